"""Quantized checkpoints: what the converter stores is what loading would make, to the bit; and where they cannot be used."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint import save_checkpoint
from llama_jax.config import SampleArgs, Weights
from llama_jax.convert import ConvertArgs, convert
from llama_jax.errors import UserError
from llama_jax.evaluate import evaluate
from llama_jax.generation import Model
from llama_jax.tokenizer import Tokenizer
from tests import inside
from tests.commands import SMALL, STORIES, told
from tests.generation.models import never_ending

KINDS: list[Weights] = ["int8", "int4", "int4-64"]
GREEDY = SampleArgs(temperature=0.0, max_new_tokens=24)
PROMPTS = ["Once upon", "The owl saw the fox by the river."]


def save(model: Model, folder: Path, dtype: Any = np.float32) -> Path:
    params = jax.tree.map(lambda w: np.asarray(w).astype(dtype), model.params)
    save_checkpoint(folder, jax.tree.map(jax.numpy.asarray, params), model.args, model.tokenizer)
    return folder


def quantize(source: Path, output: Path, weights: Weights) -> Path:
    convert(ConvertArgs(input=str(source), output=str(output), weights=weights))
    return output


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    # Sizes that groups of 32 and 64 divide, and one, the feed-forward layers' 96, that 64 does not.
    return never_ending(small_tokenizer, dim=64, n_heads=8, n_kv_heads=2, multiple_of=96)


@pytest.fixture(scope="module")
def plain(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("plain") / "plain")


@pytest.fixture(scope="module")
def int8(plain: Path) -> Path:
    return quantize(plain, plain.parent / "int8", "int8")


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_model_says_what_the_original_quantized_at_load_says(
    kind: Weights, plain: Path, tmp_path: Path
) -> None:
    found = llama_jax.load(str(quantize(plain, tmp_path / "stored", kind)))
    expected = llama_jax.load(str(plain), weights=kind)
    ids = [found.tokenizer.encode(PROMPTS[1])]
    np.testing.assert_array_equal(found.logits(ids), expected.logits(ids))
    assert found.generate(PROMPTS, GREEDY) == expected.generate(PROMPTS, GREEDY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
def test_integers_and_scales_are_those_of_the_original_whatever_is_computed_in(
    kind: Weights, dtype: Any, model: Model, tmp_path: Path
) -> None:
    source = save(model, tmp_path / "plain", dtype)
    stored = quantize(source, tmp_path / "stored", kind)
    for compute_dtype, named in (("float32", "auto"), ("bfloat16", kind)):
        found = llama_jax.load(str(stored), compute_dtype, weights=named)  # type: ignore[arg-type]
        assert_same(found.params, llama_jax.load(str(source), compute_dtype, weights=kind).params)  # type: ignore[arg-type]


@pytest.mark.parametrize("to", ["meta", "huggingface"])
def test_other_layouts_quantize_to_what_our_own_does(to: Any, plain: Path, int8: Path, tmp_path: Path) -> None:
    convert(ConvertArgs(input=str(plain), output=str(tmp_path / to), to=to))
    found = llama_jax.load(str(quantize(tmp_path / to, tmp_path / "stored", "int8")))
    assert_same(found.params, llama_jax.load(str(int8)).params)


@pytest.mark.parametrize(("kind", "most"), [("int8", 1.0), ("int4", 0.5)])
def test_the_integers_take_a_byte_and_half_a_byte_on_disk(
    kind: Weights, most: float, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = never_ending(small_tokenizer, dim=256, multiple_of=64)
    stored = quantize(save(model, tmp_path / "plain"), tmp_path / "stored", kind)
    files = [path for path in (stored / "params").rglob("*values/*") if path.name[0].isdigit()]
    values = sum(w.size for w in jax.tree.leaves(llama_jax.load(str(stored)).params) if "int" in w.dtype.name)
    assert values > 1e6
    assert sum(path.stat().st_size for path in files) <= 1.01 * most * values


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_evaluation_scores_what_is_stored_as_what_loading_makes(
    cache: Any, plain: Path, int8: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("The fox saw the river. An owl saw the fox.\n" * 3)
    found, expected = (
        evaluate(Model.load(path, weights=weights, cache=cache), tmp_path / "text.txt", window=40)
        for path, weights in ((int8, "auto"), (plain, "int8"))
    )
    assert found == expected


def test_a_quantized_draft_guesses_and_the_text_stays_the_same(plain: Path, int8: Path) -> None:
    alone = llama_jax.load(str(plain)).generate(PROMPTS, GREEDY)
    drafted = llama_jax.load(str(plain), draft=str(int8)).generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in drafted] == [c.token_ids for c in alone]


def test_other_weights_than_the_stored_are_refused(int8: Path) -> None:
    for weights in ("int4", "int4-64"):
        with pytest.raises(
            UserError, match=f"weights: expected auto or int8, as {int8} stores them, found {weights}; "
        ):
            llama_jax.load(str(int8), weights=weights)  # type: ignore[arg-type]


def test_unknown_weights_in_a_file_are_refused_by_its_name(int8: Path, tmp_path: Path) -> None:
    copy = quantize(int8.parent / "plain", tmp_path / "copy", "int8")
    path = copy / "model" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "int2"}))
    with pytest.raises(UserError, match=rf"{path}: weights: expected one of .* found 'int2'"):
        llama_jax.load(str(copy))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["convert_torch_weights.py", "--output", "out", "--to", "huggingface", "--input"], "--input"),
        (["convert_torch_weights.py", "--output", "out", "--to", "meta", "--input"], "--input"),
        (["convert_torch_weights.py", "--output", "out", "--weights", "int4", "--input"], "--input"),
        (["train.py", *SMALL, *STORIES, "--train.save-dir", "out", "--train.init-from"], "train.init_from"),
    ],
    ids=["huggingface", "meta", "another", "train"],
)
def test_what_needs_the_original_says_so_in_one_line(argv: list[str], named: str, int8: Path, tmp_path: Path) -> None:
    line = told(inside.run([*argv, str(int8)], tmp_path))
    assert line.startswith(f"error: {named}: expected a checkpoint that is not quantized, found int8 in {int8}; ")
    assert not list(tmp_path.iterdir())
