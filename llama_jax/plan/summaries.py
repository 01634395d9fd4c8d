"""A plan as JSON."""

import dataclasses
from typing import Any

from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.plan import Plan
from llama_jax.plan.roofline import Roofline
from llama_jax.plan.settings import Epoch, Found
from llama_jax.plan.topology import Topology
from llama_jax.training.flops import decode_flops, step_flops
from llama_jax.training.objective import Dpo


def summary(plan: Plan, length: Found, epoch: Epoch | None = None) -> dict[str, Any]:
    """Return the object that ``--json`` prints of a training step.

    ``length`` is the number of tokens of the whole run, ``epoch`` one pass over its data, if it is known.
    """
    flops = step_flops(plan.config, plan.tokens)
    devices, chip = plan.devices, plan.topology.chip
    found = {
        "fits": plan.fits,
        "bytes_per_device": plan.bytes,
        "hbm_per_device": int(chip.hbm_bytes),
        "tokens_per_step": plan.tokens,
        "flops_per_step": flops,
        "step_seconds": None,
        "mfu": None,
        "tokens_per_second": None,
        "tokens": length.value,
        "tokens_from": length.source,
        "steps": None if length.value is None else _steps(plan, length.value),
        "objective": plan.config.train.objective,
        "epoch": None if epoch is None else _epoch(plan, epoch),
        "days": None,
        "chip_hours": None,
        "topology": plan.topology.name,
        "attention": plan.kernel,
        "remat": plan.config.train.remat,
        "products": plan.config.train.products,
        "products_of": plan.config.train.products_of,
        "products_note": plan.note,
        "document_mask": plan.config.data.document_mask,
        "param_dtype": plan.config.train.param_dtype,
        "optimizer": plan.config.train.optimizer,
        "moments": plan.config.train.moments,
        "lora": dataclasses.asdict(plan.config.lora) if plan.config.lora.rank else None,
        **_common(plan),
    }
    if plan.schedule is not None:
        rate = plan.tokens / plan.seconds
        found |= {
            "step_seconds": plan.seconds,
            "mfu": flops / plan.seconds / (devices * chip.peak_flops),
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / devices,
        }
        if length.value is not None:
            found |= {
                "days": length.value / rate / 86400,
                "chip_hours": length.value / rate / 3600 * devices / chip.devices,
            }
    return found


def decode_summary(plan: Plan, on: Topology) -> dict[str, Any]:
    """Return the object that ``--decode --json`` prints. ``on`` is the slice that the user named."""
    assert plan.decoding is not None
    flops = decode_flops(plan.config.model, plan.decoding.batch, plan.decoding.slots)
    found = {
        "fits": plan.fits,
        "bytes_per_device": plan.bytes,
        "hbm_per_device": int(plan.topology.chip.hbm_bytes),
        "batch": plan.decoding.batch,
        "slots": plan.decoding.slots,
        "weights": plan.decoding.weights,
        "cache": plan.decoding.cache,
        "tokens_per_step": plan.decoding.batch,
        "flops_per_step": flops,
        "mfu": None,
        "step_seconds": None,
        "memory_seconds": memory_seconds(plan),
        "tokens_per_second": None,
        "topology": on.name,
        "idle_devices": on.device_count - plan.devices,
        **_common(plan),
    }
    if plan.schedule is not None:
        peak = plan.devices * plan.topology.chip.peak_flops
        found |= {"step_seconds": plan.seconds, "tokens_per_second": plan.tokens / plan.seconds}
        found |= {"mfu": flops / plan.seconds / peak}
    return found


def _steps(plan: Plan, tokens: float) -> float:
    """Return the steps of a run of this many tokens."""
    train = plan.config.train
    positions = plan.tokens // train.batch_size
    return BatchSizes.of(train).steps(-(-tokens // positions))  # type: ignore[arg-type]


def _epoch(plan: Plan, epoch: Epoch) -> dict[str, Any]:
    """Return what ``--json`` prints of one pass over the data."""
    steps, kind = epoch.steps(plan.config), "pairs" if isinstance(plan.objective, Dpo) else "conversations"
    found: dict[str, Any] = {"sequences": epoch.rows, "steps": steps}
    if plan.schedule is not None:
        found["seconds"] = steps * plan.seconds
    return found if epoch.records is None else {kind: epoch.records} | found


def memory_seconds(plan: Plan) -> float:
    """Return the seconds to read parameters and cache once."""
    return (plan.bytes_by_part["parameters"] + plan.bytes_by_part["cache"]) / plan.topology.chip.hbm_bandwidth


def _common(plan: Plan) -> dict[str, Any]:
    """Return the keys about where the step runs and its parts."""
    parts: dict[str, Any] = {"bytes": plan.bytes_by_part}
    if (schedule := plan.schedule) is not None:
        parts |= {
            "kernels": dict(schedule.cost.kernels),
            "compiled_flops_per_device": schedule.cost.flops + schedule.cost.kernel_flops,
            "hbm_bytes": schedule.cost.hbm_bytes,
            "host_bytes": schedule.cost.host_bytes,
        }
    if isinstance(schedule, Roofline):
        parts |= {"seconds": schedule.by_resource}
    elif schedule is not None:
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
        }  # fmt: skip
    return {
        "time": "roofline, a lower bound" if plan.topology.is_gpu else "schedule",
        "devices": plan.devices,
        "mesh": plan.mesh,
        "compute_dtype": plan.dtype,
        "vocab_size": plan.config.model.vocab_size,
        "compile_seconds": plan.compile_seconds,
        "parts": parts,
    }
