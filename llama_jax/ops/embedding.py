"""Token embeddings: lookup of rows in a table that is sharded over devices.

B batch, T positions, D dim, V vocab.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.devices.sharding import gather_shards, shard_by_shard, sum_shards

TABLE, TOKENS, VECTORS = ("vocab", "embed"), ("batch", "length"), ("batch", "length", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@jax.named_scope("embedding")
def embed(table: jax.Array, token_ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Look up rows of ``table``: float [V, D], int [B, T] -> [B, T, D] of ``dtype``. The gradient has the table's type.

    Each device gathers the table, already in ``dtype``, and looks up its own tokens. The partitioner alone would look
    up all devices' tokens in each device's columns and exchange the results.
    """

    def lookup(table: jax.Array, token_ids: jax.Array) -> jax.Array:
        return jnp.take(gather_shards(table.astype(dtype), "embed", axis=1), token_ids, axis=0)

    return shard_by_shard(lookup, TOKENS, (TABLE, TOKENS), VECTORS)(table, token_ids)


def embed_few(table: jax.Array, token_ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Compute ``embed`` of the few tokens of a step of generation, for which it would gather the table every time."""
    return jnp.take(table, token_ids, axis=0).astype(dtype)


def _forward(table: jax.Array, token_ids: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return embed(table, token_ids, dtype), (table, token_ids)


@jax.named_scope("embedding")
def _backward(dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, None]:
    table, token_ids = saved

    def add_up(token_ids: jax.Array, dy: jax.Array) -> jax.Array:
        # A token may stand in thousands of places, whose sum bfloat16 would not hold.
        whole = jnp.zeros(table.shape, jnp.float32).at[token_ids].add(dy.astype(jnp.float32))
        return sum_shards(whole, "embed", 1, "batch", "length").astype(table.dtype)

    return shard_by_shard(add_up, TOKENS, (TOKENS, VECTORS), TABLE)(token_ids, dy), None


embed.defvjp(_forward, _backward)
