"""Small runs in one process share their programs: tracing and compiling is nine tenths of such a run's time."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llama_jax.config import TrainArgs
from llama_jax.training import loop, start, step

# Settings of when and where a run saves, evaluates and tells, of which neither the optimizer nor a program knows.
ON_DISK = (
    "save_dir", "checkpoint_dir", "init_from", "resume_step", "keep", "keep_every", "save_interval", "save_minutes",
    "eval_interval", "eval_minutes", "eval_iters", "log_interval", "profile_steps", "tensorboard", "watchdog_seconds", "seed",
)  # fmt: skip
DEFAULTS = {name: getattr(TrainArgs(), name) for name in ON_DISK}


def shared_programs() -> Iterator[None]:
    """For a fixture: runs of the same model with the same settings take the same compiled steps, and begin with a copy of one state."""
    optimizers = functools.cache(step.make_optimizer)
    train_steps = functools.cache(step.compile_train_step)
    eval_steps = functools.cache(step.compile_eval_step)
    states = functools.cache(step.init_state)

    def make_optimizer(args: TrainArgs, steps: int, held: float | None = None) -> Any:
        return optimizers(dataclasses.replace(args, **DEFAULTS), steps, held)

    def compile_eval_step(model: Any, mesh: Any, train: TrainArgs, args: Any, *more: Any) -> Any:
        return eval_steps(model, mesh, dataclasses.replace(train, **DEFAULTS), args, *more)

    def init_state(model: Any, optimizer: Any, mesh: Any, seed: int, params: Any = None, *more: Any) -> step.TrainState:
        if params is not None or more:
            return step.init_state(model, optimizer, mesh, seed, params, *more)
        return jax.tree.map(jnp.copy, states(model, optimizer, mesh, seed))  # which the first step takes over

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_optimizer", make_optimizer)
        patch.setattr(loop, "compile_train_step", train_steps)
        patch.setattr(loop, "compile_eval_step", compile_eval_step)
        patch.setattr(start, "init_state", init_state)
        yield
