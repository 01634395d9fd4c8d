"""Exact generation: a completion is the same to the bit whatever stands beside it, however it is guessed and read."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import SampleArgs, Weights
from llama_jax.generation import Completion, Model
from llama_jax.generation import decode as decoding
from llama_jax.generation.serving import for_generation
from llama_jax.generation.speculative import Draft
from llama_jax.model import Llama, rms_norm
from llama_jax.ops import exact
from llama_jax.ops.cache import KVArray
from llama_jax.tokenizer import Tokenizer, train_tokenizer
from tests.commands import ROOT
from tests.generation.models import build, never_ending, prompts_of_lengths
from tests.ops.test_attention import literal, random_qkv, stored

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SETTINGS = {
    "greedy": SampleArgs(temperature=0.0, max_new_tokens=20),
    "sampled": SampleArgs(temperature=0.9, seed=5, max_new_tokens=20),
    "all at once": SampleArgs(
        temperature=1.2, top_k=20, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4,
        logit_bias={9: 1.5}, max_new_tokens=20,
    ),
}  # fmt: skip


def exactly(model: Model, dtype: Any, weights: Weights = "auto", cache: Any = None) -> Model:
    """The model as llama_jax.load(exact=True) gives it, with such weights and cache."""
    module = Llama(model.args, dtype, exact_rows=exact.CPU_ROWS)
    params = for_generation(model.params, weights)
    cast = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 and weights == "auto" else x, params)
    return dataclasses.replace(model, module=module, params=cast, cache_dtype=cache)


def bits(completions: Sequence[Completion]) -> list[Any]:
    return [(c.token_ids, c.logprobs, c.text, c.finish_reason) for c in completions]


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return never_ending(small_tokenizer, max_seq_len=512)


@pytest.fixture(scope="module")
def drafts(model: Model, small_tokenizer: Tokenizer) -> dict[str, Draft | None]:
    other = build(small_tokenizer, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=512)
    return {
        "none": None,
        "lookup": Draft(4),
        "another model": Draft(2, other.module, other.serving),
        "the model itself": Draft(5, model.module, model.serving),
    }


@settings(max_examples=3)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    weights=st.sampled_from(["auto", "int8", "int4"]),
    cache=st.sampled_from([None, jnp.int8]),
    draft=st.sampled_from(["none", "lookup", "another model", "the model itself"]),
    how=st.sampled_from(list(SETTINGS)),
    lengths=st.sampled_from([[3, 40, 7], [250, 12]]),
)
def test_a_row_is_the_same_to_the_bit_alone_and_together_guessed_and_not(
    model: Model, drafts: dict[str, Draft | None], dtype: str, weights: Weights, cache: Any, draft: str, how: str, lengths: list[int]
) -> None:  # fmt: skip
    plain = exactly(model, DTYPES[dtype], weights, cache)
    quick = dataclasses.replace(plain, draft=drafts[draft])
    prompts = prompts_of_lengths(model, lengths)
    together = bits(quick.generate_ids(prompts, SETTINGS[how]))
    for i in range(2):
        assert bits(plain.generate_ids([prompts[i]], SETTINGS[how])) == [together[i]]


@settings(max_examples=3)
@given(
    cache=st.sampled_from([None, jnp.int8]),
    weights=st.sampled_from(["auto", "int8"]),
    draft=st.sampled_from(["none", "lookup", "the model itself"]),
    lengths=st.sampled_from([[3, 40, 7], [250, 12]]),
)
def test_in_float32_a_row_has_the_same_tokens_without_it_up_to_ties(
    model: Model, drafts: dict[str, Draft | None], cache: Any, weights: Weights, draft: str, lengths: list[int]
) -> None:
    plain = dataclasses.replace(model, params=for_generation(model.params, weights), cache_dtype=cache)
    quick = dataclasses.replace(plain, draft=drafts[draft])
    prompts = prompts_of_lengths(model, lengths)
    # A last digit may decide how a key is rounded to int8.
    alike = 1e-4 if cache is None else 1e-2
    for prompt, together in zip(prompts, quick.generate_ids(prompts, SETTINGS["greedy"]), strict=True):
        (alone,) = plain.generate_ids([prompt], SETTINGS["greedy"])
        pairs = list(zip(together.token_ids, alone.token_ids, strict=True))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        np.testing.assert_allclose(together.logprobs[:same], alone.logprobs[:same], atol=alike)
        if same < len(pairs):
            logits = np.asarray(plain.logits([[*prompt, *alone.token_ids[:same]]]))[0, -1]
            assert abs(logits[pairs[same][0]] - logits[pairs[same][1]]) < 2 * alike


@pytest.mark.parametrize("cache", [None, jnp.int8], ids=["float", "int8"])
def test_a_prompt_is_read_the_same_to_the_bit_however_it_is_cut(
    model: Model, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = exactly(model, jnp.bfloat16, cache=cache)
    prompts = prompts_of_lengths(model, [1, 31, 32, 33, 130])
    whole = bits(one.generate_ids(prompts, SETTINGS["greedy"]))
    monkeypatch.setattr(decoding, "CPU_PREFILL", 32)
    monkeypatch.setattr(decoding, "BUCKETS", (16, 32))
    assert bits(one.generate_ids(prompts, SETTINGS["greedy"])) == whole
    # And a token is what it is, whether it was given or made.
    half = [[*prompt, *done[0][:9]] for prompt, done in zip(prompts, whole, strict=True)]
    rest = one.generate_ids(half, dataclasses.replace(SETTINGS["greedy"], max_new_tokens=11))
    assert [(c.token_ids, c.logprobs) for c in rest] == [(done[0][9:], done[1][9:]) for done in whole]


def test_a_completion_goes_on_over_more_slots_unchanged(model: Model) -> None:
    one = exactly(model, jnp.bfloat16, cache=jnp.int8)
    args = dataclasses.replace(SETTINGS["greedy"], max_new_tokens=16)
    short, long = prompts_of_lengths(model, [250, 480])
    assert bits(one.generate_ids([short], args)) == bits(one.generate_ids([short, long], args))[:1]


@pytest.mark.parametrize("cache", [None, jnp.int8], ids=["float", "int8"])
def test_logits_are_those_that_generation_samples_from(model: Model, cache: Any) -> None:
    one = exactly(model, jnp.float32, cache=cache)
    (prompt,) = prompts_of_lengths(model, [20])
    (done,) = one.generate_ids([prompt], SETTINGS["greedy"])
    logits = np.asarray(one.logits([[*prompt, *done.token_ids]]))[0, len(prompt) - 1 : -1]
    assert logits.argmax(axis=-1).tolist() == done.token_ids
    found = np.asarray(jax.nn.log_softmax(logits))[np.arange(20), done.token_ids]
    np.testing.assert_allclose(found, done.logprobs, atol=1e-6)


@pytest.mark.parametrize(("T", "slot"), [(1, 0), (1, 300), (5, 254), (9, 40)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_exact_attention_equals_the_literal_one(T: int, slot: int, dtype: Any) -> None:
    q, k, v = random_qkv(2, T, slot + T, 4, 2, 16)
    slots = np.array([slot, slot], np.int32)
    held = [stored(x, 512, dtype) for x in (k, v)]
    out = jax.jit(exact.attention)(q, *held, slots)
    np.testing.assert_allclose(out, literal(q, k, v, slot), atol=1e-5 if dtype == jnp.float32 else 0.05)


def test_each_row_writes_to_slots_of_its_own() -> None:
    _, x, _ = random_qkv(3, 1, 2, 2, 2, 4)
    empty = KVArray(jnp.zeros((3, 2, 8, 4)), None)
    held = np.asarray(empty.write(empty.stored(jnp.asarray(x)), jnp.array([0, 3, 6])).values)
    for row, slot in enumerate([0, 3, 6]):
        np.testing.assert_array_equal(held[row, :, slot : slot + 2], x[row].swapaxes(0, 1))
        assert not held[row, :, :slot].any() and not held[row, :, slot + 2 :].any()


@pytest.mark.parametrize("R", [1, 15, 16, 17, 40])
def test_products_in_blocks_and_means_are_those_of_numpy(R: int) -> None:
    rng = np.random.default_rng(R)
    x, w = rng.normal(size=(R, 48)).astype(np.float32), rng.normal(size=(48, 20)).astype(np.float32)
    np.testing.assert_allclose(exact.product_in_blocks(jnp.asarray(x), jnp.asarray(w), 16), x @ w, atol=1e-5)
    np.testing.assert_allclose(exact.means(jnp.asarray(x), 16)[:, 0], x.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("D", [16, 48, 128, 288])
def test_a_row_has_the_same_norm_to_the_bit_among_any_rows(D: int) -> None:
    rng = np.random.default_rng(D)
    x, weight = rng.normal(size=(48, D)).astype(np.float32), jnp.asarray(rng.normal(size=D), jnp.float32)
    norm = jax.jit(lambda x: rms_norm(x, weight, 1e-5, 16))
    mean = jax.jit(lambda x: exact.means(x * x, 16))
    for R in (1, 3, 16, 17, 33):
        np.testing.assert_array_equal(mean(x[:R]), mean(x)[:R])
        np.testing.assert_array_equal(norm(x[:R]), norm(x)[:R])


def test_rounding_changes_nothing_but_what_a_compiler_may_do() -> None:
    x = np.array([0.0, -0.0, 1.5, -3e38, 1e-45, np.inf, -np.inf, np.nan], np.float32)
    found = np.asarray(jax.jit(exact.rounded)(x))
    np.testing.assert_array_equal(found[:-1].view(np.int32), x[:-1].view(np.int32))
    assert np.isnan(found[-1])
    rng = np.random.default_rng(0)
    a, b, c, d = (rng.normal(size=1000).astype(np.float32) for _ in range(4))
    apart = jax.jit(lambda a, b, c, d: exact.rounded(a * b) + exact.rounded(c * d))(a, b, c, d)
    np.testing.assert_array_equal(apart, a * b + c * d)


def main() -> None:
    """Print, by type and cache, how many of the rows are not the same to the bit together, and guessed, as they are alone."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(["The owl saw the fox by the river."] * 9, 280, Path(folder) / "t.model")
        model = never_ending(tokenizer, dim=128, n_heads=8, n_kv_heads=4, multiple_of=172, n_layers=1)
        args = SampleArgs(temperature=0.7, max_new_tokens=16, seed=1)
        prompts = prompts_of_lengths(model, [3, 16, 8, 11])
        for dtype, cache in ((jnp.bfloat16, jnp.int8), (jnp.float32, None)):
            one = exactly(model, dtype, cache=cache)
            quick = dataclasses.replace(one, draft=Draft(4))
            alone = [bits(one.generate_ids([prompt], args))[0] for prompt in prompts]
            found = [bits(one.generate_ids(prompts, args)), bits(quick.generate_ids(prompts, args))]
            found += [bits(quick.generate_ids(prompts[:1], args))]
            print(sum(a != b for rows in found for a, b in zip(alone, rows, strict=False)))


@pytest.mark.slow
def test_programs_that_are_compiled_as_for_users_are_exact_too() -> None:
    """The tests' own are compiled without optimisation, which leaves out fused multiply-adds, for one."""
    command = [sys.executable, "-m", "tests.generation.test_exact"]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0"]


if __name__ == "__main__":
    main()
