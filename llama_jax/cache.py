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
    """Keys or values: [B, K, S, H], or all layers' [L, B, K, S, H]. In int8, with a scale for each token and head."""

    values: jax.Array
    scales: jax.Array | None  # float32 [B, K, S] or [L, B, K, S]

    def layer(self, index: int) -> "Stored":
        """One of all layers."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), self)

    def begin(self, slots: int) -> "Stored":
        """The first ``slots`` slots of a layer."""
        return jax.tree.map(lambda x: x[:, :, :slots], self)

    def write(self, x: jax.Array, slot: jax.Array) -> "Stored":
        """With ``x``, [B, T, K, H] or all layers' [L, B, T, K, H], in slots ``slot`` to slot + T - 1."""
        x = x.swapaxes(-3, -2)
        scales = self.scales
        if scales is not None:
            x, scale = to_integers(x, axis=-1, dtype=self.values.dtype)
            scales = jax.lax.dynamic_update_slice_in_dim(scales, scale, slot, axis=-1)
        values = jax.lax.dynamic_update_slice_in_dim(self.values, x.astype(self.values.dtype), slot, axis=-2)
        return Stored(values, scales)


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of all layers. Rows are padded on the left, so that all of them write their next token to the same slot.

    Attention reads the slots that were filled before, and the new keys and values where they were made. They are written
    behind the last read: XLA has no reason to copy a buffer. A TPU reads a part of a buffer where it lies, and every write
    costs it time: there one buffer holds all layers. Elsewhere XLA copies each part that a product reads: every layer has
    buffers of its own, which are read whole and grow (sharding.layers_apart).
    """

    k: Stored | tuple[Stored, ...]
    v: Stored | tuple[Stored, ...]
    slot: jax.Array  # int32 []: the slot that is written next
    first: jax.Array  # int32 [B]: the slot of the row's first token

    @classmethod
    def empty(
        cls, args: ModelArgs, first: jax.Array, slots: int, dtype: jnp.dtype, by_layer: bool = False
    ) -> "KVCache":
        """A cache of ``slots`` slots for rows whose first tokens stand at slots ``first`` [B]. int8: quantized."""
        shape: tuple[int, ...] = (first.shape[0], args.kv_heads, slots, args.head_dim)
        shape = shape if by_layer else (args.n_layers, *shape)

        def buffer() -> Stored:
            return Stored(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1], jnp.float32) if dtype == jnp.int8 else None)

        def empty() -> Stored | tuple[Stored, ...]:
            return tuple(buffer() for _ in range(args.n_layers)) if by_layer else buffer()

        return cls(empty(), empty(), jnp.zeros((), jnp.int32), first)

    @property
    def slots(self) -> int:
        """S."""
        return jax.tree.leaves(self.k)[0].shape[-2]

    def layer(self, index: int, slots: int) -> tuple[Stored, Stored]:
        """The first ``slots`` slots of a layer's keys and values."""
        k, v = (x[index] if isinstance(x, tuple) else x.layer(index) for x in (self.k, self.v))
        return k.begin(slots), v.begin(slots)

    def write(self, k: jax.Array, v: jax.Array) -> "KVCache":
        """With the next tokens' keys and values [L, B, T, K, H]."""

        def written(stored: Stored | tuple[Stored, ...], x: jax.Array) -> Stored | tuple[Stored, ...]:
            if isinstance(stored, tuple):
                return tuple(layer.write(part, self.slot) for layer, part in zip(stored, x, strict=True))
            return stored.write(x, self.slot)

        return KVCache(written(self.k, k), written(self.v, v), self.slot + k.shape[2], self.first)

    def grown(self, slots: int) -> "KVCache":
        """With ``slots`` slots in each layer's buffers; those that are new are empty."""
        more = (0, slots - self.slots)
        k, v = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), more, (0, 0)][: x.ndim]), (self.k, self.v))
        return self.replace(k=k, v=v)
