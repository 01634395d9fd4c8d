"""Quantized matrices, their products, and generation with them and with a quantized cache."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import SampleArgs, Weights
from llama_jax.devices.memory import bytes_of
from llama_jax.generation import Model
from llama_jax.generation.serving import for_generation
from llama_jax.ops.linear import linear
from llama_jax.ops.quantize import KINDS as TABLE
from llama_jax.ops.quantize import Matrix, quantize
from llama_jax.tokenizer import Tokenizer
from tests.generation.models import decode, full_log_probs, never_ending, prompts_of_lengths

KINDS: list[Weights] = ["int8", "int4", "int4-64"]
# The model's products, with the number of the matrix's axes that are summed over.
PRODUCTS = [
    ("BTD,DNH->BTNH", (64, 4, 8), 1),
    ("BTD,DKH->BTKH", (128, 2, 8), 1),
    ("BTNH,NHD->BTD", (4, 32, 24), 2),
    ("BTD,DF->BTF", (96, 40), 1),
    ("BTF,FD->BTD", (88, 24), 1),
    ("BTD,DV->BTV", (64, 50), 1),
]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Random numbers of numpy's, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@settings(max_examples=15)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([((64, 6), 1), ((88, 6), 1), ((2, 32, 5), 2), ((64, 3, 2), 1), ((7, 3), 1)]),
    st.sampled_from([1e-6, 0.02, 1.0, 1e6]),
    st.integers(0, 99),
)
def test_values_are_within_half_a_step_of_their_groups_scale(
    kind: Weights, matrix: tuple[tuple[int, ...], int], size: float, seed: int
) -> None:
    shape, inputs = matrix
    w = normal(*shape, seed=seed) * size
    q = quantize(w, inputs, kind)
    D = int(np.prod(shape[:inputs]))
    group = D if kind == "int8" else D // q.scales.shape[0]
    if kind != "int8":
        assert group <= TABLE[kind].group and D % group == 0
    assert q.shape == shape and q.values.shape[0] == D and q.values.dtype == (jnp.int8 if kind == "int8" else jnp.int4)
    found = q.dequantized()
    assert found.shape == shape and found.dtype == jnp.float32
    by_group = np.asarray(w).reshape(D // group, group, -1)
    scales = np.abs(by_group).max(axis=1, keepdims=True) / (127 if kind == "int8" else 7)
    np.testing.assert_allclose(q.scales, scales[:, 0], rtol=1e-5)
    error = np.abs(np.asarray(found).reshape(by_group.shape) - by_group)
    assert (error <= 0.5001 * scales).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_value_of_a_group_is_exact_and_signs_stay(kind: Weights) -> None:
    w = normal(64, 5)
    found = np.asarray(quantize(w, 1, kind).dequantized())
    for column in range(5):
        row = int(np.abs(w[:, column]).argmax())
        assert found[row, column] == pytest.approx(float(w[row, column]), rel=1e-5)
    assert (found * np.asarray(w) >= 0).all()


@pytest.mark.parametrize("D", [1, 2, 3, 4, 8, 24])
def test_a_product_of_the_largest_values_alone_does_not_overflow(D: int) -> None:
    signs = np.where(np.arange(D) % 2, -1.0, 1.0)
    w = quantize(jnp.asarray(signs, jnp.float32)[:, None], 1, "int8")
    product = jax.jit(lambda x: linear("BTD,DF->BTF", x, w))
    for largest in np.random.default_rng(D).uniform(0.1, 9.0, 200).astype(np.float32):
        found = product(jnp.asarray(largest * signs, jnp.float32)[None, None])
        np.testing.assert_allclose(found[0, 0], [largest * D], rtol=1e-5)


@functools.partial(jax.jit, static_argnums=1)
def quantized_all(matrices: list[jax.Array], kind: Weights) -> list[Any]:
    return [quantize(w, inputs, kind) for w, (_, _, inputs) in zip(matrices, PRODUCTS, strict=True)]


@jax.jit
def products(xs: list[jax.Array], ws: list[Any]) -> list[jax.Array]:
    """Of all equations, to compile once; products that are not compiled: the next test."""
    return [linear(equation, x, w) for (equation, _, _), x, w in zip(PRODUCTS, xs, ws, strict=True)]


@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (5, 1), (2, 40)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dequantized_matrix(kind: Weights, rows: tuple[int, int]) -> None:
    xs = [normal(*rows, *shape[:inputs], seed=1) for _, shape, inputs in PRODUCTS]
    ws = quantized_all([normal(*shape) for _, shape, _ in PRODUCTS], kind)
    for (equation, _, _), x, w, found in zip(PRODUCTS, xs, ws, products(xs, ws), strict=True):
        wanted = np.einsum(equation, np.asarray(x, np.float64), np.asarray(w.dequantized(), np.float64))
        assert found.shape == wanted.shape and found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=equation)


@pytest.mark.parametrize("rows", [(1, 1), (2, 40)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_operands_have_results_of_the_type_that_is_asked_for(kind: Weights, rows: tuple[int, int]) -> None:
    w, x = quantize(normal(64, 50), 1, kind), normal(*rows, 64, seed=1).astype(jnp.bfloat16)
    wanted = np.asarray(x.astype(jnp.float32) @ w.dequantized())
    for dtype in (None, jnp.float32):
        found = linear("BTD,DV->BTV", x, w, dtype)
        assert found.dtype == (dtype or jnp.bfloat16)
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", KINDS)
def test_zero_matrices_and_columns_stay_zero_and_finite(kind: Weights) -> None:
    for w in (jnp.zeros((64, 3)), normal(64, 3).at[:, 1].set(0)):
        q = quantize(w, 1, kind)
        assert np.isfinite(q.scales).all()
        found = np.asarray(q.dequantized())
        assert (found[np.asarray(w) == 0] == 0).all()
        y = np.asarray(linear("BTD,DF->BTF", jnp.ones((1, 1, 64)), q))
        assert np.isfinite(y).all() and y[0, 0, 1] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_stay_not_finite(kind: Weights, bad: float) -> None:
    q = jax.jit(lambda w: quantize(w, 1, kind))(normal(64, 5).at[3, 2].set(bad))
    found = np.asarray(q.dequantized())
    assert not np.isfinite(found[3, 2]) and np.isfinite(found[:, [0, 1, 3, 4]]).all()
    for rows in (1, 20):
        y = np.asarray(linear("BTD,DF->BTF", jnp.ones((1, rows, 64)), q))
        assert not np.isfinite(y[..., 2]).any() and np.isfinite(y[..., 0]).all()


def test_bytes_are_those_of_values_and_scales() -> None:
    w = normal(64, 10)
    assert bytes_of(w) == 64 * 10 * 4
    assert bytes_of(quantize(w, 1, "int8")) == 64 * 10 + 10 * 4
    assert bytes_of(quantize(w, 1, "int4")) == 64 * 10 // 2 + 2 * 10 * 4
    assert bytes_of({"a": quantize(w, 1, "int4-64"), "b": w}) == 64 * 10 // 2 + 10 * 4 + 64 * 10 * 4


ARGS: dict[str, Any] = {"dim": 64, "n_layers": 2, "multiple_of": 32, "max_seq_len": 128}
GREEDY = SampleArgs(temperature=0.0, top_p=1.0)


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return never_ending(small_tokenizer, **ARGS)


def quantized(model: Model, kind: Weights) -> Any:
    return for_generation(model.params, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_quantized_matrices_is_that_of_the_dequantized_model(model: Model, kind: Weights) -> None:
    params = quantized(model, kind)
    prompts = prompts_of_lengths(model, [1, 9, 40])
    ids, logprobs = decode(model, prompts, GREEDY, 20, params=params)
    arrays = jax.tree.map(
        lambda w: w.dequantized() if isinstance(w, Matrix) else w, params, is_leaf=lambda w: isinstance(w, Matrix)
    )
    plain = dataclasses.replace(model, params=arrays)
    for prompt, row, row_logprobs in zip(prompts, ids.tolist(), logprobs, strict=True):
        full = full_log_probs(plain, prompt + row)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(row_logprobs, full[np.arange(20), row], atol=1e-3)
        assert (row_logprobs >= full.max(axis=-1) - 2e-3).all()
        # And near the full precision; four bits of a random matrix say less.
        exact = full_log_probs(model, prompt + row)[len(prompt) - 1 : -1][np.arange(20), row]
        error = np.abs(row_logprobs - exact)
        assert error.max() > 1e-4
        assert error.mean() < (0.05 if kind == "int8" else 0.8)


def test_a_quantized_cache_is_near_the_float_one(model: Model) -> None:
    prompts = prompts_of_lengths(model, [1, 9, 40])
    ids, logprobs = decode(model, prompts, GREEDY, 40, cache_dtype=jnp.int8)
    for prompt, row, row_logprobs in zip(prompts, ids.tolist(), logprobs, strict=True):
        full = full_log_probs(model, prompt + row)[len(prompt) - 1 : -1]
        error = np.abs(row_logprobs - full[np.arange(40), row])
        assert 1e-4 < error.max() < 0.15 and error.mean() < 0.04
        assert (row_logprobs >= full.max(axis=-1) - 0.3).all()


def test_sampling_with_quantized_matrices_and_cache_keeps_rows_apart(model: Model) -> None:
    params = quantized(model, "int8")
    prompts = prompts_of_lengths(model, [2, 30])
    args = SampleArgs(temperature=1.0, top_p=0.9, seed=5)
    together, _ = decode(model, prompts, args, 20, params=params, cache_dtype=jnp.int8)
    turned, _ = decode(model, prompts[::-1], args, 20, params=params, cache_dtype=jnp.int8)
    np.testing.assert_array_equal(turned[::-1], together)
