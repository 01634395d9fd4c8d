"""The quarter turn of rotary embeddings, in the fastest form for each platform.

B batch, T positions, N heads, H head_dim.
"""

import jax
import jax.numpy as jnp
import numpy as np


def quarter_turn(x: jax.Array) -> jax.Array:
    """Map the halves (a, b) of the last axis to (-b, a): [B, T, N, H] -> the same shape and dtype."""
    return jax.lax.platform_dependent(x, tpu=_by_product, default=_by_halves)


def _by_halves(x: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-b, a], axis=-1)


def _by_product(x: jax.Array) -> jax.Array:
    """Multiply by a matrix of 0, 1 and -1, which gives exact results.

    This is a trick for TPUs. The product costs them almost nothing, while halves would not align with their registers.
    """
    H = x.shape[-1]
    turn = np.eye(H, k=H // 2) - np.eye(H, k=-H // 2)
    return jnp.einsum("BTNH,HI->BTNI", x, turn.astype(x.dtype), precision="highest")
