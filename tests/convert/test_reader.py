"""NaN and infinities in weights: counted and told by tensor, last, whatever the layouts; the conversion itself is exact."""

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llama_jax.convert import ConvertArgs, convert, reader
from llama_jax.convert.reader import count_not_finite
from llama_jax.tokenizer import Tokenizer
from tests.convert.test_convert import ARGS, BFLOAT16, random_weights, read_meta_folder, same_bits, write_meta_folder

FLOAT32, FLOAT16 = np.dtype("<f4"), np.dtype("<f2")


@settings(max_examples=200)
@given(st.data())
def test_values_that_are_not_finite_are_counted(data: st.DataObject) -> None:
    """Of any bits, and so of every kind of NaN."""
    dtype = data.draw(st.sampled_from([FLOAT32, FLOAT16, BFLOAT16]))
    bits = data.draw(hnp.arrays(f"u{dtype.itemsize}", hnp.array_shapes(max_dims=2, max_side=20)))
    values = bits.view(dtype)
    assert count_not_finite(values) == np.count_nonzero(~np.isfinite(values.astype(np.float32)))
    assert count_not_finite(values.T) == count_not_finite(values)


def test_every_block_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "LOOKED_AT", 7)
    values = np.zeros(50, ml_dtypes.bfloat16)
    values[[0, 6, 7, 48, 49]] = [np.nan, np.inf, -np.inf, -np.nan, np.nan]
    assert count_not_finite(values) == 5 and count_not_finite(np.zeros(0, FLOAT32)) == 0


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    "fields", [{}, {"to": "huggingface"}, {"to": "meta"}, {"weights": "int8"}], ids=lambda f: "-".join(f.values())
)
def test_they_are_told_by_tensor_as_the_last_thing(
    fields: dict[str, Any],
    dtype: np.dtype,
    small_tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = dataclasses.replace(ARGS, vocab_size=small_tokenizer.vocab_size)
    weights = random_weights(args, dtype)
    weights["layers.1.feed_forward.w2.weight"][3, :5] = np.nan
    weights["output.weight"][[0, -1], 7] = [np.inf, -np.inf]
    weights["norm.weight"][0] = -np.nan
    source = write_meta_folder(tmp_path / "meta", args, weights, 2, small_tokenizer)
    convert(ConvertArgs(input=str(source), output=str(tmp_path / "out"), **fields))
    last = capsys.readouterr().out.splitlines()[-1]
    assert "warning  8 values of the weights are NaN or infinite" in last
    for words in ("5 in layers.1.feed_forward.w2.weight", "2 in output.weight", "1 in norm.weight"):
        assert words in last
    if fields == {"to": "meta"}:
        assert same_bits(read_meta_folder(tmp_path / "out"), weights)


def test_many_tensors_are_counted_and_the_worst_are_named(
    small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = dataclasses.replace(ARGS, vocab_size=small_tokenizer.vocab_size)
    weights = random_weights(args, BFLOAT16)
    for i, tensor in enumerate(weights.values()):
        tensor.reshape(-1)[: i + 1] = np.inf
    source = write_meta_folder(tmp_path / "meta", args, weights, 1, small_tokenizer)
    convert(ConvertArgs(input=str(source), output=str(tmp_path / "out")))
    last = capsys.readouterr().out.splitlines()[-1]
    count = len(weights)
    assert f"{count * (count + 1) // 2} values" in last and f"({count} in output.weight;" in last
    assert f"and in {count - 8} more tensors" in last


def test_a_sound_model_is_not_warned_about_and_a_dry_run_says_that_it_did_not_look(
    small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = dataclasses.replace(ARGS, vocab_size=small_tokenizer.vocab_size)
    weights = random_weights(args, FLOAT16)
    weights["norm.weight"][:2] = [65504, -65504]  # the largest that there are
    source = write_meta_folder(tmp_path / "meta", args, weights, 1, small_tokenizer)
    convert(ConvertArgs(input=str(source), output=str(tmp_path / "out")))
    assert "warning" not in capsys.readouterr().out
    convert(ConvertArgs(input=str(source), dry_run=True))
    assert "no value was read" in capsys.readouterr().out.splitlines()[-1]
