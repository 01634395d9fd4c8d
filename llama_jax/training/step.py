"""The optimizer and the jitted training step.

A gradient-accumulation parts, B rows a part, T positions.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llama_jax.config import ModelArgs, TrainArgs
from llama_jax.data.batches import Batch
from llama_jax.devices.compiling import compiler_options
from llama_jax.devices.sharding import (
    batch_sharding,
    on_mesh,
    parameter_shapes,
    parameter_shardings,
    replicated,
    with_shardings,
)
from llama_jax.model import Llama
from llama_jax.ops.loss import loss_sum
from llama_jax.ops.parameters import is_norm
from llama_jax.training.bad_steps import LossHistory, watched


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes. Its number of steps is in the optimizer's state."""

    params: Any
    opt_state: Any


class StepMetrics(NamedTuple):
    """Of one step, on the device: float32 scalars, and what is remembered of the losses up to this one."""

    loss: jax.Array  # nats a token
    grad_norm: jax.Array  # before clipping
    history: LossHistory


def learning_rate(args: TrainArgs, steps: int, held: float | None = None) -> optax.Schedule:
    """Linear warm-up to lr, then a cosine to min_lr_ratio x lr at ``steps`` (LLaMA 2 paper, section 2.1).

    held: the rate of every step in place of that.
    """
    if held is not None:
        return optax.constant_schedule(held)
    warmup = warmup_steps(args, steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else args.lr,
        peak_value=args.lr,
        # The first of the steps already moves: step s is taken at the rate of s + 1.
        warmup_steps=warmup,
        decay_steps=max(steps, 1),
        end_value=args.lr * args.min_lr_ratio,
    )


def warmup_steps(args: TrainArgs, steps: int) -> int:
    """Steps of the warm-up: as many as are asked for, but for a run that has no more than these."""
    return min(args.warmup_steps, max(0, steps - 1))


def make_optimizer(args: TrainArgs, steps: int, held: float | None = None) -> optax.GradientTransformationExtraArgs:
    """AdamW with clipping and decoupled weight decay on matrices only (all but the norms' weights); bad steps are watched for.

    steps, held: see ``learning_rate``.
    """
    schedule = learning_rate(args, steps, held)
    adamw = optax.chain(
        optax.clip_by_global_norm(args.grad_clip) if args.grad_clip else optax.identity(),
        optax.adamw(
            lambda count: schedule(count + 1),
            b1=args.beta1,
            b2=args.beta2,
            eps=args.eps,
            weight_decay=args.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(lambda path, _: not is_norm(path), params),
        ),
    )
    return watched(adamw, args)


def state_shapes(model: Llama, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh) -> TrainState:
    """The state's shapes, each with its sharding: the optimizer's moments are laid out as their parameters."""
    shapes, shardings = parameter_shapes(model), parameter_shardings(model, mesh)
    opt_shapes = jax.eval_shape(optimizer.init, shapes)
    opt_shardings = optax.tree_map_params(
        optimizer, lambda _, s: s, opt_shapes, shardings, transform_non_params=lambda _: replicated(mesh)
    )
    return TrainState(with_shardings(shapes, shardings), with_shardings(opt_shapes, opt_shardings))


def shardings_of(shapes: Any) -> Any:
    """The shardings in a tree of shapes."""
    return jax.tree.map(lambda s: s.sharding, shapes)


def init_state(
    model: Llama, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh, seed: int, params: Any = None
) -> TrainState:
    """A new state, born sharded; ``params``: start from these."""
    shapes = state_shapes(model, optimizer, mesh)

    def init_params() -> Any:
        return nn.unbox(model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32)))["params"]

    with on_mesh(mesh):
        if params is None:
            params = jax.jit(init_params, out_shardings=shardings_of(shapes.params))()
        opt_state = jax.jit(optimizer.init, out_shardings=shardings_of(shapes.opt_state))(params)
    return TrainState(params, opt_state)


def make_train_step(
    model: Llama, optimizer: optax.GradientTransformationExtraArgs, accumulation: int
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The step, to be jitted: gradients of the mean loss over the batch's tokens, and one update.

    The batch is split into ``accumulation`` parts, whose gradients are added up; each part counts by its tokens, so that
    the result is that of the whole batch.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        total_weight = jnp.maximum(jnp.sum(batch.weights), 1)

        def part_loss(params: Any, part: Batch) -> jax.Array:
            return loss_sum(model, params, *part) / total_weight

        gradient = jax.value_and_grad(part_loss)
        if accumulation == 1:
            loss, grads = gradient(state.params, batch)
        else:
            # Parts take every A-th row, so that each is spread over the devices as the batch is.
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, x.shape[-1]).swapaxes(0, 1), batch)

            def add(so_far: tuple[jax.Array, Any], part: Batch) -> tuple[tuple[jax.Array, Any], None]:
                return jax.tree.map(jnp.add, so_far, gradient(state.params, part)), None

            nothing = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params)
            (loss, grads), _ = jax.lax.scan(add, nothing, parts)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, loss=loss, grad_norm=norm)
            params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state), StepMetrics(loss, norm, opt_state[-1])

    return train_step


def batch_shapes(train: TrainArgs, model: ModelArgs, mesh: Mesh) -> Batch:
    """The shapes of a step's batch, each with its sharding."""
    shape, sharding = (train.batch_size, model.max_seq_len), batch_sharding(mesh)
    ids = cast(Any, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding))
    return Batch(ids, ids, cast(Any, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)))


def trace_train_step(
    model: Llama, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh, accumulation: int, batch: Batch
) -> jax.stages.Traced:
    """The step for a mesh and the shapes of ``batch``, to be lowered and compiled; the state's buffers are donated."""
    shapes = state_shapes(model, optimizer, mesh)
    step = jax.jit(
        make_train_step(model, optimizer, accumulation),
        donate_argnums=0,
        out_shardings=(shardings_of(shapes), replicated(mesh)),
    )
    with on_mesh(mesh):
        return step.trace(shapes, batch)


def compile_train_step(
    model: Llama, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh, accumulation: int, batch: Batch
) -> jax.stages.Compiled:
    """The step, compiled for the devices of ``mesh``, which may be only described (plan)."""
    options = compiler_options(mesh.devices.flat[0])
    return trace_train_step(model, optimizer, mesh, accumulation, batch).lower().compile(compiler_options=options)


def eval_step(model: Llama, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Summed loss in nats and summed weights of a batch: float32 scalars."""
    return loss_sum(model, params, *batch), jnp.sum(batch.weights)


def compile_eval_step(model: Llama, mesh: Mesh, train: TrainArgs, args: ModelArgs) -> jax.stages.Compiled:
    """``eval_step``, of parameters and a batch, compiled for as many rows as a part of a training batch has."""
    part = replace(train, batch_size=train.batch_size // train.gradient_accumulation_steps)
    params = with_shardings(parameter_shapes(model), parameter_shardings(model, mesh))
    step = jax.jit(functools.partial(eval_step, model), out_shardings=replicated(mesh))
    with on_mesh(mesh):
        return step.lower(params, batch_shapes(part, args, mesh)).compile()
