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


class KVArray(flax.struct.PyTreeNode):
    """Keys or values of a layer as a cache holds them: in slots [B, K, S, H], or of new tokens [B, T, K, H].

    In int8 there is a scale for each token and head.
    """

    values: jax.Array
    scales: jax.Array | None  # float32, of the same shape without H

    def stored(self, x: jax.Array) -> "KVArray":
        """Return new tokens' keys or values [B, T, K, H] as these slots will hold them. Attention reads them like that, too."""
        if self.scales is None:
            return KVArray(x.astype(self.values.dtype), None)
        return KVArray(*to_integers(x, axis=-1, dtype=self.values.dtype))

    def dequantized(self, dtype: jnp.dtype) -> jax.Array:
        """Return the numbers that are stored, as an array of ``dtype``."""
        if self.scales is None:
            return self.values.astype(dtype)
        return (self.values * self.scales[..., None]).astype(dtype)

    def begin(self, slots: int) -> "KVArray":
        """Return the first ``slots`` slots."""
        return jax.tree.map(lambda x: x[:, :, :slots], self)

    def write(self, new: "KVArray", slot: jax.Array) -> "KVArray":
        """Return the slots with T new tokens, as ``stored`` gives them, in slots ``slot`` to slot + T - 1.

        slot: int32 [], or [B], where each row has its own.
        """

        def put(slots: jax.Array, tokens: jax.Array) -> jax.Array:
            write = jax.lax.dynamic_update_slice_in_dim
            if slot.ndim:
                return jax.vmap(functools.partial(write, axis=1))(slots, tokens.swapaxes(1, 2), slot)
            return write(slots, tokens.swapaxes(1, 2), slot, axis=2)

        return jax.tree.map(put, self, new)


# The keys and values of a layer's new tokens, [B, T, K, H]; in exact generation, the layer's slots with them in it.
KVPair = tuple[KVArray, KVArray]


class LayerCache(flax.struct.PyTreeNode):
    """What a layer knows of the tokens before: their keys and values, in the slots of the cache that are read."""

    k: KVArray  # [B, K, S, H]
    v: KVArray
    slot: jax.Array  # int32 []: the slot of the first new token; in exact generation [B], each row's own
    first: jax.Array  # int32 [B]: each row's first slot that holds a token


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of all layers. Rows are padded on the left, so that all of them write their next token to the same slot.

    Attention reads the slots that were filled before, and the new keys and values where they were made, but rounded as they will
    be stored. They are written after the last read, so that XLA need not copy a buffer. Each layer has buffers of its own: XLA on
    CPUs and GPUs would copy a layer out of a stack, and a TPU's compiler fetches no part of one ahead.

    In exact generation (exact.py) each row's tokens begin at slot 0, and each layer writes them before attention reads them.
    """

    k: tuple[KVArray, ...]  # one a layer
    v: tuple[KVArray, ...]
    slot: jax.Array  # int32 []: the slot that is written next; in exact generation [B], each row's own
    first: jax.Array  # int32 [B]: the slot of the row's first token

    @classmethod
    def empty(cls, args: ModelArgs, first: jax.Array, slots: int, dtype: jnp.dtype, exact: bool = False) -> "KVCache":
        """Return a cache of ``slots`` slots for rows whose first tokens stand at slots ``first`` [B]. dtype: int8 is quantized."""
        shape = first.shape[0], args.kv_heads, slots, args.head_dim

        def buffer() -> KVArray:
            return KVArray(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1], jnp.float32) if dtype == jnp.int8 else None)

        k, v = (tuple(buffer() for _ in range(args.n_layers)) for _ in range(2))
        return cls(k, v, jnp.zeros(first.shape if exact else (), jnp.int32), first)

    @property
    def slots(self) -> int:
        """S, the number of slots."""
        return self.k[0].values.shape[2]

    @property
    def is_exact(self) -> bool:
        """Whether it is a cache for exact generation."""
        return self.slot.ndim > 0

    def positions(self, T: int) -> jax.Array:
        """Return the positions of the next T tokens, counted from each row's first slot: int32 [B, T]. Padding is at 0."""
        slots = jnp.reshape(self.slot, (-1, 1)) + jnp.arange(T)
        return jnp.maximum(slots - self.first[:, None], 0)

    def layer(self, index: int, end: int) -> LayerCache:
        """Return what a layer reads: its first ``end`` slots, or all of them in exact generation."""
        end = self.slots if self.is_exact else end
        return LayerCache(self.k[index].begin(end), self.v[index].begin(end), self.slot, self.first)

    def with_new(self, new: Sequence[KVPair], x: jax.Array) -> "KVCache":
        """Return the cache with each layer's keys and values of the next T tokens. x [B, T, D]: the last layer's result."""
        k, v = zip(*new, strict=True)
        if not self.is_exact:
            # Zeros that XLA does not know to be zeros: with them a write comes after the last read, and happens in place. Without
            # them XLA copies each buffer at every step.
            zeros = 0 * x[:, :, 0]

            def after_x(x: jax.Array) -> jax.Array:
                return x + jnp.expand_dims(zeros, range(2, x.ndim)).astype(x.dtype)

            k, v = jax.tree.map(after_x, (k, v))
            k = tuple(slots.write(tokens, self.slot) for slots, tokens in zip(self.k, k, strict=True))
            v = tuple(slots.write(tokens, self.slot) for slots, tokens in zip(self.v, v, strict=True))
        return KVCache(k, v, self.slot + x.shape[1], self.first)

    def grown(self, slots: int) -> "KVCache":
        """Return the cache with ``slots`` slots in each layer's buffers. New slots are empty."""
        more = (0, slots - self.slots)
        k, v = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), more, (0, 0)][: x.ndim]), (self.k, self.v))
        return self.replace(k=k, v=v)
