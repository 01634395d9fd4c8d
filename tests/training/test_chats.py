"""Runs on conversations: the loss of packed ones, the same numbers on every mesh, resumed exactly, answers at evaluations."""

import contextlib
import dataclasses
import io
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.chat.named import LLAMA2
from llama_jax.config import Config, DataArgs, MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import PackedBatch, train_batches
from llama_jax.data.conversations import open_chats
from llama_jax.devices.sharding import parameter_shapes
from llama_jax.errors import UserError
from llama_jax.model import Llama
from llama_jax.ops.loss import loss_sum
from llama_jax.tokenizer import Tokenizer
from llama_jax.training import loop, samples
from llama_jax.training.clock import TIMES
from tests.eight_devices import run_on_eight_devices
from tests.numpy_llama import random_params

MODEL = ModelArgs(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=16, max_seq_len=64)
TRAIN = TrainArgs(
    lr=1e-2, warmup_steps=1, max_steps=8, batch_size=8, eval_interval=4, eval_iters=0, log_interval=1, save_interval=4
)
WORDS = ["the", "owl", "fox", "river", "tree", "12", "boats", "duck"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    (folder / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    write(folder / "chats.jsonl", 0, 200)
    write(folder / "held_out.jsonl", 1, 20)
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(WORDS * 4) + str(i)}) + "\n" for i in range(50))
    )
    return folder


def write(path: Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    with open(path, "w") as file:
        for i in range(count):
            texts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 6))) for _ in range(2 + 2 * (i % 3))]
            messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
            file.write(json.dumps({"messages": messages}) + "\n")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(samples, "draw_losses", lambda *_: None)
    monkeypatch.chdir(folder)


def config(name: str, data: dict[str, Any] | None = None, mesh: MeshArgs = MeshArgs(), **train: Any) -> Config:
    given = {"filepath": "chats.jsonl", "tokenizer_model_path": "tokenizer.model", "chat_template": "llama2"} | (
        data or {}
    )
    return Config(MODEL, DataArgs(**given), dataclasses.replace(TRAIN, save_dir=name, **train), mesh)


def run(*args: Any, **options: Any) -> tuple[list[dict[str, Any]], str]:
    """Train. Return the records without times, and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found = loop.train(config(*args, **options))
    lines = found.metrics_path.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines], said.getvalue()


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[list[dict[str, Any]], str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(samples, "draw_losses", lambda *_: None)
        return run("whole")


def test_a_run_counts_answers_and_keeps_the_format_it_was_tuned_in(whole: Any, folder: Path) -> None:
    records, said = whole
    chats = open_chats(folder / "whole" / "tokens")
    rows = train_batches(chats.train, TRAIN.batch_size, MODEL.max_seq_len, 0, 0, 8)
    targets = np.cumsum([int(batch.weights.sum()) for batch in rows]).tolist()
    assert [record["target_tokens"] for record in records] == targets
    assert records[-1]["eval_loss"] < records[3]["eval_loss"] and records[-1]["eval_bits_per_byte"] is None
    for words in (
        "to train on, ",
        "format  llama2",
        "on answers, with",
        "padding; an epoch has",
        "what counts is in [[ ]]",
        "/INST][[",
    ):
        assert words in said
    model = llama_jax.load(folder / "whole")
    assert model.setup.template == LLAMA2 and model.chat_format.is_llama2
    assert "document_mask = true" in (folder / "whole" / "config.toml").read_text()


def test_held_out_questions_are_answered_at_every_evaluation(whole: Any, folder: Path) -> None:
    samples = [json.loads(line) for line in (folder / "whole" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [4] * 4 + [8] * 4
    assert [s["prompt"] for s in samples[:4]] == [s["prompt"] for s in samples[4:]]
    held_out = open_chats(folder / "whole" / "tokens").eval
    model = llama_jax.load(folder / "whole")
    texts = [model.tokenizer.decode(held_out.conversation(n)[0].tolist(), specials=True) for n in range(held_out.count)]
    records = [json.loads(line)["messages"] for line in (folder / "chats.jsonl").read_text().splitlines()]
    for sample in samples[4:]:
        assert any(text.startswith(sample["prompt"] + " " + sample["expected"]) for text in texts)
        asked = next(
            m for m in records if m[-1]["content"] == sample["expected"] and m[-2]["content"] in sample["prompt"]
        )
        args = llama_jax.SampleArgs(temperature=0.0, max_new_tokens=128)
        assert model.chat(asked[:-1], args).text == sample["answer"]


def test_a_run_is_resumed_exactly(whole: Any, folder: Path) -> None:
    run("again")
    resumed, _ = run("again", resume_step=4)
    assert resumed == whole[0]
    first, second = ((folder / name / "samples.jsonl").read_bytes() for name in ("whole", "again"))
    assert first == second
    assert params(folder / "whole") == params(folder / "again")


def params(path: Path) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(llama_jax.load(path / "checkpoints" / "8").params)]


def test_parts_of_a_batch_weigh_as_much_as_their_answers(whole: Any) -> None:
    parts, _ = run("parts", gradient_accumulation_steps=4)
    for a, b in zip(parts, whole[0], strict=True):
        assert a["target_tokens"] == b["target_tokens"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=2e-5)
        if "eval_loss" in b:
            assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=2e-5)


def test_the_loss_of_a_packed_batch_is_the_sum_of_its_conversations_alone(whole: Any, folder: Path) -> None:
    chats = open_chats(folder / "whole" / "tokens").train
    args = dataclasses.replace(MODEL, vocab_size=llama_jax.load(folder / "whole").args.vocab_size)
    model, length = Llama(args, jnp.float32), MODEL.max_seq_len
    params = random_params(parameter_shapes(model))
    last = chats.sequences(length)
    sequences = [0, 1, *range(last - 4, last)]  # the longest conversations, and those that share a sequence
    batch = PackedBatch(*(np.stack(c) for c in zip(*(chats.row(length, n) for n in sequences), strict=True)))
    together = float(loss_sum(model, params, *batch))
    members = [n for sequence in sequences for n in chats.members(length, sequence)]
    assert len(members) > 8
    rows = []
    for number in members:
        ids, counted = chats.conversation(number)
        rows.append(
            [np.pad(part, (0, length + 1 - len(ids))) for part in (ids[:-1], ids[1:], counted[1:].astype(np.float32))]
        )
    alone = loss_sum(model, params, *(np.stack(column) for column in zip(*rows, strict=True)))
    assert together == pytest.approx(float(alone), rel=1e-5)


def test_all_tokens_count_if_asked_and_held_out_conversations_may_be_a_file_of_their_own(
    folder: Path, small_tokenizer: Tokenizer
) -> None:
    records, said = run("all", {"loss_on": "all", "eval_filepath": "held_out.jsonl"}, max_steps=4)
    chats = open_chats(folder / "all" / "tokens")
    assert chats.eval.count == 20 and chats.train.count == 200
    assert "answers: all/samples.jsonl" in said
    assert "held_out.jsonl, a file of its own" in said and "on every token (data.loss_on)" in said
    (first, *_) = train_batches(chats.train, TRAIN.batch_size, MODEL.max_seq_len, 0, 0, 1)
    assert records[0]["target_tokens"] == int(first.weights.sum()) > 200


def test_a_text_says_that_every_token_counts_and_which_settings_it_does_not_use(folder: Path) -> None:
    _, said = run("text", {"filepath": "text.jsonl", "too_long": "drop"}, max_steps=1)
    wanted = "on every token, as the data are text, not conversations; data.chat_template, data.too_long: not used"
    assert f"loss  {wanted}\n" in said


def test_a_setting_of_records_is_told_where_there_are_none(folder: Path) -> None:
    (folder / "plain.txt").write_text("The fox saw the owl by the river, under an old tree.\n" * 60)
    for name, told in (("plain.txt", True), ("text.jsonl", False), ("chats.jsonl", False)):
        chat = {} if name == "chats.jsonl" else {"chat_template": ""}
        _, said = run(f"skip {name}", {"filepath": name, "bad_records": "skip", **chat}, max_steps=1)
        assert ("there are none: data.bad_records skip is not used" in said) == told, name


def test_where_nothing_is_held_out_nothing_is_said_of_answers(folder: Path) -> None:
    _, said = run("no answers", {"train_size": 1.0}, max_steps=1)
    assert "nothing is held out" in said and "answers: " not in said
    assert not (folder / "no answers" / "samples.jsonl").exists()


def test_conversations_and_text_are_mixed(folder: Path) -> None:
    mixture = {"chats.jsonl": 0.5, "text.jsonl": 0.5}
    records, said = run("mixed", {"filepath": "", "mixture": mixture})
    assert (
        "attention and positions stay inside each conversation" in said and "one that a sequence's start cuts" in said
    )
    assert {"eval_loss/chats.jsonl", "eval_loss/text.jsonl"} <= set(records[-1])
    run("mixed2", {"filepath": "", "mixture": mixture})
    resumed, _ = run("mixed2", {"filepath": "", "mixture": mixture}, resume_step=4)
    assert resumed == records


def test_adapters_and_further_runs_take_over_the_format(whole: Any, folder: Path) -> None:
    settings = config("further", {"chat_template": "", "tokenizer_model_path": ""}, init_from="whole", max_steps=4)
    model = dataclasses.replace(MODEL, vocab_size=llama_jax.load(folder / "whole").args.vocab_size)
    settings = dataclasses.replace(settings, model=model, lora=dataclasses.replace(settings.lora, rank=2))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        loop.train(settings)
    assert "format  the chat template of " in said.getvalue()
    assert llama_jax.load(folder / "further").chat_format.is_llama2
    assert len((folder / "further" / "samples.jsonl").read_text().splitlines()) == 4


def test_what_a_run_on_conversations_needs_is_said(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"expected a checkpoint to tune on conversations, found none beside chats.jsonl"
    ):
        run("needs", {"tokenizer_model_path": ""})
    run("began", max_steps=4)
    with pytest.raises(UserError, match=r"data.loss_on was answers and is all now"):
        run("began", {"loss_on": "all"})
    with pytest.raises(
        UserError, match=r"^data.filepath: .*found the conversations of a run, already encoded, in began/tokens"
    ):
        run("prepared", {"filepath": "began/tokens", "tokenizer_model_path": ""})


@pytest.mark.slow
def test_losses_are_the_same_on_every_mesh(whole: Any, folder: Path) -> None:
    found = run_on_eight_devices("tests.training.test_chats", str(folder))
    for name, losses in found.items():
        for a, b in zip(losses, whole[0], strict=True):
            assert a["target_tokens"] == b["target_tokens"]
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-4), name
            if "eval_loss" in b:
                assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=1e-4), name


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    meshes = {"fsdp 8": MeshArgs(data=1, fsdp=8), "tensor 2 x fsdp 4": MeshArgs(data=1, fsdp=4, tensor=2)}
    print(json.dumps({name: run(name.replace(" ", ""), mesh=mesh)[0] for name, mesh in meshes.items()}))
