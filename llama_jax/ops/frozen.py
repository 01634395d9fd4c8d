"""Products with frozen matrices in training: many rows, and a gradient for the rows alone.

A quantized matrix is dequantized where it is multiplied, in the forward product and again in the backward one. Between
the two, only its integers and scales are in memory (QLoRA: Dettmers et al., 2023, section 3).
"""

import jax
import jax.numpy as jnp

from llama_jax.ops.quantize import Matrix


def product(equation: str, x: jax.Array, w: Matrix, dtype: jnp.dtype) -> jax.Array:
    """Compute einsum(equation, x, w) -> ``dtype``. Operands have x's type; sums are float32.

    int8 values, which share a scale per output, are scaled after the product.
    """
    values, scales = _operand(equation, w, x.dtype)
    if scales is None:
        return jnp.einsum(equation, x, values, preferred_element_type=dtype)
    return (jnp.einsum(equation, x, values, preferred_element_type=jnp.float32) * scales).astype(dtype)


def gradient(equation: str, dy: jax.Array, w: Matrix, dtype: jnp.dtype) -> jax.Array:
    """Return the gradient of ``product`` for x, of x's type ``dtype``, from the gradient dy of the result."""
    operands, y_axes = equation.split("->")
    x_axes, w_axes = operands.split(",")
    if w.scales is not None:
        # A trick: the barrier makes the matrix depend on dy. Otherwise, XLA might keep the dequantized matrix of the
        # forward product for this one.
        dy, w = jax.lax.optimization_barrier((dy, w))
    values, scales = _operand(equation, w, dtype)
    dy = (dy if scales is None else dy.astype(jnp.float32) * scales).astype(dtype)
    return jnp.einsum(f"{y_axes},{w_axes}->{x_axes}", dy, values, preferred_element_type=dtype)


def _operand(equation: str, w: Matrix, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Return the matrix to multiply by, of ``dtype``, and the scales of its outputs, if they are not in it."""
    if w.scales is None or w.scales.shape[0] > 1:
        return w.dequantized().astype(dtype), None
    x_axes, w_axes = equation.split("->")[0].split(",")
    inputs = sum(axis in w_axes for axis in x_axes)
    return w.values.reshape(w.shape).astype(dtype), w.scales.reshape(w.shape[inputs:])
