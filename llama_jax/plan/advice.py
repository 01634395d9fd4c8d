"""Finds settings that fit if the requested ones do not: the cheapest by estimate, compiled before they are advised."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llama_jax.config import Config, MeshArgs
from llama_jax.plan import Decoding, Plan, decoding
from llama_jax.plan.estimate import Candidate, candidate, candidates
from llama_jax.plan.topology import Topology

# Candidates up to this many times a chip's memory by the estimate are compiled, since the compiler refuses them in
# seconds.
MARGIN = 1.05
# Settings that are not compiled must take at most this share of a chip's memory by the estimate.
CERTAIN = 0.9


@dataclass(frozen=True)
class Advice:
    """Flags that make a step fit. If ``verified``, they were compiled; otherwise the numbers are estimates."""

    flags: str
    topology: str
    verified: bool
    bytes: int  # per chip
    seconds: float | None  # per step; None if it was not compiled

    def summary(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        found = dataclasses.asdict(self)
        return found | {"bytes_per_device": found.pop("bytes"), "step_seconds": found.pop("seconds")}


def advise_training(
    asked: Config, plan: Plan, compiles: int, compile_: Callable[[str, Config], Plan | None]
) -> Iterator[Advice]:
    """Yield settings that make a training step fit, on the same slice or (estimated) on a larger one.

    Arguments:
        asked: the user's configuration, whose mesh may have a -1.
        plan: the plan that does not fit.
        compiles: the maximum number of settings to compile, the cheapest first.
        compile_: compiles a configuration. Its first argument is the flags that make it.

    Yields nothing if even the largest slice is too small.
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
    """Return the fastest settings on the smallest slice that holds the step by the estimate, or None.

    ``ratio`` is the factor between the compiler's bytes and the estimate.
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
    """Yield settings that make a decoding step fit: a mesh, smaller numbers, fewer sequences or slots, a larger slice.

    ``on`` is the user's slice, of which the plan may use a part. ``fixed``: flags give the mesh, so advice is other
    flags. The first ``compiles`` settings are compiled, and left out if they do not fit.
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
    """Return ways to run the step: those on the requested mesh first, then by estimated speed and number of changes."""

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
