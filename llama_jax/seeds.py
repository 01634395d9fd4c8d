"""Random keys: threefry2x32 by name, so that a seed gives the same numbers whatever the settings of JAX are."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl, threefry_prng_impl
from jax.typing import ArrayLike


def random_key(seed: ArrayLike) -> jax.Array:
    """Return the random key of a seed, an integer from 0 to 2^32 - 1.

    It is the key that ``jax.random.key(seed)`` returns by default, and its random numbers are the same. That function
    obeys JAX_DEFAULT_PRNG_IMPL, JAX_RANDOM_SEED_OFFSET and JAX_THREEFRY_PARTITIONABLE, which the user may have set for
    other work.
    """
    words = jnp.stack([jnp.uint32(0), jnp.asarray(seed, jnp.uint32)])
    return jax.random.wrap_key_data(words, impl=_THREEFRY)


def _split(key: jax.Array, shape: tuple[int, ...]) -> Any:
    with jax.threefry_partitionable(True):
        return threefry_prng_impl.split(key, shape)


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> Any:
    with jax.threefry_partitionable(True):
        return threefry_prng_impl.random_bits(key, bit_width, shape)


# Bits that each device computes for its own part of an array, which are JAX's default. The keys carry this choice with them.
_THREEFRY = define_prng_impl(
    key_shape=(2,),
    seed=threefry_prng_impl.seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=threefry_prng_impl.fold_in,
    name="threefry2x32",
    tag="fry",
)
