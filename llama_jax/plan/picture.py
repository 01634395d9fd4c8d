"""Draws a plan: a chip's memory and a step's time, as bars."""

from pathlib import Path
from typing import Any

from llama_jax.devices.chips import GiB
from llama_jax.devices.sharding import describe
from llama_jax.plan import Plan
from llama_jax.plan.roofline import Roofline
from llama_jax.storage.files import replacing

# Neighbouring colours differ, also in grey.
COLOURS = ("#1b4f72", "#5dade2", "#b9770e", "#f5cba7", "#1e8449", "#abebc6", "#6c3483", "#d2b4de", "#922b21", "#f5b7b1")


# The metadata by which a picture of plan is recognized.
MARK = "llama_jax.plan"


def is_picture(content: bytes) -> bool:
    """Return whether the beginning of a file is that of a picture made by ``draw``."""
    return content.startswith(b"\x89PNG") and MARK.encode() in content


def draw(plan: Plan, path: Path) -> None:
    """Write the picture as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    memory = {part: size / GiB for part, size in plan.bytes_by_part.items()}
    time = {}
    schedule, bound = plan.schedule, ""
    if isinstance(schedule, Roofline):
        longest = max(schedule.by_resource, key=lambda name: schedule.by_resource[name])
        time, bound = {f"at least, by the {longest}": schedule.seconds * 1e3}, "at least "
    elif schedule is not None:
        time = {part: seconds * 1e3 for part, seconds in schedule.by_part}
        time |= {"attention's kernels": schedule.kernels * 1e3, "blocking collectives": schedule.blocking * 1e3}
        if schedule.waiting:
            time["waiting for other slices"] = schedule.waiting * 1e3
        if schedule.waiting_for_memory:
            time["waiting for memory"] = schedule.waiting_for_memory * 1e3
    figure, axes = plt.subplots(2, 1, figsize=(11, 5.5), layout="constrained")
    room = plan.topology.chip.hbm_bytes / GiB
    verdict = "fits" if plan.fits else "does not fit"
    _bar(axes[0], memory, f"memory of a {plan.topology.unit}, GiB ({verdict})", limit=room)
    _bar(
        axes[1],
        time,
        f"time of a step, ms ({bound}{plan.seconds * 1e3:,.1f} in all)" if time else "no time: it does not fit",
    )
    figure.suptitle(f"{plan.topology.name}, {describe(plan.mesh)}")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png", metadata={"Software": MARK})
    plt.close(figure)


def _bar(axes: Any, parts: dict[str, float], title: str, limit: float | None = None) -> None:
    """Draw one bar of ``parts`` side by side, with a line at ``limit``."""
    left = 0.0
    for colour, (name, size) in zip(COLOURS * 2, parts.items(), strict=False):
        axes.barh(0, size, left=left, color=colour, label=f"{name}  {size:,.2f}")
        left += size
    if limit is not None:
        axes.axvline(limit, color="black", linestyle="--", label=f"there is  {limit:,.2f}")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_yticks([])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if parts:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=8, frameon=False)
