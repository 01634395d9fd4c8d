"""Says what document masks cost, and what the pass over preferences before the first step does."""

from typing import Any

from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.devices.chips import GiB
from llama_jax.plan import Plan
from llama_jax.plan.settings import Epoch
from llama_jax.plan.tables import Rows, at_least, number, time_text


def mask_cost(plan: Plan, without: Plan | None) -> dict[str, Any] | None:
    """Return what the document mask adds to a step, a chip: seconds, FLOPs, bytes moved and bytes of memory.

    ``without`` is the same step compiled without it, of which the same figures are returned. None: they are not known.
    """
    if without is None or plan.schedule is None or without.schedule is None:
        return None
    of_both = [
        {
            "step_seconds": p.seconds,
            "compiled_flops_per_device": s.cost.flops + s.cost.kernel_flops,
            "hbm_bytes": s.cost.hbm_bytes,
            "bytes_per_device": p.bytes,
        }
        for p, s in ((plan, plan.schedule), (without, without.schedule))
    ]
    return {name: value - of_both[1][name] for name, value in of_both[0].items()} | {"without": of_both[1]}


def mask_rows(plan: Plan, cost: dict[str, Any] | None) -> Rows:
    """Return lines about what the document mask costs. ``cost`` is that of ``mask_cost``."""
    if cost is None:
        return [("mask", "its cost is not known, since the step was not compiled both with it and without it")]
    before = cost["without"]["step_seconds"]
    rows = [
        (
            "mask",
            f"document masks cost {cost['step_seconds'] * 1e3:+,.2f} ms a step, {cost['step_seconds'] / before:+.2%} of "
            f"{number(before * 1e3)} ms without them",
        ),
        (
            "",
            f"{cost['compiled_flops_per_device'] / 1e12:+,.3f} TFLOP and {cost['hbm_bytes'] / 1e9:+,.3f} GB from and to memory a "
            f"{plan.topology.unit}, {cost['bytes_per_device'] / GiB:+,.3f} GiB of its memory",
        ),
    ]
    if plan.schedule is not None and plan.schedule.cost.kernels:
        rows.append(("", "kernels are taken as equally fast with masks: what they compare is not estimated"))
    return rows


def reference_cost(plan: Plan, first: Plan | None, epoch: Epoch | None) -> dict[str, Any] | None:
    """Return the cost of the pass over the preferences that comes before the first step of ``plan``.

    ``first`` is that pass, compiled for one part of a batch. None: it is not known. It passes over the sequences that
    the run reads, and those held out.
    """
    if first is None or first.schedule is None:
        return None
    train = plan.config.train
    rows, sequences = train.batch_size // train.gradient_accumulation_steps, None
    if epoch is not None:
        steps = train.max_steps or epoch.steps(plan.config, train.n_epochs)
        sequences = min(epoch.rows, BatchSizes.of(train).rows(steps))
    return {
        "rows": rows,
        "seconds_of_rows": first.seconds,
        "sequences": sequences,
        "seconds": None if sequences is None else -(-sequences // rows) * first.seconds,
    }


def reference_rows(plan: Plan, cost: dict[str, Any] | None) -> Rows:
    """Return lines about the pass before the first step. ``cost`` is that of ``reference_cost``."""
    what = "before the first step, one pass forward computes the log-likelihoods of the model that the run begins with"
    if cost is None:
        return [("reference", f"{what}; its time is not known, since it was not compiled")]
    each = f"{at_least(plan.topology)}{number(cost['seconds_of_rows'] * 1e3)} ms for {cost['rows']:,} sequences"
    if cost["seconds"] is None:
        return [("reference", what), ("", f"{each}; how many the run reads is not known")]
    whole = f"{at_least(plan.topology)}{time_text(cost['seconds'])} for {cost['sequences']:,} sequences to train on"
    return [("reference", what), ("", f"{whole}, {each}, and those held out")]
