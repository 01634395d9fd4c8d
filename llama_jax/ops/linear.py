"""Matrix products of the model.

Training uses an einsum whose gradient avoids a transposed copy (einsum.py), or products in eight bits (eight_bit.py).
Generation multiplies few rows by plain or quantized matrices, in the way that is fastest on each platform. Fine-tuning
multiplies by the same matrices, which are frozen (frozen.py), and by low-rank adapters.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from llama_jax.devices.chips import LANES
from llama_jax.devices.sharding import EVERY_AXIS, shard_axes, shard_by_shard, shards_here
from llama_jax.ops import eight_bit, exact, frozen
from llama_jax.ops.eight_bit import EightBit
from llama_jax.ops.einsum import axes_of, einsum, few_outputs, few_outputs_gradient
from llama_jax.ops.gradient_order import known_after
from llama_jax.ops.quantize import Adapted, Matrix, Weight, to_integers

# A TPU multiplies on its matrix unit if there are at least this many rows, and element by element if there are fewer.
MATRIX_ROWS = 8
# On a CPU, products of up to this many rows are summed here instead of by XLA's dot, in parallel parts.
CPU_SUMMED, CPU_SUMMED_INT8, CPU_PARTS = 1, 4, 8
# From this width on, partial sums of float32 matrices do not fit into a CPU's caches. XLA's dot has no partial sums and
# is faster there.
CPU_WIDE = 8192
# The logical axis of a matrix's inputs or outputs, by the first letter of them. D is whole where this is asked.
LOGICAL = {"D": None, "N": "heads", "K": "kv_heads", "F": "mlp", "V": "vocab"}
# The number of parts in which a GPU sums the product of a single row and an int8 matrix.
GPU_PARTS = 16


def linear(
    equation: str,
    x: jax.Array,
    w: Weight | EightBit,
    dtype: Any = None,
    exact_rows: int = 0,
    bias: jax.Array | None = None,
    name: str = "",
) -> jax.Array:
    """Compute einsum(equation, x, w), for example ``linear("BTD,DNH->BTNH", x, wq)``. The weight w has no batch axis.

    dtype: the type of the result. None: x's. exact_rows: if not 0, a Matrix is multiplied by this many rows at a time
    (exact.py). bias: an array of the shape of w's outputs to add to the result. None: nothing is added. name: the
    product's name for policies of rematerialisation (remat.py), that of its matrix.

    Values and gradients equal those of jnp.einsum. Of an EightBit they are rounded. A Matrix is frozen: x has a
    gradient, and it has none.

    JAX's own gradient of x @ w is (dy^T x)^T, for which XLA on a CPU first copies the wider operand transposed. The
    gradient here has the narrower operand first, which makes a training step of the 15M model a quarter faster on a
    CPU. Other compilers choose the layout themselves and are not slowed down.
    """
    if bias is not None:
        product = linear(equation, x, w, dtype, exact_rows, name=name)
        return product + bias.astype(product.dtype)
    if isinstance(w, Adapted):
        if not exact_rows and _is_merged(equation, x, w):
            return checkpoint_name(_merged(equation, w.scale, x, w.base, w.a, w.b), name)
        product = linear(equation, x, w.base, dtype, exact_rows, name=name)
        return product + _low_rank(equation, x, w, exact_rows).astype(product.dtype)
    if isinstance(w, EightBit):
        return checkpoint_name(eight_bit.product(equation, x, w), name)
    if isinstance(w, Matrix):
        kind = jnp.dtype(dtype or x.dtype).name
        return checkpoint_name(_matrix(equation, kind, exact_rows, x.dtype.name, x, w), name)
    if dtype is not None:
        return jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=dtype)
    return checkpoint_name(einsum(equation, x, _as_multiplied(equation, w.astype(x.dtype))), name)


def _as_multiplied(equation: str, w: jax.Array) -> jax.Array:
    """Return the weight w in the order in memory in which a TPU multiplies by it.

    A trick: XLA would gather the shards of a weight [N, H, D], of which N and H are summed over, with D outermost, as
    no product takes it, and then copy the whole. With N outermost, 7B's step on v5e:16x16, without kernels, takes
    3,930 ms instead of 4,032. Heads that do not fill lanes would leave some empty so: for TinyLlama's, of 64 features,
    the product and its gradient then take 0.72 ms for 4,096 tokens, where they take 0.41.
    """
    _, w_axes, y_axes = axes_of(equation)
    if len(w_axes) != 3 or w_axes[1] in y_axes or w.shape[1] % LANES:
        return w
    return jax.lax.platform_dependent(
        w, tpu=lambda w: with_layout_constraint(w, Layout((0, 2, 1))), default=lambda w: w
    )


def features_last(x: jax.Array) -> jax.Array:
    """Return x, the result of a product, with its last axis last in memory.

    A trick: on a TPU, XLA would put positions last and copy the result back: 10 of 1,069 ms of 7B's step on v5e:16x16.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _is_merged(equation: str, x: jax.Array, w: Adapted) -> bool:
    """Return whether x (W + scale a b) is computed with one product, as x W + scale (x a) b in float32 are two.

    It is one if the sum takes fewer numbers than the second product's inputs and outputs have, and loses no digits.
    """
    plain = w.base.scales is None and x.dtype == w.base.values.dtype == jnp.float32
    return plain and w.keys is None and math.prod(x.shape[:2]) * sum(w.base.values.shape) >= w.base.values.size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _merged(equation: str, scale: float, x: jax.Array, base: Matrix, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute einsum(equation, x, W + scale a b) of a plain frozen W, with gradients for x, a and b."""
    return _merged_forward(equation, scale, x, base, a, b)[0]


def _merged_forward(
    equation: str, scale: float, x: jax.Array, base: Matrix, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, Matrix, jax.Array, jax.Array]]:
    whole = base.replace(values=base.values + scale * (a @ b))
    return frozen.product(equation, x, whole, x.dtype), (x, base, a, b)


def _merged_backward(
    equation: str, scale: float, saved: tuple[jax.Array, Matrix, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, None, jax.Array, jax.Array]:
    x, base, a, b = saved
    # The sum is made again. To keep it would take as much memory as the base.
    whole = base.replace(values=base.values + scale * (known_after(dy, a) @ b))
    dx = frozen.gradient(equation, dy, whole, x.dtype)
    x, dy = (rows.reshape(*rows.shape[:2], -1) for rows in (x, dy))
    low = few_outputs(x, scale * a)
    db = jnp.einsum("BTR,BTO->RO", low, dy)
    return dx, None, few_outputs_gradient(x, scale * jnp.einsum("BTO,RO->BTR", dy, b)), db


_merged.defvjp(_merged_forward, _merged_backward)


def _low_rank(equation: str, x: jax.Array, w: Adapted, exact_rows: int) -> jax.Array:
    """Compute scale (dropout(x) a) b in x's type, or in float32 if exact_rows is not 0."""
    inputs = sum(axis in equation.split(",")[1].split("->")[0] for axis in equation.split(",")[0])
    rows, outputs = x.shape[:2], w.shape[inputs:]
    x = x.reshape(*rows, -1)
    if exact_rows:
        low = exact.product_in_blocks(x.reshape(math.prod(rows), -1), w.a, exact_rows).astype(x.dtype)
        product = exact.rounded(exact.product_in_blocks(low, w.b, exact_rows) * w.scale)
        return product.reshape(*rows, *outputs)
    low = low_rank_inputs(x, w)
    return einsum("BTR,RO->BTO", low, w.b.astype(x.dtype)).reshape(*rows, *outputs)


def low_rank_inputs(x: jax.Array, w: Adapted) -> jax.Array:
    """Return scale dropout(x) a: [B, T, I] -> [B, T, R] of x's type."""
    if w.keys is not None:
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - w.dropout, x.shape[1:]))(w.keys)
        x = jnp.where(kept, x / (1 - w.dropout), 0)
    return few_outputs(x, w.a.astype(x.dtype)) * w.scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _matrix(equation: str, dtype: str, exact_rows: int, x_dtype: str, x: jax.Array, w: Matrix) -> jax.Array:
    """Multiply by a Matrix, with a result of ``dtype``. Its gradient for x holds the stored values and scales alone."""
    return _flat(equation, x, w, exact_rows).astype(dtype)


def _matrix_forward(
    equation: str, dtype: str, exact_rows: int, x_dtype: str, x: jax.Array, w: Matrix
) -> tuple[jax.Array, Matrix]:
    return frozen.product(equation, x, w, jnp.dtype(dtype)), w


def _matrix_backward(
    equation: str, dtype: str, exact_rows: int, x_dtype: str, w: Matrix, dy: jax.Array
) -> tuple[jax.Array, None]:
    return frozen.gradient(equation, dy, w, jnp.dtype(x_dtype)), None


_matrix.defvjp(_matrix_forward, _matrix_backward)


def _flat(equation: str, x: jax.Array, w: Matrix, exact_rows: int) -> jax.Array:
    """Compute the product in float32 on flat matrices, the form in which a Matrix is stored.

    Values are converted to x's type where they are read, without a converted copy in memory.
    """
    x_axes, w_axes = equation.split("->")[0].split(",")
    inputs = sum(axis in w_axes for axis in x_axes)
    rows, outputs = x.shape[:2], w.shape[inputs:]
    x = x.reshape(math.prod(rows), -1)
    grouped = w.scales is not None and w.scales.shape[0] > 1
    values = w.dequantized().reshape(w.values.shape) if grouped else w.values
    if exact_rows:
        product = exact.product_in_blocks(x, values, exact_rows, w.is_transposed)
    elif w.is_transposed:
        product = jax.lax.platform_dependent(x, values, tpu=_rows_of_table_on_tpu, default=_rows_of_table)
    elif grouped:
        on_tpu = functools.partial(_rows_in_pieces, inputs=LOGICAL[w_axes[0]], outputs=LOGICAL[w_axes[inputs]])
        product = jax.lax.platform_dependent(
            x, w, cpu=_dequantized(_rows_on_cpu), cuda=_rows_by_group_on_gpu, tpu=on_tpu, default=_dequantized(_rows)
        )
    else:
        product = jax.lax.platform_dependent(
            x, values, cpu=_rows_on_cpu, cuda=_rows_on_gpu, tpu=_rows_on_tpu, default=_rows
        )
    if w.scales is not None and not grouped:
        product *= w.scales
        product = exact.rounded(product) if exact_rows else product
    return product.reshape(*rows, *outputs)


def _dequantized(rows: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[jax.Array, Matrix], jax.Array]:
    """Return ``rows`` for a quantized matrix: the product by its weights as a flat array."""
    return lambda x, w: rows(x, w.dequantized().reshape(w.values.shape))


def _rows_in_pieces(x: jax.Array, w: Matrix, inputs: str | None, outputs: str | None) -> jax.Array:
    """Multiply x [R, D] by a matrix with a scale per group of inputs -> float32 [R, F], on a TPU.

    XLA converts int4 in its product where a device's number of inputs is a power of two. Otherwise it would first write
    the matrix to memory in bfloat16: 8 rows by w2 of 7B then take 584 microseconds on a v5e chip instead of 70. The
    trick is to multiply two pieces of such sizes, of which the second ends with the matrix. It takes zeros for x where
    the first has been. inputs, outputs: the logical axes of D and F, if they have one.
    """
    assert w.scales is not None
    groups, shards = len(w.scales), shards_here(inputs)
    group, size = len(w.values) // groups, len(w.values) // shards
    first = 1 << (size.bit_length() - 1)
    second = 1 << (size - first - 1).bit_length() if size > first else 0
    if first % group or second % group or groups % shards or shards_here("embed") > 1:
        return _rows_on_tpu(x, _spread(w.scales, group) * w.values.astype(jnp.float32))

    def local(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
        def piece(x: jax.Array, begin: int, end: int) -> jax.Array:
            spread = _spread(scales[begin // group : end // group], group)
            return _rows_on_tpu(x[:, begin:end], spread * values[begin:end].astype(jnp.float32))

        rest = jnp.where(jnp.arange(size) < first, 0, x)
        product = piece(x, 0, first)
        if second:
            product += piece(rest, size - second, size)
        shards = shard_axes(inputs) if inputs else ()
        return jax.lax.psum(product, shards) if shards else product

    # Of all axes, as the conversion would leave the product where the partitioner splits others.
    rows = "batch" if len(x) % shards_here("batch") == 0 else None
    by_shard = shard_by_shard(local, EVERY_AXIS, ((rows, inputs), *[(inputs, outputs)] * 2), (rows, outputs))
    return by_shard(x, w.values, w.scales)


def _spread(scales: jax.Array, group: int) -> jax.Array:
    """Return scales [groups, F] for each input, [D, F].

    So the integers keep their shape, and XLA converts them in the product.
    """
    return jnp.broadcast_to(scales[:, None], (len(scales), group, scales.shape[1])).reshape(-1, scales.shape[1])


def _rows(x: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum("RD,DF->RF", x, values.astype(x.dtype), preferred_element_type=jnp.float32)


def _rows_of_table(x: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum("RD,FD->RF", x, values.astype(x.dtype), preferred_element_type=jnp.float32)


def _rows_on_tpu(x: jax.Array, values: jax.Array, rows: Callable[..., jax.Array] = _rows) -> jax.Array:
    # A trick: padding rows make the TPU use its matrix unit instead of multiplying element by element.
    product = rows(jnp.pad(x, [(0, max(0, MATRIX_ROWS - len(x))), (0, 0)]), values)[: len(x)]
    # A trick: without the barrier, the layout that later operations prefer reaches the matrix, and XLA transposes it.
    return jax.lax.optimization_barrier(product)


_rows_of_table_on_tpu = functools.partial(_rows_on_tpu, rows=_rows_of_table)


def _rows_on_gpu(x: jax.Array, values: jax.Array) -> jax.Array:
    """Compute ``_rows``, but sum the product of a single row and an int8 matrix without the matrix unit.

    Reading int8 for the matrix unit is half as fast: on an H100, a matrix of 4096 x 11008 takes 55 us instead of 28.
    """
    if len(x) > 1 or values.dtype != jnp.int8:
        return _rows(x, values)
    parts = math.gcd(x.shape[1], GPU_PARTS)
    x, values = (a.astype(jnp.float32).reshape(parts, -1, a.shape[-1]) for a in (x.T, values))
    # A trick: the barrier keeps XLA from merging the two sums into one, which would do too little in parallel.
    return jnp.sum(jax.lax.optimization_barrier(jnp.sum(x * values, axis=1)), axis=0)[None]


def _rows_by_group_on_gpu(x: jax.Array, w: Matrix) -> jax.Array:
    """Multiply x [R, D] by a matrix with a scale per group of inputs -> float32 [R, F].

    XLA would write the matrix to memory in float32 before its product. A single row is multiplied and summed by group
    instead, without the matrix unit, and scales apply to the sums. As compiled for an H100, a decoding step of four
    layers of 7B's width then reads and writes 0.87 GB, where it took 8.2.
    """
    assert w.scales is not None
    if len(x) > 1:
        return _dequantized(_rows)(x, w)
    groups, outputs = w.scales.shape
    x, values = x.astype(jnp.float32).reshape(groups, -1, 1), w.values.reshape(groups, -1, outputs)
    # A trick: XLA would write out what a sum over the middle axis reads, transposed.
    sums = jnp.asarray(sum(x[:, i] * values[:, i].astype(jnp.float32) for i in range(values.shape[1])))
    # A trick: the barrier keeps XLA from merging the two sums into one, which would do too little in parallel.
    return jnp.sum(jax.lax.optimization_barrier(sums) * w.scales, axis=0)[None]


def _rows_on_cpu(x: jax.Array, values: jax.Array) -> jax.Array:
    integers = values.dtype == jnp.int8
    wide = values.shape[1] >= CPU_WIDE and not integers
    if len(x) > (CPU_SUMMED_INT8 if integers else CPU_SUMMED) or wide:
        return _rows(x, values)
    if integers:
        # A trick: XLA cannot know that 0 * x is zero. Without it, XLA would convert the matrix once, before the loop
        # over decoding steps, and each step would read four bytes per value instead of one.
        values += (0 * x[0, 0]).astype(jnp.int8)
    return jnp.stack([_sum_of_products(row, values) for row in x.astype(jnp.float32)])


def _sum_of_products(x: jax.Array, values: jax.Array) -> jax.Array:
    """Multiply x [D] by values [D, F] -> float32 [F], faster than XLA's dot on a CPU.

    Memory is read as a few long streams. XLA's dot of int8 would first write a converted matrix. Here values are
    converted in registers, and x is rounded to integers of about 20 bits, an error close to that of float32. Sums of
    integers can be taken in any order, so the compiler vectorises them.
    """
    # Inputs may be sharded over devices. Each device slices its own.
    shards = math.gcd(len(x), jax.sharding.get_abstract_mesh().size or 1)
    parts = math.gcd(len(x) // shards, CPU_PARTS)
    scale: jax.Array | float = 1.0
    if values.dtype == jnp.int8:
        # The sum of the parts does not overflow, even if rounding makes the largest integer a little larger.
        x, scale = to_integers(x, axis=0, dtype=jnp.int32, most=(2**31 - 1) // (128 * parts))
    rows = len(x) // (shards * parts)
    x, values = x.reshape(shards, parts, rows, 1), values.reshape(shards, parts, rows, -1)
    side_by_side = jnp.asarray(sum(x[:, i] * values[:, i].astype(x.dtype) for i in range(parts)))
    # Use einsum, because XLA would compute a sum for one output after the other.
    scales = jnp.full((shards, rows), scale, jnp.float32)
    return jnp.einsum("SR,SRF->F", scales, side_by_side.astype(jnp.float32))
