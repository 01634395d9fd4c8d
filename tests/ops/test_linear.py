"""linear: the values and gradients of jnp.einsum, for every product of the model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops import linear as platforms
from llama_jax.ops.linear import linear
from llama_jax.ops.quantize import quantize

SIZES = {"B": 2, "T": 5, "C": 3, "D": 6, "N": 4, "K": 2, "H": 3, "F": 16, "V": 11}
EQUATIONS = [
    "BTD,DNH->BTNH",
    "BTD,DKH->BTKH",
    "BTNH,NHD->BTD",
    "BTD,DF->BTF",
    "BTF,FD->BTD",
    "BCD,DV->BCV",
]


def operands(equation: str, dtype: jnp.dtype = jnp.float32) -> list[jax.Array]:
    axes = equation.replace("->", ",").split(",")
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, [SIZES[a] for a in part]).astype(dtype) for key, part in zip(keys, axes, strict=True)
    ]


def results(function: Any, equation: str, x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    """The product, and the gradients with respect to x and w."""

    def run(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x, w: function(equation, x, w), x, w)
        return y, *pull(dy)

    return jax.jit(run)(x, w, dy)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_values_and_gradients_are_those_of_einsum(equation: str) -> None:
    x, w, dy = operands(equation)
    for found, wanted in zip(results(linear, equation, x, w, dy), results(jnp.einsum, equation, x, w, dy), strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_bfloat16_operands_have_bfloat16_results_and_gradients(equation: str) -> None:
    x, w, dy = operands(equation, jnp.bfloat16)
    exact = results(jnp.einsum, equation, *(a.astype(jnp.float32) for a in (x, w, dy)))
    for a, b in zip(results(linear, equation, x, w, dy), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("rows", "kind"), [(1, "int4"), (3, "int4"), (1, "int4-64")])
def test_a_product_in_blocks_is_that_of_the_weights(rows: int, kind: str) -> None:
    """Three blocks of 64 inputs, of two groups or one."""
    w = quantize(jax.random.normal(jax.random.key(1), (192, 40)), 1, kind)
    x = jax.random.normal(jax.random.key(0), (rows, 192))
    found = jax.jit(platforms._rows_in_blocks, static_argnames="block")(x, w, block=64)
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ np.asarray(w.dequantized(), np.float64), atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "rows", "block"),
    [(11008, 1, 128), (11008, 2, 0), (2752, 5, 64), (1376, 1, 0), (4096, 1, 0)],
    ids=["7B's w2", "too many sums", "four devices' part", "eight devices' part", "a power of two"],
)
def test_blocks_are_for_few_rows_of_matrices_that_xla_would_convert_first(inputs: int, rows: int, block: int) -> None:
    shapes = jax.eval_shape(lambda: quantize(jnp.zeros((inputs, 16)), 1, "int4"))
    assert platforms._block(rows, shapes) == block


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_few_rows_have_the_same_products_on_every_platform(platform: str, rows: int, dtype: type) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 48)).astype(np.float32)
    values = rng.integers(-127, 128, (48, 20)).astype(dtype)
    found = jax.jit(getattr(platforms, f"_rows_on_{platform}"))(x, values)
    np.testing.assert_allclose(found, x.astype(np.float64) @ values.astype(np.float64), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("kind", "inputs", "group"), [("int4", 96, 32), ("int4-64", 192, 64), ("int4", 50, 25)])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_is_summed_by_group_on_a_gpu(kind: str, inputs: int, group: int, rows: int) -> None:
    w = quantize(jax.random.normal(jax.random.key(0), (inputs, 40)), 1, kind)
    x = np.asarray(jax.random.normal(jax.random.key(1), (rows, inputs)))
    assert w.scales is not None and w.scales.shape == (inputs // group, 40)
    matrix = np.asarray(w.values, np.float64) * np.repeat(np.asarray(w.scales, np.float64), group, axis=0)
    found = jax.jit(platforms._rows_by_group_on_gpu)(jnp.asarray(x), w)
    np.testing.assert_allclose(found, x.astype(np.float64) @ matrix, rtol=1e-5, atol=1e-4)
