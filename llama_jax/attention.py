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
    slots = jnp.arange(k.shape[2])
    visible = slots <= positions[:, None]
    if first is not None:
        # A padding query sees itself, so that its softmax, which nobody reads, stays finite.
        visible = (visible & (slots >= first[:, None, None]))[:, None, None] | (slots == positions[:, None])
    return _softmax_attention(q, k, v, jnp.where(visible, 0.0, -jnp.inf))


@jax.custom_vjp
def _softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """softmax(q k + bias) v: q [B, K, G, T, H]; k, v [B, K, S, H]; bias float32 [T, S] or [B, 1, 1, T, S], not differentiated.

    What is divided and summed is [T, H] and never [T, S] where that can be: the softmax is normalised behind its product
    with v, and its gradient needs the sum of dy y and not of dw w (FlashAttention-2, section 3.1).
    """
    return _forward(q, k, v, bias)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32) + bias
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    norm = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    y = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v, preferred_element_type=jnp.float32) / norm
    return y.astype(v.dtype), (q, k, v, weights, norm, y)


def _backward(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, norm, y = saved
    dy = dy.astype(jnp.float32) / norm
    mean = jnp.sum(dy * y, axis=-1, keepdims=True)
    dy = dy.astype(v.dtype)
    d_weights = jnp.einsum("BKGTH,BKSH->BKGTS", dy, v, preferred_element_type=jnp.float32)
    d_scores = (weights * (d_weights - mean)).astype(k.dtype)
    dq = jnp.einsum("BKGTS,BKSH->BKGTH", d_scores, k).astype(q.dtype)
    dk = jnp.einsum("BKGTS,BKGTH->BKSH", d_scores, q.astype(k.dtype))
    dv = jnp.einsum("BKGTS,BKGTH->BKSH", weights, dy)
    return dq, dk, dv, None


_softmax_attention.defvjp(_forward, _backward)
