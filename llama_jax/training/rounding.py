"""Rounding of float32 numbers to bfloat16, such that small updates of parameters are not lost.

An update of a fine-tuning step is often less than half of what separates a bfloat16 number from the next. Rounded to
the nearest, it would vanish each time. Stochastic rounding keeps it on average. Compensated (Kahan) rounding keeps what
is lost in a second bfloat16 number. Both are in "Revisiting BFloat16 Training" (Zamirai et al., 2020, section 4).
"""

import jax
import jax.numpy as jnp


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
