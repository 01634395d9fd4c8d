"""The KV cache: keys and values of the tokens that a batch has seen, in slots of preallocated buffers.

L layers, B rows, K KV heads, S slots, H head_dim, T new tokens.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.config import Cache, ModelArgs
from llama_jax.quantize import to_integers

# The type of keys and values by its name; None: the type that is computed in.
CACHE_DTYPES: dict[Cache, Any] = {"auto": None, "int8": jnp.int8}


class Stored(flax.struct.PyTreeNode):
    """A layer's keys or values, [B, K, S, H]. In int8, with a scale for each token and head."""

    values: jax.Array
    scales: jax.Array | None  # float32 [B, K, S]

    def begin(self, slots: int) -> "Stored":
        """The first ``slots`` slots."""
        return jax.tree.map(lambda x: x[:, :, :slots], self)

    def write(self, x: jax.Array, slot: jax.Array) -> "Stored":
        """With ``x``, [B, T, K, H], in slots ``slot`` to slot + T - 1."""
        x = x.swapaxes(1, 2)
        scales = self.scales
        if scales is not None:
            x, scale = to_integers(x, axis=-1, dtype=self.values.dtype)
            scales = jax.lax.dynamic_update_slice_in_dim(scales, scale, slot, axis=2)
        values = jax.lax.dynamic_update_slice_in_dim(self.values, x.astype(self.values.dtype), slot, axis=2)
        return Stored(values, scales)


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of all layers. Rows are padded on the left, so that all of them write their next token to the same slot.

    Attention reads the slots that were filled before, and the new keys and values where they were made. They are written
    behind the last read: XLA has no reason to copy a buffer. Each layer has buffers of its own: XLA on CPUs and GPUs would copy
    a layer out of a stack, and a TPU's compiler fetches no part of one ahead.
    """

    k: tuple[Stored, ...]  # of each layer
    v: tuple[Stored, ...]
    slot: jax.Array  # int32 []: the slot that is written next
    first: jax.Array  # int32 [B]: the slot of the row's first token

    @classmethod
    def empty(cls, args: ModelArgs, first: jax.Array, slots: int, dtype: jnp.dtype) -> "KVCache":
        """A cache of ``slots`` slots for rows whose first tokens stand at slots ``first`` [B]. int8: quantized."""
        shape = first.shape[0], args.kv_heads, slots, args.head_dim

        def buffer() -> Stored:
            return Stored(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1], jnp.float32) if dtype == jnp.int8 else None)

        k, v = (tuple(buffer() for _ in range(args.n_layers)) for _ in range(2))
        return cls(k, v, jnp.zeros((), jnp.int32), first)

    @property
    def slots(self) -> int:
        """S."""
        return self.k[0].values.shape[2]

    def layer(self, index: int, slots: int) -> tuple[Stored, Stored]:
        """The first ``slots`` slots of a layer's keys and values."""
        return self.k[index].begin(slots), self.v[index].begin(slots)

    def write(self, new: Sequence[tuple[jax.Array, jax.Array]]) -> "KVCache":
        """With each layer's keys and values, [B, T, K, H], of the next tokens."""
        k = tuple(stored.write(x, self.slot) for stored, (x, _) in zip(self.k, new, strict=True))
        v = tuple(stored.write(x, self.slot) for stored, (_, x) in zip(self.v, new, strict=True))
        return KVCache(k, v, self.slot + new[0][0].shape[1], self.first)

    def grown(self, slots: int) -> "KVCache":
        """With ``slots`` slots in each layer's buffers; those that are new are empty."""
        more = (0, slots - self.slots)
        k, v = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), more, (0, 0)][: x.ndim]), (self.k, self.v))
        return self.replace(k=k, v=v)
