"""An optimizer for little memory: parameters in bfloat16 and small states, updated one layer at a time, in place.

Optax updates a whole tree at once. Beside bfloat16 parameters and packed moments, that tree in float32 would be the
largest of all. Here the layers are updated in a loop, each in float32, and only the narrow results are kept.

L layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, KeyPath

from llama_jax.config import TrainArgs
from llama_jax.devices.sharding import replicated
from llama_jax.ops.noise import noise
from llama_jax.ops.parameters import is_vector
from llama_jax.seeds import random_key
from llama_jax.training.bad_steps import LossHistory, noted
from llama_jax.training.moments import small_adam
from llama_jax.training.norms import squares
from llama_jax.training.rounding import compensated, stochastic
from llama_jax.training.widths import by_width

# What the random bits of a step are for.
GRADIENTS, UPDATES = 0, 1
# An update by Adafactor is scaled down to this root mean square (Shazeer and Stern, 2018, section 6).
ADAFACTOR_CLIP = 1.0


class PiecesState(NamedTuple):
    """The state of the optimizer, beside a LossHistory."""

    step: jax.Array
    """int32: the number of steps, skipped ones included."""
    direction: dict[str, Any]
    """Adam's moments, or Adafactor's: of "layers", with a leading axis L, and of the "rest"."""
    residue: Any
    """With compensated rounding: what is added to each parameter, bfloat16. It is empty otherwise."""


def is_small(args: TrainArgs) -> bool:
    """Return whether the settings ask for this optimizer."""
    return args.optimizer == "adafactor" or args.param_dtype != "float32" or args.moments != "float32"


def narrow_shapes(shapes: Any, args: TrainArgs) -> Any:
    """Return the parameters' shapes in the type in which they are trained."""
    return jax.eval_shape(lambda params: narrow(params, args), shapes)


def narrow(params: Any, args: TrainArgs) -> Any:
    """Return parameters in the type in which they are trained, rounded to the nearest. Vectors stay float32."""
    dtype = jnp.dtype(args.param_dtype)
    return jax.tree_util.tree_map_with_path(lambda path, p: p if is_vector(path) else p.astype(dtype), params)


@dataclass(frozen=True)
class InPieces:
    """The optimizer. ``rate`` is the learning rate of a step, counted from 1."""

    args: TrainArgs
    rate: optax.Schedule

    def init(self, params: Any) -> tuple[PiecesState, LossHistory]:
        """Return the first state for ``params``, whose layers are stacked."""
        (layers, rest), direction = _split(params), self._direction()
        states = {"layers": jax.vmap(direction.init)(_wide(layers)), "rest": direction.init(_wide(rest))}
        has_residue = self.args.param_dtype == "bfloat16" and self.args.rounding == "compensated"
        residue = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params) if has_residue else {}
        return PiecesState(jnp.zeros((), jnp.int32), states, residue), LossHistory.empty()

    def apply(
        self, grads: Any, state: tuple[PiecesState, LossHistory], params: Any, *, loss: jax.Array, grad_norm: jax.Array
    ) -> tuple[Any, tuple[PiecesState, LossHistory], Any]:
        """Return updated parameters and state, and of each parameter the sum of squares of its change, float32.

        ``grads`` are not clipped yet; ``grad_norm`` is their norm.
        """
        own, history = state
        skipped, history = noted(self.args, history, loss, grad_norm)
        most, rate, key = self.args.grad_clip, self.rate(own.step + 1), self._key(own, UPDATES)
        scale = jnp.where(grad_norm > most, most / grad_norm, 1.0) if most else jnp.float32(1.0)

        def update(number: Any, grads: Any, before: tuple[Any, ...]) -> tuple[Any, ...]:
            before = before[:3]  # what changes has no value before
            after = self._updated(jax.random.fold_in(key, number), scale, rate, grads, *before)
            if self.args.bad_steps != "stop":
                after = cast(Any, jax.tree.map(lambda old, new: jnp.where(skipped, old, new), before, after))
            # Here, where a layer is in the caches: beside the new parameters, the old ones would fill memory.
            return *after, squares(jax.tree.map(jnp.subtract, _wide(after[0]), _wide(before[0])))

        changes: Any = jax.tree.map(lambda p: jnp.zeros(p.shape[:1], jnp.float32), params["layers"]), {}
        split = _split(params), (own.direction["layers"], own.direction["rest"]), _split(own.residue), changes
        (layers, rest), L = _split(grads), len(jax.tree.leaves(params["layers"])[0])
        stacks = _over_layers(L, update, layers, tuple(layers for layers, _ in split))
        rests = update(L, rest, tuple(rest for _, rest in split))  # type: ignore[arg-type]
        direction = {"layers": stacks[1], "rest": rests[1]}
        residue = {"layers": stacks[2], **rests[2]} if own.residue else {}
        changed = {"layers": jax.tree.map(jnp.sum, stacks[3]), **rests[3]}
        return {"layers": stacks[0], **rests[0]}, (PiecesState(own.step + 1, direction, residue), history), changed

    def add(self, so_far: Any, grads: Any, state: tuple[PiecesState, LossHistory], part: jax.Array) -> Any:
        """Return the sum of gradients so far and those of the batch's part of this number, in the type of both.

        bfloat16 is rounded at random: to the nearest, a sum would stop to grow when a part is a 512th of it.
        """
        leaves, structure = jax.tree.flatten(so_far)
        seeds = _seeds(jax.random.fold_in(self._key(state[0], GRADIENTS), part), len(leaves))[:, 0]
        sums = [a.astype(jnp.float32) + b for a, b in zip(leaves, jax.tree.leaves(grads), strict=True)]
        return jax.tree.unflatten(structure, map(_rounded, sums, leaves, seeds))

    def _key(self, state: PiecesState, purpose: int) -> jax.Array:
        """Return the key of the random bits of the next step, which follows from the seed and the step's number."""
        return jax.random.fold_in(jax.random.fold_in(random_key(self.args.seed), state.step), purpose)

    def _direction(self) -> optax.GradientTransformationExtraArgs:
        """Return the chain that makes an update, for a rate of 1, from clipped gradients, all in float32."""
        args = self.args
        if args.optimizer == "adafactor":
            by = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(ADAFACTOR_CLIP))
        else:
            by = small_adam(args.beta1, args.beta2, args.eps, args.moments, args.nesterov)
        decay = optax.add_decayed_weights(args.weight_decay, matrices)
        return optax.with_extra_args_support(optax.chain(by_width(by, args), decay))

    def _updated(
        self, key: jax.Array, scale: jax.Array, rate: Any, grads: Any, params: Any, state: Any, residue: Any
    ) -> tuple[Any, Any, Any]:
        """Return a piece's parameters, state and residue after an update in float32."""
        leaves, structure = jax.tree.flatten(params)
        seeds = _seeds(key, len(leaves))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)
        has_residue = bool(jax.tree.leaves(residue))
        wide = jax.tree.map(jnp.add, _wide(params), residue) if has_residue else _wide(params)
        updates, state = self._direction().update(grads, state, wide, seeds=seeds[:, 1:])
        new = jax.tree.leaves(jax.tree.map(lambda p, u: p - rate * u, wide, updates))
        if not has_residue:
            return jax.tree.unflatten(structure, map(_rounded, new, leaves, seeds[:, 0])), state, residue
        rounded, rest = zip(*(compensated(p, like.dtype) for p, like in zip(new, leaves, strict=True)), strict=True)
        return jax.tree.unflatten(structure, rounded), state, jax.tree.unflatten(structure, rest)


def matrices(params: Any) -> Any:
    """Return which parameters decay: matrices, and not vectors."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not is_vector(path), params)


def state_shardings(shapes: Any, params: Any, mesh: Mesh) -> Any:
    """Return the shardings of a state.

    What belongs to a parameter is sharded like it, as far as its axes are the same.

    shapes: the shapes of the optimizer's state. params: those of the parameters, with their shardings.
    """
    by_name = {_name(path): param for path, param in jax.tree_util.tree_leaves_with_path(params)}

    def sharding(path: KeyPath, leaf: Any) -> NamedSharding:
        param = by_name.get(_name(path))
        return replicated(mesh) if param is None else NamedSharding(mesh, _spec(leaf.shape, param))

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def _name(path: KeyPath) -> tuple[str, ...]:
    """Return the name of the parameter to which an array of the state belongs."""
    names = tuple(key.key for key in path if isinstance(key, DictKey))
    return names[1:] if names[:1] == ("rest",) else names


def _spec(shape: tuple[int, ...], param: Any) -> PartitionSpec:
    """Return the partition of an array of ``shape``: a parameter's, its blocks', or its without one of its axes."""
    axes: list[Any] = [*param.sharding.spec, *[None] * (param.ndim - len(param.sharding.spec))]
    if len(shape) == param.ndim - 1:
        for i in range(param.ndim):
            if shape == param.shape[:i] + param.shape[i + 1 :]:
                del axes[i]
                break
    if len(shape) != len(axes):
        return PartitionSpec()
    sizes = param.sharding.mesh.shape

    def parts(axis: Any) -> int:
        return math.prod(sizes[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))

    return PartitionSpec(*(axis if size % parts(axis) == 0 else None for axis, size in zip(axes, shape, strict=True)))


def _split(tree: Any) -> tuple[Any, Any]:
    """Return the stacked layers of a tree of parameters, and the rest of it. An empty tree has neither."""
    return tree.get("layers", {}), {name: value for name, value in tree.items() if name != "layers"}


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _seeds(key: jax.Array, count: int) -> jax.Array:
    """Return seeds for ``count`` arrays, three each, uint32 [count, 3, 2]."""
    return jax.random.bits(key, (count, 3, 2), jnp.uint32)


def _rounded(new: jax.Array, like: jax.Array, seed: jax.Array) -> jax.Array:
    """Return float32 numbers in the type of ``like``. bfloat16 is rounded at random."""
    return new if like.dtype == jnp.float32 else stochastic(new, noise(seed, new.shape))


def _over_layers(L: int, update: Callable[[Any, Any, Any], Any], inputs: Any, stacks: Any) -> Any:
    """Return ``stacks`` with each of L layers replaced by ``update`` of its number, inputs and part, in place."""

    def layer(tree: Any, i: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)

    def step(i: jax.Array, stacks: Any) -> Any:
        new = update(i, layer(inputs, i), layer(stacks, i))
        return jax.tree.map(lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, i, 0), stacks, new)

    return jax.lax.fori_loop(0, L, step, stacks)
