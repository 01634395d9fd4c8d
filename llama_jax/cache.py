"""The KV cache: keys and values of the tokens that a batch has seen, in slots of preallocated buffers.

L layers, B rows, K KV heads, S slots, H head_dim, T new tokens.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.config import Cache, ModelArgs
from llama_jax.quantize import to_integers

# The type of keys and values by its name; None: the type that is computed in.
CACHE_DTYPES: dict[Cache, Any] = {"auto": None, "int8": jnp.int8}


class Stored(flax.struct.PyTreeNode):
    """Keys or values: [L, B, K, S, H], or a layer's [B, K, S, H]. In int8, with a scale for each token and head."""

    values: jax.Array
    scales: jax.Array | None  # float32 [L, B, K, S]

    def layer(self, index: int | jax.Array, slots: int) -> "Stored":
        """The first ``slots`` slots of a layer."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)[:, :, :slots], self)

    def write(self, x: jax.Array, slot: jax.Array) -> "Stored":
        """With ``x`` [L, B, T, K, H] in slots ``slot`` to slot + T - 1."""
        x = x.swapaxes(2, 3)
        scales = self.scales
        if scales is not None:
            x, scale = to_integers(x, axis=-1, dtype=self.values.dtype)
            scales = jax.lax.dynamic_update_slice_in_dim(scales, scale, slot, axis=3)
        values = jax.lax.dynamic_update_slice_in_dim(self.values, x.astype(self.values.dtype), slot, axis=3)
        return Stored(values, scales)


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of all layers. Rows are padded on the left, so that all of them write their next token to the same slot.

    Attention reads the slots that were filled before, and the new keys and values where they were made. They are written once
    for all layers, behind the last read: XLA has no reason to copy a buffer.
    """

    k: Stored
    v: Stored
    slot: jax.Array  # int32 []: the slot that is written next
    first: jax.Array  # int32 [B]: the slot of the row's first token

    @classmethod
    def empty(cls, args: ModelArgs, first: jax.Array, slots: int, dtype: jnp.dtype) -> "KVCache":
        """A cache of ``slots`` slots for rows whose first tokens stand at slots ``first`` [B]. int8: quantized."""
        shape = (args.n_layers, first.shape[0], args.kv_heads, slots, args.head_dim)

        def empty() -> Stored:
            return Stored(jnp.zeros(shape, dtype), jnp.zeros(shape[:4], jnp.float32) if dtype == jnp.int8 else None)

        return cls(empty(), empty(), jnp.zeros((), jnp.int32), first)

    def write(self, k: jax.Array, v: jax.Array) -> "KVCache":
        """With the next tokens' keys and values [L, B, T, K, H]."""
        return KVCache(self.k.write(k, self.slot), self.v.write(v, self.slot), self.slot + k.shape[2], self.first)
