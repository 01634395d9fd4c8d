"""Rounding of float32 numbers to bfloat16, such that small updates of parameters are not lost.

An update of a fine-tuning step is often less than half of what separates a bfloat16 number from the next. Rounded to
the nearest, it would vanish each time. Stochastic rounding keeps it on average. Compensated (Kahan) rounding keeps what
is lost in a second bfloat16 number. Both are in "Revisiting BFloat16 Training" (Zamirai et al., 2020, section 4).
"""

import math

import jax
import jax.numpy as jnp

# The finalizer of MurmurHash3: odd multipliers and shifts by which each bit of the input changes half of the output's.
_MULTIPLIERS, _SHIFTS = (0x85EBCA6B, 0xC2B2AE35), (16, 13, 16)
_GOLDEN = 0x9E3779B9  # 2^32 divided by the golden ratio spreads consecutive numbers


def noise(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return random bits, uint32 of ``shape``, which depend on ``seed``, uint32 [2], and on the place in the array.

    They are the same on every mesh, and computed where they are used. JAX's own generator takes seven times as many
    operations, as much as a tenth of a step.
    """
    at = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % (1 << 32)
        at += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return _mixed(_mixed(at * jnp.uint32(_GOLDEN) + seed[0]) ^ seed[1])


def _mixed(x: jax.Array) -> jax.Array:
    for multiplier, shift in zip(_MULTIPLIERS, _SHIFTS, strict=False):
        x = (x ^ (x >> shift)) * jnp.uint32(multiplier)
    return x ^ (x >> _SHIFTS[-1])


def uniform(bits: jax.Array) -> jax.Array:
    """Return the upper 16 of ``bits``, uint32, as float32 numbers from 0 to below 1."""
    return (bits >> 16).astype(jnp.float32) * jnp.float32(2**-16)


def stochastic(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Round float32 to bfloat16, up or down, such that the mean over ``bits`` is ``x``.

    bits: random, uint32 of x's shape, of which the upper 16 count. Numbers that bfloat16 has stay as they are.
    """
    # bfloat16 is the upper half of float32. The lower half is the probability of rounding up, in 65,536 parts.
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits >> 16)
    rounded = jax.lax.bitcast_convert_type(raised & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def compensated(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Split float32 into the nearest number of ``dtype`` and the rest, bfloat16. With bfloat16 they have 16 bits."""
    rounded = nearest(x) if dtype == jnp.bfloat16 else x
    return rounded, nearest(x - rounded.astype(jnp.float32))


def nearest(x: jax.Array) -> jax.Array:
    """Round float32 to the nearest bfloat16."""
    # XLA may leave out a conversion to bfloat16 and back. It keeps this operation.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)
