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
    if _is_cut_out_first(w):
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
    if _is_cut_out_first(w):
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


def _is_cut_out_first(w: Matrix) -> bool:
    """Return whether XLA is made to cut a layer's integers out of their stack before it dequantizes them.

    A trick, by a barrier. XLA for TPUs cuts out integers with one scale per output in the product, for nothing. Those
    with a scale per group it would first write to memory as float32. On a mesh, devices would gather dequantized
    matrices without it.
    """
    if w.scales is None:
        return False
    on_mesh = jax.sharding.get_abstract_mesh().size > 1
    return on_mesh or (w.scales.shape[0] > 1 and _in_product(len(w.values)))


def _in_product(inputs: int) -> bool:
    """Return whether XLA for TPUs dequantizes a matrix of so many inputs in the product, if it has groups."""
    return inputs & (inputs - 1) == 0


def _operand(w: Matrix, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Return the flat matrix to multiply by, [I, O] of ``dtype``, and its outputs' scales [O] if it lacks them."""
    inputs, outputs = w.values.shape
    if w.scales is None:
        return w.values.astype(dtype), None
    if w.scales.shape[0] > 1:
        values = w.dequantized().reshape(inputs, outputs).astype(dtype)
        # A trick: with the barrier, XLA for TPUs cuts the integers out and dequantizes them in one step.
        return values if _in_product(inputs) else jax.lax.optimization_barrier(values), None
    return w.values.astype(dtype), w.scales.reshape(outputs)
