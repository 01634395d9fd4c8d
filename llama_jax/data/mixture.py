"""Mixtures: which source each row of a run is read from. It depends on the row's number and the weights alone.

The rows of a source follow each other without a gap: the third row that is read from it is its third. So weights may
change at a step, and nothing of a source is repeated or left out.
"""

import functools
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.data.conversations import Stream
from llama_jax.errors import UserError

# Shares are whole numbers of rows in a period of at most this many rows.
LONGEST_PERIOD = 100_000


class Place(NamedTuple):
    """A row of a source: its number among the rows that are read from it."""

    source: str
    number: int


def parts_of(weights: Mapping[str, float]) -> dict[str, int]:
    """Return the rows of each source in a period, which is as short as the weights allow.

    Weights with many digits are rounded to LONGEST_PERIOD rows. Raises UserError if a source would get no row.
    """
    exact = {name: Fraction(repr(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    shares = {name: weight / total for name, weight in exact.items()}
    period = math.lcm(*(share.denominator for share in shares.values()))
    if period <= LONGEST_PERIOD:
        return {name: int(share * period) for name, share in shares.items()}
    parts = {name: int(share * LONGEST_PERIOD) for name, share in shares.items()}
    by_rest = sorted(shares, key=lambda name: parts[name] - shares[name] * LONGEST_PERIOD)
    for name in by_rest[: LONGEST_PERIOD - sum(parts.values())]:
        parts[name] += 1
    for name, part in parts.items():
        if not part:
            raise UserError(
                f"data.mixture: expected at least one of {LONGEST_PERIOD:,} rows for each source, found the weight {weights[name]:g} "
                f"of {name}, which is less; give it more, or leave it out"
            )
    return parts


def folder_of(folder: Path, name: str) -> Path:
    """Return the folder for the tokens of a source. Its name has that of the source, as far as a path can have it."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[-40:]
    return folder / f"{words}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@functools.lru_cache(maxsize=16)
def order_of(parts: tuple[int, ...]) -> np.ndarray:
    """Return the source, by number, of each row of a period, so that each has its share of any beginning of it.

    After n rows, a source with the share f has n f of them, to less than one row (Tijdeman, "The chairman assignment
    problem", 1980).
    """
    period, count = sum(parts), len(parts)
    if count == 1:
        return np.zeros(period, np.int32)
    order, read = np.zeros(period, np.int32), [0] * count
    least = Fraction(1, 2 * count - 2)
    unit = least.denominator
    for row in range(1, period + 1):
        # What each source lacks, in 1 / (period unit) of a row. Of those that lack enough, the first deadline is next.
        lacks = [(row * part - period * done) * unit for part, done in zip(parts, read, strict=True)]
        waiting = [i for i in range(count) if lacks[i] >= period]
        chosen = min(waiting, key=lambda i: ((unit - 1) * period - lacks[i]) / parts[i])
        order[row - 1] = chosen
        read[chosen] += 1
    return order


@dataclass(frozen=True)
class Stretch:
    """The weights from a step on."""

    step: int
    weights: dict[str, float]


@dataclass(frozen=True)
class Schedule:
    """The weights of all steps of a run, whose steps have as many rows as ``sizes`` says."""

    stretches: tuple[Stretch, ...]
    sizes: BatchSizes

    @classmethod
    def of(
        cls, known: Sequence[dict[str, Any]], weights: dict[str, float], start: int, sizes: BatchSizes
    ) -> "Schedule":
        """Return the schedule of a run that goes on from step ``start``.

        ``known`` is what earlier starts noted, see ``to_list``. What they had planned for later steps is left out.
        """
        kept = [Stretch(int(s["step"]), dict(s["weights"])) for s in known if int(s["step"]) < start]
        if not kept or kept[-1].weights != weights:
            kept.append(Stretch(start if kept else 0, dict(weights)))
        return cls(tuple(kept), sizes)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the stretches for JSON."""
        return [{"step": stretch.step, "weights": stretch.weights} for stretch in self.stretches]

    @property
    def names(self) -> set[str]:
        """The sources of all steps."""
        return {name for stretch in self.stretches for name in stretch.weights}

    def place(self, row: int) -> Place:
        """Return where row ``row`` of the run, counted from 0, is read."""
        span = self._span(row)
        periods, at = divmod(row - span.first, len(span.order))
        source = int(span.order[at])
        name = span.names[source]
        inside = periods * span.parts[source] + int(span.before[at, source])
        return Place(name, span.read.get(name, 0) + inside)

    def rows_before(self, step: int) -> dict[str, int]:
        """Return how many rows of each source steps 1 to ``step`` have read."""
        row = self.sizes.rows(step)
        return self._span(max(0, row - 1)).read_until(row)

    def _span(self, row: int) -> "_Span":
        """Return the stretch that a row is in."""
        return next(span for span in reversed(self._spans) if span.first <= row)

    @functools.cached_property
    def _spans(self) -> "list[_Span]":
        spans: list[_Span] = []
        for stretch in self.stretches:
            first = self.sizes.rows(stretch.step)
            spans.append(_Span.of(first, stretch.weights, spans[-1].read_until(first) if spans else {}))
        return spans


def renamed(known: Sequence[dict[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what ``Schedule.to_list`` gave, with new names of sources. ``names`` has the earlier ones by these."""
    new = {old: name for name, old in names.items()}
    return [s | {"weights": {new.get(name, name): weight for name, weight in s["weights"].items()}} for s in known]


class Mixed(NamedTuple):
    """Several streams, and the schedule that says which of them each row of a run is read from."""

    streams: Mapping[str, Stream]
    schedule: Schedule


class _Span(NamedTuple):
    """A stretch in rows: the first one, its sources with their rows in a period, and what was read of each before."""

    first: int
    names: tuple[str, ...]
    parts: tuple[int, ...]
    order: np.ndarray  # int [period]
    before: np.ndarray  # int [period + 1, sources]: rows of each source in the beginning of a period
    read: dict[str, int]

    @classmethod
    def of(cls, first: int, weights: dict[str, float], read: dict[str, int]) -> "_Span":
        """Return the span of a stretch that begins at row ``first``, when ``read`` rows of each source were read."""
        parts = parts_of(weights)
        order = order_of(tuple(parts.values()))
        counted = np.cumsum(order[:, None] == np.arange(len(parts)), axis=0, dtype=np.int64)
        before = np.concatenate([np.zeros((1, len(parts)), np.int64), counted])
        return cls(first, tuple(parts), tuple(parts.values()), order, before, read)

    def read_until(self, row: int) -> dict[str, int]:
        """Return the rows of each source that are read before row ``row``, which is in the span or at its end."""
        periods, at = divmod(row - self.first, len(self.order))
        inside = (periods * np.array(self.parts) + self.before[at]).tolist()
        return self.read | {name: self.read.get(name, 0) + n for name, n in zip(self.names, inside, strict=True)}
