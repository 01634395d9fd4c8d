"""Random keys: threefry2x32 by name, so that a seed gives the same numbers whatever the settings of JAX are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl, threefry_prng_impl
from jax.typing import ArrayLike

from llama_jax.errors import UserError, quoted

LARGEST_SEED = 2**32 - 1


def random_key(seed: ArrayLike) -> jax.Array:
    """Return the random key of a seed: an integer from 0 to 2^32 - 1, or uint32 [] within a compiled function.

    It is the key that ``jax.random.key(seed)`` returns by default, and its random numbers are the same. That function
    obeys JAX_DEFAULT_PRNG_IMPL, JAX_RANDOM_SEED_OFFSET and JAX_THREEFRY_PARTITIONABLE, which the user may have set for
    other work. Raises UserError on another seed.
    """
    if not isinstance(seed, jax.Array):
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= LARGEST_SEED:
            raise UserError(f"seed: expected 0 to {LARGEST_SEED:,}, found {quoted(seed)}")
    elif seed.dtype != jnp.uint32:
        raise UserError(f"seed: expected uint32, found an array of {seed.dtype}")
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
