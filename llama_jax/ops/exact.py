"""Exact generation: a token's numbers depend, to the bit, only on the tokens before it.

Libraries and compilers add the terms of a sum in an order that depends on array shapes: how many rows are computed
together, how many tokens are fed at a time, how far a cache is filled. In float32 this changes the last digits. In
bfloat16 or with an int8 cache, a last digit decides how a number is rounded, and sometimes which token comes next. Here
the order of
every sum is fixed:

- A product has a fixed number of rows (``product_in_blocks``), and a sum is a product with ones (``sums``).
- A product is rounded before something is added to it (``rounded``).
- Each row's tokens are in the cache from slot 0 on. New tokens are written before attention reads the cache, and
  attention sums over tiles of slots in order (``attention``).

B rows, T new tokens, N query heads, K KV heads, G = N/K, H head_dim, S slots.
"""

import jax
import jax.numpy as jnp

from llama_jax.ops.cache import KVArray

# Rows of each product. If memory bandwidth is the limit, they cost little more than one row.
ROWS, CPU_ROWS = 64, 16
# Queries and slots of each product of attention.
QUERIES, TILE = 8, 256
# Columns of the product that computes means.
COLUMNS = 8


def product_in_blocks(x: jax.Array, values: jax.Array, rows: int, transposed: bool = False) -> jax.Array:
    """Return x @ values in float32, [R, D], [D, F] -> [R, F], as products of ``rows`` rows, the last one padded with
    zeros.

    transposed: values are [F, D]. The result of a row depends on the shape of its product, but not on the row's place
    in it.
    """
    equation = "RD,FD->RF" if transposed else "RD,DF->RF"
    blocks = jnp.pad(x, [(0, -len(x) % rows), (0, 0)]).reshape(-1, rows, x.shape[1])

    def product(block: jax.Array) -> jax.Array:
        return jnp.einsum(equation, block, values.astype(x.dtype), preferred_element_type=jnp.float32)

    result = jax.lax.map(product, blocks).reshape(-1, values.shape[0 if transposed else 1])[: len(x)]
    # A trick: the barrier keeps the compiler from fusing this with what follows. Fused, it would differ between
    # programs.
    return jax.lax.optimization_barrier(result)


def means(x: jax.Array, rows: int) -> jax.Array:
    """Return means over the last axis, float32 [..., D] -> [..., 1]."""
    D = x.shape[-1]
    # Two tricks: compilers turn a product with one column into a sum, and fuse it with what makes x, both in ways that
    # depend on the number of blocks. So it has COLUMNS equal ones, and x is complete before it begins.
    ones = jnp.full((D, COLUMNS), 1 / D, jnp.float32)
    with jax.default_matmul_precision("highest"):
        means = product_in_blocks(jax.lax.optimization_barrier(x.reshape(-1, D)), ones, rows)
    return means[:, :1].reshape(*x.shape[:-1], 1)


def rounded(x: jax.Array) -> jax.Array:
    """Return float32 ``x`` in a form that no compiler fuses into a multiply-add, which rounds once instead of twice.

    Whether a compiler fuses depends on the other operations in the loop. The trick is to add 0 to the bits (x != x is 0
    unless x is NaN), which it cannot simplify.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type(bits + (x != x), jnp.float32)


@jax.named_scope("attention")
def attention(q: jax.Array, k: KVArray, v: KVArray, slot: jax.Array, window: int | None = None) -> jax.Array:
    """Attend causally over a cache that holds the new tokens: q [B, T, N, H]; k, v [B, K, S, H] -> [B, T, N, H] of q's
    dtype.

    Each row's tokens are in slots 0 and following, the new ones from ``slot`` [B] on. S is a multiple of TILE. A query
    sees its own slot and those before it, ``window`` of them if given. Slots that it does not see add zeros before and
    after those it sees, which changes no sum.
    """
    B, T, N, H = q.shape
    K, S = k.values.shape[1:3]
    G, Q, tiles = N // K, QUERIES, S // TILE
    # C blocks of Q queries are processed in sequence. Each has R = G Q rows per head, over I tiles of slots.
    q = jnp.pad(q * H**-0.5, [(0, 0), (0, -T % Q), (0, 0), (0, 0)])
    C = q.shape[1] // Q
    q = q.reshape(B, C, Q, K, G, H).transpose(1, 0, 3, 4, 2, 5).reshape(C, B, K, 1, G * Q, H)
    position = (slot[:, None] + jnp.arange(C * Q)).reshape(B, C, Q).swapaxes(0, 1)
    position = jnp.tile(position, (1, 1, G)).reshape(C, B, 1, 1, G * Q, 1)
    of_slot = jnp.arange(S).reshape(tiles, 1, TILE)
    k, v = jax.tree.map(lambda x: x.reshape(B, K, tiles, TILE, *x.shape[3:]), (k, v))

    def attend(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, position = block
        scores = _float32("BKIRH,BKISH->BKIRS", jnp.broadcast_to(q, (B, K, tiles, G * Q, H)), k.values)
        if k.scales is not None:
            scores = rounded(scores * k.scales[:, :, :, None])
        seen = of_slot <= position
        if window is not None:
            seen &= of_slot > position - window
        scores = jnp.where(seen, scores, -jnp.inf)
        weights = jnp.exp(scores - jnp.max(scores, axis=(2, 4), keepdims=True))
        with jax.default_matmul_precision("highest"):
            norm = _float32("BKIRS,BKISH->BKIRH", weights, jnp.ones((B, K, tiles, TILE, 1)))
        if v.scales is not None:
            weights *= v.scales[:, :, :, None]
        y = _float32("BKIRS,BKISH->BKIRH", weights.astype(q.dtype), v.values)
        y, norm = (_added_up(x.swapaxes(0, 2)) for x in (y, norm))
        return (y / norm).astype(q.dtype)

    y = jax.lax.map(attend, (q, position))  # [C, K, B, R, H]
    y = y.reshape(C, K, B, G, Q, H).transpose(2, 0, 4, 1, 3, 5).reshape(B, C * Q, N, H)[:, :T]
    # The same trick as in product_in_blocks.
    return jax.lax.optimization_barrier(y)


def _added_up(parts: jax.Array) -> jax.Array:
    """Return the sum over the first axis, in order."""
    return jax.lax.scan(lambda total, part: (total + part, None), jnp.zeros_like(parts[0]), parts)[0]


def _float32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute einsum in float32, with y converted to x's type."""
    return jnp.einsum(equation, x, y.astype(x.dtype), preferred_element_type=jnp.float32)
