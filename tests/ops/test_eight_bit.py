"""Products in eight bits: those of a literal quantized product, and gradients that are right on average."""

import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax.config import MeshArgs
from llama_jax.devices.sharding import make_mesh, on_mesh, spec
from llama_jax.ops import eight_bit
from llama_jax.ops.eight_bit import TYPES, EightBit, both_ways
from llama_jax.ops.linear import linear
from tests.eight_devices import run_on_eight_devices
from tests.ops.test_linear import EQUATIONS, operands, results

ALL = ("forward", "input", "weight")
LAYERS = [equation for equation in EQUATIONS if "V" not in equation]
SEED = jnp.array([3, 5], jnp.uint32)
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def multiplied(kind: str, products: tuple[str, ...] = ALL) -> Any:
    return lambda equation, x, w: linear(equation, x, eight_bits(equation, w, SEED, kind, products))


def eight_bits(equation: str, w: jax.Array, seed: jax.Array, kind: str, products: tuple[str, ...] = ALL) -> EightBit:
    x_axes, w_axes = equation.split("->")[0].split(",")
    border = sum(axis in x_axes for axis in w_axes)
    made = both_ways(jax.lax.stop_gradient(w), range(border), range(border, w.ndim), kind, products)
    return EightBit(w, *made, seed, kind, products)


def quantized(x: jax.Array, seed: jax.Array | None = None) -> eight_bit.Quantized:
    """x [rows, columns] in int8, by row."""
    return eight_bit.quantized(x, eight_bit.scales_of(x, [1], jnp.int8), jnp.int8, seed)


def flat(equation: str, x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, ...]:
    """The operands as matrices: [rows, inputs], [inputs, outputs], [rows, outputs]."""
    x_axes, w_axes = equation.split("->")[0].split(",")
    inputs = int(np.prod(w.shape[: sum(axis in w_axes for axis in x_axes)]))
    return x.reshape(-1, inputs), w.reshape(inputs, -1), dy.reshape(len(x.reshape(-1, inputs)), -1)


def split(x: np.ndarray, axis: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """x in eight bits, as float64, and its scales along ``axis``."""
    most = 127 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
    scale = np.abs(x).max(axis, keepdims=True) * np.float32(1 / most)
    x = x * (np.float32(1) / scale)
    x = np.round(x) if dtype == np.int8 else x.clip(-most, most).astype(dtype)
    return x.astype(np.float64), scale


def literal(a: np.ndarray, b: np.ndarray, types: tuple[Any, Any]) -> np.ndarray:
    """a b with a quantized by row and b by column: integers summed in int64, float8 in float64."""
    (a, of_a), (b, of_b) = split(a, 1, types[0]), split(b, 0, types[1])
    return ((a @ b).astype(np.float32) * of_a * of_b).astype(np.float32)


def literal_weight(x: np.ndarray, dy: np.ndarray, of_x: Any, of_dy: Any) -> np.ndarray:
    """x^T dy with the wider quantized by row, and the narrower times its scales by column."""
    if dy.size < x.size:
        return literal_weight(dy, x, of_dy, of_x).T
    dy, of_dy = split(dy, 1, of_dy)
    x, of_x = split(x * of_dy, 0, of_x)
    return ((x.T @ dy).astype(np.float32) * of_x.T).astype(np.float32)


@pytest.mark.parametrize("equation", LAYERS)
def test_int8s_forward_product_is_the_literal_one_exactly(equation: str) -> None:
    x, w, dy = operands(equation)
    found = results(multiplied("int8"), equation, x, w, dy)[0]
    a, b, _ = flat(equation, *map(np.asarray, (x, w, dy)))
    np.testing.assert_array_equal(found, literal(a, b, (np.int8, np.int8)).reshape(found.shape))


@pytest.mark.parametrize("equation", LAYERS)
def test_fp8s_three_products_are_the_literal_ones(equation: str) -> None:
    x, w, dy = operands(equation)
    found = results(multiplied("fp8"), equation, x, w, dy)
    a, b, d = flat(equation, *map(np.asarray, (x, w, dy)))
    products = literal(a, b, (E4M3, E4M3)), literal(d, b.T, (E5M2, E4M3)), literal_weight(a, d, E4M3, E5M2)
    for one, wanted in zip(found, products, strict=True):
        np.testing.assert_allclose(one, wanted.reshape(one.shape), rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("equation", LAYERS)
@pytest.mark.parametrize("named", ALL)
def test_a_product_that_is_not_named_is_that_of_floats(equation: str, named: str) -> None:
    x, w, dy = operands(equation)
    found, plain = (results(f, equation, x, w, dy) for f in (multiplied("int8", (named,)), linear))
    whole = results(multiplied("int8"), equation, x, w, dy)
    for name, one, float_, eight in zip(ALL, found, plain, whole, strict=True):
        np.testing.assert_array_equal(one, eight if name == named else float_)
        assert not np.array_equal(float_, eight)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.08)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_error_of_all_three_products_is_small_and_the_type_is_that_of_x(
    kind: str, bound: float, dtype: Any
) -> None:
    x, w, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(4, 64, 96), (96, 80), (4, 64, 80)]))
    exact = results(linear, "BTD,DF->BTF", x, w, dy)
    found = results(multiplied(kind), "BTD,DF->BTF", *(a.astype(dtype) for a in (x, w, dy)))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < bound * jnp.linalg.norm(b)


@pytest.fixture(scope="module", params=[10, 14], ids=["x is wider", "dy is wider"])
def by_seed(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The gradients of 400 seeds, and those of floats, of a dy whose values are mostly below half a step of int8."""
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 8, 12), (12, request.param)]))
    dy = 0.001 * jax.random.normal(jax.random.key(2), (2, 8, request.param))
    dy = dy.at[:, 0].set(1.0).at[:, :, 0].set(1.0)
    seeds = jax.random.bits(jax.random.key(3), (400, 2), jnp.uint32)

    def gradients(seed: jax.Array) -> Any:
        return jax.vjp(lambda x, w: linear("BTD,DF->BTF", x, eight_bits("BTD,DF->BTF", w, seed, "int8")), x, w)[1](dy)

    # w, and x if it is wider, are rounded to the nearest, which is not of interest here.
    of_w, of_x = (quantized(a) for a in (w, x.reshape(16, 12)))
    near_w, near_x = (np.asarray(values * scales) for values, scales in (of_w, of_x))
    near_x = near_x if x.size > dy.size else np.asarray(x).reshape(16, 12)
    flat_dy = np.asarray(dy).reshape(16, -1)
    return jax.jit(jax.vmap(gradients))(seeds), ((flat_dy @ near_w.T).reshape(2, 8, 12), near_x.T @ flat_dy)


@pytest.mark.parametrize("i", [0, 1])
def test_int8s_gradients_are_right_on_average(by_seed: tuple[Any, Any], i: int) -> None:
    found, wanted = np.asarray(by_seed[0][i]), by_seed[1][i]
    error, deviation = found.mean(0) - wanted, found.std(0) / np.sqrt(len(found))
    distances = np.abs(error) / (deviation + 1e-5 * np.abs(wanted).max())
    # In standard deviations: of two hundred numbers none is five, and the mean is sqrt(2 / pi) at most.
    assert found.std(0).max() > 0 and distances.max() < 5 and distances.mean() < 0.9


def test_rounding_to_the_nearest_would_lose_small_gradients() -> None:
    """The claim for which gradients are rounded at random."""
    dy = jnp.full((1, 1000), 0.3 / 127).at[0, 0].set(1.0)
    nearest, scales = quantized(dy)
    at_random, _ = quantized(dy, SEED)
    assert jnp.sum(nearest * scales) == 1.0
    assert float(jnp.sum(at_random * scales)) == pytest.approx(float(jnp.sum(dy)), rel=0.05)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(kind: str, bad: float) -> None:
    x, w, dy = operands("BTD,DF->BTF")
    y, dx, dw = results(multiplied(kind), "BTD,DF->BTF", x.at[0, 0, 0].set(bad), w, dy)
    assert not jnp.any(jnp.isfinite(y[0, 0])) and jnp.all(jnp.isfinite(y[1]))
    assert not jnp.any(jnp.isfinite(dw[0])) and jnp.all(jnp.isfinite(dx))
    zeros = results(multiplied(kind), "BTD,DF->BTF", 0 * x, 0 * w, 0 * dy)
    assert all(not np.any(each) for each in zeros)


def test_small_gradients_are_not_lost() -> None:
    x, w, dy = operands("BTD,DF->BTF")
    large, small = (results(multiplied("int8"), "BTD,DF->BTF", x, w, dy * size) for size in (1.0, 2.0**-60))
    for a, b in zip(large[1:], small[1:], strict=True):
        np.testing.assert_allclose(b * 2.0**60, a, rtol=1e-6)


def test_sums_of_more_tokens_than_int32_holds_do_not_overflow() -> None:
    rows = 4 * 40_000
    x, dy = jnp.ones((4, rows // 4, 1)), jnp.ones((4, rows // 4, 1))
    assert rows * 127**2 > 2**31
    _, _, dw = results(multiplied("int8"), "BTD,DF->BTF", x, jnp.ones((1, 1)), dy)
    np.testing.assert_allclose(dw, rows, rtol=1e-6)


AXES = {"B": "batch", "T": "length", "D": None, "N": "heads", "K": "kv_heads", "H": None, "F": "mlp"}
MESHES = [(1, 4, 2, 1), (2, 1, 2, 2)]


def difference(kind: str, equation: str, sizes: tuple[int, int, int, int]) -> float:
    """How far the three products on a mesh are from those of one device, as a share of their largest values."""
    size = {"B": 8, "T": 4, "D": 8, "N": 4, "K": 2, "H": 4, "F": 16}
    axes = equation.replace("->", ",").split(",")
    values = [jax.random.normal(jax.random.key(i), [size[a] for a in part]) for i, part in enumerate(axes)]
    alone, mesh = results(multiplied(kind), equation, *values), make_mesh(MeshArgs(*sizes))
    shared = [
        jax.device_put(v, NamedSharding(mesh, spec(*("embed" if a == "D" and i == 1 else AXES[a] for a in part))))
        for i, (v, part) in enumerate(zip(values, axes, strict=True))
    ]
    with on_mesh(mesh):
        together = results(multiplied(kind), equation, *shared)
    pairs = zip(map(np.asarray, alone), map(np.asarray, together), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def test_products_are_the_same_on_every_mesh() -> None:
    """Scales and random bits are those of the whole arrays. Only sums over shards are taken in another order."""
    found = run_on_eight_devices("tests.ops.test_eight_bit")
    assert len(found) == 2 * len(LAYERS) * len(MESHES)
    assert max(found.values()) < 1e-6, found


if __name__ == "__main__":
    cases = itertools.product(TYPES, LAYERS, MESHES)
    print(json.dumps({str(case): difference(*case) for case in cases}))
