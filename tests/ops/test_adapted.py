"""Frozen matrices and low-rank adapters: their products, and their gradients."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Weights
from llama_jax.ops.linear import linear
from llama_jax.ops.loss import (
    cross_entropy,
    frozen_cross_entropy,
    frozen_token_log_likelihoods,
    token_log_likelihoods,
)
from llama_jax.ops.quantize import Adapted, Matrix, flat, quantize

PRODUCTS = [
    ("BTD,DNH->BTNH", (64, 4, 8), 1),
    ("BTNH,NHD->BTD", (4, 32, 24), 2),
    ("BTF,FD->BTD", (88, 24), 1),
]
KINDS: list[Weights] = ["auto", "int8", "int4", "int4-64"]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def matrix(shape: tuple[int, ...], inputs: int, kind: Weights) -> Matrix:
    w = normal(*shape)
    return flat(w, inputs) if kind == "auto" else quantize(w, inputs, kind)


def adapted(base: Matrix, rank: int = 3, scale: float = 0.5, **more: Any) -> Adapted:
    inputs, outputs = base.values.shape
    return Adapted(base, normal(inputs, rank, seed=1), normal(rank, outputs, seed=2), scale=scale, **more)


@pytest.mark.parametrize(("kind", "rows"), [*((kind, 5) for kind in KINDS), ("auto", 50)])
@pytest.mark.parametrize(("equation", "shape", "inputs"), PRODUCTS)
def test_products_and_gradients_are_those_of_the_dequantized_matrix_and_the_literal_adapter(
    kind: Weights, rows: int, equation: str, shape: tuple[int, ...], inputs: int
) -> None:
    """Many rows are multiplied by the sum of a plain matrix and its adapter, few by each."""
    w = adapted(matrix(shape, inputs, kind))
    x = normal(2, rows, *shape[:inputs], seed=3)
    dy = normal(2, rows, *shape[inputs:], seed=4)
    dense = w.base.dequantized()

    def ours(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return linear(equation, x, w.replace(a=a, b=b))

    def literal(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, dense + w.scale * (a @ b).reshape(shape))

    found, pull = jax.vjp(jax.jit(ours), x, w.a, w.b)
    wanted, pull_literal = jax.vjp(literal, x, w.a, w.b)
    for one, other in zip((found, *pull(dy)), (wanted, *pull_literal(dy)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * float(jnp.abs(other).max()))
    np.testing.assert_allclose(w.merged(), dense + w.scale * (w.a @ w.b).reshape(shape), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_operands_of_bfloat16_have_gradients_of_bfloat16_near_those_of_float32(kind: Weights) -> None:
    equation, shape, inputs = PRODUCTS[0]
    w, x, dy = matrix(shape, inputs, kind), normal(2, 5, 64, seed=3), normal(2, 5, 4, 8, seed=4)
    exact, pull_exact = jax.vjp(lambda x: linear(equation, x, w), x)
    found, pull = jax.vjp(lambda x: linear(equation, x, w), x.astype(jnp.bfloat16))
    for a, b in ((found, exact), (pull(dy.astype(jnp.bfloat16))[0], pull_exact(dy)[0])):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("rows", [5, 50])
def test_the_gradient_of_the_first_factor_is_no_product_of_a_transposed_input(rows: int) -> None:
    """XLA on a CPU computes such a product, which has few columns, many times slower."""
    equation, shape, inputs = PRODUCTS[2]
    w, x, dy = adapted(matrix(shape, inputs, "auto")), normal(2, rows, 88), normal(2, rows, 24)

    def gradient(a: jax.Array, x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda a: linear(equation, x, w.replace(a=a)), a)[1](dy)[0]

    text = jax.jit(gradient).lower(w.a, x, dy).compile().as_text()
    products = re.findall(r"= f32\[([\d,]+)\]\S* (?:dot\(|fusion\(.*(?=dot_general))", text)
    assert "3,88" in products and "88,3" not in products


@pytest.mark.parametrize("has_adapter", [True, False])
def test_unrolled_layers_of_a_plain_base_are_not_kept_for_the_backward_pass(
    has_adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, it is the order of the gradient that saves the memory of the layers."""
    stack, a, b = normal(8, 128, 128), normal(8, 128, 2, seed=1), normal(8, 2, 128, seed=2)

    def loss(x: jax.Array, a: jax.Array, b: jax.Array, stack: jax.Array) -> jax.Array:
        def layer(x: jax.Array, values: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            base = Matrix(values[0], None, (128, 128))
            return jnp.tanh(linear("BTD,DF->BTF", x, Adapted(base, *values[1:]) if has_adapter else base)), None

        return jnp.sum(jax.lax.scan(layer, x, (stack, a, b), unroll=8)[0])

    def temporary() -> int:
        jax.clear_caches()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(normal(1, 512, 128), a, b, stack).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    ordered = temporary()
    for module in ("linear", "frozen"):
        monkeypatch.setattr(f"llama_jax.ops.{module}.known_after", lambda dy, x: x)
    assert ordered <= temporary() - 5 * stack[0].nbytes


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("remat", [False, True])
def test_the_backward_pass_of_stacked_layers_holds_no_dequantized_layers(kind: Weights, remat: bool) -> None:
    """The compiled program has no array with the values of all layers but the integers themselves."""
    L, D = 6, 96
    layers = jax.vmap(lambda w: quantize(w, 1, kind))(normal(L, D, D))
    layers = layers.replace(shape=(D, D))
    a, b = jnp.zeros((L, D, 2)), jnp.zeros((L, 2, D))

    def loss(adapter: tuple[jax.Array, jax.Array], x: jax.Array, layers: Matrix) -> jax.Array:
        def layer(x: jax.Array, now: Any) -> tuple[jax.Array, None]:
            w, a, b = now
            return jnp.tanh(linear("BTD,DF->BTF", x, Adapted(w, a, b))), None

        step = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        return jnp.sum(jax.lax.scan(step, x, (layers, *adapter))[0])

    text = jax.jit(jax.grad(loss)).lower((a, b), normal(1, 4, D), layers).compile().as_text()
    stacks = {found for found in re.findall(r"\b([a-z]+\d+)\[6,96,96\]", text)}
    assert stacks and stacks <= {"s8", "s4"}, stacks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 3])
def test_the_loss_of_a_frozen_output_is_cross_entropy_of_the_merged_matrix(kind: Weights, rank: int) -> None:
    base = matrix((64, 50), 1, kind)
    w = adapted(base, rank)
    hidden = normal(2, 7, 64, seed=5)
    rng = np.random.default_rng(0)
    targets, weights = rng.integers(50, size=(2, 7)), rng.integers(2, size=(2, 7)).astype(np.float32)

    def ours(hidden: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return frozen_cross_entropy(hidden, base, hidden @ a * w.scale, b, targets, weights, 6)

    def literal(hidden: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return cross_entropy(hidden, base.dequantized() + w.scale * a @ b, targets, weights, 6)

    every = jax.value_and_grad(ours, argnums=(0, 1, 2))(hidden, w.a, w.b)
    wanted = jax.value_and_grad(literal, argnums=(0, 1, 2))(hidden, w.a, w.b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), every, wanted)
    np.testing.assert_allclose(ours(hidden, w.a, w.b), wanted[0], rtol=1e-5)


@pytest.mark.parametrize("kind", ["auto", "int4"])
@pytest.mark.parametrize("rank", [0, 3])
def test_log_likelihoods_of_a_frozen_output_are_those_of_the_merged_matrix(kind: Weights, rank: int) -> None:
    base = matrix((64, 50), 1, kind)
    w, hidden, cotangent = adapted(base, rank), normal(2, 7, 64, seed=5), normal(2, 7, seed=6)
    targets = np.random.default_rng(0).integers(50, size=(2, 7))

    def ours(hidden: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return frozen_token_log_likelihoods(hidden, base, hidden @ a * w.scale, b, targets, 6)

    def literal(hidden: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return token_log_likelihoods(hidden, base.dequantized() + w.scale * a @ b, targets, 6)

    found, pull = jax.vjp(ours, hidden, w.a, w.b)
    wanted, pull_literal = jax.vjp(literal, hidden, w.a, w.b)
    for one, other in zip((found, *pull(cotangent)), (wanted, *pull_literal(cotangent)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_dropout_follows_each_rows_key_and_leaves_the_frozen_product_whole() -> None:
    base = flat(jnp.zeros((64, 24)), 1)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jnp.ones((3, 400, 64))

    def product(keys: Any) -> np.ndarray:
        w = Adapted(base, jnp.eye(64), jnp.eye(64, 24), keys, scale=1.0, dropout=0.25)
        return np.asarray(jax.jit(lambda w: linear("BTF,FD->BTD", x, w))(w))

    found = product(keys)
    assert set(np.unique(found)) == {0.0, np.float32(1 / 0.75)}
    assert abs((found == 0).mean() - 0.25) < 0.01
    np.testing.assert_array_equal(product(keys[::-1]), found[::-1])
    assert (found[0] != found[1]).any()
