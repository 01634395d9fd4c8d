"""Softmax attention in blocks of queries, each of which sees a range of keys, and its gradient.

On a CPU the gradient is a large part of a training step. It is written so that no scores are transposed, nothing is
padded, and between the passes only the operands, the result and the softmax's weights are kept.

B batch, T query positions, S key positions, K KV heads, G query heads per KV head, H head_dim.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.ops.gradient_order import known_after

# The name of attention's result for rematerialisation policies (remat.py).
ATTENTION = "attention"


class Span(NamedTuple):
    """A block: queries ``at`` to ``end`` - 1, and the keys ``begin`` to ``seen`` - 1, outside which they see none."""

    at: int
    end: int
    begin: int
    seen: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def softmax_attention(
    spans: tuple[Span, ...], q: jax.Array, k: jax.Array, v: jax.Array, biases: list[jax.Array]
) -> jax.Array:
    """Compute softmax(q k + bias) v in blocks of queries: q [B, K, G, T, H]; k, v [B, K, S, H] -> [B, K, G, T, H].

    spans: the blocks, which together have all queries, in order. biases: float32 of each block, [queries, keys] or
    [B, 1, 1, queries, keys]; they are not differentiated. Divisions and sums are over [T, H] instead of [T, S] if
    possible: the softmax is normalised after its product with v, and its gradient uses the sum of dy y instead of dw w
    (FlashAttention-2, section 3.1).
    """
    return _forward(spans, q, k, v, biases)[0]


def _forward(
    spans: tuple[Span, ...], q: jax.Array, k: jax.Array, v: jax.Array, biases: list[jax.Array]
) -> tuple[jax.Array, Any]:
    of_blocks = []
    for (at, end, begin, seen), bias in zip(spans, biases, strict=True):
        keys, values = k[:, :, begin:seen], v[:, :, begin:seen]
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", q[:, :, :, at:end], keys, preferred_element_type=jnp.float32) + bias
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        norm = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(v.dtype)
        y = jnp.einsum("BKGTS,BKSH->BKGTH", weights, values, preferred_element_type=jnp.float32) / norm
        of_blocks.append((y.astype(v.dtype), norm, weights))
    ys, norms, kept = zip(*of_blocks, strict=True)
    y = checkpoint_name(jnp.concatenate(ys, axis=3), ATTENTION)
    return y, (q, k, v, kept, jnp.concatenate(norms, axis=3), y)


def _backward(spans: tuple[Span, ...], saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, norm, y = saved
    q, k, v = (known_after(dy, x) for x in (q, k, v))
    # Take the sums of all blocks at once. XLA on a CPU would put the sum of each block into one slow kernel with its use.
    dy = dy.astype(jnp.float32) / norm
    mean = jnp.sum(dy * y, axis=-1, keepdims=True)
    dy = dy.astype(v.dtype)
    dq, dk, dv = [], [], []
    for (at, end, begin, seen), w in zip(spans, weights, strict=True):
        of_y, values = dy[:, :, :, at:end], v[:, :, begin:seen]
        d_weights = jnp.einsum("BKGTH,BKSH->BKGTS", of_y, values, preferred_element_type=jnp.float32)
        d_scores = (w * (d_weights - mean[:, :, :, at:end])).astype(k.dtype)
        dq.append(jnp.einsum("BKGTS,BKSH->BKGTH", d_scores, k[:, :, begin:seen]).astype(q.dtype))
        # With keys last, as the scores have them, a CPU need not transpose the scores.
        dk.append(jnp.einsum("BKGTH,BKGTS->BKHS", q[:, :, :, at:end].astype(k.dtype), d_scores))
        dv.append(jnp.einsum("BKGTH,BKGTS->BKHS", of_y, w))
    d_keys, d_values = (_sum_over_blocks(spans, parts, k.shape[2]).swapaxes(2, 3) for parts in (dk, dv))
    return jnp.concatenate(dq, axis=3), d_keys, d_values, None


def _sum_over_blocks(spans: tuple[Span, ...], parts: list[jax.Array], keys: int) -> jax.Array:
    """Add up what the blocks give to the keys that they see, each [..., its keys] -> [..., keys]. Nothing is padded."""
    borders = sorted({0, keys, *(span.begin for span in spans), *(span.seen for span in spans)})
    sums = []
    for begin, end in itertools.pairwise(borders):
        given = [
            part[..., begin - s.begin : end - s.begin]
            for s, part in zip(spans, parts, strict=True)
            if s.begin <= begin and end <= s.seen
        ]
        sums.append(sum(given[1:], given[0]))
    return jnp.concatenate(sums, axis=-1)


softmax_attention.defvjp(_forward, _backward)
