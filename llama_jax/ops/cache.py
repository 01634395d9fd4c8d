"""The KV cache: keys and values of the tokens that a batch has seen, in slots of preallocated buffers.

L layers, B rows, K KV heads, S slots, H head_dim, T new tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.config import Cache, ModelArgs
from llama_jax.ops.quantize import to_integers

# The type of keys and values by its name; None: the type that is computed in.
CACHE_DTYPES: dict[Cache, Any] = {"auto": None, "int8": jnp.int8}


class Stored(flax.struct.PyTreeNode):
    """Keys or values of a layer as they are stored: in slots [B, K, S, H], or of new tokens [B, T, K, H].

    In int8 there is a scale for each token and head.
    """

    values: jax.Array
    scales: jax.Array | None  # float32, of the same shape without H

    def of(self, x: jax.Array) -> "Stored":
        """New tokens' keys or values [B, T, K, H] as these slots will hold them. Attention reads them like that, too."""
        if self.scales is None:
            return Stored(x.astype(self.values.dtype), None)
        return Stored(*to_integers(x, axis=-1, dtype=self.values.dtype))

    def plain(self, dtype: jnp.dtype) -> jax.Array:
        """What the stored numbers stand for, of ``dtype``."""
        if self.scales is None:
            return self.values.astype(dtype)
        return (self.values * self.scales[..., None]).astype(dtype)

    def begin(self, slots: int) -> "Stored":
        """The first ``slots`` slots."""
        return jax.tree.map(lambda x: x[:, :, :slots], self)

    def write(self, new: "Stored", slot: jax.Array) -> "Stored":
        """With ``new``, T tokens as ``of`` gives them, in slots ``slot`` to slot + T - 1; slot [B]: each row's in its own."""

        def put(slots: jax.Array, tokens: jax.Array) -> jax.Array:
            write = jax.lax.dynamic_update_slice_in_dim
            if slot.ndim:
                return jax.vmap(functools.partial(write, axis=1))(slots, tokens.swapaxes(1, 2), slot)
            return write(slots, tokens.swapaxes(1, 2), slot, axis=2)

        return jax.tree.map(put, self, new)


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of all layers. Rows are padded on the left, so that all of them write their next token to the same slot.

    Attention reads the slots that were filled before, and the new keys and values where they were made, but rounded as they will
    be stored. They are written behind the last read: XLA has no reason to copy a buffer. Each layer has buffers of its own: XLA on CPUs and GPUs would copy
    a layer out of a stack, and a TPU's compiler fetches no part of one ahead.
    """

    k: tuple[Stored, ...]  # of each layer
    v: tuple[Stored, ...]
    slot: jax.Array  # int32 []: the slot that is written next; in exact generation [B], each row's
    first: jax.Array  # int32 [B]: the slot of the row's first token

    @classmethod
    def empty(
        cls, args: ModelArgs, first: jax.Array, slots: int, dtype: jnp.dtype, slot_a_row: bool = False
    ) -> "KVCache":
        """A cache of ``slots`` slots for rows whose first tokens stand at slots ``first`` [B]. int8: quantized."""
        shape = first.shape[0], args.kv_heads, slots, args.head_dim

        def buffer() -> Stored:
            return Stored(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1], jnp.float32) if dtype == jnp.int8 else None)

        k, v = (tuple(buffer() for _ in range(args.n_layers)) for _ in range(2))
        return cls(k, v, jnp.zeros(first.shape if slot_a_row else (), jnp.int32), first)

    @property
    def slots(self) -> int:
        """S."""
        return self.k[0].values.shape[2]

    def layer(self, index: int, slots: int) -> tuple[Stored, Stored]:
        """The first ``slots`` slots of a layer's keys and values."""
        return self.k[index].begin(slots), self.v[index].begin(slots)

    def write(self, new: Sequence[tuple[Stored, Stored]]) -> "KVCache":
        """With each layer's keys and values of the next T tokens."""
        k = tuple(stored.write(x, self.slot) for stored, (x, _) in zip(self.k, new, strict=True))
        v = tuple(stored.write(x, self.slot) for stored, (_, x) in zip(self.v, new, strict=True))
        return KVCache(k, v, self.slot + new[0][0].values.shape[1], self.first)

    def grown(self, slots: int) -> "KVCache":
        """With ``slots`` slots in each layer's buffers; those that are new are empty."""
        more = (0, slots - self.slots)
        k, v = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), more, (0, 0)][: x.ndim]), (self.k, self.v))
        return self.replace(k=k, v=v)
