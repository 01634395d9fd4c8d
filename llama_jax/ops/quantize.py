"""Weights: arrays, matrices in the form for generation, plain or quantized, and either with a low-rank adapter.

int8 has one scale per output channel. int4 has one scale per group of inputs of each output channel. A weight is
``values * scales``, without an offset. The largest magnitude determines the scale, as in LLM.int8 (Dettmers et al.,
2022, section 2.1).
"""

import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


class Kind(NamedTuple):
    """How a kind of quantized matrix is made."""

    dtype: Any
    """The type of its integers."""
    group: int | None = None
    """The most inputs of an output that share a scale. None: all of them."""


# Every kind of quantized matrix, by its name.
KINDS: dict[str, Kind] = {"int8": Kind(jnp.int8), "int4": Kind(jnp.int4, 32), "int4-64": Kind(jnp.int4, 64)}


class Matrix(flax.struct.PyTreeNode):
    """A weight in the form for generation: two axes, inputs and outputs, plain or quantized.

    A TPU stores the last two axes of an array in tiles. It would copy a weight of more axes before multiplying it.
    """

    values: jax.Array
    """[inputs, outputs], or [L, inputs, outputs] if layers are stacked. The type is int8 or int4 if quantized."""
    scales: jax.Array | None = None
    """float32 [groups, outputs], or [L, groups, outputs]. int8 has one group."""
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    """The shape of the original weight, in which inputs and outputs may be several axes each."""
    is_transposed: bool = flax.struct.field(pytree_node=False, default=False)
    """Whether ``values`` are [outputs, inputs] instead, as those of tied embeddings are."""

    def dequantized(self) -> jax.Array:
        """Return the weight as an array of ``shape``, in float32 if it is quantized."""
        if self.is_transposed:
            return self.values.T
        if self.scales is None:
            return self.values.reshape(self.shape)
        groups, outputs = self.scales.shape
        values = self.values.reshape(groups, -1, outputs).astype(jnp.float32)
        return (values * self.scales[:, None]).reshape(self.shape)


class Adapted(flax.struct.PyTreeNode):
    """A frozen matrix and its low-rank adapter: x W + scale (dropout(x) a) b (LoRA: Hu et al., 2021, section 4.1)."""

    base: Matrix
    """The matrix W, plain or quantized."""
    a: jax.Array
    """float [inputs, rank], or [L, inputs, rank] if layers are stacked."""
    b: jax.Array
    """float [rank, outputs], or [L, rank, outputs]."""
    keys: jax.Array | None = None
    """A random key per row of the batch, [B] or [L, B], from which dropout is drawn. None: there is no dropout."""
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    """The share of the adapter's inputs that training sets to zero."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original weight."""
        return self.base.shape

    def merged(self) -> jax.Array:
        """Return W + scale a b as an array of ``shape``, float32."""
        product = jnp.matmul(self.a.astype(jnp.float32), self.b.astype(jnp.float32), precision="highest")
        return self.base.dequantized().astype(jnp.float32) + self.scale * product.reshape(self.shape)


# A weight that the model multiplies by. Of the model's functions, only ``linear`` (linear.py) looks inside.
Weight = jax.Array | Matrix | Adapted


def flat(w: jax.Array, inputs: int) -> Matrix:
    """Return ``w`` as a plain Matrix. Products sum over the first ``inputs`` axes of ``w``."""
    return Matrix(w.reshape(math.prod(w.shape[:inputs]), -1), None, w.shape)


def transposed(table: jax.Array) -> Matrix:
    """Return the output matrix [D, V] of tied embeddings, which is the table [V, D] itself and no copy of it."""
    return Matrix(table, None, table.shape[::-1], is_transposed=True)


def quantize(w: jax.Array, inputs: int, kind: str) -> Matrix:
    """Quantize ``w`` to ``kind``: "int8", "int4" or "int4-64". Products sum over the first ``inputs`` axes of ``w``."""
    D = math.prod(w.shape[:inputs])
    group = group_of(D, kind)
    values, scales = to_integers(w.reshape(D // group, group, -1), axis=1, dtype=KINDS[kind].dtype)
    return Matrix(values.reshape(D, -1), scales, w.shape)


def group_of(inputs: int, kind: str) -> int:
    """Return how many of ``inputs`` share a scale in a matrix of ``kind``: the largest divisor up to its group."""
    most = KINDS[kind].group
    return inputs if most is None else max(size for size in range(1, most + 1) if inputs % size == 0)


def to_integers(x: jax.Array, axis: int, dtype: Any, most: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Round ``x`` to integers of ``dtype``. Return them and float32 scales, whose shape is x's without ``axis``.

    Values along ``axis`` share a scale. most: the integer that stands for the largest magnitude. None: the type's
    largest. If values are not all finite, their scale is NaN, because no integer represents them.
    """
    x = x.astype(jnp.float32)
    # Multiply by the reciprocal, because some compilers replace a division by it. So all programs give the same bits.
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=axis), 1e-12) * np.float32(1 / (most or jnp.iinfo(dtype).max))
    # Test for finite values, because compilers may ignore NaN in a maximum.
    scales = jnp.where(jnp.all(jnp.isfinite(x), axis=axis), scales, jnp.nan)
    return jnp.round(x / jnp.expand_dims(scales, axis)).astype(dtype), scales
