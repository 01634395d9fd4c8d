"""Moments in 8 bits: how exact they are, that they are right on average, and what stays zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.training.moments import BLOCK, block_axis, pack, unpack

SHAPE = (256, 12)
RNG = np.random.default_rng(0)
# Over ten decades, as gradients of one matrix are.
FIRST = (RNG.normal(size=SHAPE) * 10.0 ** RNG.uniform(-10, 0, size=SHAPE)).astype(np.float32)
FIRST[:, 3] = 0
SECOND = FIRST**2


def bits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1 << 32, size=SHAPE, dtype=np.uint32)


@pytest.mark.parametrize(("signed", "x"), [(True, FIRST), (False, SECOND)])
def test_a_packed_number_is_one_of_the_two_levels_beside_it(signed: bool, x: np.ndarray) -> None:
    """By a literal implementation in float64."""
    top, power = (127, 2) if signed else (255, 4)
    levels = (np.arange(top + 1) / top) ** power
    packed = jax.jit(pack, static_argnums=2)(x, bits(1), signed)
    assert packed.codes.dtype == (jnp.int8 if signed else jnp.uint8) and packed.codes.shape == SHAPE
    largest = np.abs(x).reshape(-1, BLOCK, SHAPE[1]).max(axis=1)
    np.testing.assert_array_equal(packed.scales, largest)
    scale = np.repeat(largest, BLOCK, axis=0).astype(np.float64)
    share = np.abs(x.astype(np.float64)) / np.where(scale > 0, scale, 1)
    found = np.abs(np.asarray(unpack(packed), np.float64)) / np.where(scale > 0, scale, 1)
    at = np.clip(np.searchsorted(levels, share, side="right") - 1, 0, top - 1)
    low, high = levels[at], levels[at + 1]
    near = np.minimum(np.abs(found - low), np.abs(found - high))
    assert np.all(near <= 1e-6 * high + 1e-12)
    assert np.all(np.sign(unpack(packed)) * np.sign(x) >= 0)
    assert not np.any(np.asarray(packed.codes)[:, 3]) and np.all(np.isfinite(unpack(packed)))


def test_an_update_of_two_packed_moments_is_close_where_it_is_large() -> None:
    """The relative error of the root of the second moment: 1% at the block's largest, 10% at a hundredth."""
    root = np.sqrt(np.asarray(unpack(pack(jnp.asarray(SECOND), jnp.asarray(bits(2)), False)), np.float64))
    largest = np.repeat(np.abs(FIRST).reshape(-1, BLOCK, SHAPE[1]).max(axis=1), BLOCK, axis=0)
    share = np.abs(FIRST) / np.where(largest > 0, largest, 1)
    error = np.abs(root - np.abs(FIRST)) / np.where(FIRST == 0, 1, np.abs(FIRST))
    assert error[share > 0.9].max() < 0.01 and error[share > 0.01].max() < 0.1


@pytest.mark.parametrize(("signed", "x"), [(True, FIRST), (False, SECOND)])
def test_the_mean_over_many_roundings_is_the_number(signed: bool, x: np.ndarray) -> None:
    draws = np.random.default_rng(3).integers(1 << 32, size=(2000, *SHAPE), dtype=np.uint32)
    found = jax.jit(jax.vmap(lambda b: unpack(pack(jnp.asarray(x), b, signed))))(draws)
    mean, deviation = np.asarray(found, np.float64).mean(axis=0), np.asarray(found, np.float64).std(axis=0)
    largest = np.repeat(np.abs(x).reshape(-1, BLOCK, SHAPE[1]).max(axis=1), BLOCK, axis=0)
    # 16 bits decide; and second moments below the first level are rounded up.
    floor = largest * (2.0**-16 if signed else 255.0**-4) + np.abs(x) * 1e-4
    assert np.all(np.abs(mean - x) <= 6 * deviation / np.sqrt(len(draws)) + 1.001 * floor)


def test_a_second_moment_that_is_not_zero_does_not_become_zero() -> None:
    tiny = np.full(SHAPE, 1e-20, np.float32)
    tiny[0] = 1.0
    assert np.all(np.asarray(pack(jnp.asarray(tiny), jnp.zeros(SHAPE, jnp.uint32) - 1, False).codes) >= 1)


def test_a_moment_that_decays_by_less_than_half_a_level_a_step_decays_on_average() -> None:
    """Rounded to the nearest, it would stay where it is for ever: a step is a fifteenth of a level."""

    def step(packed: tuple[jax.Array, jax.Array], draw: jax.Array):
        x = jnp.where(jnp.arange(SHAPE[0])[:, None] % BLOCK == 0, 1.0, 0.999 * unpack(packed))  # type: ignore[arg-type]
        return pack(x, draw, False), None

    draws = np.random.default_rng(4).integers(1 << 32, size=(500, *SHAPE), dtype=np.uint32)
    start = pack(jnp.full(SHAPE, 0.5).at[::BLOCK].set(1.0), jnp.asarray(bits(5)), False)
    end, _ = jax.jit(lambda: jax.lax.scan(step, start, draws))()
    rest = np.delete(np.asarray(unpack(end)), np.arange(0, SHAPE[0], BLOCK), axis=0)
    assert rest.mean() == pytest.approx(0.5 * 0.999**500, rel=0.02)


@given(st.lists(st.integers(1, 40000), min_size=2, max_size=3).map(tuple))
def test_blocks_are_the_largest_that_divide_an_axis(shape: tuple[int, ...]) -> None:
    axis, size = block_axis(shape)
    assert shape[axis] % size == 0 and 1 <= size <= BLOCK
    assert size == max(d for length in shape for d in range(1, BLOCK + 1) if length % d == 0)


@pytest.mark.parametrize("shape", [(256, 3), (3, 256), (7, 96, 5), (1, 1), (131, 2)])
def test_an_array_of_any_shape_is_packed(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    packed = pack(jnp.asarray(x), jnp.zeros(shape, jnp.uint32), True)
    assert packed.scales.size * block_axis(shape)[1] == x.size
    assert np.abs(np.asarray(unpack(packed)) - x).max() <= np.abs(x).max() * 2 / 127


def test_blocks_lie_where_meshes_cut_between_them() -> None:
    assert block_axis((4096, 11008)) == (0, 128) and block_axis((11008, 4096)) == (1, 128)
    assert block_axis((4096, 32, 128)) == (0, 128) and block_axis((4096, 32001)) == (0, 128)
