"""linear: the values and gradients of jnp.einsum, for every product of the model."""

import itertools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax.config import MeshArgs
from llama_jax.devices.sharding import make_mesh, on_mesh, spec
from llama_jax.ops import linear as platforms
from llama_jax.ops.linear import linear
from llama_jax.ops.quantize import Matrix, quantize
from tests.eight_devices import run_on_eight_devices

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


def pieces(inputs: int, kind: str, rows: int = 3) -> tuple[np.ndarray, Matrix, np.ndarray]:
    """Rows, a quantized matrix, and their product in numpy."""
    w = quantize(jax.random.normal(jax.random.key(1), (inputs, 40)), 1, kind)
    x = np.asarray(jax.random.normal(jax.random.key(0), (rows, inputs)))
    assert w.scales is not None
    matrix = np.asarray(w.values, np.float64) * np.repeat(np.asarray(w.scales), inputs // len(w.scales), axis=0)
    return x, w, x.astype(np.float64) @ matrix


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize(
    ("inputs", "kind"),
    [(192, "int4"), (192, "int4-64"), (1376, "int4"), (2752, "int4-64"), (480, "int4"), (256, "int4"), (50, "int4")],
    ids=["halves", "a group each", "much in both", "wide groups", "nearly all in both", "one piece", "groups of 25"],
)
def test_a_product_in_pieces_is_that_of_the_whole_matrix(inputs: int, kind: str, rows: int) -> None:
    x, w, wanted = pieces(inputs, kind, rows)
    found = jax.jit(lambda x, w: platforms._rows_in_pieces(x, w, "mlp", None))(x, w)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_pieces_are_powers_of_two_that_end_with_the_matrix() -> None:
    """The sizes for which a TPU's compiler converts int4 in the product."""
    x, w, _ = pieces(1376, "int4")
    program = str(jax.make_jaxpr(lambda x, w: platforms._rows_in_pieces(x, w, "mlp", None))(x, w))
    assert sorted(map(int, re.findall(r"f32\[8,(\d+)\] = pad", program))) == [512, 1024]


MESHES = [(1, 1, 8, 1), (2, 1, 4, 1), (1, 2, 4, 1), (2, 1, 2, 2)]
# The inputs are split over devices, or the outputs.
LAYERS = [("mlp", None, 768), (None, "mlp", 192)]


def error_on_mesh(sizes: tuple[int, int, int, int], inputs: str | None, outputs: str | None, width: int) -> float:
    """How far products in pieces on a mesh are from those in numpy: of four rows, and of one."""
    mesh = make_mesh(MeshArgs(*sizes))
    worst = 0.0
    for rows in (4, 1):
        x, w, wanted = pieces(width, "int4", rows)
        w = jax.device_put(w, NamedSharding(mesh, spec(inputs, outputs)))
        with on_mesh(mesh):
            found = jax.jit(lambda x, w: platforms._rows_in_pieces(x, w, inputs, outputs))(x, w)
        worst = max(worst, float(np.abs(np.asarray(found) - wanted).max()))
    return worst


def test_products_in_pieces_are_the_same_on_every_mesh() -> None:
    found = run_on_eight_devices("tests.ops.test_linear")
    assert len(found) == len(MESHES) * len(LAYERS)
    assert max(found.values()) < 1e-3, found


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


if __name__ == "__main__":
    cases = itertools.product(MESHES, LAYERS)
    print(json.dumps({str(case): error_on_mesh(case[0], *case[1]) for case in cases}))
