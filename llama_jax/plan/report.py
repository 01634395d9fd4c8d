"""A plan as text and as JSON."""

from typing import Any

from llama_jax.chips import GiB
from llama_jax.config import Remat
from llama_jax.plan import Plan
from llama_jax.plan.cost import BETWEEN_SLICES, KERNEL_EFFICIENCY
from llama_jax.progress import duration
from llama_jax.sharding import describe
from llama_jax.training.flops import train_flops_per_token

# Policies that keep less and less for the backward pass.
LESS_MEMORY: dict[Remat, Remat] = {"none": "dots", "dots": "attention", "attention": "full", "offload": "full"}


def summary(plan: Plan, tokens: float) -> dict[str, Any]:
    """What ``--json`` prints of a training step. tokens: of the whole run."""
    flops = plan.tokens * train_flops_per_token(plan.config.model)
    chips, chip = plan.chips, plan.topology.chip
    found = {
        "fits": plan.fits,
        "bytes_per_device": plan.bytes,
        "hbm_per_device": int(chip.hbm_bytes),
        "tokens_per_step": plan.tokens,
        "flops_per_step": flops,
        "step_seconds": None,
        "mfu": None,
        "tokens_per_second": None,
        **_common(plan),
    }
    if plan.schedule is not None:
        rate = plan.tokens / plan.seconds
        found |= {
            "step_seconds": plan.seconds,
            "mfu": flops / plan.seconds / (chips * chip.peak_flops),
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / chips,
            "days": tokens / rate / 86400,
            "chip_hours": tokens / rate / 3600 * chips,
        }
    return found


def decode_summary(plan: Plan, batch: int, slots: int) -> dict[str, Any]:
    """What ``--decode --json`` prints of a decoding step."""
    read = plan.bytes_by_part["parameters"] + plan.bytes_by_part["cache"]
    found = {
        "fits": plan.fits,
        "bytes_per_device": plan.bytes,
        "hbm_per_device": int(plan.topology.chip.hbm_bytes),
        "batch": batch,
        "slots": slots,
        "step_seconds": None,
        "memory_seconds": read / plan.topology.chip.hbm_bandwidth,
        **_common(plan),
    }
    if plan.schedule is not None:
        found |= {"step_seconds": plan.seconds, "tokens_per_second": batch / plan.seconds}
    return found


def _common(plan: Plan) -> dict[str, Any]:
    """Where the step runs, and its parts."""
    parts: dict[str, Any] = {"bytes": plan.bytes_by_part}
    if (schedule := plan.schedule) is not None:
        parts |= {
            "seconds": {
                "matrix": schedule.cost.matrix,
                "other": schedule.cost.other,
                "blocking_collectives": schedule.blocking,
                "kernels": schedule.kernels,
                "waiting_for_slices": schedule.waiting,
                "waiting_for_memory": schedule.waiting_for_memory,
            },
            "overlapped_collectives": schedule.overlapped,
            "seconds_by_part": dict(schedule.by_part),
            "collectives": [
                {
                    "kind": c.kind, "devices": c.group, "blocking": c.blocking, "count": c.count,
                    "bytes": c.bytes, "seconds": c.seconds,
                }
                for c in schedule.collectives
            ],
            "kernels": dict(schedule.cost.kernels),
            "compiled_flops_per_device": schedule.cost.flops + schedule.cost.kernel_flops,
            "hbm_bytes": schedule.cost.hbm_bytes,
            "host_bytes": schedule.cost.host_bytes,
        }  # fmt: skip
    return {
        "topology": plan.topology.name,
        "devices": plan.chips,
        "mesh": plan.mesh,
        "attention": plan.kernel,
        "remat": plan.config.train.remat,
        "compile_seconds": plan.compile_seconds,
        "parts": parts,
    }


def training_text(plan: Plan, tokens: float) -> str:
    """What ``plan`` prints of a training step."""
    rows = _place(plan) + _memory(plan)
    found = summary(plan, tokens)
    if plan.schedule is not None:
        model = plan.config.model
        rows += [
            ("step", f"{plan.seconds * 1e3:,.0f} ms for {plan.tokens:,} tokens of {model.max_seq_len:,} a sequence"),
            *_time(plan),
            (
                "at most",
                f"{found['mfu']:.1%} of the peak, {found['tokens_per_second']:,.0f} tokens/s, "
                f"{found['tokens_per_second_per_device']:,.0f} a chip",
            ),
            ("for", f"{tokens:,.0f} tokens: {found['days']:,.1f} days, {found['chip_hours']:,.0f} chip-hours"),
        ]
    return _table(rows)


def decoding_text(plan: Plan, batch: int, slots: int) -> str:
    """What ``plan --decode`` prints."""
    rows = _place(plan) + _memory(plan)
    found = decode_summary(plan, batch, slots)
    if plan.schedule is not None:
        rows += [
            ("step", f"{plan.seconds * 1e3:,.2f} ms for {batch} sequences over a cache of {slots:,} tokens"),
            *_time(plan),
            ("memory", f"{found['memory_seconds'] * 1e3:,.2f} ms to read parameters and cache once"),
            ("at most", f"{found['tokens_per_second']:,.0f} tokens/s"),
        ]
    return _table(rows)


def _place(plan: Plan) -> list[tuple[str, str]]:
    train = plan.config.train
    return [
        ("slice", f"{plan.topology.name}, {plan.chips} chips, mesh: {describe(plan.mesh)}"),
        ("program", f"attention: {plan.kernel}, remat: {train.remat}; compiled in {duration(plan.compile_seconds)}"),
    ]


def _memory(plan: Plan) -> list[tuple[str, str]]:
    room = f"{plan.topology.chip.hbm_bytes / GiB:.2f} GiB a chip"
    if plan.schedule is None:
        needed = f"{plan.bytes / GiB:.2f} GiB" if plan.bytes else "more"
        rows = [("memory", f"DOES NOT FIT into {room}: the compiler needs {needed}")]
    else:
        verdict = "fits:" if plan.fits else "DOES NOT FIT:"
        rows = [("memory", f"{verdict} {plan.bytes / GiB:.2f} of {room}")]
    rows += [("", f"{size / GiB:8.2f} GiB  {part}") for part, size in plan.bytes_by_part.items()]
    return rows if plan.fits else [*rows, ("change", advice(plan))]


def advice(plan: Plan) -> str:
    """What to change where a step does not fit."""
    train = plan.config.train
    state = sum(plan.bytes_by_part.get(name, 0) for name in ("parameters", "optimizer", "cache"))
    split = f"--train.gradient-accumulation-steps {2 * train.gradient_accumulation_steps}"
    if state > plan.topology.chip.hbm_bytes / 2:
        return "parameters and optimizer fill the chips: spread them (--mesh.fsdp, --mesh.tensor), or take more chips"
    if train.remat in LESS_MEMORY:
        return f"--train.remat {LESS_MEMORY[train.remat]}, or {split}"
    return f"{split}, or more chips"


def _time(plan: Plan) -> list[tuple[str, str]]:
    schedule = plan.schedule
    assert schedule is not None
    cost = schedule.cost

    def row(seconds: float, what: str) -> tuple[str, str]:
        return "", f"{seconds * 1e3:8,.1f} ms   {what}"

    kernels = ", ".join(f"{name} x {runs}" for name, runs in cost.kernels.items())
    rows = [
        row(cost.matrix, f"matrix products, {cost.flops / 1e12:,.1f} TFLOP a chip"),
        row(cost.other, f"all else; {cost.hbm_bytes / 1e9:,.0f} GB from and to memory in all"),
        row(schedule.blocking, "collectives that block"),
    ]
    if cost.kernels:
        rows.append(row(schedule.kernels, f"kernels, taken at {KERNEL_EFFICIENCY:.0%} of the peak: {kernels}"))
    if schedule.waiting:
        rows.append(row(schedule.waiting, "more for the network between slices"))
    if schedule.waiting_for_memory:
        rows.append(row(schedule.waiting_for_memory, "more for the memory, which is read ahead"))
    rows += [("by part", "")] + [row(seconds, part) for part, seconds in schedule.by_part]
    rows.append(("links", ""))
    for c in schedule.collectives:
        how = "blocks" if c.blocking else "overlaps"
        rows.append(
            row(
                c.seconds,
                f"{c.kind} over {c.group}{'' if c.kind.endswith(BETWEEN_SLICES) else ' chips'}, {c.bytes / 1e9:,.3f} GB, {how}",
            )
        )
    return rows


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:>10}  {text}".rstrip() for name, text in rows)
