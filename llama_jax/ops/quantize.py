"""Matrices as generation stores them: plain, or quantized.

int8 has a scale an output channel, int4 a scale a group of inputs of each output channel. A value is ``values * scales``,
without an offset, and the scale is the largest magnitude's, as in LLM.int8 (Dettmers et al., 2022, section 2.1).
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import Weights

# Inputs that share a scale with int4.
GROUPS = {"int4": 32, "int4-64": 64}


class Matrix(flax.struct.PyTreeNode):
    """A matrix [inputs, outputs] of generation. Inputs and outputs may be several axes each."""

    values: jax.Array  # of the matrix's shape; int8 or int4 where it is quantized
    scales: jax.Array | None = None  # float32 [groups, outputs]; int8 has one group

    def reshape(self, *shape: int) -> "Matrix":
        """The same matrix, with its inputs and outputs in other axes."""
        return self.replace(values=self.values.reshape(shape))

    def dequantized(self) -> jax.Array:
        """The matrix, float32 where it is quantized."""
        if self.scales is None:
            return self.values
        groups, outputs = self.scales.shape
        values = self.values.reshape(groups, -1, outputs).astype(jnp.float32)
        return (values * self.scales[:, None]).reshape(self.values.shape)


def quantize(matrix: jax.Array, inputs: int, kind: Weights) -> Matrix:
    """``matrix``, whose first ``inputs`` axes are summed over in products, as ``kind``: "int8", "int4", "int4-64"."""
    D = math.prod(matrix.shape[:inputs])
    groups = D // _group(D, kind)
    by_group = matrix.reshape(groups, D // groups, -1)
    values, scales = to_integers(by_group, axis=1, dtype=jnp.int8 if kind == "int8" else jnp.int4)
    return Matrix(values.reshape(matrix.shape), scales)


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


def _group(inputs: int, kind: Weights) -> int:
    """Inputs a scale: all of them for int8, or else the largest divisor up to the kind's size."""
    return inputs if kind == "int8" else max(size for size in range(1, GROUPS[kind] + 1) if inputs % size == 0)
