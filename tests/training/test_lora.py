"""Runs that train adapters: what they save, resume, continue and refuse, and what is generated with them."""

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.adapters import joined
from llama_jax.checkpoint import Checkpoint
from llama_jax.checkpoint.adapted import WholeModel, digest_of
from llama_jax.config import Config, DataArgs, ModelArgs, SampleArgs, TrainArgs
from llama_jax.convert import ConvertArgs, convert
from llama_jax.convert.checkpoint_source import OwnSource, write_own
from llama_jax.errors import UserError
from llama_jax.generation import Model
from llama_jax.lora_args import LoraArgs
from llama_jax.ops.quantize import Adapted, flat
from llama_jax.storage.checksums import write_checksums
from llama_jax.training import loop, samples
from llama_jax.training.clock import TIMES
from llama_jax.training.tuning import check_arguments

MODEL = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=16, max_seq_len=16)
RUN = TrainArgs(
    lr=1e-2, warmup_steps=1, max_steps=6, batch_size=4, eval_interval=3, eval_iters=1, log_interval=1, save_interval=3,
    keep=9, eps=1e-6,
)  # fmt: skip
LORA = LoraArgs(rank=4, alpha=6.0)


@pytest.fixture(autouse=True, scope="module")
def undrawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "draw_losses", lambda *_: None)
        yield


def train(
    folder: Path,
    lora: LoraArgs = LORA,
    base: str = "base",
    text: str = "b.txt",
    args: ModelArgs = MODEL,
    **changes: Any,
) -> str:
    """What a run prints, in the folder beside its text and its base."""
    root = folder.parent
    run = dataclasses.replace(RUN, save_dir=str(folder), init_from=str(root / base) if base else "", **changes)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        loop.train(Config(args, DataArgs(str(root / text), vocab_size=280), run, lora=lora))
    return out.getvalue()


def refusal(folder: Path, *args: Any, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        train(folder, *args, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, made of one text, and two runs on another one: adapters of it, and of it in int4."""
    root = tmp_path_factory.mktemp("lora")
    (root / "a.txt").write_text("the cat sat on the mat and the dog ran to the sea\n" * 100)
    (root / "b.txt").write_text("a dog and a cat ran on one old mat by the sea and sat\n" * 100)
    train(root / "base", LoraArgs(), "", "a.txt")
    (root / "told.txt").write_text(train(root / "tuned"))
    train(root / "quantized", dataclasses.replace(LORA, base_weights="int4", targets=("wq", "w2", "output")))
    return root


def params_of(folder: Path, step: int = 6) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint.find(folder / "checkpoints" / str(step))
    shapes = checkpoint.arrays("params")
    return {name: np.asarray(checkpoint.open_array(name).read().result()) for name in shapes}


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


IDS = np.array([[1, 5, 9, 40, 33, 7, 8, 200]])


def logits(path: Path, **how: Any) -> np.ndarray:
    return np.asarray(llama_jax.load(str(path), **how).logits(IDS))


def test_only_the_adapter_is_trained_and_saved(root: Path) -> None:
    before, after = params_of(root / "tuned", 3), params_of(root / "tuned")
    names = {f"layers/{place}" for place in ("attention/wq", "attention/wk", "attention/wv", "attention/wo")}
    names |= {f"layers/feed_forward/{name}" for name in ("w1", "w2", "w3")}
    assert set(after) == {f"{name}/{factor}" for name in names for factor in "ab"}
    assert after["layers/attention/wo/a"].shape == (2, 32, 4) and after["layers/attention/wk/b"].shape == (2, 4, 16)
    assert all((after[name] != before[name]).any() for name in after)
    losses = [record["train_loss"] for record in records(root / "tuned")]
    assert losses[-1] < losses[0]
    checkpoint = Checkpoint.find(root / "tuned")
    assert checkpoint.adapter is not None and checkpoint.adapter.lora == LORA
    state = checkpoint.arrays("state")
    assert max(leaf.size for leaf in state.values()) <= max(value.size for value in after.values())
    told = (root / "told.txt").read_text()
    for words in ("adapters", "rank 4, scale 1.5", "on wq, wk, wv", "base", "frozen, in float32"):
        assert words in told, words


def test_the_first_step_begins_at_the_base_and_plain_and_quantized_bases_differ(root: Path) -> None:
    """b is zero at first. So a run with a rate of nearly 0 has the losses of its base."""
    train(root / "still", lr=1e-12, weight_decay=0.0)
    train(root / "still whole", LoraArgs(), lr=1e-12, weight_decay=0.0)
    still, whole = (records(root / name) for name in ("still", "still whole"))
    for a, b in zip(still, whole, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        # Beside a frozen base, embeddings, output and norms have neither gradients nor updates.
        frozen = {name for name in b if name.endswith(("_norm/output", "_norm/embeddings", "_norm/norms"))}
        assert len(frozen) == 6 and a.keys() == b.keys() - frozen
        assert a.get("eval_loss", 0.0) == pytest.approx(b.get("eval_loss", 0.0), rel=1e-5)
    assert records(root / "quantized")[0]["train_loss"] != pytest.approx(still[0]["train_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["tuned", "quantized"])
def test_a_run_of_adapters_talks_with_its_base_and_its_base_talks_with_it(name: str, root: Path) -> None:
    found = logits(root / name)
    np.testing.assert_array_equal(found, logits(root / "base", adapter=str(root / name)))
    assert np.abs(found - logits(root / "base")).max() > 1e-2
    (completion,) = llama_jax.load(str(root / name)).generate(["the cat"], SampleArgs(max_new_tokens=4))
    assert len(completion.token_ids) > 0


@pytest.mark.parametrize(("weights", "exact"), [("auto", False), ("int8", True), ("int4", False)])
def test_an_adapter_beside_a_matrix_has_the_logits_of_one_merged_into_it(weights: Any, exact: bool, root: Path) -> None:
    base, tuned = llama_jax.load(str(root / "base"), weights=weights), Checkpoint.find(root / "tuned")
    factors: dict[str, Any] = {}
    for name, value in params_of(root / "tuned").items():
        *path, last = name.split("/")
        inner = factors
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    beside = joined(base.serving, factors, LORA, tuned.args)
    module = llama_jax.load(str(root / "base"), exact=exact).module
    found = np.asarray(Model(base.args, beside, base.tokenizer, module).logits(IDS))
    dense = jax.tree.map(
        lambda w: w.merged() if isinstance(w, Adapted) else w, beside, is_leaf=lambda w: isinstance(w, Adapted)
    )
    merged = np.asarray(Model(base.args, flattened(dense), base.tokenizer, module).logits(IDS))
    np.testing.assert_allclose(found, merged, atol=2e-5)
    np.testing.assert_allclose(found, logits(root / "tuned", weights=weights, exact=exact), atol=2e-5)


def flattened(params: Any) -> Any:
    """Parameters of which the adapted matrices are arrays, in the form for generation."""
    layers = []
    for layer in params["layers"]:
        layers.append(
            layer
            | {
                part: {name: flat(w, 2 if name == "wo" else 1) for name, w in layer[part].items()}
                for part in ("attention", "feed_forward")
            }
        )
    return params | {"layers": tuple(layers)}


def test_a_resumed_run_has_the_numbers_of_one_that_never_stopped_bit_for_bit(root: Path) -> None:
    dropped = dataclasses.replace(LORA, dropout=0.3)
    train(root / "whole", dropped)
    train(root / "resumed", dropped)
    train(root / "resumed", dropped, resume_step=3)
    assert records(root / "resumed") == records(root / "whole") != records(root / "tuned")
    one, other = params_of(root / "whole"), params_of(root / "resumed")
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.slow
def test_an_adapter_is_trained_further_in_a_run_that_resumes(root: Path) -> None:
    train(root / "further", base="tuned", lr=1e-12, weight_decay=0.0)
    before, after = params_of(root / "tuned"), params_of(root / "further")
    assert all(np.allclose(before[name], after[name], atol=1e-8) for name in before)
    assert Checkpoint.find(root / "further").adapter == Checkpoint.find(root / "tuned").adapter
    train(root / "further", base="tuned", lr=1e-12, weight_decay=0.0, max_steps=8)
    assert records(root / "further")[-1]["step"] == 8


def test_an_adapter_is_trained_further_with_its_own_settings_alone(root: Path) -> None:
    for lora, key in (
        (dataclasses.replace(LORA, rank=2), "lora.rank"),
        (dataclasses.replace(LORA, alpha=1.0), "lora.alpha"),
        (dataclasses.replace(LORA, targets=("wq",)), "lora.targets"),
        (dataclasses.replace(LORA, rslora=True), "lora.rslora"),
        (dataclasses.replace(LORA, base_weights="int8"), "lora.base_weights"),
        (LoraArgs(), "train.init_from"),
    ):
        assert refusal(root / "other", lora, "tuned").startswith(f"{key}: expected"), key
        assert not (root / "other").exists()


def test_settings_of_the_adapters_are_those_of_the_run(root: Path) -> None:
    for changes in ({"rank": 2}, {"alpha": 1.0}, {"targets": ("wq",)}, {"base_weights": "int8"}, {"rslora": True}):
        message = refusal(root / "tuned", dataclasses.replace(LORA, **changes), max_steps=9)
        assert message.startswith(f"lora.{next(iter(changes))}: expected"), message
    assert refusal(root / "tuned", LoraArgs(), max_steps=9).startswith("lora.rank: expected 4")


# Each is a program of its own, which takes seconds to compile.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("alpha", "dropout", "base_weights", "rslora")]


@pytest.mark.parametrize("field", ["rank", "targets", *SLOW])
def test_a_changed_field_changes_the_run(field: str, root: Path) -> None:
    values = {
        "rank": 2, "alpha": 1.0, "dropout": 0.5, "targets": ("wq", "output"), "base_weights": "int8", "rslora": True
    }  # fmt: skip
    train(root / field, dataclasses.replace(LORA, **{field: values[field]}))
    assert records(root / field) != records(root / "tuned")


def test_a_quantized_checkpoint_is_a_base_for_adapters_alone(root: Path) -> None:
    folder = root / "int8"
    folder.mkdir()
    source = OwnSource(root / "base")

    def blocks() -> Any:
        from llama_jax.cli.progress import Progress
        from llama_jax.convert.reader import Reader

        return Reader(source, Progress("", None, "B", shown=False)).blocks()

    write_own(source, folder, blocks, "int8")
    message = refusal(root / "never", LoraArgs(), "int8")
    assert message.startswith("train.init_from: expected") and "int8" in message and "--lora.rank" in message
    assert refusal(root / "never", dataclasses.replace(LORA, base_weights="int4"), "int8").startswith(
        "lora.base_weights"
    )
    train(root / "of int8", base="int8")
    train(root / "to int8", dataclasses.replace(LORA, base_weights="int8"))
    assert records(root / "of int8") == records(root / "to int8"), "integers are the same, whoever quantizes"
    np.testing.assert_array_equal(logits(root / "of int8"), logits(root / "to int8"))


def test_impossible_settings_are_refused_by_name(root: Path) -> None:
    for lora, base, words in (
        (LoraArgs(alpha=3.0), "base", "lora.alpha: expected lora.rank"),
        (LoraArgs(targets=("wq",)), "base", "lora.targets: expected lora.rank"),
        (LoraArgs(rank=4, targets=("wz",)), "base", "lora.targets: expected names"),  # type: ignore[arg-type]
        (LoraArgs(rank=4, targets=("wq", "wq")), "base", "lora.targets: expected each name once"),
        (LoraArgs(rank=4, targets=()), "base", "lora.targets: expected one or more"),
        (LoraArgs(rank=17), "base", "lora.rank: expected up to 16, the smaller side of wk"),
        (LoraArgs(rank=-1), "base", "lora.rank: expected 0"),
        (LoraArgs(rank=4, alpha=0.0), "base", "lora.alpha: expected a number above 0"),
        (LoraArgs(rank=4, dropout=1.0), "base", "lora.dropout: expected 0.0 or more, below 1"),
        (LORA, "", "lora.rank: expected train.init_from"),
    ):
        message = refusal(root / "never", lora, base)
        assert message.startswith(words), message
        assert not (root / "never").exists()


def test_a_base_that_moved_or_changed_is_refused_by_name_and_found_where_it_is_said_to_be(root: Path) -> None:
    found = logits(root / "tuned")
    (root / "base").rename(root / "moved")
    try:
        for _ in range(2):  # gone, then another one in its place
            with pytest.raises(UserError, match=r"expected the base of this adapter.*--ckpt.*--adapter"):
                llama_jax.load(str(root / "tuned"))
            assert "--train.init-from" in refusal(root / "tuned", max_steps=7)
            if not (root / "base").exists():
                train(root / "base", LoraArgs(), "", "b.txt")
        np.testing.assert_array_equal(logits(root / "moved", adapter=str(root / "tuned")), found)
        shutil.copytree(root / "tuned", root / "tuned copy")
        train(root / "tuned copy", base="moved", max_steps=7)
        assert "train.init_from: expected the base of this run's adapters" in refusal(root / "tuned copy", max_steps=8)
        with pytest.raises(UserError, match="digest"):
            llama_jax.load(str(root / "base"), adapter=str(root / "tuned"))
        with pytest.raises(UserError, match="adapter: expected a low-rank adapter"):
            llama_jax.load(str(root / "moved"), adapter=str(root / "base"))
        with pytest.raises(UserError, match="ckpt: expected the base"):
            llama_jax.load(str(root / "tuned copy"), adapter=str(root / "tuned"))
    finally:
        shutil.rmtree(root / "base", ignore_errors=True)
        (root / "moved").rename(root / "base")


def test_of_a_base_whose_run_has_gone_on_the_step_is_named(root: Path) -> None:
    assert "which the adapter needs: copy it if its run is to go on" in (root / "told.txt").read_text()
    shutil.copytree(root / "base", root / "gone on")
    train(root / "gone on", LoraArgs(), "", "a.txt", max_steps=8)
    for step in (root / "gone on" / "checkpoints" / "6", None):
        with pytest.raises(UserError) as caught:
            llama_jax.load(str(root / "gone on" / "checkpoints" / "8"), adapter=str(root / "tuned"))
        named = f"that base is an earlier step of the same run: give {step}" in str(caught.value)
        assert named if step else "choose an adapter of this base" in str(caught.value)
        if step:
            assert len(logits(step, adapter=str(root / "tuned"))) == 1
            shutil.rmtree(step)


def test_a_base_of_another_project_is_converted_again_where_the_cache_was_cleared(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, source in (("hf", "base"), ("other", "merged")):
        if source == "merged":
            convert(ConvertArgs(input=str(root / "tuned"), output=str(tmp_path / source)))
        convert(
            ConvertArgs(
                input=str((tmp_path if source == "merged" else root) / source),
                output=str(tmp_path / name),
                to="huggingface",
            )
        )
    shutil.copy(root / "b.txt", tmp_path)
    train(tmp_path / "tuned", base="hf", max_steps=3)
    assert "another model" in refusal(tmp_path / "tuned", base="other", max_steps=4)
    shutil.rmtree(tmp_path / "cache" / "llama_jax" / "converted")
    assert "resumed  at step 3" in train(tmp_path / "tuned", base="hf", max_steps=4)


def test_an_adapter_of_an_earlier_version_knows_its_base_by_a_digest_with_the_time(root: Path, tmp_path: Path) -> None:
    rows = json.loads((root / "base" / "checkpoints" / "6" / "checksums.json").read_text())["files"]
    text = json.dumps({name: row for name, row in rows.items() if name.startswith("params/")}, sort_keys=True).encode()
    earlier = hashlib.sha256(len(text).to_bytes(8, "big") + text).hexdigest()[:16]
    step = Path(shutil.copytree(root / "tuned", tmp_path / "tuned")) / "checkpoints" / "6"
    model, now = step / "model" / "model.json", digest_of(Checkpoint.find(root / "base" / "checkpoints" / "6"))
    assert now != earlier and model.read_text().count(now) == 1
    model.write_text(model.read_text().replace(now, earlier))
    write_checksums(step)
    np.testing.assert_array_equal(logits(step), logits(root / "tuned" / "checkpoints" / "6"))


RELATIVES = {
    "tied": {"tie_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "of other sizes": {"head_dim": 16, "hidden_dim": 48, "sliding_window": 8, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("of other sizes", "int4"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [("tied", "int8"), ("biased", "auto")]),
    ],
)
def test_relatives_of_llama_2_are_bases_too(root: Path, tmp_path: Path, kind: str, weights: Any) -> None:
    for name in ("a.txt", "b.txt"):
        shutil.copy(root / name, tmp_path)
    args = dataclasses.replace(MODEL, **RELATIVES[kind])
    train(tmp_path / "base", LoraArgs(), "", "a.txt", args=args)
    train(tmp_path / "tuned", dataclasses.replace(LORA, base_weights=weights), args=args)
    losses = [record["train_loss"] for record in records(tmp_path / "tuned")]
    assert losses[-1] < losses[0] - 0.02
    tokens = np.arange(3, 15)[None]
    found = llama_jax.load(tmp_path / "tuned" / "checkpoints" / "6", "float32").logits(tokens)
    convert(ConvertArgs(input=str(tmp_path / "tuned"), output=str(tmp_path / "merged")))
    expected = llama_jax.load(tmp_path / "merged", "float32").logits(tokens)
    # The quantized output matrix of a tied model is not merged: it would be the embeddings as well.
    np.testing.assert_allclose(found, expected, atol=0.1 if kind == "tied" else 1e-4)


def test_the_output_of_a_tied_model_has_no_adapter(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "a.txt", tmp_path)
    args = dataclasses.replace(MODEL, tie_embeddings=True)
    train(tmp_path / "base", LoraArgs(), "", "a.txt", args=args)
    lora = dataclasses.replace(LORA, targets=("wq", "output"))
    said = refusal(tmp_path / "tuned", lora, text="a.txt", args=args)
    assert said.startswith("lora.targets: expected matrices of the layers") and not (tmp_path / "tuned").exists()


def test_the_context_is_that_of_the_base_after_tuning_on_shorter_sequences(root: Path) -> None:
    short = dataclasses.replace(MODEL, max_seq_len=8)
    train(root / "short", args=short, max_steps=1)
    assert Checkpoint.find(root / "short").args.max_seq_len == 8
    assert llama_jax.load(root / "short").args.max_seq_len == MODEL.max_seq_len == 16


def test_a_model_of_another_shape_than_its_base_is_refused_before_anything_is_written(root: Path) -> None:
    for lora in (LORA, LoraArgs()):
        for name, new in (("dim", 64), ("n_layers", 1), ("n_kv_heads", MODEL.n_heads), ("multiple_of", 128)):
            old = getattr(MODEL, name)
            said = refusal(root / "never", lora, args=dataclasses.replace(MODEL, **{name: new}))
            assert said.startswith(f"model.{name}: expected {old}, as the model in {root / 'base'}"), said
            assert said.endswith(f"found {new}; leave it out") and not (root / "never").exists()


def test_a_run_is_not_written_into_the_folder_of_a_model(root: Path, tmp_path: Path) -> None:
    """There it would be hidden by the model, which generation finds first."""
    convert(ConvertArgs(input=str(root / "base"), output=str(tmp_path / "model")))
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    shutil.copy(root / "a.txt", tmp_path)
    for place in (tmp_path / "model", Checkpoint.find(root / "tuned").folder):
        said = refusal(place, base=str(tmp_path / "model"), text="a.txt")
        assert said.startswith(f"train.save_dir: expected a run folder or a new one, found a model in {place}; "), said
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before


def test_arguments_that_change_what_the_base_computes_are_told(root: Path) -> None:
    base = WholeModel.find(root / "base")
    model = dataclasses.replace(base.args, rope_theta=5e5, max_seq_len=8)
    theta = f"model.rope_theta is 500000.0, and was 10000.0 in {base.folder}"
    assert check_arguments(base, model, keeps_context=True) == [theta]
    assert sorted(check_arguments(base, model)) == [f"model.max_seq_len is 8, and was 16 in {base.folder}", theta]
    assert check_arguments(base, dataclasses.replace(base.args, vocab_size=-1)) == []
    told = train(root / "theta", args=dataclasses.replace(MODEL, rope_theta=5e5), max_steps=1)
    assert f"note  {theta}\n" in told


def test_another_conversion_of_the_same_base_is_the_base_of_its_adapters(root: Path, tmp_path: Path) -> None:
    digests = set()
    for name in ("first", "second"):
        convert(ConvertArgs(input=str(root / "base"), output=str(tmp_path / name)))
        digests.add(digest_of(Checkpoint.find(tmp_path / name)))
    convert(ConvertArgs(input=str(root / "base"), output=str(tmp_path / "other"), weights="int8"))
    assert len(digests) == 1 and digest_of(Checkpoint.find(tmp_path / "other")) not in digests
