"""Which mesh, how many sequences at once and what to keep for the backward pass: the likeliest are compiled and ranked."""

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

# Most sequences that a device of the batch axes is given at once.
MOST_ROWS = 16


@dataclass(frozen=True)
class Search:
    """The ways to run a step that are possible, and those that are worth compiling, the fastest by the count first."""

    config: Config
    topology: Topology
    possible: int
    fitting: int  # by the count
    promising: list[Candidate]

    @classmethod
    def begin(cls, config: Config, topology: Topology) -> "Search":
        """Count them all. Where none fits by the count, the smallest one is worth compiling.

        Raises UserError where no mesh divides the model and the batch.
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
        """Compile at most ``compiles`` of them; what the compiler says of one decides which of the others are worth it.

        Where none of them fits, the smallest one is compiled too: it tells whether anything does.
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
    """How many times the counted bytes the compiler finds, at most, of what does not fit; 1 where all does."""
    return max((plan.bytes / candidate.bytes for candidate, plan in found if not plan.fits), default=1.0)


def ranked(found: list[tuple[Candidate, Plan]]) -> list[tuple[Candidate, Plan]]:
    """The fastest first; what does not fit last."""
    return sorted(found, key=lambda pair: (not pair[1].fits, pair[1].seconds))


def row_text(candidate: Candidate, plan: Plan, asked: Config) -> str:
    """A line about a candidate that was compiled. asked: the configuration as it was given."""
    where, flags = describe(dict(plan.mesh)), candidate.flags(asked)
    if not plan.fits:
        needed = f"{plan.bytes / GiB:6.2f} GiB" if plan.bytes else "too large "
        return f"  does not fit           {needed}  {where}, {candidate.rows} sequences at once  {flags}"
    rate = plan.tokens / plan.seconds
    return (
        f"  {rate:12,.0f} tokens/s  {plan.bytes / GiB:6.2f} GiB  {where}, {candidate.rows} sequences at once  {flags}"
    )
