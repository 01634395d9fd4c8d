"""Bad steps, whose loss or gradient is not finite or whose loss is a spike: detected on the device, then handled.

The statistics of earlier losses are part of the optimizer's state, and so of every checkpoint. A resumed run judges its
steps as if it had never stopped.
"""

import math
from typing import Any, NamedTuple, NoReturn, Protocol

import jax
import jax.numpy as jnp
import optax

from llama_jax.config import TrainArgs
from llama_jax.errors import UserError

# The mean of the losses covers about this many steps.
MEAN_STEPS = 100
# This many skipped steps in a row end a run, because it no longer learns.
MOST_SKIPPED = 20


class LossHistory(NamedTuple):
    """Statistics of earlier losses, as scalars on the device: the mean is float32, the counts are int32."""

    mean: jax.Array  # nats per token, over good steps: the mean of the first MEAN_STEPS, then an exponential one
    good_steps: jax.Array
    bad_steps: jax.Array
    skipped_steps: jax.Array
    skipped_in_a_row: jax.Array
    is_bad: jax.Array  # 1 if the newest step is bad

    @classmethod
    def empty(cls) -> "LossHistory":
        """Return the statistics before the first step."""
        return cls(jnp.zeros((), jnp.float32), *(jnp.zeros((), jnp.int32) for _ in range(5)))


class Metrics(Protocol):
    """Results of a step, on the host."""

    @property
    def loss(self) -> Any: ...
    @property
    def grad_norm(self) -> Any: ...
    @property
    def history(self) -> LossHistory: ...


def watched(optimizer: optax.GradientTransformation, args: TrainArgs) -> optax.GradientTransformationExtraArgs:
    """Return the chain ``optimizer`` with the updates of bad steps dropped as train.bad_steps says.

    Its update also takes the step's ``loss`` and ``grad_norm``. Its state is the chain's plus a LossHistory. A skipped
    step changes neither parameters nor moments nor the count of bias correction. The learning rate's count and the
    order of the batches advance, since both belong to the number of the step.
    """

    def init(params: Any) -> Any:
        return (*optimizer.init(params), LossHistory.empty())

    def update(grads: Any, state: Any, params: Any, *, loss: jax.Array, grad_norm: jax.Array) -> tuple[Any, Any]:
        *inner, history = state
        updates, new = optimizer.update(grads, tuple(inner), params)
        skipped, after = noted(args, history, loss, grad_norm)
        if args.bad_steps != "stop":
            updates = jax.tree.map(lambda u: jnp.where(skipped, 0, u), updates)
            new = jax.tree.map(lambda a, b: _unless(skipped, a, b), tuple(inner), new, is_leaf=_is_schedule)
        return updates, (*new, after)

    return optax.GradientTransformationExtraArgs(init, update)


def noted(
    args: TrainArgs, history: LossHistory, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, LossHistory]:
    """Return whether a step is to be skipped, as train.bad_steps says, and the statistics after it."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    bad = ~finite
    if args.spike_factor:
        bad |= (history.good_steps > 0) & (loss > args.spike_factor * history.mean)
    skipped = {"stop": jnp.zeros((), bool), "skip": bad, "count": ~finite}[args.bad_steps]
    return skipped, _after(history, loss, bad, skipped)


def _is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)


def _unless(skipped: jax.Array, old: Any, new: Any) -> Any:
    return new if _is_schedule(new) else jnp.where(skipped, old, new)


def _after(history: LossHistory, loss: jax.Array, bad: jax.Array, skipped: jax.Array) -> LossHistory:
    good = history.good_steps + ~bad
    change = (loss - history.mean) / jnp.clip(good, 1, MEAN_STEPS)
    return LossHistory(
        mean=jnp.where(bad, history.mean, history.mean + change).astype(jnp.float32),
        good_steps=good,
        bad_steps=history.bad_steps + bad,
        skipped_steps=history.skipped_steps + skipped,
        skipped_in_a_row=jnp.where(skipped, history.skipped_in_a_row + 1, 0),
        is_bad=bad.astype(jnp.int32),
    )


def judge(args: TrainArgs, metrics: list[Any], first: int, saved_at: int, best: int = 0) -> list[str]:
    """Return a line about each bad step. ``metrics`` are on the host and begin with step ``first``.

    ``saved_at`` and ``best`` are the steps of the last and the best checkpoint, or 0. Raises UserError if a bad step,
    or too many skipped ones, end the run.
    """
    lines = []
    for step, found in enumerate(metrics, first):
        if not found.history.is_bad:
            continue
        if args.bad_steps == "stop":
            _raise_bad(args, found, step, saved_at, best)
        if found.history.skipped_in_a_row >= MOST_SKIPPED:
            raise UserError(
                f"train: expected an update in {MOST_SKIPPED} steps, found all skipped up to step {step:,} "
                f"({_numbers(found)}); {advice(saved_at, best)}"
            )
        deed = "skipped" if found.history.skipped_in_a_row else "counted"
        lines.append(f"step {step:,}: {_numbers(found)}; {deed}, bad steps so far: {found.history.bad_steps:,}")
    return lines


REMEDY = "a lower --train.lr or more --train.warmup-steps"


def _numbers(found: Metrics) -> str:
    mean = f", mean {found.history.mean:.4g}" if found.history.good_steps else ""
    return f"loss {found.loss:.4g}{mean}, gradient norm {found.grad_norm:.4g}"


def advice(saved_at: int, best: int, remedy: str = REMEDY) -> str:
    """Say which checkpoints there are and how to resume from them."""
    if not saved_at:
        return f"no checkpoint was saved yet: start again with {remedy}"
    text = f"the same settings would fail again from the last checkpoint, step {saved_at:,}: resume with {remedy}"
    if best and best != saved_at:
        return f"{text}; if that fails too, --train.resume-step {best} goes back to the best checkpoint"
    return f"{text}; if that fails too, --train.resume-step goes back to an earlier checkpoint"


def _raise_bad(args: TrainArgs, found: Metrics, step: int, saved_at: int, best: int) -> NoReturn:
    for name, value in (("loss", found.loss), ("gradient norm", found.grad_norm)):
        if not math.isfinite(value):
            raise_not_finite(name, value, step, saved_at, best)
    most = args.spike_factor * found.history.mean
    raise UserError(
        f"train: expected a loss up to {most:.4g}, {args.spike_factor:g} times the mean, found {found.loss:.4g} at "
        f"step {step:,}; {advice(saved_at, best, f'{REMEDY}, or --train.bad-steps skip')}"
    )


def raise_not_finite(name: str, value: float, step: int, saved_at: int, best: int = 0) -> NoReturn:
    """Raise a UserError about a value that is not finite."""
    raise UserError(f"train: expected a finite {name}, found {value} at step {step:,}; {advice(saved_at, best)}")
