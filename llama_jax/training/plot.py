"""Draws losses.png: losses over the tokens that a run has read, with a scale of time; below them speed and norms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_jax.expected_args import ExpectedArgs
from llama_jax.storage.files import replacing
from llama_jax.training.norms import KINDS

TRAIN, EVAL, FAINT = "tab:blue", "tab:orange", "gray"
# Heights in inches, of the losses and of each panel below them.
LOSSES, PANEL = 4.8, 2.2
# Units of time in seconds, the largest first.
UNITS = (86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")


def plot_losses(
    path: Path,
    records: list[dict[str, Any]],
    title: str,
    floor: float | None = None,
    expected: ExpectedArgs = ExpectedArgs(),
) -> None:
    """Plot the training loss (each logged step and a running mean) and the evaluations over tokens.

    Panels below show what the records have of rewards, throughput, and the norms of gradients and updates. ``floor`` is
    the entropy of the text in bits per byte, drawn as a line. ``expected`` is drawn as a band with a line in it once an
    evaluation says how many bits per byte a nat a token is. Without a record with a finite loss, nothing is drawn.
    """
    finite = [r for r in records if r["train_loss"] is not None]
    if not finite:
        return
    # Imported here, because matplotlib is slow to import and plots are rare.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    tokens, losses = [r["tokens"] for r in finite], [r["train_loss"] for r in finite]
    evals = [r for r in records if "eval_loss" in r]
    panels = _panels(records)
    figure = Figure(figsize=(8, LOSSES + PANEL * len(panels)), layout="constrained")
    grid = figure.add_gridspec(1 + len(panels), 1, height_ratios=[LOSSES, *[PANEL] * len(panels)])
    axes = figure.add_subplot(grid[0])
    lowest = axes
    for row, draw in enumerate(panels, 1):
        lowest = figure.add_subplot(grid[row], sharex=axes)
        draw(lowest, records)
        lowest.grid(alpha=0.25)
    for above in figure.axes:
        above.tick_params(labelbottom=above is lowest)
    lowest.set_xlabel("tokens trained on")
    # The first hundredth of a run brings half of the loss's descent. Only a logarithmic scale shows the rest.
    axes.set_yscale("log")
    axes.plot(tokens, losses, color=TRAIN, alpha=0.3, linewidth=0.8, label="train, each logged step")
    axes.plot(tokens, _running_mean(losses), color=TRAIN, linewidth=1.6, label="train, running mean")
    unit = "pair" if _draw_rewards in panels else "token"
    axes.set(ylabel=f"loss, nats a {unit} (log scale)", title=title)
    axes.xaxis.set_major_formatter(EngFormatter())
    if evals:
        _draw_evaluations(axes, evals, floor, expected)
    _draw_time(axes, records, max([*tokens, *expected.tokens]))
    _write_numbers(axes.yaxis, max(losses) / min(losses))
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, loc="upper right")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _panels(records: list[dict[str, Any]]) -> list[Callable[[Any, list[dict[str, Any]]], None]]:
    """Return what draws each panel below the losses, of which earlier versions have recorded few or none."""
    panels = {
        _draw_rewards: "reward_accuracy",
        _draw_throughput: "tokens_per_second",
        _draw_gradients: "grad_norm",
        _draw_updates: "update_norm/",
    }
    keys = {key for record in records for key, value in record.items() if value is not None}
    return [draw for draw, wanted in panels.items() if any(key.startswith(wanted) for key in keys)]


def _draw_throughput(axes: Any, records: list[dict[str, Any]]) -> None:
    """Draw the tokens a second of steps, in which evaluations, saving and samples do not count."""
    from matplotlib.ticker import EngFormatter

    tokens, speeds = _series(records, "tokens_per_second")
    axes.plot(tokens, speeds, color=TRAIN, alpha=0.3, linewidth=0.8)
    axes.plot(tokens, _running_mean(speeds), color=TRAIN, linewidth=1.6)
    axes.set(ylabel="tokens a second", ylim=(0, 1.1 * sorted(speeds)[-1 - len(speeds) // 50]))
    axes.yaxis.set_major_formatter(EngFormatter())


def _draw_gradients(axes: Any, records: list[dict[str, Any]]) -> None:
    """Draw the norm of the gradients before clipping, of all parameters and by kind."""
    _draw_norms(axes, records, "grad_norm", "gradient norm")


def _draw_updates(axes: Any, records: list[dict[str, Any]]) -> None:
    """Draw the norm of the change of the parameters in a step, by kind."""
    _draw_norms(axes, records, "update_norm", "update norm")


def _draw_norms(axes: Any, records: list[dict[str, Any]], name: str, label: str) -> None:
    """Draw running means of norms, without those that are 0. A kind has one color in all panels."""
    drawn: list[float] = []
    for key, color, what in (
        (name, "black", "all"),
        *((f"{name}/{kind}", f"C{i}" if i < 10 else FAINT, kind) for i, kind in enumerate(KINDS)),
    ):
        tokens, norms = _series(records, key)
        positive = [i for i, norm in enumerate(norms) if norm > 0]
        if positive:
            means = _running_mean([norms[i] for i in positive])
            axes.plot([tokens[i] for i in positive], means, color=color, linewidth=1.1, label=what)
            drawn += means
    axes.set_ylabel(f"{label}\n(running mean, log scale)")
    if drawn:
        axes.set_yscale("log")
        _write_numbers(axes.yaxis, max(drawn) / min(drawn))
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, labelspacing=0.2)


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return the tokens and the values of the records that have a value of ``key``."""
    having = [r for r in records if r.get(key) is not None]
    return [r["tokens"] for r in having], [r[key] for r in having]


def _draw_time(axes: Any, records: list[dict[str, Any]], end: float) -> None:
    """Draw a scale of time above that of tokens: of all starts, evaluations and saving included.

    end: the last token that the plot shows. What the run has not read yet would take as long as what it has.
    """
    import numpy as np

    tokens, seconds = [0.0], [0.0]
    for record in records:
        if record["tokens"] > tokens[-1] and record.get("run_seconds", 0.0) > seconds[-1]:
            tokens.append(record["tokens"])
            seconds.append(record["run_seconds"])
    if len(tokens) < 3:
        return
    unit, name = next((size, name) for size, name in UNITS if seconds[-1] >= 2 * size or size == 1)
    # The margins of the plot lie before the first token and after the last one.
    margin = 2 * max(1.0, end / tokens[-1])
    x = np.array([-margin * tokens[-1], *tokens, margin * tokens[-1]])
    y = np.array([-margin * seconds[-1], *seconds, margin * seconds[-1]]) / unit
    time = axes.secondary_xaxis("top", functions=(lambda t: np.interp(t, x, y), lambda t: np.interp(t, y, x)))
    time.set_xlabel(f"time, {name}")


def _draw_rewards(axes: Any, records: list[dict[str, Any]]) -> None:
    """Draw of preferences the share of pairs whose chosen answer gains more, and the margins."""
    margins = axes.twinx()
    for prefix, style in (("", "-"), ("eval_", "o-")):
        of = [r for r in records if r["train_loss"] is not None and r.get(f"{prefix}reward_accuracy") is not None]
        if of:
            tokens, name = [r["tokens"] for r in of], "eval" if prefix else "train, running mean"
            accuracies, means = ([r[f"{prefix}reward_{what}"] for r in of] for what in ("accuracy", "margin"))
            if not prefix:
                accuracies, means = _running_mean(accuracies), _running_mean(means)
            axes.plot(tokens, accuracies, style, color=TRAIN, markersize=4, label=f"accuracy, {name}")
            margins.plot(tokens, means, style, color=EVAL, markersize=4, label=f"margin, {name}")
    axes.set(ylabel="share of pairs ranked right", ylim=(0, 1.02))
    margins.set_ylabel("mean reward margin")
    lines = [*axes.get_lines(), *margins.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], frameon=False, loc="lower right", fontsize=8)


def _draw_evaluations(axes: Any, evals: list[dict[str, Any]], floor: float | None, expected: ExpectedArgs) -> None:
    """Draw held-out losses, a label at the best one, the scale in bits per byte, what is expected, and the floor."""
    best = min(evals, key=lambda r: r["eval_loss"])
    bits = best["eval_bits_per_byte"]  # None if the tokenizer loses text
    axes.plot(
        [r["tokens"] for r in evals],
        [r["eval_loss"] for r in evals],
        color=EVAL,
        marker="o",
        markersize=4,
        label="eval",
    )
    of_sources = sorted({key for record in evals for key in record if key.startswith("eval_loss/")})
    for i, key in enumerate(of_sources):
        having = [r for r in evals if key in r]
        axes.plot(
            [r["tokens"] for r in having],
            [r[key] for r in having],
            color=f"C{2 + i}",  # the first two are those of the whole
            marker=".",
            linewidth=0.8,
            label=f"eval, {key.partition('/')[2]}",
        )
    text = f"{best['eval_loss']:.3f} nats a {'pair' if 'eval_reward_margin' in best else 'token'}" + (
        "" if bits is None else f"\n{bits:.3f} bits a byte"
    )
    arrow = {"arrowstyle": "-", "color": FAINT}
    axes.annotate(
        text, xy=(best["tokens"], best["eval_loss"]), xytext=(0, 32), textcoords="offset points", ha="right", fontsize=9,
        arrowprops=arrow,
    )  # fmt: skip
    if bits is None:
        return
    bits_per_nat = bits / best["eval_loss"]
    secondary = axes.secondary_yaxis("right", functions=(lambda y: y * bits_per_nat, lambda y: y / bits_per_nat))
    secondary.set_ylabel("bits a byte (log scale)")
    _write_numbers(secondary.yaxis, 1)
    if expected.tokens:
        low, middle, high = (
            [value / bits_per_nat for value in row] for row in (expected.low, expected.bits_per_byte, expected.high)
        )
        axes.fill_between(
            expected.tokens, low, high, color=EVAL, alpha=0.12, linewidth=0, label="eval, expected interval"
        )
        axes.plot(expected.tokens, middle, color=EVAL, linestyle=":", linewidth=1.4, label="eval, expected")
    if floor is not None:
        label = f"entropy of the text, {floor:.3f} bits a byte"
        axes.axhline(floor / bits_per_nat, color=FAINT, linestyle="--", linewidth=1, label=label)


def _write_numbers(axis: Any, span: float) -> None:
    """Label a logarithmic axis with plain numbers, also between powers of ten if it spans few of them."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(StrMethodFormatter("{x:g}") if span < 12 else NullFormatter())


def _running_mean(values: list[float]) -> list[float]:
    """Return running means over about a twentieth of the points, at least nine, as many before each as after it.

    Near the beginning, where losses fall steeply, fewer are taken. Near the end the number stays the same: all that
    come after, and more of those before. A mean of the last few would show the luck of the last batches.
    """
    reach = min(max(4, len(values) // 40), len(values) // 8)
    means = []
    for i in range(len(values)):
        before = min(reach, i)
        behind = min(before, len(values) - 1 - i)
        before = min(i, 2 * before - behind)
        means.append(sum(values[i - before : i + behind + 1]) / (before + behind + 1))
    return means
