"""Products of training in eight bits: of int8, summed in int32, or of float8, summed in float32.

Each operand is quantized where it is multiplied. Values that a product sums over share a scale, by which the largest of
them becomes the largest of the eight bits' numbers: a row of the activations has one, and a column of the matrix. So
scales factor out of the sums. The three products of training sum over different axes, and quantize anew:

    forward  y = x w                 scales by token and by output
    input    dx = dy w^T             by token and by input
    weight   dw = x^T dy             by input or by output

The last sums over tokens, and scales by token do not factor out of it. So the wider of x and dy stays as another
product has quantized it, and the narrower takes its scales, and is then quantized anew.

A matrix is quantized once a step, for the first and for the second, where each device holds its shard of it.

int8 rounds gradients at random, right on average (Gupta et al., 2015, section 3.1): dy, and x where it takes dy's
scales. It rounds all else to the nearest.
float8 rounds to the nearest: x and w to e4m3, dy to e5m2, whose range is larger (Micikevicius et al., 2022, section 3).
"""

import functools
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
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
# The name of x's scales, a number for each token, which policies of rematerialisation keep.
SCALES = "scales"
# The random bits of a second operand.
OTHER = np.uint32(0x5BD1E995)
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

    def by(summed: range) -> Quantized:
        return quantized(w, scales_of(w, list(summed), operand), operand)

    return by(inputs) if "forward" in products else None, by(outputs) if "input" in products else None


def product(equation: str, x: jax.Array, w: EightBit) -> jax.Array:
    """Compute einsum(equation, x, w) in eight bits, with a result and gradients of x's type."""
    return _product(equation, w.kind, w.products, x, w.values.astype(x.dtype), (w.by_output, w.by_input), w.seed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
    equation: str, kind: str, products: tuple[str, ...], x: jax.Array, w: jax.Array, copies: Copies, seed: jax.Array
) -> jax.Array:
    return _forward(equation, kind, products, x, w, copies, seed)[0]


def _forward(
    equation: str, kind: str, products: tuple[str, ...], x: jax.Array, w: jax.Array, copies: Copies, seed: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
    by_output, by_input = copies
    scales = checkpoint_name(scales_of(x, _features(equation, 0), TYPES[kind][0]), SCALES)
    if by_output is None:
        y = jnp.einsum(equation, x, w)
    else:
        y = multiply(equation, kind, quantized(x, scales, TYPES[kind][0]), by_output, x.dtype)
    return y, (x, scales, w if by_input is None else by_input, seed)


def _backward(
    equation: str, kind: str, products: tuple[str, ...], saved: tuple[Any, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    (x, scales, w, seed), (x_axes, w_axes, y_axes), (operand, of_gradient, _) = saved, axes_of(equation), TYPES[kind]
    rounded = quantized(dy, scales_of(dy, _features(equation, 1), of_gradient), of_gradient, seed)
    if isinstance(w, Quantized):
        dx = multiply(f"{y_axes},{w_axes}->{x_axes}", kind, rounded, w, x.dtype)
    else:
        dx = input_gradient(equation, dy, w)
    if "weight" not in products:
        dw = weight_gradient(equation, x, dy)
    elif dy.size >= x.size:
        dw = _weight_product(kind, (y_axes, w_axes, x_axes), rounded, x, operand, seed)
    else:
        dw = _weight_product(kind, (x_axes, w_axes, y_axes), quantized(x, scales, operand), dy, of_gradient, seed)
    return dx.astype(x.dtype), dw.astype(x.dtype), None, None


_product.defvjp(_forward, _backward)


def _features(equation: str, side: int) -> list[int]:
    """Return which axes of x (side 0) or of y (side 1) are w's, in "x,w->y"."""
    x_axes, w_axes, y_axes = axes_of(equation)
    return [i for i, axis in enumerate((x_axes, y_axes)[side]) if axis in w_axes]


def _weight_product(
    kind: str, axes: tuple[str, str, str], wide: Quantized, narrow: jax.Array, dtype: Any, seed: jax.Array
) -> jax.Array:
    """Return the sum over tokens of two operands' products, the gradient of a matrix, in eight bits -> narrow's type.

    axes: those of wide, of the matrix and of narrow. wide: has a scale for each token. dtype: narrow's, when quantized.
    """
    wide_axes, w_axes, narrow_axes = axes
    tokens = [i for i, axis in enumerate(narrow_axes) if axis not in w_axes]
    scaled = narrow.astype(jnp.float32) * _spread(wide.scales, wide_axes, narrow_axes)
    second = _summed_last(quantized(scaled, scales_of(scaled, tokens, dtype), dtype, seed ^ OTHER), tokens)
    first = Quantized(wide.values, jnp.ones((1,) * wide.values.ndim, jnp.float32))
    # The narrower gives the result's rows.
    rows, columns = ("".join(axis for axis in of if axis in w_axes) for of in (narrow_axes, wide_axes))
    dw = multiply(f"{wide_axes},{narrow_axes}->{rows}{columns}", kind, first, second, narrow.dtype)
    return dw if rows + columns == w_axes else jnp.einsum(f"{rows}{columns}->{w_axes}", dw)


def _summed_last(x: Quantized, summed: list[int]) -> Quantized:
    """Return x with the last of the axes ``summed`` last in memory.

    A trick: a TPU multiplies int8 at its full rate only if the operand that gives the result's rows lies so. The
    barrier makes XLA transpose the eight bits, and not what they are made of.
    """
    *first, last = summed
    order = (*first, *(axis for axis in range(x.values.ndim) if axis not in summed), last)
    return Quantized(with_layout_constraint(jax.lax.optimization_barrier(x.values), Layout(order)), x.scales)


def multiply(equation: str, kind: str, a: Quantized, b: Quantized, dtype: Any) -> jax.Array:
    """Compute einsum(equation, a, b) in eight bits -> ``dtype``. Each axis stands in two of the three arrays.

    a, b: have scales of 1 along the axes that are summed over.
    """
    a_axes, b_axes, y_axes = axes_of(equation)
    sizes = dict(zip(a_axes + b_axes, a.values.shape + b.values.shape, strict=True))
    # Sums over shards are taken of the results, in their own type: of int32, they would move twice the bytes, and could
    # overflow.
    parts = _parts([axis for axis in a_axes if axis in b_axes], sizes)
    split = f"{_split(a_axes, parts)},{_split(b_axes, parts)}->{''.join(parts)}{y_axes}"
    sums = jnp.einsum(
        split,
        _reshaped(a.values, a_axes, parts),
        _reshaped(b.values, b_axes, parts),
        preferred_element_type=TYPES[kind][2],
    )
    y = sums.astype(jnp.float32) * _spread(a.scales, a_axes, y_axes) * _spread(b.scales, b_axes, y_axes)
    y = y.astype(dtype)
    return jax.lax.reduce(y, jnp.zeros((), dtype), jax.lax.add, range(len(parts))) if parts else y


def scales_of(x: jax.Array, summed: list[int], dtype: Any) -> jax.Array:
    """Return float32 scales, whose axes ``summed`` are 1, by which x is divided to fit into eight bits of ``dtype``.

    Values that are not finite make their scale infinite, and so every product with them infinite or NaN.
    """
    # Replace NaN, because compilers may ignore it in a maximum.
    sizes = jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf).astype(jnp.float32)
    return jnp.maximum(jnp.max(sizes, axis=summed, keepdims=True), LEAST) * np.float32(1 / _most(dtype))


def quantized(x: jax.Array, scales: jax.Array, dtype: Any, seed: jax.Array | None = None) -> Quantized:
    """Return x divided by ``scales`` in eight bits, with these.

    seed: int8 rounds at random by this seed, uint32 [2]. None: it rounds to the nearest.
    """
    x, most = x.astype(jnp.float32) * (1 / scales), _most(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        x = jnp.round(x) if seed is None else jnp.floor(x + uniform(noise(seed, x.shape)))
    return Quantized(jnp.clip(x, -most, most).astype(dtype), scales)


def _most(dtype: Any) -> np.float32:
    """Return the largest number of a type of eight bits."""
    return np.float32(127 if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


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
