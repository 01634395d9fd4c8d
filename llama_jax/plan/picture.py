"""Draws a plan, a chip's memory and a step's time as bars, or a search, memory against time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.devices.chips import GiB
from llama_jax.devices.sharding import describe
from llama_jax.plan import Plan
from llama_jax.plan.calibration import Compiled, needed_bytes
from llama_jax.plan.roofline import Roofline
from llama_jax.plan.search import Search, ranked
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
    _save(figure, path)


def draw_search(search: Search, found: Sequence[Compiled], path: Path) -> None:
    """Write a picture of memory against time as PNG: all candidates, and those compiled with their ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(figsize=(13, 6), layout="constrained")
    topology, guesses = search.topology, search.guesses(found)
    axes.scatter(
        [g.bytes / GiB for g in guesses], [g.seconds * 1e3 for g in guesses], s=12, color="#aab7b8", alpha=0.5,
        label=f"{len(guesses)} candidates, by the {'calibrated ' * bool(found)}estimate",
    )  # fmt: skip
    room = topology.chip.hbm_bytes / GiB
    axes.axvline(room, color="black", linestyle="--", label=f"there is  {room:,.2f} GiB")
    for rank, c in enumerate(ranked(found), 1):
        colour, marker = ("#1b4f72", "o") if c.plan.fits else ("#922b21", "x")
        if rank == 1 and c.plan.fits:
            colour, marker = "#1e8449", "*"
        timed = c.plan.schedule is not None
        point = needed_bytes(c.plan) / GiB, (c.plan.seconds if timed else c.expected.seconds) * 1e3
        said = (
            f"{point[0]:,.2f} GiB, {point[1]:,.1f} ms"
            if timed
            else f"{point[0]:,.2f} GiB, does not fit, its time estimated"
        )
        axes.scatter(
            *point, s=160 if marker == "*" else 40, color=colour, marker=marker, zorder=3,
            label=f"{rank}: {'the best, ' * (marker == '*')}{said}\n{c.candidate.flags(search.config)}",
        )  # fmt: skip
        axes.annotate(str(rank), point, xytext=(5, 4), textcoords="offset points", fontsize=8, color=colour)
    axes.set(xscale="log", yscale="log", xlabel=f"memory of a {topology.unit}, GiB", ylabel="time of a step, ms")
    for axis in (axes.xaxis, axes.yaxis):
        for formatter in (axis.set_major_formatter, axis.set_minor_formatter):
            formatter("{x:,.4g}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.tick_params(which="both", labelsize=8)
    axes.set_title(f"{topology.name}: ways to run a step", loc="left", fontsize=10)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write a figure as PNG with the mark of plan, and close it."""
    import matplotlib.pyplot as plt

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
