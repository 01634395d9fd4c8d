"""Matrix products of the model: an einsum with a gradient that keeps the weight's layout; few rows; quantized weights."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.ops import exact
from llama_jax.ops.quantize import Matrix, Weight, to_integers

# The name by which rematerialisation policies know the results (remat.py).
PROJECTION = "projection"


# A TPU multiplies on its matrix unit what has at least this many rows, and element by element what has less.
MATRIX_ROWS = 8
# A CPU sums the products of so many rows itself, in so many parts side by side.
CPU_SUMMED, CPU_SUMMED_INT8, CPU_PARTS = 1, 4, 8
# Partial sums of float32 matrices as wide as this would leave a CPU's caches: XLA's dot, which has none, is faster there.
CPU_WIDE = 8192
# A GPU sums a single row's products with int8 in so many parts.
GPU_PARTS = 16


def linear(equation: str, x: jax.Array, w: Weight, dtype: Any = None, exact_rows: int = 0) -> jax.Array:
    """einsum(equation, x, w), of ``dtype`` (None: x's), where w has no batch axis: ``linear("BTD,DNH->BTNH", x, wq)``.

    Same values and gradients as jnp.einsum. JAX's own gradient of x @ w is (dy^T x)^T, which XLA on a CPU begins by copying
    the wider operand transposed. Written with the narrower operand first, a training step of the 15M model is a quarter
    faster there; other compilers choose the layout by themselves and are not hindered. A Matrix has no gradient.

    exact_rows: where it is not 0, a Matrix is multiplied by so many rows at a time (exact.py).
    """
    if isinstance(w, Matrix):
        return _flat(equation, x, w, exact_rows).astype(dtype or x.dtype)
    if dtype is not None:
        return jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=dtype)
    return checkpoint_name(_einsum(equation, x, w.astype(x.dtype)), PROJECTION)


def _flat(equation: str, x: jax.Array, w: Matrix, exact_rows: int) -> jax.Array:
    """The product, float32, as one of flat matrices, the form that they are stored in. Values are converted where they are read."""
    x_axes, w_axes = equation.split("->")[0].split(",")
    inputs = sum(axis in w_axes for axis in x_axes)
    rows, outputs = x.shape[:2], w.shape[inputs:]
    x = x.reshape(math.prod(rows), -1)
    grouped = w.scales is not None and w.scales.shape[0] > 1
    values = w.dequantized().reshape(w.values.shape) if grouped else w.values
    if exact_rows:
        product = exact.product_in_blocks(x, values, exact_rows)
    else:
        product = jax.lax.platform_dependent(
            x, values, cpu=_rows_on_cpu, cuda=_rows_on_gpu, tpu=_rows_on_tpu, default=_rows
        )
    if w.scales is not None and not grouped:
        product *= w.scales
        product = exact.rounded(product) if exact_rows else product
    return product.reshape(*rows, *outputs)


def _rows(x: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum("RD,DF->RF", x, values.astype(x.dtype), preferred_element_type=jnp.float32)


def _rows_on_tpu(x: jax.Array, values: jax.Array) -> jax.Array:
    product = _rows(jnp.pad(x, [(0, max(0, MATRIX_ROWS - len(x))), (0, 0)]), values)[: len(x)]
    # Without it, the layout that what follows would like to have is asked of the matrix, which is transposed for it.
    return jax.lax.optimization_barrier(product)


def _rows_on_gpu(x: jax.Array, values: jax.Array) -> jax.Array:
    """Tiles of a matrix unit, converted from int8, are read half as fast as sums: on an H100, 4096 x 11008 in 55 us, not 28."""
    if len(x) > 1 or values.dtype != jnp.int8:
        return _rows(x, values)
    parts = math.gcd(x.shape[1], GPU_PARTS)
    x, values = (a.astype(jnp.float32).reshape(parts, -1, a.shape[-1]) for a in (x.T, values))
    # The barrier keeps XLA from making one sum of both, with too little to do at once.
    return jnp.sum(jax.lax.optimization_barrier(jnp.sum(x * values, axis=1)), axis=0)[None]


def _rows_on_cpu(x: jax.Array, values: jax.Array) -> jax.Array:
    integers = values.dtype == jnp.int8
    wide = values.shape[1] >= CPU_WIDE and not integers
    if len(x) > (CPU_SUMMED_INT8 if integers else CPU_SUMMED) or wide:
        return _rows(x, values)
    if integers:
        # Zeros that come out of x: without them a loop of steps would convert the matrix once, and read it four times as wide.
        values += (0 * x[0, 0]).astype(jnp.int8)
    return jnp.stack([_sum_of_products(row, values) for row in x.astype(jnp.float32)])


def _sum_of_products(x: jax.Array, values: jax.Array) -> jax.Array:
    """[D] times [D, F] -> float32 [F], faster than XLA's dot on a CPU: memory is read as a few long streams.

    A dot of int8 would write a converted matrix first; here it is converted in registers. x becomes integers then, of 20 bits
    for the largest, which is about float32's own error: sums of integers may be taken in any order, and are vectorised.
    """
    # Inputs may be spread over devices: each slices its own.
    shards = math.gcd(len(x), jax.sharding.get_abstract_mesh().size or 1)
    parts = math.gcd(len(x) // shards, CPU_PARTS)
    scale: jax.Array | float = 1.0
    if values.dtype == jnp.int8:
        # Sums of the parts do not overflow, even where rounding makes the largest a little larger.
        x, scale = to_integers(x, axis=0, dtype=jnp.int32, most=(2**31 - 1) // (128 * parts))
    rows = len(x) // (shards * parts)
    x, values = x.reshape(shards, parts, rows, 1), values.reshape(shards, parts, rows, -1)
    side_by_side = jnp.asarray(sum(x[:, i] * values[:, i].astype(x.dtype) for i in range(parts)))
    # A dot, since XLA would take the sum for one output after the other.
    scales = jnp.full((shards, rows), scale, jnp.float32)
    return jnp.einsum("SR,SRF->F", scales, side_by_side.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, w)


def _forward(equation: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _einsum(equation, x, w), (x, w)


def _backward(equation: str, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    operands, y_axes = equation.split("->")
    x_axes, w_axes = operands.split(",")
    dx = jnp.einsum(f"{y_axes},{w_axes}->{x_axes}", dy, w)
    if x.size <= dy.size:
        dw = jnp.einsum(f"{x_axes},{y_axes}->{w_axes}", x, dy)
    else:
        dw = jnp.einsum(f"{y_axes},{x_axes}->{w_axes}", dy, x)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_einsum.defvjp(_forward, _backward)
