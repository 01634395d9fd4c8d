"""The KV cache: the keys and values of the tokens processed so far, in slots of preallocated buffers.

L layers, B rows, K KV heads, S slots, H head_dim, T new tokens.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.config import Cache, ModelArgs
from llama_jax.ops.quantize import to_integers
from llama_jax.rope_scaling import depends_on_length

# The data type of keys and values for each setting. None: the type of activations.
CACHE_DTYPES: dict[Cache, Any] = {"auto": None, "int8": jnp.int8}


class KVArray(flax.struct.PyTreeNode):
    """The keys or values of a layer, either cached in slots [B, K, S, H] or of new tokens [B, T, K, H].

    int8 values have one scale per token and head.
    """

    values: jax.Array
    scales: jax.Array | None  # float32, of the shape of values without H

    def stored(self, x: jax.Array) -> "KVArray":
        """Return the keys or values of new tokens [B, T, K, H] in the type of these slots, quantized if it is int8.

        Attention also reads new tokens in this form, as it will read them from the cache later.
        """
        if self.scales is None:
            return KVArray(x.astype(self.values.dtype), None)
        return KVArray(*to_integers(x, axis=-1, dtype=self.values.dtype))

    def dequantized(self, dtype: jnp.dtype) -> jax.Array:
        """Return the values as an array of ``dtype``, multiplied by their scales if there are any."""
        if self.scales is None:
            return self.values.astype(dtype)
        return (self.values * self.scales[..., None]).astype(dtype)

    def begin(self, slots: int) -> "KVArray":
        """Return the first ``slots`` slots."""
        return jax.tree.map(lambda x: x[:, :, :slots], self)

    def write(self, new: "KVArray", slot: jax.Array) -> "KVArray":
        """Return the slots with T new tokens, in the form that ``stored`` returns, in slots ``slot`` to slot + T - 1.

        slot: int32 [], or [B] if each row has its own.
        """

        def put(slots: jax.Array, tokens: jax.Array) -> jax.Array:
            write = jax.lax.dynamic_update_slice_in_dim
            if slot.ndim:
                return jax.vmap(functools.partial(write, axis=1))(slots, tokens.swapaxes(1, 2), slot)
            return write(slots, tokens.swapaxes(1, 2), slot, axis=2)

        return jax.tree.map(put, self, new)


# The keys and values of a layer's new tokens, [B, T, K, H]. In exact generation: the layer's slots, which include them.
KVPair = tuple[KVArray, KVArray]


class LayerCache(flax.struct.PyTreeNode):
    """The cached keys and values that a layer's attention reads."""

    k: KVArray  # [B, K, S, H]
    v: KVArray
    slot: jax.Array  # int32 [], the slot of the first new token. In exact generation [B], one per row.
    first: jax.Array  # int32 [B], the first slot of each row that holds a token


class KVCache(flax.struct.PyTreeNode):
    """The keys and values of all layers. Rows are padded on the left, so that all write their next token to one slot.

    Attention reads the filled slots, and reads new keys and values directly, rounded as they will be stored. They are
    written to the cache after the last read, so that XLA need not copy the buffers. Each layer has its own buffers.
    From a stack, XLA on CPUs and GPUs would copy a layer before reading it, and a TPU's compiler would not prefetch it.

    In exact generation (exact.py), each row's tokens begin at slot 0, and each layer writes them before attention reads
    them.
    """

    k: tuple[KVArray, ...]  # one per layer
    v: tuple[KVArray, ...]
    slot: jax.Array  # int32 [], the slot to write next. In exact generation [B], one per row.
    first: jax.Array  # int32 [B], the slot of each row's first token
    prompts: jax.Array | None = None  # int32 [B], the length of each row's prompt. None: no rotary frequency needs it.

    @classmethod
    def empty(
        cls,
        args: ModelArgs,
        first: jax.Array,
        slots: int,
        dtype: jnp.dtype,
        exact: bool = False,
        prompts: jax.Array | None = None,
    ) -> "KVCache":
        """Return an empty cache of ``slots`` slots for rows whose first tokens go to slots ``first`` [B].

        dtype: the type of keys and values. int8: they are quantized. exact: whether generation is exact (exact.py).
        prompts: int32 [B], the length of each row's prompt. It counts if rotary frequencies depend on it (rotary.py).
        None: the rows have no prompts.
        """
        shape = first.shape[0], args.kv_heads, slots, args.head_width

        def buffer() -> KVArray:
            return KVArray(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1], jnp.float32) if dtype == jnp.int8 else None)

        k, v = (tuple(buffer() for _ in range(args.n_layers)) for _ in range(2))
        if not depends_on_length(args.rope_scaling):
            prompts = None
        elif prompts is None:
            prompts = jnp.zeros_like(first)
        return cls(k, v, jnp.zeros(first.shape if exact else (), jnp.int32), first, prompts)

    @property
    def slots(self) -> int:
        """The number of slots, S."""
        return self.k[0].values.shape[2]

    @property
    def layer_bytes(self) -> int:
        """The bytes of a layer's keys on a device. The arrays may be described."""
        keys: Any = self.k[0].values
        shape = keys.shape if keys.sharding is None else keys.sharding.shard_shape(keys.shape)
        return math.prod(shape) * keys.dtype.itemsize

    @property
    def is_exact(self) -> bool:
        """Whether the cache is for exact generation."""
        return self.slot.ndim > 0

    def positions(self, T: int) -> jax.Array:
        """Return the positions of the next T tokens, int32 [B, T], from each row's first slot. Padding has 0."""
        slots = jnp.reshape(self.slot, (-1, 1)) + jnp.arange(T)
        return jnp.maximum(slots - self.first[:, None], 0)

    def layer(self, index: int, end: int) -> LayerCache:
        """Return the slots that layer ``index`` reads: the first ``end``, or all in exact generation."""
        end = self.slots if self.is_exact else end
        return LayerCache(self.k[index].begin(end), self.v[index].begin(end), self.slot, self.first)

    def with_new(self, new: Sequence[KVPair], x: jax.Array) -> "KVCache":
        """Return the cache with each layer's keys and values of the next T tokens added.

        x: the last layer's result [B, T, D].
        """
        k, v = zip(*new, strict=True)
        if not self.is_exact:
            # A trick: XLA cannot know that 0 * x is zero. Adding it makes each write wait for the last layer. So the
            # write follows the last read and happens in place. Otherwise XLA copies each buffer at every step.
            zeros = 0 * x[:, :, 0]

            def after_x(x: jax.Array) -> jax.Array:
                return x + jnp.expand_dims(zeros, range(2, x.ndim)).astype(x.dtype)

            k, v = jax.tree.map(after_x, (k, v))
            k = tuple(slots.write(tokens, self.slot) for slots, tokens in zip(self.k, k, strict=True))
            v = tuple(slots.write(tokens, self.slot) for slots, tokens in zip(self.v, v, strict=True))
        return self.replace(k=k, v=v, slot=self.slot + x.shape[1])

    def grown(self, slots: int) -> "KVCache":
        """Return the cache with its buffers enlarged to ``slots`` slots. New slots are empty."""
        more = (0, slots - self.slots)
        k, v = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), more, (0, 0)][: x.ndim]), (self.k, self.v))
        return self.replace(k=k, v=v)
