"""Adam's moments in 16 or 8 bits.

8 bits follow "8-bit Optimizers via Block-wise Quantization" (Dettmers et al., 2022): each block of numbers has its own
scale, and the code has more levels near zero, as relative errors count. Here a level is a power of the code. It is
(c / 127)^2 for the signed first moment, and (c / 255)^4 for the second, which is a square. A moment is rounded up or
down at random, right on average: rounded to the nearest, one that changes by less than half a level a step would never
change.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from llama_jax.ops.noise import noise, uniform
from llama_jax.ops.parameters import is_vector
from llama_jax.train_args import Moments
from llama_jax.training.rounding import stochastic

# Numbers of a block, at most. Blocks of 128 cost 1/32 byte a number for their scales.
BLOCK = 128


class Packed(NamedTuple):
    """A moment in 8 bits. Its numbers lie as those of the parameter."""

    codes: jax.Array
    """int8 for the first moment, uint8 for the second; of the parameter's shape."""
    scales: jax.Array
    """float32: the largest magnitude of each block. The shape is the parameter's, with blocks along one axis."""


def block_axis(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the axis along which the blocks of an array lie, and the size of a block.

    It is the axis with the largest blocks. Of several, it is the one that most powers of two divide, since its shards
    then hold whole blocks on most meshes.
    """

    def size(axis: int) -> int:
        return max(block for block in range(1, BLOCK + 1) if shape[axis] % block == 0)

    axis = max(range(len(shape)), key=lambda axis: (size(axis), shape[axis] & -shape[axis]))
    return axis, size(axis)


def pack(x: jax.Array, bits: jax.Array, signed: bool) -> Packed:
    """Return float32 numbers in 8 bits, rounded by random ``bits``, uint32 of the same shape.

    signed: whether it is the first moment. A second moment that is not zero never becomes zero, by which an update
    would be divided.
    """
    top, power, dtype = (127, 2, jnp.int8) if signed else (255, 4, jnp.uint8)
    axis, size = block_axis(x.shape)
    scales = jnp.max(jnp.abs(_in_blocks(x, axis, size)), axis=axis + 1)
    share = jnp.abs(x) / _of_each(jnp.where(scales > 0, scales, 1.0), axis, size)
    root = jnp.sqrt(share) if signed else jnp.sqrt(jnp.sqrt(share))
    below = jnp.clip(jnp.floor(root * top), 0, top - 1)
    low, high = below**power, (below + 1) ** power
    code = below + (uniform(bits) < (share * float(top**power) - low) / (high - low))
    code = jnp.sign(x) * code if signed else jnp.maximum(code, (x > 0).astype(jnp.float32))
    return Packed(code.astype(dtype), scales)


def unpack(packed: Packed) -> jax.Array:
    """Return the numbers that were packed, float32."""
    codes, scales = packed
    axis = next((i for i, (a, b) in enumerate(zip(codes.shape, scales.shape, strict=True)) if a != b), 0)
    code = codes.astype(jnp.float32)
    level = code * jnp.abs(code) / 127**2 if codes.dtype == jnp.int8 else (code / 255) ** 4
    return level * _of_each(scales, axis, codes.shape[axis] // scales.shape[axis])


def _in_blocks(x: jax.Array, axis: int, size: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _of_each(scales: jax.Array, axis: int, size: int) -> jax.Array:
    """Return the scale of each number, from one for each block."""
    shape = scales.shape
    spread = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), (*shape[: axis + 1], size, *shape[axis + 1 :]))
    return spread.reshape(*shape[:axis], math.prod(spread.shape[axis : axis + 2]), *shape[axis + 1 :])


def small_adam(
    b1: float, b2: float, eps: float, kind: Moments, nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Return ``optax.scale_by_adam``, which keeps its moments in ``kind`` between steps, those of vectors in float32.

    Its update also takes ``seeds``, uint32 [leaves, 2, 2]: of each parameter, for the first and the second moment.
    """
    adam = optax.scale_by_adam(b1, b2, eps, nesterov=nesterov)

    def init(params: Any) -> optax.ScaleByAdamState:
        state = cast(optax.ScaleByAdamState, adam.init(params))
        seeds = jnp.zeros((len(jax.tree.leaves(params)), 2, 2), jnp.uint32)
        return _narrow(state, kind, seeds)

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None, *, seeds: jax.Array
    ) -> tuple[Any, optax.ScaleByAdamState]:
        wide = state._replace(mu=_wide(state.mu), nu=_wide(state.nu))
        updates, new = adam.update(grads, wide, params)
        return updates, _narrow(cast(optax.ScaleByAdamState, new), kind, seeds)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def _wide(tree: Any) -> Any:
    """Return moments as they are computed with, float32."""
    return jax.tree.map(lambda x: unpack(x) if _is_packed(x) else x.astype(jnp.float32), tree, is_leaf=_is_packed)


def _narrow(state: optax.ScaleByAdamState, kind: Moments, seeds: jax.Array) -> optax.ScaleByAdamState:
    """Return the state with its moments in ``kind``, rounded by ``seeds``."""
    keep: dict[Moments, Callable[[jax.Array, jax.Array, bool], Any]] = {
        "float32": lambda x, seed, signed: x,
        "bfloat16": lambda x, seed, signed: stochastic(x, noise(seed, x.shape)),
        "int8": lambda x, seed, signed: pack(x, noise(seed, x.shape), signed),
    }

    def narrow(tree: Any, which: int) -> Any:
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        made = [
            x if is_vector(path) else keep[kind](x, seeds[i, which], which == 0) for i, (path, x) in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, made)

    return state._replace(mu=narrow(state.mu, 0), nu=narrow(state.nu, 1))
