"""Products with frozen matrices in training: many rows, and a gradient for the rows alone.

A quantized matrix is dequantized where it is multiplied, in the forward product and again in the backward one. Between
the two, only its integers and scales are in memory (QLoRA: Dettmers et al., 2023, section 3).

B batch, T positions, I inputs and O outputs of a flat matrix.
"""

import jax
import jax.numpy as jnp

from llama_jax.ops.gradient_order import known_after
from llama_jax.ops.quantize import Matrix


def product(equation: str, x: jax.Array, w: Matrix, dtype: jnp.dtype) -> jax.Array:
    """Compute einsum(equation, x, w) -> ``dtype``. Operands have x's type; sums are float32.

    int8 values, which share a scale per output, are scaled after the product.
    """
    if w.scales is not None:
        # A trick: the barrier makes XLA for TPUs cut the layer's integers out of their stack by themselves, and then
        # dequantize them in the product. Otherwise, it writes them to memory as float32 first.
        x, w = jax.lax.optimization_barrier((x, w))
    values, scales = _operand(w, x.dtype)
    rows, outputs = x.shape[:2], w.shape[_inputs(equation) :]
    flat = x.reshape(*rows, -1)
    if scales is None:
        y = jnp.einsum("BTI,IO->BTO", flat, values, preferred_element_type=dtype)
    else:
        y = (jnp.einsum("BTI,IO->BTO", flat, values, preferred_element_type=jnp.float32) * scales).astype(dtype)
    return y.reshape(*rows, *outputs)


def gradient(equation: str, dy: jax.Array, w: Matrix, dtype: jnp.dtype) -> jax.Array:
    """Return the gradient of ``product`` for x, of x's type ``dtype``, from the gradient dy of the result."""
    if w.scales is not None:
        # A trick: the barrier makes the matrix depend on dy. Otherwise, XLA might keep the dequantized matrix of the
        # forward product for this one.
        dy, w = jax.lax.optimization_barrier((dy, w))
    else:
        # So the layer is cut out of its stack again. Otherwise, all layers of the forward pass would be kept.
        w = w.replace(values=known_after(dy, w.values))
    values, scales = _operand(w, dtype)
    rows, inputs = dy.shape[:2], w.shape[: _inputs(equation)]
    flat = dy.reshape(*rows, -1)
    flat = (flat if scales is None else flat.astype(jnp.float32) * scales).astype(dtype)
    return jnp.einsum("BTO,IO->BTI", flat, values, preferred_element_type=dtype).reshape(*rows, *inputs)


def _inputs(equation: str) -> int:
    """Return the number of axes of the matrix that a product sums over."""
    x_axes, w_axes = equation.split("->")[0].split(",")
    return sum(axis in w_axes for axis in x_axes)


def _operand(w: Matrix, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Return the flat matrix to multiply by, [I, O] of ``dtype``, and its outputs' scales [O] if it lacks them."""
    inputs, outputs = w.values.shape
    if w.scales is None or w.scales.shape[0] > 1:
        return w.dequantized().reshape(inputs, outputs).astype(dtype), None
    return w.values.astype(dtype), w.scales.reshape(outputs)
