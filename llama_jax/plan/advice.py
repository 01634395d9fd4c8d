"""Settings that fit, where those that were asked for do not: the cheapest ones by a count, compiled before they are advised."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llama_jax.config import Config, MeshArgs
from llama_jax.plan import Decoding, Plan, decoding
from llama_jax.plan.estimate import Candidate, candidate, candidates
from llama_jax.plan.topology import Topology

# A candidate may be this much larger than a chip by the count and be compiled all the same: what does not fit is told in seconds.
MARGIN = 1.05
# What nobody compiles must fit by the count with room to spare.
CERTAIN = 0.9


@dataclass(frozen=True)
class Advice:
    """Flags that make a step fit. verified: it was compiled; otherwise its numbers are estimates."""

    flags: str
    topology: str
    verified: bool
    bytes: int  # a chip
    seconds: float | None  # a step; None where it was not compiled

    def summary(self) -> dict[str, Any]:
        """As ``--json`` has it."""
        found = dataclasses.asdict(self)
        return found | {"bytes_per_device": found.pop("bytes"), "step_seconds": found.pop("seconds")}


def advise_training(
    asked: Config, plan: Plan, compiles: int, compile_: Callable[[str, Config], Plan | None]
) -> Iterator[Advice]:
    """What makes a training step fit that does not: other settings on the same slice, the cheapest that at most ``compiles``
    compiles find; where there are none, the smallest slice that holds it, by estimate.

    asked: the configuration as it was given, whose mesh may have a -1. compile_: is told the flags and the configuration that they
    make. Nothing is yielded where even the largest slice is too small.
    """
    room = plan.topology.chip.hbm_bytes
    config = dataclasses.replace(plan.config, mesh=MeshArgs(**plan.mesh))
    own = candidate(config, plan.topology)
    ratio, failed = (plan.bytes / own.bytes if plan.bytes else 1.0), {own.config}
    tried = 0
    for option in _cheapest_first(asked, config, plan.topology):
        if option.config in failed or option.bytes * ratio > MARGIN * room:
            continue
        if tried == compiles:
            if option.bytes * ratio <= CERTAIN * room:
                yield _estimated(option, asked, plan.topology, ratio)
                return
            continue
        tried += 1
        found = compile_(option.changes(asked), option.config)
        if found is not None and found.fits:
            yield Advice(option.changes(asked), plan.topology.name, True, found.bytes, found.seconds)
            return
        failed.add(option.config)
        if found is not None:
            ratio = max(ratio, found.bytes / option.bytes)
    if (other := smallest_slice(asked, plan.topology, ratio)) is not None:
        yield other


def smallest_slice(asked: Config, topology: Topology, ratio: float = 1.0) -> Advice | None:
    """The fastest way on the smallest slice that holds the step by the count, whose bytes the compiler has ``ratio`` times.

    None where none is large enough.
    """
    for slice_ in topology.larger():
        fitting = [c for c in candidates(asked, slice_) if c.bytes * ratio <= CERTAIN * slice_.chip.hbm_bytes]
        if fitting:
            return _estimated(min(fitting, key=lambda c: c.seconds), asked, topology, ratio)
    return None


def advise_decoding(
    asked: Config,
    plan: Plan,
    on: Topology,
    compiles: int,
    fixed: bool,
    compile_: Callable[[str, Config, Topology, Decoding], Plan | None],
) -> Iterator[Advice]:
    """What makes a decoding step fit: another mesh, smaller numbers, fewer sequences, fewer slots; or a larger slice.

    on: the slice that was asked for, of which the plan may use a part. fixed: flags gave its mesh, and others take their place.
    The first ``compiles`` settings are compiled, and left out where they do not fit after all.
    """
    wanted = plan.decoding
    assert wanted is not None
    before = dataclasses.asdict(asked.mesh)
    tried = 0
    for flags, smaller, layout in decoding.fewer(asked, on, wanted, fixed):
        sizes = dataclasses.asdict(layout.mesh).items() if fixed else ()
        mesh = [f"--mesh.{axis} {size}" for axis, size in sizes if size != before[axis]]
        said = " ".join([*mesh, *filter(None, [flags])])
        if not said:
            continue
        if tried == compiles:
            yield Advice(said, on.name, False, int(layout.bytes), None)
            continue
        tried += 1
        found = compile_(said, dataclasses.replace(asked, mesh=layout.mesh), layout.topology, smaller)
        if found is not None and found.fits:
            yield Advice(said, on.name, True, found.bytes, found.seconds)
    if (other := decoding.larger(asked, on, wanted)) is not None:
        yield Advice(f"--topology {other.topology.name}", other.topology.name, False, int(other.bytes), None)


def _cheapest_first(asked: Config, config: Config, topology: Topology) -> Iterator[Candidate]:
    """Ways to run the step: those on the mesh that was asked for first, then the fastest by the count, then the least change."""

    def cost(option: Candidate) -> tuple[bool, float, int, int]:
        changes = option.changes(asked)
        return (
            option.config.mesh != config.mesh, round(option.seconds, 4), changes.count("--"),
            option.config.train.gradient_accumulation_steps,
        )  # fmt: skip

    yield from sorted(candidates(config, topology), key=cost)


def _estimated(option: Candidate, asked: Config, topology: Topology, ratio: float) -> Advice:
    flags = [f"--topology {option.topology.name}"] if option.topology != topology else []
    flags += list(filter(None, [option.changes(asked)]))
    return Advice(" ".join(flags), option.topology.name, False, int(option.bytes * ratio), None)
