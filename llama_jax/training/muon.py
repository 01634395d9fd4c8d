"""Muon: momentum whose every matrix is orthogonalised, for the matrices of the layers (Jordan et al., 2024).

An update is scaled to the root mean square of AdamW's (Liu et al., 2025, "Muon is scalable for LLM training", section
2.2), so that one learning rate serves both. Optax's Muon computes the same; here the matrices are spread over the
devices of a mesh, and the products are of bfloat16 on accelerators.

Letters: L layers, D dim, P the other side of a matrix, S matrices in a stack, m and n the smaller and larger side.
"""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, tree_leaves_with_path, tree_map_with_path

from llama_jax.config import ModelArgs
from llama_jax.devices.sharding import EVERY_AXIS, shard_axes, shard_by_shard
from llama_jax.ops.parameters import AXES, is_vector
from llama_jax.train_args import DType

# The iteration is X <- a X + b (X X^T) X + c (X X^T)^2 X. Five of them bring singular values,
# all but the smallest, to between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# The root mean square of AdamW's updates, about.
RMS = 0.2
EPS = 1e-8
# A device orthogonalises about this many numbers at once, and at least one matrix. A CPU takes one matrix at a time,
# which stays in its cache.
AT_ONCE = 1 << 26
# The axes of a stack [S, D, P].
STACK = (None, "embed", "mlp")


class MuonState(NamedTuple):
    """The state of Muon: the number of updates, int32, and the running mean of the gradient of each matrix, float32."""

    updates: jax.Array
    momentum: Any


def scale_by_muon(momentum: float, compute_dtype: DType = "auto") -> optax.GradientTransformation:
    """Return the transformation of gradients of the layers' matrices into Muon's updates, for a rate of -1.

    The gradient's running mean is corrected for its bias and taken one step ahead (Nesterov), as in optax.

    compute_dtype: float32, or else bfloat16 on accelerators and float32 on a CPU.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        mean = optax.tree.update_moment(grads, state.momentum, momentum, 1)
        count = state.updates + 1
        ahead = jax.tree.map(
            lambda mean, grad: momentum * mean + (1 - momentum) * grad,
            optax.tree.bias_correction(mean, momentum, count + 1),
            optax.tree.bias_correction(grads, momentum, count),
        )
        return _directions(ahead, compute_dtype), MuonState(count, mean)

    return optax.GradientTransformation(init, update)


def in_layers(params: Any) -> Any:
    """Return which parameters Muon updates: the matrices of the layers, not vectors, embeddings or output."""
    return tree_map_with_path(lambda path, _: path[0].key == "layers" and not is_vector(path), params)


def not_in_layers(params: Any) -> Any:
    """Return which parameters AdamW updates: all others."""
    return jax.tree.map(lambda muon: not muon, in_layers(params))


def matrix_sizes(args: ModelArgs) -> list[tuple[int, int]]:
    """Return the smaller and the larger side of each matrix of a layer."""
    Q, KV, F = args.n_heads * args.head_width, args.kv_heads * args.head_width, args.hidden_width
    return [(min(args.dim, P), max(args.dim, P)) for P in (Q, KV, KV, Q, F, F, F)]


def at_once(sides: tuple[int, ...], count: int, most: int = AT_ONCE) -> int:
    """Return how many of ``count`` matrices of these sides a device orthogonalises at once."""
    return min(count, max(1, most // math.prod(sides)))


def orthogonalize(x: jax.Array) -> jax.Array:
    """Return U V^T, about, of matrices U diag(s) V^T, by the iteration of Newton and Schulz: [..., m, n] -> the same.

    The products are of x's dtype. A matrix of zeros stays one.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    norm = jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True)
    x, (a, b, c) = (x / (norm + EPS)).astype(x.dtype), COEFFICIENTS
    for _ in range(ITERATIONS):
        squares = x @ x.swapaxes(-1, -2)
        x = a * x + (b * squares + c * (squares @ squares)) @ x
    return x


def _directions(means: Any, compute_dtype: DType) -> Any:
    """Return the orthogonalised and scaled matrices of a tree of stacks of layers, float32."""
    paths, leaves = zip(*tree_leaves_with_path(means), strict=True) if jax.tree.leaves(means) else ((), ())
    stacks = [_flat(path, x) for path, x in zip(paths, leaves, strict=True)]
    dtype = jnp.float32 if compute_dtype == "float32" else jnp.bfloat16
    on_cpu = functools.partial(_orthogonalized, jnp.float32, 1)
    elsewhere = functools.partial(_orthogonalized, dtype, AT_ONCE)
    made = jax.lax.platform_dependent(*stacks, cpu=on_cpu, default=elsewhere) if stacks else ()
    scaled = [RMS * math.sqrt(max(x.shape[1:])) * x for x in made]
    unflat = [_unflat(path, x, like) for path, x, like in zip(paths, scaled, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(means), unflat)


def _flat(path: KeyPath, x: jax.Array) -> jax.Array:
    """Return a parameter of all layers as matrices [L, D, P], since the iteration may as well be of the transposed."""
    if _starts_with_dim(path):
        return x.reshape(*x.shape[:2], -1)
    return x.reshape(len(x), -1, x.shape[-1]).swapaxes(1, 2)


def _unflat(path: KeyPath, x: jax.Array, like: jax.Array) -> jax.Array:
    """Undo ``_flat``: [L, D, P] -> the shape of ``like``."""
    return (x if _starts_with_dim(path) else x.swapaxes(1, 2)).reshape(like.shape)


def _starts_with_dim(path: KeyPath) -> bool:
    return AXES[cast(Any, path[-1]).key][0] == "embed"


def _orthogonalized(dtype: Any, most: int, *stacks: jax.Array) -> tuple[jax.Array, ...]:
    """Return stacks [L, D, P] orthogonalised in ``dtype``, float32.

    Stacks of one shape are spread over the mesh together. ``most`` is how many numbers a device takes at once.
    """
    sizes = [x.shape[1:] for x in stacks]
    made: dict[int, jax.Array] = {}
    for size in dict.fromkeys(sizes):
        which = [i for i, other in enumerate(sizes) if other == size]
        axes = (STACK,) * len(which)
        spread = shard_by_shard(functools.partial(_spread, most), EVERY_AXIS, axes, axes)
        made |= zip(which, spread(*(stacks[i].astype(dtype) for i in which)), strict=True)
    return tuple(made[i].astype(jnp.float32) for i in range(len(stacks)))


def _spread(most: int, *stacks: jax.Array) -> tuple[jax.Array, ...]:
    """Return stacks of one shape orthogonalised, of which each device holds shards of all matrices.

    Each device gets whole matrices of a share of the stack, orthogonalises these alone, and gives the shards back.
    """
    axes = set(shard_axes(*EVERY_AXIS))
    if not axes:
        return tuple(_some_at_once(x, most) for x in stacks)
    lengths = [len(x) for x in stacks]
    x = jnp.concatenate(stacks)
    x = jnp.pad(x, ((0, -len(x) % jax.lax.axis_size(tuple(axes))), (0, 0), (0, 0)))
    x = _to_shards(_some_at_once(_to_matrices(x), most))
    return tuple(jnp.split(x[: sum(lengths)], [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]))


def _to_matrices(x: jax.Array) -> jax.Array:
    """Return this device's share of a stack of which it holds shards: [S, D/f, P/t] -> [S/devices, D, P]."""
    for axis, name in enumerate(STACK):
        if name is not None and (names := shard_axes(name)):
            x = jax.lax.all_to_all(x, names, split_axis=0, concat_axis=axis, tiled=True)
    if copies := _copies():
        size = len(x) // jax.lax.axis_size(copies)
        x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(copies) * size, size)
    return x


def _to_shards(x: jax.Array) -> jax.Array:
    """Undo ``_to_matrices``: [S/devices, D, P] -> [S, D/f, P/t]."""
    if copies := _copies():
        x = jax.lax.all_gather(x, copies, tiled=True)
    for axis, name in reversed(list(enumerate(STACK))):
        if name is not None and (names := shard_axes(name)):
            x = jax.lax.all_to_all(x, names, split_axis=axis, concat_axis=0, tiled=True)
    return x


def _copies() -> tuple[str, ...]:
    """Return the axes of the mesh along which devices hold the same parameters."""
    split = shard_axes("embed", "mlp")
    return tuple(name for name in shard_axes("batch", "length") if name not in split)


def _some_at_once(x: jax.Array, most: int) -> jax.Array:
    """Return a stack [S, D, P] orthogonalised, at least a matrix and at most about ``most`` numbers at a time."""
    few = at_once(x.shape[1:], len(x), most)
    return orthogonalize(x) if few == len(x) else jax.lax.map(orthogonalize, x, batch_size=few if few > 1 else None)
