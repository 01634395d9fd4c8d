"""Causal attention with grouped queries, over a sequence or over a KV cache.

B batch, T query positions, S key positions, N query heads, K KV heads, G = N/K, H head_dim.
"""

import jax
import jax.numpy as jnp

# Queries a block. A block sees only the keys before its end, which halves the work of a causal mask over the whole square
# and keeps the scores small enough for a core's cache.
BLOCK = 64
# Longer sequences have larger blocks instead of more: the program's length stays bounded.
MAX_BLOCKS = 16


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, slot: jax.Array | None = None, first: jax.Array | None = None
) -> jax.Array:
    """Softmax attention; no query sees a key after its own position.

    q: [B, T, N, H]; k, v: [B, S, K, H]. Keys and values are not repeated: query head n reads KV head n // G.
    Without ``slot``, T = S and query t sees keys 0..t. With ``slot`` (an integer scalar; k and v are then a cache), query t
    sees keys up to slot + t. ``first`` [B]: the first key slot that holds a token of the row; slots before are padding.
    Returns [B, T, N, H] of q's dtype; scores and softmax are float32.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    # Heads before positions: a CPU multiplies each head's matrices where they lie.
    q = (q * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    block = max(BLOCK, -(-T // MAX_BLOCKS))
    blocks = []
    for start in range(0, T, block):
        end = min(start + block, T)
        positions = jnp.arange(start, end) + (0 if slot is None else slot)
        seen = end if slot is None else k.shape[2]
        blocks.append(_attend(q[:, :, :, start:end], k[:, :, :seen], v[:, :, :seen], positions, first))
    out = jnp.concatenate(blocks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, first: jax.Array | None) -> jax.Array:
    """Attention of queries [B, K, G, T, H] at slots ``positions`` [T] over keys and values [B, K, S, H] at slots 0 to S - 1."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
    slots = jnp.arange(k.shape[2])
    visible = slots <= positions[:, None]
    if first is not None:
        # A padding query sees itself, so that its softmax, which nobody reads, stays finite.
        visible = (visible & (slots >= first[:, None, None]))[:, None, None] | (slots == positions[:, None])
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights, v)
