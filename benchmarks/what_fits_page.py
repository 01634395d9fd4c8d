"""The page and the picture of benchmarks/what_fits.py, from its lines alone."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from what_fits_cells import MODELS, TASKS, Cell, Line, seconds_for

from llama_jax.devices.chips import GiB
from llama_jax.plan.topology import Topology
from llama_jax.storage.files import replacing

# The error of an estimate is told in its row if at least so many compiled cells show it.
FEWEST = 3
HEAD = """# What fits where

<!-- Written by `python benchmarks/what_fits.py`; change that, not this. -->

LLaMA models of six sizes, on the slices and GPUs that people rent: what fits, how fast it can be, and the flags to copy.
To look up what a machine can do, read a row of a table below; to look up what to rent, read a column.

![What fits where](what-fits.png)

**{compiled} of {cells} cells are compiled**, in bold: memory is exact, and the time is the TPU compiler's schedule ([what the numbers
are](planning.md#what-the-numbers-are)). {estimated} are estimates, with a ~: those of `plan --search`, corrected by the compiled cells of the
same task and chip, else of the same task, else of all tasks, on TPUs and GPUs apart. One that is not corrected takes the products at the
chip's peak, and decoding the memory at its bandwidth, which is too fast. {none} have no layout, since no mesh divides the model and the batch among the chips. {failed}Nothing here was measured on a chip. Times
of an H100 are lower bounds, compiled or not: its compiler writes no schedule.

```bash
python benchmarks/what_fits.py
```

goes on with the cells that are not compiled, a line each in `benchmarks/records/what-fits.jsonl`, and writes this page. To try
other settings of a cell, give its flags to [plan](planning.md).

{errors}
"""
ERRORS = """## How wrong the estimates are

Each compiled cell, estimated from the other compiled ones, against the compiler: the median error, and the largest.

| estimates of | memory | time |
|---|---|---|
"""
ABOUT = {
    "pretraining": (
        "## Pretraining",
        "With the paper's batch, 4 million tokens a step (1B and 3B: 2 million), parameters in float32 and AdamW.",
    ),
    "full tuning": (
        "## Full tuning",
        "All parameters, in bfloat16 with stochastic rounding, and moments in 8 bits; 64 sequences of the whole context a step.",
    ),
    "adapter tuning": (
        "## Adapter tuning",
        "Adapters of rank 16 on all matrices; 16 sequences of the whole context a step. The base is in bfloat16 where that fits, else in "
        "int8, else in int4.",
    ),
    "decoding": (
        "## Decoding",
        "A step of 8 sequences over a cache of 2,048 tokens each, in bfloat16, on the chips of one host. Chips that would not make it "
        "faster stay idle.",
    ),
}


def page(cells: Sequence[Cell], compiled: Mapping[str, Line], estimates: Sequence[Line]) -> str:
    """Return the page. ``compiled`` has the lines of compiled cells by name, ``estimates`` a line of every cell."""
    lines = joined(compiled, estimates)
    cells = sorted(cells, key=_place_on_page)
    kinds = Counter("none" if line["fits"] is None else line["from"] for line in lines.values())
    failed = [line for line in compiled.values() if line["fits"] is None]
    parts = [
        HEAD.format(
            compiled=kinds["compiled"], cells=len(cells), estimated=kinds["estimate"], none=kinds["none"], errors=_errors(estimates),
            failed=f"In {len(failed)} the compiler fails, which their rows say. " if failed else "",
        )
    ]  # fmt: skip
    for family, (title, text) in ABOUT.items():
        if not (of_family := [cell for cell in cells if cell.task.family == family]):
            continue
        parts.append(f"{title}\n\n{text}\n")
        for task in dict.fromkeys(cell.task.name for cell in of_family):
            parts.append(_overview([cell for cell in of_family if cell.task.name == task], lines))
        for model in dict.fromkeys(cell.model for cell in of_family):
            parts.append(_details([cell for cell in of_family if cell.model == model], lines, compiled))
    parts.append(_made_with(compiled))
    return "\n".join(parts)


def _place_on_page(cell: Cell) -> tuple[int, int, int]:
    """Return by what the cells are sorted: models, slices as they are declared, tasks."""
    return list(MODELS).index(cell.model.name), cell.task.slices.index(cell.slice), list(TASKS).index(cell.task.name)


def joined(compiled: Mapping[str, Line], estimates: Sequence[Line]) -> dict[str, Line]:
    """Return a line of every cell by its name: the compiled one, where the compiler did not fail, else the estimate."""
    good = {name: line for name, line in compiled.items() if line["fits"] is not None}
    return {line["cell"]: good.get(line["cell"], line) for line in estimates}


def _errors(estimates: Sequence[Line]) -> str:
    """Return the table of the estimates' errors, or a sentence if nothing is compiled."""
    found: dict[str, dict[str, dict[str, float] | None]] = {}
    for line in estimates:
        kind = "GPU" if Topology.parse(line["slice"]).is_gpu else "TPU"
        if line.get("errors"):
            found[f"{line['task'].partition(',')[0]}, {kind}"] = line["errors"]
    if not found:
        return "The error of the estimates is not known: too few cells are compiled to compare them with.\n"

    def text(error: dict[str, float] | None) -> str:
        if error is None:
            return "not known"
        return f"{error['median']:.1%}, {error['largest']:.1%} ({error['count']} cell{'s'[: error['count'] != 1]})"

    rows = [f"| {name} | {text(each.get('bytes'))} | {text(each.get('seconds'))} |" for name, each in found.items()]
    rest = "Where a task is not in the table, the error of its estimates is not known.\n"
    return ERRORS + "\n".join(rows) + "\n\n" + rest


def _overview(cells: Sequence[Cell], lines: Mapping[str, Line]) -> str:
    """Return the table of one task: a row a slice, a column a model, tokens a second or what is needed."""
    models = [name for name in MODELS if any(cell.model.name == name for cell in cells)]
    by_place = {(cell.slice, cell.model.name): lines[cell.name] for cell in cells}
    title = cells[0].task.name.partition(", ")[2]
    rows = [f"| {title and f'{title}, '}tokens a second | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for slice_ in dict.fromkeys(cell.slice for cell in cells):
        rows.append(f"| {slice_text(slice_)} | {' | '.join(_short(by_place[slice_, model]) for model in models)} |")
    return "\n".join(rows) + "\n"


def slice_text(name: str) -> str:
    """Return a slice's name, chips, and memory of each."""
    topology = Topology.parse(name)
    count = f"{topology.chips} {topology.rented}{'s'[: topology.chips != 1]}"
    return f"{name}, {count} of {topology.chip.hbm_bytes / GiB:.4g} GiB"


def _short(line: Line) -> str:
    if line["fits"] is None:
        return "no layout"
    mark = "" if line["from"] == "compiled" else "~"
    if line["fits"]:
        text = f"{mark}{rate_text(line['tokens_per_step'] / line['step_seconds'])}"
    else:
        text = f"needs {mark}{line['bytes'] / GiB:,.0f} GiB" if line["bytes"] else "too large"
    return text if mark else f"**{text}**"


def rate_text(rate: float) -> str:
    """Return tokens a second with three digits: 886071 -> "886,000"."""
    digits = 3 - len(f"{rate:.0f}")
    return f"{round(rate, digits):,.0f}" if rate >= 10 else f"{rate:.2g}"


def _details(cells: Sequence[Cell], lines: Mapping[str, Line], compiled: Mapping[str, Line]) -> str:
    """Return a model's section of a task: what to type, and a row for each slice on which it fits."""
    model, tokens = cells[0].model, cells[0].task.tokens
    fitting = [cell for cell in cells if lines[cell.name]["fits"]]
    parts = [f"### {model.name}: {model.what}, {cells[0].task.family}\n"]
    if fitting:
        length = "" if tokens is None else f" {'a trillion' if tokens == 1e12 else '100 million'} tokens |"
        parts.append(f"```bash\n{cells[0].command}\n```\n")
        parts.append(f"| slice | memory of each | step | tokens/s |{length} by | more flags |")
        parts.append("|---" * (7 - (tokens is None)) + "|")
        parts += [_row(cell, lines[cell.name]) for cell in fitting]
        parts.append("")
    if rest := [cell for cell in cells if cell not in fitting]:
        parts.append(f"Does not fit: {'; '.join(_refusal(cell, lines[cell.name]) for cell in rest)}.\n")
    for cell in cells:
        if cell.name in compiled and compiled[cell.name]["fits"] is None:
            parts.append(f"The compiler fails on {cell.name}: {compiled[cell.name]['why']}\n")
    return "\n".join(parts)


def _row(cell: Cell, line: Line) -> str:
    bound, seconds = "at least " * cell.topology.is_gpu, line["step_seconds"]
    most = "at most " * cell.topology.is_gpu
    wait = seconds_for(cell, seconds, line["tokens_per_step"])
    mark = "" if line["from"] == "compiled" else "~"
    columns = [
        _place(cell), f"{mark}{line['bytes'] / GiB:.2f} of {line['room'] / GiB:.2f} GiB", f"{bound}{mark}{_milliseconds(seconds)}",
        f"{most}{mark}{rate_text(line['tokens_per_step'] / seconds)}",
    ]  # fmt: skip
    columns += [] if math.isinf(wait) else [f"{bound}{mark}{_days(wait)}"]
    flags = f"`{line['flags']}`" if line["flags"] else ""
    return f"| {' | '.join([*columns, _source(line), flags])} |"


def _place(cell: Cell) -> str:
    """Return the slice, with the numbers of a decoding step, which a model's rows may differ in."""
    kind = cell.task.name.partition(", ")[2]
    return f"{cell.slice}, {kind}" if kind else cell.slice


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def _days(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.2g} minutes"
    return f"{seconds / 3600:.3g} hours" if seconds < 2 * 86400 else f"{float(f'{seconds / 86400:.3g}'):,.4g} days"


def _source(line: Line) -> str:
    """Return whether a row is compiled or estimated, and how wrong the estimate may be."""
    if line["from"] == "compiled":
        return "**compiled**"
    if not line["corrected_by"]:
        return "estimate, not corrected"
    errors = line.get("errors") or {}
    known = [
        f"{what} up to {errors[name]['largest']:.0%} off"
        for name, what in (("bytes", "memory"), ("seconds", "time"))
        if (errors.get(name) or {}).get("count", 0) >= FEWEST
    ]
    return f"estimate, {', '.join(known)}" if known else "estimate, error not known"


def _refusal(cell: Cell, line: Line) -> str:
    if line["fits"] is None:
        return f"{_place(cell)} (no layout: the batch or the model cannot be divided)"
    by = "compiled" if line["from"] == "compiled" else "estimate"
    needed = f"needs {line['bytes'] / GiB:,.2f} of {line['room'] / GiB:.2f} GiB" if line["bytes"] else "needs more"
    return f"{_place(cell)} ({needed}, {by})"


def _made_with(compiled: Mapping[str, Line]) -> str:
    """Return which versions compiled how many cells."""
    made: Counter[str] = Counter()
    for line in compiled.values():
        made[
            ", ".join(f"{name} {version}" for name, version in [*line["versions"].items(), ("sources", line["source"])])
        ] += 1
    rows = [f"- {count} cell{'s'[: count != 1]}: {what}" for what, count in sorted(made.items())]
    shapes = "\n".join(
        f"| {model.name} | {model.what} | `--config {model.config}{' ' if model.flags else ''}{model.flags}` |"
        for model in MODELS.values()
    )
    text = (
        "Nothing is compiled yet.\n"
        if not rows
        else "The compiled cells were compiled with\n\n" + "\n".join(rows) + "\n"
    )
    return f"## The models, and what compiled them\n\n| size | model | shape |\n|---|---|---|\n{shapes}\n\n{text}"


def draw(cells: Sequence[Cell], compiled: Mapping[str, Line], estimates: Sequence[Line], path: Path) -> None:
    """Write the picture: of each task, slices by models, coloured by tokens a second, and marked where compiled."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import colormaps, pyplot

    lines, tasks = joined(compiled, estimates), [name for name in TASKS if name != "decoding, int4"]
    figure, grid = pyplot.subplots(1, len(tasks), figsize=(15, 5.6), layout="constrained")
    for axes, task in zip(grid, tasks, strict=True):
        own = [cell for cell in cells if cell.task.name == task]
        slices, models = list(TASKS[task].slices), list(MODELS)
        rates = {
            c: lines[c.name]["tokens_per_step"] / lines[c.name]["step_seconds"] for c in own if lines[c.name]["fits"]
        }
        low, high = math.log(min(rates.values(), default=1.0)), math.log(max(rates.values(), default=2.0))
        for cell in own:
            x, y, line = models.index(cell.model.name), slices.index(cell.slice), lines[cell.name]
            share = (math.log(rates[cell]) - low) / max(high - low, 1e-9) if cell in rates else None
            colour = "#eeeeee" if share is None else colormaps["viridis"](0.25 + 0.7 * share)
            axes.add_patch(pyplot.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
            weight = "bold" if line["from"] == "compiled" else "normal"
            axes.text(
                x,
                y,
                "-" if share is None else _compact(rates[cell]),
                ha="center",
                va="center",
                fontsize=7,
                weight=weight,
            )
        axes.set(xlim=(-0.5, len(models) - 0.5), ylim=(len(slices) - 0.5, -0.5), title=task)
        axes.set_xticks(range(len(models)), models)
        axes.set_yticks(range(len(slices)), slices, fontsize=8)
        axes.tick_params(length=0)
    figure.suptitle("tokens a second, at most (bold: compiled; plain: estimated; -: does not fit, or has no layout)")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    pyplot.close(figure)


def _compact(rate: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if rate >= size:
            return f"{rate / size:.3g}{unit}"
    return f"{rate:.3g}"
