"""Searches for the best mesh, sequences at once and remat policy: promising candidates are compiled and ranked."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.config import Config
from llama_jax.devices.chips import GiB
from llama_jax.devices.sharding import describe
from llama_jax.errors import UserError
from llama_jax.plan import Plan
from llama_jax.plan.calibration import Calibration, Compiled, Guess, errors, features_of
from llama_jax.plan.estimate import Candidate, candidates
from llama_jax.plan.topology import Topology

# A device on the batch axes gets at most this many sequences at once.
MOST_ROWS = 16
# What fits with less than this probability is not compiled.
HOPELESS = 0.05
# The power of that probability that a time is divided by. It is small, since the compiler refuses in seconds.
COUNTS = 0.25


@dataclass(frozen=True)
class Search:
    """The possible ways to run a step, with their features for the calibration."""

    config: Config
    topology: Topology
    possible: list[Candidate]
    features: np.ndarray

    @classmethod
    def begin(cls, config: Config, topology: Topology) -> "Search":
        """Estimate all candidates. Raises UserError if no mesh divides the model and the batch."""
        found = list(candidates(config, topology, MOST_ROWS))
        if not found:
            raise UserError(
                f"--search: expected a train.batch_size and a model that some mesh of {topology.device_count} {topology.unit}s divides, found "
                f"{config.train.batch_size} sequences; take a multiple of the {topology.unit}s"
            )
        return cls(config, topology, found, features_of(found))

    @property
    def fitting(self) -> int:
        """The number of candidates that fit by the plain estimate."""
        return sum(c.bytes <= self.topology.chip.hbm_bytes for c in self.possible)

    def guesses(self, found: Sequence[Compiled]) -> list[Guess]:
        """Return what the plans found so far lead to expect of each possible candidate."""
        return Calibration.of(found).guesses(self.possible, self.features)

    def run(self, compiles: int, compile_: Callable[[Candidate], Plan | None]) -> Iterator[Compiled]:
        """Compile at most ``compiles`` candidates, the most promising first by what those before it have shown.

        If none fits, the smallest candidate is compiled as well, to tell whether anything fits. ``compile_`` returns
        None if the compiler fails; such a candidate counts, and teaches nothing.
        """
        found: list[Compiled] = []
        tried: set[int] = set()
        while len(tried) < compiles and (chosen := self._promising(found, tried)) is not None:
            yield from self._tried(chosen, found, tried, compile_)
        smallest = min(range(len(self.possible)), key=lambda i: self.possible[i].bytes)
        if smallest not in tried and not any(c.plan.fits for c in found):
            yield from self._tried(smallest, found, tried, compile_)

    def _promising(self, found: Sequence[Compiled], tried: set[int]) -> int | None:
        """Return which candidate may be the fastest of those that may fit, or None if there is none left.

        Before anything is compiled, the plain estimates count. Then what counts is the time that a candidate may take,
        one standard deviation below what is expected of it, over a power of the probability that it fits.
        """
        room, left = self.topology.chip.hbm_bytes, [i for i in range(len(self.possible)) if i not in tried]
        if not found:
            fitting = [i for i in left if self.possible[i].bytes <= room]
            return min(fitting, key=lambda i: self.possible[i].seconds, default=None)
        calibration = Calibration.of(found)
        fits = calibration.fits(self.possible, self.features, room)
        times = calibration.at_best(self.possible, self.features)
        hopeful = [i for i in left if fits[i] > HOPELESS]
        return min(hopeful, key=lambda i: times[i] / fits[i] ** COUNTS, default=None)

    def _tried(
        self, chosen: int, found: list[Compiled], tried: set[int], compile_: Callable[[Candidate], Plan | None]
    ) -> Iterator[Compiled]:
        """Compile a candidate and add it to those found, and yield it, if the compiler does not fail."""
        expected = self.guesses(found)[chosen]
        tried.add(chosen)
        if (plan := compile_(self.possible[chosen])) is not None:
            found.append(Compiled(self.possible[chosen], plan, expected))
            yield found[-1]


def ratio(found: Sequence[Compiled]) -> float:
    """Return by how much the compiler's bytes exceed the estimate, at most, among plans that do not fit; at least 1."""
    return max([1.0, *(c.plan.bytes / c.candidate.bytes for c in found if not c.plan.fits)])


def ranked(found: Sequence[Compiled]) -> list[Compiled]:
    """Sort candidates by speed. Those that do not fit come last."""
    return sorted(found, key=lambda c: (not c.plan.fits, c.plan.seconds))


def row_text(compiled: Compiled, asked: Config) -> str:
    """Return a line about a compiled candidate. ``asked`` is the user's configuration."""
    candidate, plan = compiled.candidate, compiled.plan
    flags = candidate.flags(asked)
    where = f"{describe(dict(plan.mesh))}, {candidate.rows} sequence{'s'[: candidate.rows != 1]} at once"
    if not plan.fits:
        needed = f"{plan.bytes / GiB:6.2f} GiB" if plan.bytes else "too large "
        return f"  does not fit           {needed}  {where}  {flags}"
    rate, most = plan.tokens / plan.seconds, "  at most" * plan.topology.is_gpu
    return f"{most}  {rate:12,.0f} tokens/s  {plan.bytes / GiB:6.2f} GiB  {where}  {flags}"


def error_rows(found: Sequence[Compiled]) -> list[tuple[str, str]]:
    """Return lines about the errors of the estimates. ``found`` is in the order of compilation."""
    rows: list[tuple[str, str]] = []
    for name, (before, after) in errors(found).items():
        if before is None or after is None:
            text = "not known, since it takes two compiled candidates"
        else:
            text = (
                f"median {after.median:.1%}, largest {after.largest:.1%}; without the calibration {before.median:.1%} and "
                f"{before.largest:.1%} ({after.count} candidate{'s'[: after.count != 1]}, each estimated before it was compiled)"
            )
        rows.append(("" if rows else "error", f"of the estimate of {name}: {text}"))
    return rows


def estimates_of(compiled: Compiled) -> dict[str, Any]:
    """Return what ``--json`` prints about the estimates of a candidate: the plain one, and the calibrated one."""
    plain, expected = compiled.candidate, compiled.expected
    return {
        "estimated": {"bytes_per_device": plain.bytes, "step_seconds": plain.seconds},
        "expected": {"bytes_per_device": expected.bytes, "step_seconds": expected.seconds},
    }


def errors_summary(found: Sequence[Compiled]) -> dict[str, Any]:
    """Return what ``--json`` prints about the errors of the estimates, in the order of compilation."""
    return {
        name: {
            kind: None if e is None else dataclasses.asdict(e)
            for kind, e in zip(("estimated", "expected"), both, strict=True)
        }
        for name, both in errors(found).items()
    }
