"""Learning rates: the schedules of a run, and the steps at which their parts begin."""

import optax

from llama_jax.config import TrainArgs


def learning_rate(args: TrainArgs, steps: int, held: float | None = None) -> optax.Schedule:
    """Return the learning rate schedule: linear warm-up to lr, then a decay to min_lr_ratio x lr at ``steps``.

    cosine is the schedule of the LLaMA 2 paper (section 2.1). wsd stays at lr until ``decay_start`` and then decays
    along a line (warmup-stable-decay, MiniCPM, Hu et al., 2024, section 4). linear decays along a line from the end of
    the warm-up on. ``held``, if given, is the constant rate of every step instead.
    """
    if held is not None:
        return optax.constant_schedule(held)
    warmup, end = warmup_steps(args, steps), args.lr * args.min_lr_ratio
    # Step s uses the rate of s + 1, so that the first step already updates the parameters.
    if args.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if warmup else args.lr,
            peak_value=args.lr,
            warmup_steps=warmup,
            decay_steps=max(steps, 1),
            end_value=end,
        )
    decay = decay_start(args, steps)
    parts, ends = list[optax.Schedule](), list[int]()
    if warmup:
        parts.append(optax.linear_schedule(0.0, args.lr, warmup))
        ends.append(warmup)
    if decay > warmup:
        parts.append(optax.constant_schedule(args.lr))
        ends.append(decay)
    parts.append(optax.linear_schedule(args.lr, end, max(steps, 1) - decay))
    return optax.join_schedules(parts, ends)


def warmup_steps(args: TrainArgs, steps: int) -> int:
    """Return the number of warm-up steps, at most one less than the run has."""
    return min(args.warmup_steps, max(0, steps - 1))


def decay_start(args: TrainArgs, steps: int) -> int:
    """Return the last step before the rate decays: decay_from or, by wsd, that before the last decay_fraction.

    It is never within the warm-up, and at least one step decays.
    """
    warmup = warmup_steps(args, steps)
    if args.schedule != "wsd":
        return warmup
    start = args.decay_from or steps - round(args.decay_fraction * steps)
    return max(warmup, min(start, steps - 1))


def decay_end(args: TrainArgs) -> int:
    """Return the step at which a decay from decay_from ends: max_steps, or where it is decay_fraction of all steps."""
    return args.max_steps or max(args.decay_from + 1, round(args.decay_from / (1 - args.decay_fraction)))


def stable_until(args: TrainArgs, steps: int) -> int | None:
    """Return the last step of the stable phase, from which a run can be continued or decayed. None: it has none."""
    start = decay_start(args, steps)
    return start if args.schedule == "wsd" and start and start >= args.warmup_steps else None
