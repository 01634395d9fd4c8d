"""Every field of every section is read: changed, it changes what a run does."""

import contextlib
import dataclasses
import hashlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.build import make_model
from llama_jax.checkpoint import steps_of
from llama_jax.config import Config, DataArgs, ModelArgs, SampleArgs, TrainArgs
from llama_jax.data.batches import Batch
from llama_jax.devices.sharding import make_mesh
from llama_jax.training import loop, samples, steps
from llama_jax.training.clock import TIMES
from llama_jax.training.rates import learning_rate
from llama_jax.training.step import compile_train_step, make_optimizer
from tests.training import test_step

MODEL = ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=16)
TRAIN = TrainArgs(
    lr=1e-2, warmup_steps=1, max_steps=4, batch_size=4, eval_interval=2, eval_iters=1, log_interval=1, save_interval=4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fields")
    words = ["the", "cat", "and", "a", "dog", "sat", "on", "one", "old", "mat", "by", "the", "sea"]
    for name, seed in (("a.txt", 0), ("b.txt", 1)):
        rng = random.Random(seed)
        (folder / name).write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(200)))
    (folder / "task.jsonl").write_text('{"context": "the cat", "choices": ["sat", "mat"], "answer": 0}\n')
    return folder


SAVES: list[int] = []


@pytest.fixture(autouse=True, scope="module")
def watched() -> Iterator[None]:
    """Runs are not drawn here, nor do they tell samples, which these tests are not about; it is noted when they save."""

    def save(run: Any, state: Any, step: int, eval_loss: float | None) -> None:
        SAVES.append(step)
        original(run, state, step, eval_loss)

    original = steps._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_save", save)
        patch.setattr(samples, "draw_losses", lambda *_: None)
        patch.setattr(samples, "show", lambda *_, **__: None)
        yield


def outcome(folder: Path, name: str, section: str = "", **changes: Any) -> dict[str, Any]:
    """What a small run leaves behind, without times."""
    config = Config(
        MODEL, DataArgs(str(folder / "a.txt"), vocab_size=280), dataclasses.replace(TRAIN, save_dir=str(folder / name))
    )
    if section:
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    SAVES.clear()
    with contextlib.redirect_stdout(io.StringIO()):
        run = loop.train(config)
    params = llama_jax.load(str(run.path / "checkpoints" / str(steps_of(run.path)[-1]))).params
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))).hexdigest()
    records = [
        {k: v for k, v in json.loads(line).items() if k not in TIMES}
        for line in run.metrics_path.read_text().splitlines()
    ]
    documents = json.loads((run.path / "tokens" / "manifest.json").read_text())["documents"]
    return {
        "folder": str(run.path),
        "records": records,
        "params": digest,
        "saves": list(SAVES),
        "steps": steps_of(run.path),
        "documents": documents,
        "folders": sorted(path.name for path in run.path.iterdir() if path.is_dir()),
    }


@pytest.fixture(scope="module")
def base(folder: Path) -> dict[str, Any]:
    return outcome(folder, "base")


# Values that change the numbers of the run.
CHANGED: dict[str, dict[str, Any]] = {
    "data": {
        "filepath": "b.txt", "train_size": 0.5, "tokenizer_model_path": "base/tokenizer.model", "vocab_size": 290,
        "separator": "\n", "stories": 30, "document_mask": True, "eval_filepath": "b.txt",
    },
    "train": {
        "n_epochs": 2, "max_steps": 3, "batch_size": 2, "compute_dtype": "bfloat16", "eval_interval": 1, "eval_iters": 2,
        "log_interval": 2, "save_interval": 1, "save_dir": "elsewhere", "init_from": "base", "seed": 1, "bad_steps": "skip",
        "spike_factor": 1.001, "profile_steps": "2", "tensorboard": True, "keep": 1,
        "eval_tasks": ("task.jsonl",), "param_dtype": "bfloat16", "rounding": "compensated", "optimizer": "adafactor",
        "moments": "int8", "products": "int8", "products_of": "forward", "rate_width": 4,
    },
}  # fmt: skip
# Values that change the numbers of a run on conversations.
OF_CHATS: dict[str, str] = {"chat_template": "other.jinja", "loss_on": "all", "too_long": "drop"}
# What the optimizer alone reads, and what that changes: test_step.py.
OPTIMIZER = set(test_step.PERTURBED) - {"max_steps"}
# Values that change the program and not what it computes.
SAME_NUMBERS = {"gradient_accumulation_steps": 2, "remat": "full"}
# A run that does not hang is the same under any watchdog: see test_watchdog.py.
ELSEWHERE = {
    "watchdog_seconds", "attention", "checkpoint_dir",  # tests of their own
    "muon_momentum",  # tests/training/test_muon.py
    "objective", "dpo_beta", "dpo_label_smoothing",  # tests/training/test_preferences.py
    "keep_every", "save_minutes", "eval_minutes", "resume_step", "hold_lr",  # tests/training/test_resuming.py
    "batch_start", "batch_ramp_steps",  # tests/training/test_batch_ramp.py
    "decay_fraction",  # tests/training/test_rates.py
    "decay_from", "decay_run",  # tests/training/test_decaying.py
    "minutes",  # tests/recipe/test_one_step.py
}  # fmt: skip


def test_every_field_is_covered() -> None:
    fields = {
        name: {f.name for f in dataclasses.fields(kind)} for name, kind in (("data", DataArgs), ("train", TrainArgs))
    }
    # tests/data/test_prepare.py, tests/data/test_corpus.py, tests/training/test_mixtures.py
    read_at_all = {"as_text", "text_field", "bad_records", "mixture"}
    read_at_all |= {"cache_gb"}  # tests/data/test_remote.py
    read_at_all |= set(OF_CHATS)
    read_at_all |= {"chats"}  # tests/training/test_built_in_chats.py
    assert fields["data"] == set(CHANGED["data"]) | read_at_all
    assert fields["train"] == set(CHANGED["train"]) | OPTIMIZER | set(SAME_NUMBERS) | ELSEWHERE
    assert {f.name for f in dataclasses.fields(SampleArgs)} == set(SAMPLING) | OPTIONS
    # LoraArgs: tests/training/test_lora.py.
    # ExpectedArgs: tests/training/test_expecting.py.
    # ModelArgs: tests/test_model.py; MeshArgs: tests/devices/test_sharding.py; DistributedArgs: tests/devices/test_distributed.py.
    assert {f.name for f in dataclasses.fields(Config)} == {
        *("model", "data", "train", "mesh", "distributed", "lora", "expected")
    }


@pytest.mark.parametrize(("section", "field"), [(s, f) for s, fields in CHANGED.items() for f in fields])
def test_a_changed_field_changes_the_run(section: str, field: str, folder: Path, base: dict[str, Any]) -> None:
    value: Any = CHANGED[section][field]
    changes: dict[str, Any] = {field: value}
    if field in ("filepath", "eval_filepath", "tokenizer_model_path", "save_dir", "init_from"):
        changes[field] = str(folder / value)
    if field == "eval_tasks":
        changes[field] = (str(folder / "task.jsonl"),)
    compared = base
    if field == "tokenizer_model_path":  # the very tokenizer that would be trained: nothing else may change
        assert outcome(folder, field, section, **changes) | {"folder": ""} == base | {"folder": ""}
        other = outcome(folder, "larger", "data", vocab_size=290)
        changes[field] = str(folder / "larger" / "tokenizer.model")
        assert outcome(folder, "larger2", section, **changes) | {"folder": other["folder"]} == other
        return
    if field == "document_mask":
        changes |= {"separator": "\n"}
        compared = outcome(folder, "documents", section, separator="\n")
    if field == "rounding":
        changes |= {"param_dtype": "bfloat16"}
        compared = outcome(folder, "stochastic", section, param_dtype="bfloat16")
    if field == "products_of":
        changes |= {"products": "int8"}
        compared = outcome(folder, "all products", section, products="int8")
    if field == "stories":
        compared = outcome(folder, "fewer stories", "data", filepath="", stories=20)
        changes["filepath"] = ""
    if field == "n_epochs":
        changes |= {"max_steps": None, "batch_size": 64}
        compared = outcome(folder, "one epoch", "train", **changes | {"n_epochs": 1})
        assert 1 < compared["records"][-1]["step"] < 40
    if field in ("bad_steps", "spike_factor"):  # a loss that rises at all is a spike
        changes = {"spike_factor": 1.001, "bad_steps": "skip", "lr": 20.0}
        given = changes | ({"bad_steps": "count"} if field == "bad_steps" else {"spike_factor": 1e6})
        compared = outcome(folder, f"without {field}", section, **given)
    found = outcome(folder, field, section, **changes)
    if field != "save_dir":
        assert found | {"folder": ""} != compared | {"folder": ""}
    assert (found["folder"] == str(folder / "elsewhere")) == (field == "save_dir")


@pytest.fixture(scope="module")
def chats(folder: Path, base: dict[str, Any]) -> dict[str, Any]:
    """Data of a run on conversations, some of which are longer than the context."""
    texts = [("the " * (1 + i % 4), "on a mat " * (1 + i % 3)) for i in range(60)]
    (folder / "other.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}!{{ eos_token }}{% endif %}{% endfor %}"
    )
    lines = (json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in texts)
    (folder / "chats.jsonl").write_text("\n".join(lines))
    tokenizer = str(folder / "base" / "tokenizer.model")
    data = {"filepath": str(folder / "chats.jsonl"), "tokenizer_model_path": tokenizer, "chat_template": "plain"}
    return {"data": data, "found": outcome(folder, "chats", "data", **data)}


@pytest.mark.parametrize("field", OF_CHATS)
def test_a_changed_field_of_conversations_changes_the_numbers(field: str, folder: Path, chats: dict[str, Any]) -> None:
    value = str(folder / OF_CHATS[field]) if field == "chat_template" else OF_CHATS[field]
    found = outcome(folder, f"chats {field}", "data", **chats["data"] | {field: value})
    losses = [[r["train_loss"] for r in each["records"]] for each in (found, chats["found"])]
    assert losses[0] != losses[1]
    assert outcome(folder, "chats again", "data", **chats["data"])["records"] == chats["found"]["records"]


def test_the_optimizer_and_its_rates_are_made_of_the_runs_settings(folder: Path) -> None:
    """With all of them changed, so that none is the default."""

    def note(args: TrainArgs, steps: int, held: float | None = None) -> Any:
        given.append((args, steps, held))
        return original(args, steps, held)

    changes = {name: value for name, value in test_step.PERTURBED.items() if name != "max_steps"}
    given, original = list[Any](), loop.make_optimizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_optimizer", note)
        records = outcome(folder, "rates", "train", **changes)["records"]
    ((args, steps, held),) = given
    assert {name: getattr(args, name) for name in changes} == changes and (steps, held) == (TRAIN.max_steps, None)
    rates = learning_rate(args, steps)
    assert [r["lr"] for r in records] == pytest.approx([float(rates(r["step"])) for r in records])


@pytest.mark.parametrize("field", SAME_NUMBERS)
def test_a_field_that_only_saves_memory_changes_the_program_and_not_the_numbers(
    field: str, folder: Path, base: dict[str, Any]
) -> None:
    found = outcome(folder, field, "train", **{field: SAME_NUMBERS[field]})
    for a, b in zip(found["records"], base["records"], strict=True):
        assert all(a[key] == pytest.approx(b[key], rel=1e-4) for key in ("train_loss", "grad_norm", "lr"))

    def program(args: TrainArgs) -> str:
        model = make_model(dataclasses.replace(MODEL, vocab_size=280, n_layers=2), "float32", args.remat)
        shape = jax.ShapeDtypeStruct((4, 16), np.int32)
        batch = Batch(shape, shape, jax.ShapeDtypeStruct((4, 16), np.float32))  # type: ignore[arg-type]
        mesh = make_mesh(Config().mesh)
        return compile_train_step(
            model, make_optimizer(args, 4), mesh, args.gradient_accumulation_steps, batch
        ).as_text()

    assert program(TRAIN) != program(dataclasses.replace(TRAIN, **{field: SAME_NUMBERS[field]}))


SAMPLING: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 0.1,
    "top_k": 1,
    "min_p": 1.0,
    "repetition_penalty": 1e-3,
    "presence_penalty": -100.0,
    "frequency_penalty": -100.0,
    "logit_bias": {5: 100.0},
    "stop": tuple("abcdefghijklmnopqrstuvwxyz "),
    "max_new_tokens": 3,
    "n": 2,
    "seed": 5,
    "logprobs": 2,
    "echo": True,
}
# tests/generation/test_options.py, test_infill.py and test_grammar.py
OPTIONS = {"min_new_tokens", "ignore_eos", "stop_token_ids", "infill_format", "json_schema"}


@pytest.mark.parametrize("field", SAMPLING)
def test_a_changed_field_changes_the_sample(field: str, folder: Path, base: dict[str, Any]) -> None:
    model = llama_jax.load(base["folder"])
    args = SampleArgs(temperature=1.0, top_p=0.9, max_new_tokens=10, seed=0)
    changed = dataclasses.replace(args, **{field: SAMPLING[field]})
    assert model.generate(["the cat"], changed) != model.generate(["the cat"], args)
