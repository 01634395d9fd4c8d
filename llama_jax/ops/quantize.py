"""Weights: arrays, and matrices as generation stores them, plain or quantized.

int8 has a scale an output channel, int4 a scale a group of inputs of each output channel. A value is ``values * scales``,
without an offset, and the scale is the largest magnitude's, as in LLM.int8 (Dettmers et al., 2022, section 2.1).
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
    """A weight as generation stores it: two axes, inputs and outputs, plain or quantized.

    A TPU lays the last two axes of an array out in tiles, and multiplies no other form without a copy.
    """

    values: (
        jax.Array
    )  # [inputs, outputs], or [L, inputs, outputs] where layers are stacked; int8 or int4 where it is quantized
    scales: jax.Array | None = None  # float32 [groups, outputs], likewise; int8 has one group
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    """The shape of the weight that it stands for, in which inputs and outputs may be several axes each."""

    def dequantized(self) -> jax.Array:
        """Return the weight, an array of ``shape``; float32 where it is quantized."""
        if self.scales is None:
            return self.values.reshape(self.shape)
        groups, outputs = self.scales.shape
        values = self.values.reshape(groups, -1, outputs).astype(jnp.float32)
        return (values * self.scales[:, None]).reshape(self.shape)


# What the model multiplies by. ``linear`` (linear.py) is the one function that looks inside.
Weight = jax.Array | Matrix


def as_array(w: Weight) -> jax.Array:
    """Return the weight as an array of its shape; float32 where it is quantized."""
    return w.dequantized() if isinstance(w, Matrix) else w


def flat(w: jax.Array, inputs: int) -> Matrix:
    """Return ``w``, whose first ``inputs`` axes are summed over in products, as a plain Matrix."""
    return Matrix(w.reshape(math.prod(w.shape[:inputs]), -1), None, w.shape)


def quantize(w: jax.Array, inputs: int, kind: str) -> Matrix:
    """Return ``w``, whose first ``inputs`` axes are summed over in products, as ``kind``: "int8", "int4", "int4-64"."""
    D = math.prod(w.shape[:inputs])
    dtype, most = KINDS[kind]
    # The largest divisor of D up to the group's size.
    group = D if most is None else max(size for size in range(1, most + 1) if D % size == 0)
    groups = D // group
    by_group = w.reshape(groups, D // groups, -1)
    values, scales = to_integers(by_group, axis=1, dtype=dtype)
    return Matrix(values.reshape(D, -1), scales, w.shape)


def to_integers(x: jax.Array, axis: int, dtype: Any, most: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Integers of ``dtype``, and float32 scales without ``axis``, each of which serves all values along it.

    most: the integer of the largest magnitude; None: the type's largest. Of values that are not all finite the scale is NaN: no
    integer stands for them, and compilers may pass over NaN in a maximum.
    """
    x = x.astype(jnp.float32)
    # A product, and not a quotient of which a compiler makes a product: the same bits from every program.
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=axis), 1e-12) * np.float32(1 / (most or jnp.iinfo(dtype).max))
    scales = jnp.where(jnp.all(jnp.isfinite(x), axis=axis), scales, jnp.nan)
    return jnp.round(x / jnp.expand_dims(scales, axis)).astype(dtype), scales
