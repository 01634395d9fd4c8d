"""Collectives over the links between chips: their bytes and seconds, and what SparseCores run beside other work."""

import math
from dataclasses import dataclass

from llama_jax.devices.chips import Chip
from llama_jax.plan.hlo import Instruction, Program

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# How often the bytes of a collective's result cross a link (of a ring, in both directions).
PASSES = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0, "all-to-all": 0.25}
# The steps of a collective that a SparseCore runs: prepared, begun with its operands, waited for.
OFFLOADED = ("custom-call-start", "custom-call-update", "custom-call-done")
# The suffix of collectives between slices.
BETWEEN_SLICES = " between slices"
# The number and the bytes of collectives, by their kind, whether they block, and the number of devices.
Transfers = dict[tuple[str, bool, int], list[float]]


@dataclass
class Moving:
    """A collective that a SparseCore runs beside the work that follows its beginning."""

    kind: str
    group: int
    bytes: float
    seconds: float
    left: float = 0.0  # of the seconds, what work has not covered so far
    waited: float = 0.0  # of the seconds, those during which nothing else ran


class Offloaded:
    """The collectives of one computation that a SparseCore runs, followed in the order of execution.

    Those under way share the links one after the other. Work that runs meanwhile covers their time.
    """

    def __init__(self, program: Program, chip: Chip):
        self._program, self._chip = program, chip
        self._moving: dict[str, Moving] = {}  # by the name of the last step

    def cover(self, seconds: float) -> None:
        """Let collectives go on, in the order in which they began, during this work."""
        for it in self._moving.values():
            covered = min(it.left, seconds)
            it.left -= covered
            seconds -= covered

    def follow(self, step: Instruction, transfers: Transfers) -> None:
        """Take a step of a collective. At its end, add it to ``transfers``: what no work covered blocks."""
        if step.opcode == OFFLOADED[0]:
            for inner in (i for name in step.called for i in self._program.computations[name]):
                if kind := collective_of(inner.opcode):
                    group = inner.group_size(self._program.devices)
                    size = moved(inner, group)
                    self._moving[step.name] = Moving(kind, group, size, link_seconds(kind, size, group, self._chip))
            return
        it = self._moving.get(step.operands[0])
        if it is None:
            return
        if step.opcode == OFFLOADED[1]:
            it.left = it.seconds
            self._moving[step.name] = self._moving.pop(step.operands[0])
            return
        for earlier in list(self._moving.values())[: list(self._moving).index(step.operands[0]) + 1]:
            earlier.waited, earlier.left = earlier.waited + earlier.left, 0.0
        del self._moving[step.operands[0]]
        blocked = it.bytes * it.waited / it.seconds if it.seconds else 0.0
        for blocking, share in ((True, blocked), (False, it.bytes - blocked)):
            if share:
                transfer = transfers[it.kind, blocking, it.group]
                transfer[0] += share / it.bytes
                transfer[1] += share


def collective_of(opcode: str) -> str | None:
    """Return the kind of collective that an operation is, or begins or ends, or None."""
    kind = opcode.removesuffix("-start").removesuffix("-done")
    return kind if kind in COLLECTIVES else None


def moved(i: Instruction, group: int) -> int:
    """Return the bytes of a collective's whole array, of which ``group`` devices each have a part before or after."""
    if i.opcode == "reduce-scatter":
        return i.size * group
    # The start of an asynchronous collective returns its operand next to its result.
    return max(a.size for a in i.results) if i.opcode.endswith("-start") else i.size


def link_seconds(kind: str, size: float, group: int, chip: Chip) -> float:
    """Return the seconds of a collective of ``group`` chips on rings along the torus axes that it spans."""
    if group <= 1:
        return 0.0
    if kind.endswith(BETWEEN_SLICES):
        passes = PASSES.get(kind.removesuffix(BETWEEN_SLICES), 1.0)
        return passes * size * (group - 1) / group / (chip.slice_bytes or math.inf)
    if kind == "collective-permute":
        return size / (chip.link_bytes / 2)
    axes = 1 if group <= 16 else 2
    if chip.torus_axes == 3 and group >= 64:
        axes = 3
    return PASSES[kind] * size * (group - 1) / group / (chip.link_bytes * axes)
