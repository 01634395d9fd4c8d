"""Products of training in eight bits: of int8, summed in int32, or of float8, summed in float32.

Each operand is quantized where it is multiplied. Values that a product sums over share a scale, by which the largest of
them becomes the largest of the eight bits' numbers: a row of the activations has one, and a column of the matrix. So
scales factor out of the sums. The three products of training sum over different axes, and quantize anew:

    forward  y = x w                 scales by token and by output
    input    dx = dy w^T             by token and by input
    weight   dw = x^T dy             by input and by output

A matrix is quantized once a step, for the first and for the second, where each device holds its shard of it.

int8 rounds the gradient dy at random, right on average (Gupta et al., 2015, section 3.1), and all else to the nearest.
float8 rounds to the nearest: x and w to e4m3, dy to e5m2, whose range is larger (Micikevicius et al., 2022, section 3).
"""

import functools
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from llama_jax.devices.sharding import shards_of
from llama_jax.ops.einsum import axes_of, input_gradient, weight_gradient
from llama_jax.ops.noise import noise, uniform

# The types of operands, and of gradients, by the kind of product. Then the type of their sums.
TYPES: dict[str, tuple[Any, Any, Any]] = {
    "int8": (jnp.int8, jnp.int8, jnp.int32),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float32),
}
# The logical axes (devices/sharding.py) of axes that activations are spread over. Each shard sums for itself.
SPREAD = {"B": "batch", "T": "length", "N": "heads", "K": "kv_heads", "F": "mlp"}
# So many products of two int8 numbers fit into a sum of int32.
MOST_INT8 = (2**31 - 1) // 127**2
# The largest magnitude that is not quantized to zeros alone. Its reciprocal is a float32 number.
LEAST = np.float32(1e-30)


class Quantized(NamedTuple):
    """An array in eight bits, and float32 scales of the same axes, 1 where they do not differ: about their product."""

    values: jax.Array
    scales: jax.Array


# A matrix quantized by output and by input. None: the product that multiplies by it is not in eight bits.
Copies = tuple[Quantized | None, Quantized | None]


class EightBit(flax.struct.PyTreeNode):
    """A plain matrix in training, whose products are computed in eight bits. Generation never sees one."""

    values: jax.Array
    """float, of any shape, or with L in front if layers are stacked."""
    by_output: Quantized | None
    """The values with a scale for each output. None: the product "forward" is not in eight bits."""
    by_input: Quantized | None
    """The values with a scale for each input. None: the product "input" is not in eight bits."""
    seed: jax.Array
    """uint32 [2], or [L, 2]: what random rounding follows from."""
    kind: str = flax.struct.field(pytree_node=False, default="int8")
    """"int8" or "fp8"."""
    products: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    """The products in eight bits: some of "forward", "input" and "weight". The others are computed in x's type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return self.values.shape


def both_ways(w: jax.Array, inputs: range, outputs: range, kind: str, products: tuple[str, ...]) -> Copies:
    """Return a matrix quantized by output and by input, for those ``products`` that multiply by it.

    inputs, outputs: which of its axes are those. Other axes are of a stack.
    """
    operand = TYPES[kind][0]
    return (
        quantized(w, list(inputs), operand) if "forward" in products else None,
        quantized(w, list(outputs), operand) if "input" in products else None,
    )


def product(equation: str, x: jax.Array, w: EightBit) -> jax.Array:
    """Compute einsum(equation, x, w) in eight bits, with a result and gradients of x's type."""
    return _product(equation, w.kind, w.products, x, w.values.astype(x.dtype), (w.by_output, w.by_input), w.seed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
    equation: str, kind: str, products: tuple[str, ...], x: jax.Array, w: jax.Array, copies: Copies, seed: jax.Array
) -> jax.Array:
    by_output, _ = copies
    return jnp.einsum(equation, x, w) if by_output is None else multiply(equation, kind, x, by_output)


def _forward(
    equation: str, kind: str, products: tuple[str, ...], x: jax.Array, w: jax.Array, copies: Copies, seed: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
    _, by_input = copies
    return _product(equation, kind, products, x, w, copies, seed), (x, w if by_input is None else by_input, seed)


def _backward(
    equation: str, kind: str, products: tuple[str, ...], saved: tuple[Any, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    (x, w, seed), (x_axes, w_axes, y_axes) = saved, axes_of(equation)
    if isinstance(w, Quantized):
        dx = multiply(f"{y_axes},{w_axes}->{x_axes}", kind, dy, w, seed)
    else:
        dx = input_gradient(equation, dy, w)
    if "weight" in products:
        summed = [i for i, axis in enumerate(x_axes) if axis in y_axes]
        second = _summed_last(quantized(x, summed, TYPES[kind][0]), summed)
        dw = multiply(f"{y_axes},{x_axes}->{w_axes}", kind, dy, second, seed)
    else:
        dw = weight_gradient(equation, x, dy)
    return dx.astype(x.dtype), dw.astype(x.dtype), None, None


_product.defvjp(_forward, _backward)


def _summed_last(x: Quantized, summed: list[int]) -> Quantized:
    """Return x with the last of the axes ``summed`` last in memory.

    A trick: a TPU multiplies int8 at its full rate only if the operand that gives the result's rows lies so. The
    barrier makes XLA transpose the eight bits, and not what they are made of.
    """
    *first, last = summed
    order = (*first, *(axis for axis in range(x.values.ndim) if axis not in summed), last)
    return Quantized(with_layout_constraint(jax.lax.optimization_barrier(x.values), Layout(order)), x.scales)


def multiply(equation: str, kind: str, a: jax.Array, b: Quantized, seed: jax.Array | None = None) -> jax.Array:
    """Compute einsum(equation, a, b) in eight bits -> a's type. Each axis stands in two of the three arrays.

    b: has scales of 1 along the axes that are summed over.

    seed: a is a gradient, and int8 rounds it at random by this seed, uint32 [2]. None: a is rounded to the nearest.
    """
    a_axes, b_axes, y_axes = axes_of(equation)
    sizes, dtype = dict(zip(a_axes + b_axes, a.shape + b.values.shape, strict=True)), a.dtype
    summed = [axis for axis in a_axes if axis in b_axes]
    operand, of_gradient, of_sums = TYPES[kind]
    first, scales = quantized(a, [a_axes.index(s) for s in summed], operand if seed is None else of_gradient, seed)
    second, others = b
    # Sums over shards are taken of the results, in their own type: of int32, they would move twice the bytes, and could
    # overflow.
    parts = _parts(summed, sizes)
    split = f"{_split(a_axes, parts)},{_split(b_axes, parts)}->{''.join(parts)}{y_axes}"
    sums = jnp.einsum(
        split, _reshaped(first, a_axes, parts), _reshaped(second, b_axes, parts), preferred_element_type=of_sums
    )
    y = sums.astype(jnp.float32) * _spread(scales, a_axes, y_axes) * _spread(others, b_axes, y_axes)
    y = y.astype(dtype)
    return jax.lax.reduce(y, jnp.zeros((), dtype), jax.lax.add, range(len(parts))) if parts else y


def quantized(x: jax.Array, summed: list[int], dtype: Any, seed: jax.Array | None = None) -> Quantized:
    """Return x in eight bits, and float32 scales whose axes ``summed`` are 1, such that their product is about x.

    Values that are not finite make their scale infinite, and so every product with them infinite or NaN.
    """
    x = x.astype(jnp.float32)
    whole = jnp.issubdtype(dtype, jnp.integer)
    most = np.float32(127 if whole else jnp.finfo(dtype).max)
    # Replace NaN, because compilers may ignore it in a maximum.
    sizes = jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf)
    scales = jnp.maximum(jnp.max(sizes, axis=summed, keepdims=True), LEAST) * np.float32(1 / most)
    x = x * (1 / scales)
    if whole:
        x = jnp.round(x) if seed is None else jnp.floor(x + uniform(noise(seed, x.shape)))
    return Quantized(jnp.clip(x, -most, most).astype(dtype), scales)


def _parts(summed: list[str], sizes: dict[str, int]) -> dict[str, int]:
    """Return into how many parts to cut sums over these axes: by the mesh, and such that int32 does not overflow."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    parts = {axis: 1 if mesh.empty else shards_of(SPREAD.get(axis), mesh) for axis in summed}
    parts = {axis: count if sizes[axis] % count == 0 else 1 for axis, count in parts.items()}
    for axis in summed:
        others = math.prod(sizes[other] // parts[other] for other in summed if other != axis)
        while sizes[axis] // parts[axis] * others > MOST_INT8 and parts[axis] < sizes[axis]:
            parts[axis] = next(n for n in range(parts[axis] + 1, sizes[axis] + 1) if sizes[axis] % n == 0)
    return {axis: count for axis, count in parts.items() if count > 1}


def _split(axes: str, parts: dict[str, int]) -> str:
    return "".join(axis + axis.lower() if axis in parts else axis for axis in axes)


def _reshaped(x: jax.Array, axes: str, parts: dict[str, int]) -> jax.Array:
    """Return x with each axis of ``parts`` cut into two, of the parts and of what is in a part."""
    cut = [(parts[a], size // parts[a]) if a in parts else (size,) for a, size in zip(axes, x.shape, strict=True)]
    return x.reshape(sum(cut, ()))


def _spread(scales: jax.Array, axes: str, y_axes: str) -> jax.Array:
    """Return scales in the shape of a result, whose axes have the same order, with 1 where they do not depend on it."""
    sizes = dict(zip(axes, scales.shape, strict=True))
    return scales.reshape([sizes.get(axis, 1) for axis in y_axes])
