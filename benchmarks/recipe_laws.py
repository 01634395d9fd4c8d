"""Fit the laws of llama_jax/recipe/laws.py to runs, and print their constants and how far the runs lie from them.

python benchmarks/recipe_laws.py runs.jsonl

Runs of more than MOST_EPOCHS are left out, since the law of learning by heart is one of runs near their best length.
A line of the file is a run: text (a path; the lines of benchmarks/records/laws.jsonl describe theirs), parameters, tokens,
tflop, settings or flags, of which the vocabulary's size is read, and evals, a list of [step, bits per byte]. The last one
of these counts, since the rate has decayed by then: a line to 0. What comes before it says how much a rate costs that has
not decayed yet. Texts are split and counted as recipe does. The spread is that of texts that were left out, one after the
other: of these, four in five lie within it.
"""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from llama_jax.config import DataArgs
from llama_jax.recipe.laws import Laws, TextLevel
from llama_jax.recipe.text import Counted, count_text

# What is fitted, as logarithms, but for the share, and how far each may go from its first guess, as a factor.
FITTED = ("floor", "of_size", "size_power", "of_bytes", "bytes_power", "worth", "by_heart")
# A first guess weighs as much as a run that lies this far from it, as a logarithm: few runs cannot fix all constants.
GUESS = 1.0
MOST_EPOCHS = 40
# A residual beyond this, as a logarithm, pulls less than in proportion (soft L1).
SCALE = 0.05


class Run(NamedTuple):
    """A run: what the laws say something about."""

    text: str
    level: TextLevel
    parameters: int
    read: float
    unique: float
    bits: float
    flops: float
    earlier: tuple[tuple[float, float], ...] = ()
    """Evaluations before the end: the share of the run that was done, and bits per byte."""
    frequencies: float = math.inf
    """Bits per byte for who knows how often each token occurs and no more."""


def read_runs(path: Path) -> list[Run]:
    """Return the runs of a file. Lines without an evaluation are left out."""
    counted: dict[tuple[str, int], Counted] = {}
    found = []
    for line in filter(None, path.read_text().splitlines()):
        row = json.loads(line)
        if not row.get("evals"):
            continue
        if not Path(row["text"]).exists():
            sys.exit(
                f"{path}: expected the path of a text under text, found {row['text']!r}; texts are no part of the project: name your copies"
            )
        size = _vocab_size(row)
        key = row["text"], size
        if key not in counted:
            counted[key] = count_text(DataArgs(filepath=row["text"], vocab_size=size), True, math.inf)
        text = counted[key]
        read = row["tokens"] * text.bytes_per_token
        if read > MOST_EPOCHS * text.train_bytes:
            continue
        found.append(
            Run(
                row["text"],
                text.level,
                row["parameters"],
                read,
                text.train_bytes,
                row["evals"][-1][1],
                1e12 * row["tflop"],
                tuple(
                    (step / row["evals"][-1][0], bits)
                    for step, bits in row["evals"]
                    if step < 0.95 * row["evals"][-1][0]
                ),
                text.frequencies,
            )
        )
    return found


def _vocab_size(row: dict[str, Any]) -> int:
    """Return data.vocab_size of a run, by its settings as a sweep has them, or by its flags."""
    flags = row.get("flags", [])
    words = flags.split() if isinstance(flags, str) else flags
    given = dict(itertools.pairwise(words)).get("--data.vocab-size", 1024)
    return int(row.get("settings", {}).get("data.vocab-size", given))


def fit(runs: Sequence[Run], first: Laws = Laws()) -> Laws:
    """Return the laws that fit the logarithms of the runs' losses best, not far from the ``first`` guess."""
    start = np.array([math.log(getattr(first, name)) for name in FITTED] + [first.share])

    def laws_of(values: np.ndarray) -> Laws:
        named: dict[str, Any] = {name: float(math.exp(value)) for name, value in zip(FITTED, values[:-1], strict=True)}
        return dataclasses.replace(first, **named, share=float(values[-1]))

    def residuals(values: np.ndarray) -> np.ndarray:
        apart, laws = dict[str, list[float]](), laws_of(values)
        for run in runs:
            apart.setdefault(run.text, []).append(residual(laws, run))
        # Runs of one text err together, by what the text's level misses, which says nothing about shapes and lengths.
        together = [float(np.mean(each)) for each in apart.values()]
        within = [value - mean for each, mean in zip(apart.values(), together, strict=True) for value in each]
        return np.concatenate([together, within, SCALE * (values - start) / GUESS])

    bounds = start - 6, start + 6
    bounds[0][-1], bounds[1][-1] = 0.0, 1.0
    return laws_of(least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=SCALE).x)


def residual(laws: Laws, run: Run) -> float:
    """Return how much higher a run's loss is than expected, as a difference of logarithms."""
    return math.log(run.bits / laws.bits_per_byte(run.level, run.parameters, run.read, run.unique))


def without_each(runs: Sequence[Run], first: Laws = Laws()) -> dict[str, Laws]:
    """Return, for each text, the laws that are fitted on the other texts."""
    texts = dict.fromkeys(run.text for run in runs)
    return {text: fit([run for run in runs if run.text != text], first) for text in texts}


def spread_of(runs: Sequence[Run], others: dict[str, Laws]) -> dict[str, list[float]]:
    """Return, for each text, the residuals of its runs by laws that were fitted on the other texts."""
    return {text: [residual(laws, run) for run in runs if run.text == text] for text, laws in others.items()}


def ways_back(runs: Sequence[Run], others: dict[str, Laws]) -> tuple[dict[str, float], float]:
    """Return how far each text's evaluations go back to the frequencies of tokens at most, and the least way there.

    A way is a difference of logarithms from the expectation, by laws that were fitted on the other texts.
    """
    found: dict[str, float] = {}
    ways = []
    for run in runs:
        laws = others[run.text]
        for share, bits in (*run.earlier, (1.0, run.bits)):
            expected = laws.bits_per_byte(run.level, run.parameters, share * run.read, run.unique, 1 - share)
            ways.append(math.log(run.frequencies / expected))
            found[run.text] = max(found.get(run.text, 0.0), math.log(bits / expected) / ways[-1])
    return found, min(ways)


def excesses(laws: Laws, runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """Return, for each text, the share r of the peak rate and the logarithm of what it cost: float64 [evaluations, 2].

    The cost is that beyond the law of the bytes read so far, by which a run of its own would end there. How far the run
    ends from the laws does not count.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        end = laws.relative(run.parameters, run.read, run.unique)
        for share, bits in run.earlier:
            law = laws.relative(run.parameters, share * run.read, run.unique)
            found.setdefault(run.text, []).append((1 - share, math.log(bits / run.bits) - math.log(law / end)))
    return {text: np.array(each) for text, each in found.items()}


def fit_undecayed(laws: Laws, apart: dict[str, np.ndarray]) -> Laws:
    """Return the laws with the cost of a rate that has not decayed. Each text weighs the same."""

    def residuals(values: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [(each[:, 1] - values[0] * each[:, 0] ** values[1]) / math.sqrt(len(each)) for each in apart.values()]
        )

    first = np.array([laws.undecayed, laws.undecayed_power])
    found = least_squares(residuals, first, bounds=([0, 0.5], [2, 4]), loss="soft_l1", f_scale=SCALE).x
    return dataclasses.replace(laws, undecayed=float(found[0]), undecayed_power=float(found[1]))


def undecayed_sizes(laws: Laws, apart: dict[str, np.ndarray]) -> dict[str, float]:
    """Return how far each text lies from a fit on the others, as a multiple of r: a root mean square."""
    found = {}
    for text, each in apart.items():
        others = fit_undecayed(laws, {name: values for name, values in apart.items() if name != text})
        far = each[:, 1] - [others.excess(rate) for rate in each[:, 0]]
        found[text] = float(np.sqrt(np.mean(np.square(far / each[:, 0]))))
    return found


def four_in_five(sizes: Sequence[float]) -> float:
    """Return the size within which four in five others lie, by conformal prediction: the quantile of one value more."""
    return sorted(sizes)[min(len(sizes) - 1, math.ceil(0.8 * (len(sizes) + 1)) - 1)]


def main() -> None:
    """Fit and print."""
    if len(sys.argv) != 2:
        sys.exit("expected one file of runs; python benchmarks/recipe_laws.py runs.jsonl")
    runs = read_runs(Path(sys.argv[1]))
    texts = {run.text for run in runs}
    if len(texts) < 2:
        sys.exit(f"expected runs on two texts or more, found {len(runs)} runs on {len(texts)}")
    laws, others = fit(runs), without_each(runs)
    apart = spread_of(runs, others)
    for text, values in apart.items():
        print(f"{text}: {len(values)} runs, left out: {', '.join(f'{value:+.3f}' for value in values)}")
    inside = [residual(laws, run) for run in runs]
    # Runs of one text err together, so a text counts once.
    spread = four_in_five([float(np.sqrt(np.mean(np.square(values)))) for values in apart.values()])
    flops = [run.flops for run in runs]
    laws = dataclasses.replace(laws, texts=len(texts), spread=spread, least_flops=min(flops), most_flops=max(flops))
    costs = excesses(laws, runs)
    sizes = undecayed_sizes(laws, costs)
    laws = dataclasses.replace(fit_undecayed(laws, costs), undecayed_spread=four_in_five(list(sizes.values())))
    ways, least = ways_back(
        runs,
        {
            text: dataclasses.replace(each, undecayed=laws.undecayed, undecayed_power=laws.undecayed_power)
            for text, each in others.items()
        },
    )
    laws = dataclasses.replace(laws, way_back=four_in_five(list(ways.values())), least_learned=least)
    print(f"shares of the way back to frequencies: {', '.join(f'{way:.2f}' for way in ways.values())}")
    for text, size in sizes.items():
        print(f"{text}: left out, {size:.3f} x r from the cost of a share r of the peak rate")
    print(
        f"{len(runs)} runs on {len(texts)} texts; root mean square of the residuals {np.sqrt(np.mean(np.square(inside))):.4f}"
    )
    print(f"of texts that were left out, four in five lie within {spread:.4f}")
    for field in dataclasses.fields(laws):
        value = getattr(laws, field.name)
        print(f"    {field.name}: {'int' if field.name == 'texts' else 'float'} = {value:.4g}")


if __name__ == "__main__":
    main()
