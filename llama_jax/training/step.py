"""The optimizer and the jitted training step.

Letters: A parts of gradient accumulation, B rows of a part, T positions.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llama_jax.adapters import init_adapter
from llama_jax.config import ModelArgs, TrainArgs
from llama_jax.data.batches import Batch, PackedBatch, PairBatch
from llama_jax.devices.compiling import compiler_options, untried_options
from llama_jax.devices.sharding import (
    batch_sharding,
    on_mesh,
    parameter_shapes,
    parameter_shardings,
    replicated,
    with_shardings,
)
from llama_jax.model import Llama
from llama_jax.ops.loss import log_likelihoods
from llama_jax.seeds import random_key
from llama_jax.training import eight_bits
from llama_jax.training.adapting import Adapting
from llama_jax.training.bad_steps import LossHistory, watched
from llama_jax.training.muon import in_layers, not_in_layers, scale_by_muon
from llama_jax.training.norms import Norms, squares
from llama_jax.training.objective import Dpo, NextToken, Objective, Rewards
from llama_jax.training.pieces import InPieces, is_small, matrices, narrow, narrow_shapes, state_shardings
from llama_jax.training.rates import learning_rate
from llama_jax.training.widths import by_width

AnyBatch = Batch | PackedBatch | PairBatch
# What ``make_optimizer`` returns.
AnyOptimizer: TypeAlias = optax.GradientTransformationExtraArgs | InPieces


class TrainState(flax.struct.PyTreeNode):
    """All values that a step changes. The number of steps is in the optimizer's state.

    ``params`` are the model's parameters or, where adapters are trained, those of the adapters alone.
    """

    params: Any
    opt_state: Any


class StepMetrics(NamedTuple):
    """Results of one step, on the device. Loss and gradient norm are float32 scalars."""

    loss: jax.Array  # nats per token, or per pair
    grad_norm: jax.Array  # before clipping
    history: LossHistory
    targets: jax.Array | int = 0  # int32 []: tokens of the batch that count in the loss
    rewards: Rewards | None = None  # of preferences: means over the pairs of the batch
    norms: Norms | None = None  # by kind of parameter


def make_optimizer(args: TrainArgs, steps: int, held: float | None = None) -> AnyOptimizer:
    """Return AdamW with gradient clipping, weight decay on all parameters but norm weights, and handling of bad steps.

    ``steps`` and ``held`` are those of ``learning_rate``. With settings that save memory, or Adafactor, the optimizer
    works in pieces (pieces.py). Muon takes AdamW's place for the matrices of the layers (muon.py). With rate_width,
    each kind of parameter has its own rate (widths.py).
    """
    schedule = learning_rate(args, steps, held)
    if is_small(args):
        return InPieces(args, schedule)
    clip = optax.clip_by_global_norm(args.grad_clip) if args.grad_clip else optax.identity()
    adam = optax.scale_by_adam(args.beta1, args.beta2, args.eps, nesterov=args.nesterov)
    step = (
        optax.add_decayed_weights(args.weight_decay, matrices),
        optax.scale_by_learning_rate(lambda count: schedule(count + 1)),
    )
    if args.optimizer == "muon":
        muon = optax.masked(scale_by_muon(args.muon_momentum, args.compute_dtype), in_layers)
        return watched(optax.chain(clip, muon, by_width(optax.masked(adam, not_in_layers), args), *step), args)
    # A chain in the chain, since checkpoints hold the state in this form.
    return watched(optax.chain(clip, optax.chain(by_width(adam, args), *step)), args)


def state_shapes(model: Llama, optimizer: AnyOptimizer, mesh: Mesh, adapting: Adapting | None = None) -> TrainState:
    """Return the state's shapes with their shardings. The optimizer's moments are sharded like their parameters.

    adapting: trains adapters. None: trains the whole model.
    """
    if adapting is None:
        shapes, shardings = parameter_shapes(model), parameter_shardings(model, mesh)
    else:
        shapes = adapting.adapter_shapes(model.args, mesh)
        shardings = shardings_of(shapes)
    if isinstance(optimizer, InPieces):
        params = with_shardings(narrow_shapes(shapes, optimizer.args), shardings)
        opt_shapes = jax.eval_shape(optimizer.init, params)
        return TrainState(params, with_shardings(opt_shapes, state_shardings(opt_shapes, params, mesh)))
    opt_shapes = jax.eval_shape(optimizer.init, shapes)
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda shape, s: shape if _is_masked(shape) else s,
        opt_shapes,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=_is_masked,
    )
    return TrainState(with_shardings(shapes, shardings), with_shardings(opt_shapes, opt_shardings))


def _is_masked(node: Any) -> bool:
    """Return whether another part of the optimizer has the parameter of a node of the state."""
    return isinstance(node, optax.MaskedNode)


def shardings_of(shapes: Any) -> Any:
    """Return the shardings of a tree of shapes."""
    return jax.tree.map(lambda s: s.sharding, shapes)


def init_state(
    model: Llama,
    optimizer: AnyOptimizer,
    mesh: Mesh,
    seed: int,
    params: Any = None,
    adapting: Adapting | None = None,
) -> TrainState:
    """Create the initial state directly in its shards, from ``params`` or, if None, from random parameters."""
    shapes = state_shapes(model, optimizer, mesh, adapting)

    def init_params() -> Any:
        if adapting is not None:
            return init_adapter(model.args, adapting.lora, seed)
        made = nn.unbox(model.init(random_key(seed), jnp.zeros((1, 1), jnp.int32)))["params"]
        return narrow(made, optimizer.args) if isinstance(optimizer, InPieces) else made

    with on_mesh(mesh):
        if params is None:
            params = jax.jit(init_params, out_shardings=shardings_of(shapes.params))()
        opt_state = jax.jit(optimizer.init, out_shardings=shardings_of(shapes.opt_state))(params)
    return TrainState(params, opt_state)


def make_train_step(
    model: Llama,
    optimizer: AnyOptimizer,
    accumulation: int,
    adapting: Adapting | None = None,
    objective: Objective = NextToken(),
    eight: TrainArgs | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Return the training step: gradients of the mean loss over the batch's tokens or pairs, and one update. Jit it.

    The batch is split into ``accumulation`` parts whose gradients are summed. Each part is weighted by its tokens, so
    the result equals that of the whole batch. With ``adapting``, the step takes a third argument, the frozen base.

    eight: the settings of products in eight bits. None: there are none.
    """

    def train_step(state: TrainState, batch: AnyBatch, base: Any = None) -> tuple[TrainState, StepMetrics]:
        count, targets = jnp.maximum(objective.count(cast(Any, batch)), 1), jnp.count_nonzero(batch.weights)
        rows = None if adapting is None and eight is None else jnp.arange(len(batch.weights))

        copies = {} if eight is None else eight_bits.copies(eight, state.params)

        def part_loss(params: Any, part: AnyBatch, rows: Any) -> tuple[jax.Array, Rewards]:
            if adapting is not None:
                params = adapting.in_step(model.args, base, params, state.opt_state, rows)
            elif eight is not None:
                params = eight_bits.in_step(eight, params, copies, state.opt_state, rows)
            loss, rewards = objective.sums(model, params, cast(Any, part))
            return loss / count, jax.tree.map(lambda total: total / count, rewards)

        gradient = jax.value_and_grad(part_loss, has_aux=True)
        if accumulation == 1:
            (loss, rewards), grads = gradient(state.params, batch, rows)
        else:
            # Each part takes every A-th row, so that it is spread over the devices like the batch.
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), (batch, rows))

            def add(so_far: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], None]:
                number, part = part
                values, grads = gradient(state.params, *part)
                if isinstance(optimizer, InPieces):
                    sums = optimizer.add(so_far[1], grads, state.opt_state, number)
                    return (jax.tree.map(jnp.add, so_far[0], values), sums), None
                return jax.tree.map(jnp.add, so_far, (values, grads)), None

            zero = jnp.zeros((), jnp.float32)
            nothing = (zero, dict.fromkeys(objective.rewards, zero)), jax.tree.map(jnp.zeros_like, state.params)
            ((loss, rewards), grads), _ = jax.lax.scan(add, nothing, (jnp.arange(accumulation), parts))
        with jax.named_scope("optimizer"):
            norm, norms, state = _updated(optimizer, state, loss, grads)
        return state, StepMetrics(loss, norm, state.opt_state[-1], targets, rewards, norms)

    return train_step


def _updated(
    optimizer: AnyOptimizer, state: TrainState, loss: jax.Array, grads: Any
) -> tuple[jax.Array, Norms, TrainState]:
    """Return the norm of the gradients, the norms by kind of parameter, and the state after an update."""
    sums = squares(grads)
    norm = jnp.sqrt(optax.tree.sum(sums))
    before = grads, state.opt_state, state.params
    if isinstance(optimizer, InPieces):
        params, opt_state, changed = optimizer.apply(*before, loss=loss, grad_norm=norm)
    else:
        updates, opt_state = optimizer.update(*before, loss=loss, grad_norm=norm)
        params, changed = optax.apply_updates(state.params, updates), squares(updates)
    return norm, Norms.of(sums, changed), TrainState(params, opt_state)


class Dispatched:
    """A compiled program that is called through ``jax.jit``, which compiles it again, or reads it from JAX's cache.

    Called directly, JAX's compiled programs refuse arrays of 4-bit integers on CPUs: the layout that such an array
    reports is not the one that its own program reports.
    """

    def __init__(self, jitted: Callable[..., Any], compiled: jax.stages.Compiled, mesh: Mesh):
        self._jitted, self._compiled, self._mesh = jitted, compiled, mesh

    def __call__(self, *args: Any) -> Any:
        with on_mesh(self._mesh):
            return self._jitted(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    @classmethod
    def if_needed(cls, jitted: Callable[..., Any], compiled: jax.stages.Compiled, mesh: Mesh, base: Any) -> Any:
        """Return ``compiled`` as it is called with a frozen base of these shapes: directly, unless it has 4 bits."""
        return cls(jitted, compiled, mesh) if any(x.dtype == jnp.int4 for x in jax.tree.leaves(base)) else compiled


def batch_shapes(
    train: TrainArgs,
    model: ModelArgs,
    mesh: Mesh,
    document_mask: bool = False,
    objective: Objective = NextToken(),
) -> AnyBatch:
    """Return the shapes of a step's batch with their shardings: int32 and float32 [batch_size, positions]."""
    shape, sharding = (train.batch_size, objective.length(model)), batch_sharding(mesh)
    ids = cast(Any, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding))
    weights = cast(Any, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding))
    if isinstance(objective, Dpo):
        return PairBatch(ids, ids, weights, ids, ids, weights)
    return PackedBatch(ids, ids, weights, ids, ids) if document_mask else Batch(ids, ids, weights)


def trace_train_step(
    model: Llama,
    optimizer: AnyOptimizer,
    mesh: Mesh,
    accumulation: int,
    batch: AnyBatch,
    adapting: Adapting | None = None,
    objective: Objective = NextToken(),
    eight: TrainArgs | None = None,
) -> jax.stages.Traced:
    """Trace the step for a mesh and the shapes of ``batch``. The state's buffers are donated, the base's are not."""
    return _train_program(model, optimizer, mesh, accumulation, batch, adapting, objective, eight)[1]


def _train_program(
    model: Llama,
    optimizer: AnyOptimizer,
    mesh: Mesh,
    accumulation: int,
    batch: AnyBatch,
    adapting: Adapting | None,
    objective: Objective,
    eight: TrainArgs | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[Any, jax.stages.Traced]:
    """Return the jitted step, with XLA's ``options``, and the step traced for these shapes."""
    shapes = state_shapes(model, optimizer, mesh, adapting)
    frozen = () if adapting is None else (adapting.base_shapes(model, mesh),)
    step = jax.jit(
        make_train_step(model, optimizer, accumulation, adapting, objective, eight),
        donate_argnums=0,
        out_shardings=(shardings_of(shapes), replicated(mesh)),
        compiler_options=options,
    )
    with on_mesh(mesh):
        return step, step.trace(shapes, batch, *frozen)


def compile_train_step(
    model: Llama,
    optimizer: AnyOptimizer,
    mesh: Mesh,
    accumulation: int,
    batch: AnyBatch,
    adapting: Adapting | None = None,
    objective: Objective = NextToken(),
    eight: TrainArgs | None = None,
) -> jax.stages.Compiled:
    """Compile the step for the devices of ``mesh``, which may be only described (as in plan)."""
    options = compiler_options(mesh.devices.flat[0])
    if adapting is None:
        traced = trace_train_step(model, optimizer, mesh, accumulation, batch, None, objective, eight)
        return traced.lower().compile(compiler_options=options)
    step, traced = _train_program(model, optimizer, mesh, accumulation, batch, adapting, objective, None, options)
    base = adapting.base_shapes(model, mesh)
    return cast(jax.stages.Compiled, Dispatched.if_needed(step, traced.lower().compile(), mesh, base))


def eval_step(
    model: Llama,
    params: Any,
    batch: AnyBatch,
    base: Any = None,
    *,
    adapting: Adapting | None = None,
    objective: Objective = NextToken(),
) -> tuple[jax.Array, ...]:
    """Return the summed loss in nats of a batch, the number of its tokens or pairs, and the sums of any rewards."""
    whole = params if adapting is None else adapting.whole(model.args, base, params)
    loss, rewards = objective.sums(model, whole, cast(Any, batch))
    return loss, objective.count(cast(Any, batch)), *(rewards[name] for name in objective.rewards)


def compile_eval_step(
    model: Llama,
    mesh: Mesh,
    train: TrainArgs,
    args: ModelArgs,
    document_mask: bool = False,
    adapting: Adapting | None = None,
    objective: Objective = NextToken(),
) -> jax.stages.Compiled:
    """Compile ``eval_step`` of (parameters, batch) for batches as large as one part of a training batch.

    With ``adapting``, the step takes a third argument, the frozen base.
    """
    step = functools.partial(eval_step, model, adapting=adapting, objective=objective)
    return _part_program(step, model, mesh, train, args, document_mask, adapting, objective)


def _reference_step(
    model: Llama, params: Any, batch: PairBatch, base: Any = None, *, adapting: Adapting | None = None
) -> jax.Array:
    """Return the log-likelihoods of a batch's targets, float32 [B, T]."""
    whole = params if adapting is None else adapting.whole(model.args, base, params)
    return log_likelihoods(model, whole, batch.inputs, batch.targets, batch.segments, batch.positions)


def compile_reference_step(
    model: Llama, mesh: Mesh, train: TrainArgs, args: ModelArgs, adapting: Adapting | None, objective: Objective
) -> jax.stages.Compiled:
    """Compile the log-likelihoods of preferences, for the arguments of ``compile_eval_step``'s program."""
    step = functools.partial(_reference_step, model, adapting=adapting)
    return _part_program(step, model, mesh, train, args, True, adapting, objective)


def _part_program(
    function: Callable[..., Any],
    model: Llama,
    mesh: Mesh,
    train: TrainArgs,
    args: ModelArgs,
    document_mask: bool,
    adapting: Adapting | None,
    objective: Objective,
) -> jax.stages.Compiled:
    """Compile a function of the parameters and one part of a training batch. Every device gets its whole result."""
    part = replace(train, batch_size=train.batch_size // train.gradient_accumulation_steps)
    batch = batch_shapes(part, args, mesh, document_mask, objective)
    options = untried_options(mesh.devices.flat[0]) or None
    step = jax.jit(function, out_shardings=replicated(mesh), compiler_options=options)
    with on_mesh(mesh):
        if adapting is None:
            params = with_shardings(narrow_shapes(parameter_shapes(model), train), parameter_shardings(model, mesh))
            return step.lower(params, batch).compile()
        base = adapting.base_shapes(model, mesh)
        compiled = step.lower(adapting.adapter_shapes(args, mesh), batch, base).compile()
    return cast(jax.stages.Compiled, Dispatched.if_needed(step, compiled, mesh, base))
