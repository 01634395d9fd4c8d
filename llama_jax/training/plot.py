"""losses.png: the losses of a run over the tokens that it has read."""

from pathlib import Path
from typing import Any

from llama_jax.files import replacing


def plot_losses(path: Path, records: list[dict[str, Any]], title: str, floor: float | None = None) -> None:
    """Draw training loss (each logged step, and a running mean) and evaluations over tokens, with bits per byte at the right.

    floor: the text's own entropy in bits per byte, drawn as a line. Does nothing before the first record.
    """
    if not records:
        return
    # Imported here: drawing is rare, and the library slow to load.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    train = [(r["tokens"], r["train_loss"]) for r in records if "train_loss" in r]
    evals = [(r["tokens"], r["eval_loss"], r["eval_bits_per_byte"]) for r in records if "eval_loss" in r]
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    tokens = [t for t, _ in train]
    axes.plot(
        tokens, [loss for _, loss in train], color="tab:blue", alpha=0.3, linewidth=0.8, label="train, each logged step"
    )
    axes.plot(
        tokens, _running_mean([loss for _, loss in train]), color="tab:blue", linewidth=1.6, label="train, running mean"
    )
    bits_per_nat = None
    if evals:
        axes.plot(
            [t for t, _, _ in evals],
            [loss for _, loss, _ in evals],
            color="tab:orange",
            marker="o",
            markersize=4,
            label="eval",
        )
        best = min(evals, key=lambda e: e[1])
        bits_per_nat = best[2] / best[1]
        axes.annotate(
            f"{best[1]:.3f} nats a token\n{best[2]:.3f} bits a byte",
            xy=best[:2], xytext=(0, 28), textcoords="offset points", ha="right", fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "gray"},
        )  # fmt: skip
        secondary = axes.secondary_yaxis("right", functions=(lambda y: y * bits_per_nat, lambda y: y / bits_per_nat))
        secondary.set_ylabel("bits a byte")
        if floor is not None:
            axes.axhline(
                floor / bits_per_nat,
                color="gray",
                linestyle="--",
                linewidth=1,
                label=f"entropy of the text, {floor:.3f} bits a byte",
            )
    low = min(
        [loss for _, loss in train]
        + [loss for _, loss, _ in evals]
        + ([floor / bits_per_nat] if floor and bits_per_nat else [])
    )
    high = max(loss for _, loss in train)
    axes.set_ylim(max(0, low - 0.08 * (high - low)), high + 0.05 * (high - low) + 1e-3)
    axes.set(xlabel="tokens trained on", ylabel="loss, nats a token", title=title)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _running_mean(values: list[float]) -> list[float]:
    """Exponential mean over about a fiftieth of the points, unbiased at the start."""
    decay = max(0.0, 1 - 50 / max(len(values), 1))
    decay = max(decay, 0.8)
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return means
