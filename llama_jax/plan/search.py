"""Searches for the best mesh, sequences at once and remat policy: promising candidates are compiled and ranked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llama_jax.config import Config
from llama_jax.devices.chips import GiB
from llama_jax.devices.sharding import describe
from llama_jax.errors import UserError
from llama_jax.plan import Plan
from llama_jax.plan.advice import MARGIN
from llama_jax.plan.estimate import Candidate, candidates
from llama_jax.plan.topology import Topology

# A device on the batch axes gets at most this many sequences at once.
MOST_ROWS = 16


@dataclass(frozen=True)
class Search:
    """The possible ways to run a step, and those worth compiling, the fastest by the estimate first."""

    config: Config
    topology: Topology
    possible: int
    fitting: int  # by the estimate
    promising: list[Candidate]

    @classmethod
    def begin(cls, config: Config, topology: Topology) -> "Search":
        """Estimate all candidates. If none fits by the estimate, only the smallest one is worth compiling.

        Raises UserError if no mesh divides the model and the batch.
        """
        found = list(candidates(config, topology, MOST_ROWS))
        if not found:
            raise UserError(
                f"--search: expected a train.batch_size and a model that some mesh of {topology.chips} chips divides, found "
                f"{config.train.batch_size} sequences; take a multiple of the chips"
            )
        fitting = [c for c in found if c.bytes <= topology.chip.hbm_bytes]
        smallest = [min(found, key=lambda c: c.bytes)]
        return cls(config, topology, len(found), len(fitting), sorted(fitting, key=lambda c: c.seconds) or smallest)

    def run(self, compiles: int, compile_: Callable[[Candidate], Plan | None]) -> Iterator[tuple[Candidate, Plan]]:
        """Compile at most ``compiles`` candidates. Each result decides which of the others are still worth compiling.

        If none fits, the smallest candidate is compiled as well, to tell whether anything fits.
        """
        found: list[tuple[Candidate, Plan]] = []
        tried: list[Candidate] = []
        for candidate in self.promising:
            too_large = candidate.bytes * ratio(found) > MARGIN * self.topology.chip.hbm_bytes
            if len(tried) < compiles and not (tried and too_large):
                tried.append(candidate)
                if (plan := compile_(candidate)) is not None:
                    found.append((candidate, plan))
                    yield candidate, plan
        smallest = min(self.promising, key=lambda c: c.bytes)
        fits = any(plan.fits for _, plan in found)
        if not fits and smallest not in tried and (plan := compile_(smallest)) is not None:
            yield smallest, plan


def ratio(found: list[tuple[Candidate, Plan]]) -> float:
    """Return by how much the compiler's bytes exceed the estimate, at most, among plans that do not fit; else 1."""
    return max((plan.bytes / candidate.bytes for candidate, plan in found if not plan.fits), default=1.0)


def ranked(found: list[tuple[Candidate, Plan]]) -> list[tuple[Candidate, Plan]]:
    """Sort candidates by speed. Those that do not fit come last."""
    return sorted(found, key=lambda pair: (not pair[1].fits, pair[1].seconds))


def row_text(candidate: Candidate, plan: Plan, asked: Config) -> str:
    """Return a line about a compiled candidate. ``asked`` is the user's configuration."""
    where, flags = describe(dict(plan.mesh)), candidate.flags(asked)
    if not plan.fits:
        needed = f"{plan.bytes / GiB:6.2f} GiB" if plan.bytes else "too large "
        return f"  does not fit           {needed}  {where}, {candidate.rows} sequences at once  {flags}"
    rate, most = plan.tokens / plan.seconds, "  at most" * plan.topology.is_gpu
    return f"{most}  {rate:12,.0f} tokens/s  {plan.bytes / GiB:6.2f} GiB  {where}, {candidate.rows} sequences at once  {flags}"
