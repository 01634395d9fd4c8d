"""Steps whose loss or gradient is not finite, or whose loss is a spike: found on the device, skipped, counted or told.

What is remembered of earlier losses is a part of the optimizer's state, and so of every checkpoint: a run that goes on
judges its steps as if it had never stopped.
"""

import math
from typing import Any, NamedTuple, NoReturn, Protocol

import jax
import jax.numpy as jnp
import optax

from llama_jax.config import TrainArgs
from llama_jax.errors import UserError

# The mean of the losses goes back over about as many steps.
MEAN_STEPS = 100
# So many skipped steps in a row end a run, which learns nothing any more.
MOST_SKIPPED = 20


class LossHistory(NamedTuple):
    """What earlier steps' losses were like: scalars on the device, float32 the mean, int32 the counts."""

    mean: jax.Array  # nats a token, over good steps: plain up to MEAN_STEPS of them, exponential after
    good_steps: jax.Array
    bad_steps: jax.Array
    skipped_steps: jax.Array
    skipped_in_a_row: jax.Array
    is_bad: jax.Array  # 1 where the newest step is bad

    @classmethod
    def empty(cls) -> "LossHistory":
        """Before the first step."""
        return cls(jnp.zeros((), jnp.float32), *(jnp.zeros((), jnp.int32) for _ in range(5)))


class Metrics(Protocol):
    """What is known of a step, on the host."""

    @property
    def loss(self) -> Any: ...
    @property
    def grad_norm(self) -> Any: ...
    @property
    def history(self) -> LossHistory: ...


def watched(optimizer: optax.GradientTransformation, args: TrainArgs) -> optax.GradientTransformationExtraArgs:
    """``optimizer``, a chain, which leaves out the updates of bad steps as train.bad_steps asks.

    Its update takes the step's ``loss`` and ``grad_norm`` too. Its state is the chain's and a LossHistory. A step that is
    skipped changes neither parameters nor moments, nor the count that corrects the moments' bias; the count of the learning
    rate's schedule goes on, as the rate belongs to the number of the step, and so does the order of the batches.
    """

    def init(params: Any) -> Any:
        return (*optimizer.init(params), LossHistory.empty())

    def update(grads: Any, state: Any, params: Any, *, loss: jax.Array, grad_norm: jax.Array) -> tuple[Any, Any]:
        *inner, history = state
        updates, new = optimizer.update(grads, tuple(inner), params)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        bad = ~finite
        if args.spike_factor:
            bad |= (history.good_steps > 0) & (loss > args.spike_factor * history.mean)
        skipped = {"stop": jnp.zeros((), bool), "skip": bad, "count": ~finite}[args.bad_steps]
        if args.bad_steps != "stop":
            updates = jax.tree.map(lambda u: jnp.where(skipped, 0, u), updates)
            new = jax.tree.map(lambda a, b: _unless(skipped, a, b), tuple(inner), new, is_leaf=_is_schedule)
        return updates, (*new, _after(history, loss, bad, skipped))

    return optax.GradientTransformationExtraArgs(init, update)


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
    """A line about each bad step of ``metrics``, of steps ``first`` onwards, on the host.

    saved_at, best: the steps of the last checkpoint and of the best, 0 where there is none. Raises UserError where a bad step, or too many that were skipped, end the run.
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
    """Which checkpoints there are, and how to go on from them."""
    if not saved_at:
        return f"no checkpoint was saved yet: begin again with {remedy}"
    text = f"the last checkpoint is of step {saved_at:,}, from which the same settings lead to the same end: go on with {remedy}"
    if best and best != saved_at:
        return f"{text}; where it is too late there, --train.resume-step {best} goes back to the best one"
    return f"{text}; where it is too late there, --train.resume-step goes back to one before it"


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
    """Raise the UserError that names a value which is not finite."""
    raise UserError(f"train: expected a finite {name}, found {value} at step {step:,}; {advice(saved_at, best)}")
