"""Rounding to bfloat16: unbiased at random, exact to 16 bits where it is compensated, and the same on every mesh."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llama_jax.ops.noise import noise, uniform
from llama_jax.training.rounding import compensated, nearest, stochastic

RNG = np.random.default_rng(0)
NUMBERS = np.concatenate([RNG.normal(size=500), RNG.normal(size=500) * 1e-6, [0.0, 1.0, -2.0, 3e38, 1e-38]])
X = NUMBERS.astype(np.float32)


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 numbers next to float32 ones, towards zero and away from it."""
    toward = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    away = ((x.view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
    return toward, np.where(toward == x, x, away)


def test_stochastic_rounding_takes_one_of_the_two_neighbours_as_often_as_the_formula_says() -> None:
    toward, away = neighbours(X)
    draws = 4000
    bits = np.random.default_rng(1).integers(1 << 32, size=(draws, len(X)), dtype=np.uint32)
    rounded = np.asarray(jax.jit(jax.vmap(stochastic, (None, 0)))(X, bits)).astype(np.float32)
    assert ((rounded == toward) | (rounded == away)).all()
    share = np.where(away > toward, 1, -1) * (X - toward) / np.where(away == toward, 1, np.abs(away - toward))
    found = (rounded == away).mean(axis=0)
    inexact = away != toward
    assert np.abs(found - share)[inexact].max() < 5 * 0.5 / np.sqrt(draws)
    np.testing.assert_array_equal(rounded[:, ~inexact], np.broadcast_to(X[~inexact], (draws, (~inexact).sum())))


def test_the_mean_over_many_seeds_is_the_number() -> None:
    """By the module's own bits; to the nearest, the mean would be off by up to half of what separates neighbours."""
    seeds = np.random.default_rng(2).integers(1 << 32, size=(4000, 2), dtype=np.uint32)
    rounded = jax.jit(jax.vmap(lambda seed: stochastic(jnp.asarray(X), noise(seed, X.shape)).astype(jnp.float32)))
    error = np.asarray(rounded(seeds), np.float64).mean(axis=0) - X.astype(np.float64)
    assert np.all(np.abs(error) <= 5 * np.abs(X.astype(np.float64)) * 2**-7 / 2 / np.sqrt(len(seeds)) + 1e-45)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays(value: float) -> None:
    found = stochastic(jnp.float32(value), jnp.uint32(2**32 - 1)).astype(jnp.float32)
    np.testing.assert_array_equal(found, np.float32(value))


def test_nearest_is_the_libraries() -> None:
    np.testing.assert_array_equal(jax.jit(nearest)(X), X.astype(ml_dtypes.bfloat16))


def test_a_compensated_sum_is_numpys_formula_and_loses_a_65536th_at_most() -> None:
    """Also compiled, where XLA may leave out a conversion and back."""
    rounded, rest = jax.jit(lambda x: compensated(x, jnp.bfloat16))(X)
    expected = X.astype(ml_dtypes.bfloat16)
    left = (X - expected.astype(np.float32)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(rounded, expected)
    np.testing.assert_array_equal(rest, left)
    both = np.asarray(rounded, np.float64) + np.asarray(rest, np.float64)
    assert np.all(np.abs(both - X) <= np.abs(X) * 2.0**-16 + 1e-40)


def test_small_steps_add_up() -> None:
    """A thousand of a tenth of what bfloat16 can add: to the nearest, none would have an effect."""
    step = np.float32(2**-7 / 10)

    def compensated_step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        value, rest = carry
        return compensated(value.astype(jnp.float32) + rest.astype(jnp.float32) + step, jnp.bfloat16), None

    def stochastic_step(value: jax.Array, seed: jax.Array) -> tuple[jax.Array, None]:
        return stochastic(value.astype(jnp.float32) + step, noise(seed, value.shape)), None

    start = jnp.ones(512, jnp.bfloat16)
    (value, rest), _ = jax.lax.scan(compensated_step, (start, jnp.zeros_like(start)), length=1000)
    exact = 1 + 1000 * float(step)
    np.testing.assert_allclose(np.asarray(value, np.float64) + np.asarray(rest, np.float64), exact, rtol=2e-3)
    seeds = jnp.asarray(np.random.default_rng(3).integers(1 << 32, size=(1000, 2), dtype=np.uint32))
    value, _ = jax.lax.scan(stochastic_step, start, seeds)
    assert np.asarray(value, np.float64).mean() == pytest.approx(exact, rel=5e-3)
    assert nearest(jnp.float32(1) + step) == 1


def test_bits_are_even_and_those_of_neighbours_and_of_other_seeds_have_nothing_in_common() -> None:
    shape = (64, 16, 32)
    many = np.stack([noise(jnp.asarray(seed, jnp.uint32), shape) for seed in ([0, 0], [1, 0], [0, 1], [7, 9])])
    shares = np.unpackbits(many.reshape(4, -1, 1).view(np.uint8), axis=-1).mean(axis=1)
    assert np.abs(shares - 0.5).max() < 5 * 0.5 / np.sqrt(many[0].size)
    values = np.asarray(jax.vmap(uniform)(jnp.asarray(many)))
    assert values.min() >= 0 and values.max() < 1 and values.mean() == pytest.approx(0.5, abs=0.005)
    pairs = [(values[a], values[b]) for a in range(4) for b in range(a)]
    pairs += [(np.roll(values[0], 1, axis), values[0]) for axis in range(3)]
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)
