"""The cost of one run of a compiled TPU program on a chip, by its own schedule.

The compiler estimates the cycles of each fusion. The body of a loop counts as often as it runs. Collectives are timed
by their bytes and the links' bandwidth, Pallas kernels by their FLOPs. The times are lower bounds, because nothing is
assumed to wait except for blocking collectives.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from llama_jax.devices.chips import LANES, Chip
from llama_jax.plan.hlo import HBM, HOST, Instruction, Program
from llama_jax.plan.links import BETWEEN_SLICES, OFFLOADED, Offloaded, collective_of, link_seconds, moved

# Copies that go on beside other work, by what begins them: of an array, or of a slice that is read or written.
COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
BEGINNINGS = tuple(f"{copy}-start" for copy in COPIES)
# Parts of a transfer to the host or other slices, whose bytes are counted at the send, and of a copy, counted at its
# start.
TRANSFERS = ("send", "send-done", "recv", "recv-done", "after-all", *(f"{copy}-done" for copy in COPIES))
# Matrix products of [T, S] scores in flash attention kernels: forward (scores, values), gradient of q, of k and v.
KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
# The share of the peak FLOP/s assumed for flash attention kernels, for which the compiler estimates no cycles.
KERNEL_EFFICIENCY = 0.5
# Parts of the model, by a word in the path of an operation's name. The first match counts.
PARTS = {
    "attention": "attention",
    "feed-forward": "feed_forward",
    "loss": "loss",
    "embedding": "embedding",
    "optimizer": "optimizer",
}
RECOMPUTED = "rematted_computation"


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind: their number, bytes of results, and seconds on the links."""

    kind: str
    blocking: bool
    group: int
    count: int
    bytes: float
    seconds: float


def _none_yet() -> list[float]:
    """Return zero for the number and the bytes of collectives."""
    return [0.0, 0.0]


@dataclass
class Cost:
    """The cost of one run on one chip."""

    matrix: float = 0.0  # seconds in fusions with matrix products
    other: float = 0.0  # seconds in everything else that the compiler estimates
    flops: float = 0.0  # of matrix products, without kernels
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0
    kernel_flops: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # matrix + other seconds by part
    kernels: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # runs, by name
    transfers: dict[tuple[str, bool, int], list[float]] = field(default_factory=lambda: defaultdict(_none_yet))

    def add(self, part: "Cost", times: int) -> None:
        """Add ``part`` as often as it runs."""
        for name in ("matrix", "other", "flops", "hbm_bytes", "host_bytes", "kernel_flops"):
            setattr(self, name, getattr(self, name) + times * getattr(part, name))
        for name, seconds in part.parts.items():
            self.parts[name] += times * seconds
        for name, runs in part.kernels.items():
            self.kernels[name] += times * runs
        for key, (count, size) in part.transfers.items():
            self.transfers[key][0] += times * count
            self.transfers[key][1] += times * size


@dataclass(frozen=True)
class Schedule:
    """The cost of a program on a chip, in seconds."""

    cost: Cost
    chip: Chip

    @property
    def collectives(self) -> list[Collective]:
        """All collectives, the longest first."""
        found = [
            Collective(kind, blocking, group, int(count), size, link_seconds(kind, size, group, self.chip))
            for (kind, blocking, group), (count, size) in self.cost.transfers.items()
        ]
        return sorted(found, key=lambda c: -c.seconds)

    @property
    def by_part(self) -> list[tuple[str, float]]:
        """Seconds of matrix products and other fusions by part of the model, the longest first."""
        return sorted(self.cost.parts.items(), key=lambda part: -part[1])

    @property
    def blocking(self) -> float:
        """Seconds in collectives during which nothing else runs."""
        return sum(c.seconds for c in self.collectives if c.blocking)

    @property
    def overlapped(self) -> float:
        """Seconds in collectives that overlap with other work."""
        return sum(c.seconds for c in self.collectives if not c.blocking)

    @property
    def kernels(self) -> float:
        """Seconds in Pallas kernels."""
        return self.cost.kernel_flops / (self.chip.peak_flops * KERNEL_EFFICIENCY)

    @property
    def waiting(self) -> float:
        """Seconds that the network between slices takes beyond the work that it overlaps with."""
        between = sum(c.seconds for c in self.collectives if c.kind.endswith(BETWEEN_SLICES))
        return max(0.0, between - self._busy)

    @property
    def waiting_for_memory(self) -> float:
        """Seconds that memory takes beyond the work that overlaps with prefetching."""
        return max(0.0, self.cost.hbm_bytes / self.chip.hbm_bandwidth - self._busy - self.waiting)

    @property
    def seconds(self) -> float:
        """Seconds of one run."""
        return self._busy + self.waiting + self.waiting_for_memory

    @property
    def _busy(self) -> float:
        return self.cost.matrix + self.cost.other + self.blocking + self.kernels


def schedule_of(program: Program, chip: Chip, seen: float = 0.5) -> Schedule:
    """Return the cost of one run of a program.

    seen: the share of all pairs of a query and a key that attention looks at. A causal mask leaves half of them.
    """
    return Schedule(Reader(program, chip, seen).cost_of_entry(), chip)


class Reader:
    """Sums the cost of a program's computations, each computed once."""

    def __init__(self, program: Program, chip: Chip, seen: float):
        self._program, self._chip, self._seen = program, chip, seen
        self._done: dict[str, Cost] = {}

    def cost_of_entry(self) -> Cost:
        return self._cost(self._program.entry)

    def _cost(self, computation: str) -> Cost:
        if computation not in self._done:
            cost, seen, offloaded = Cost(), set[str](), Offloaded(self._program, self._chip)
            names = {i.name: i for i in self._program.computations[computation]}
            for instruction in names.values():
                if instruction.opcode in OFFLOADED:
                    offloaded.follow(instruction, cost.transfers)
                    continue
                before = self._working(cost)
                self._count(instruction, names, cost, seen)
                offloaded.cover(self._working(cost) - before)
            self._done[computation] = cost
        return self._done[computation]

    def _working(self, cost: Cost) -> float:
        """Return the seconds of work, during which a SparseCore can run a collective."""
        return cost.matrix + cost.other + cost.kernel_flops / (self._chip.peak_flops * KERNEL_EFFICIENCY)

    def _count(self, i: Instruction, names: dict[str, Instruction], cost: Cost, seen: set[str]) -> None:
        """Add the cost of an instruction. Collectives on channels in ``seen`` are already counted."""
        if i.opcode == "while":
            cost.add(self._cost(i.body), self._program.trips(i))
        elif i.opcode in ("call", "conditional", "async-start"):
            for called in i.called:
                cost.add(self._cost(called), 1)
        elif collective_of(i.opcode):
            self._transfer(i, i.opcode.endswith("-start"), cost, seen)
        elif sent := i.between_slices:
            kind, slices = sent
            transfer = cost.transfers[kind + BETWEEN_SLICES, False, slices]
            transfer[0] += 1
            transfer[1] += i.results[0].size
        elif i.target == "tpu_custom_call":
            self._kernel(i, names, cost)
        elif i.opcode in BEGINNINGS:
            arrays = [array for array in i.results if array.dims]  # without indices, and the copy's own number
            memories = {array.memory for array in arrays}
            moved = min((array.size for array in arrays), default=0)
            cost.host_bytes += moved * (HOST in memories)
            cost.hbm_bytes += moved * (HBM in memories and HOST not in memories)
        elif i.opcode not in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", *TRANSFERS):
            self._compute(i, names, cost, seen)

    def _compute(self, i: Instruction, names: dict[str, Instruction], cost: Cost, seen: set[str]) -> None:
        inner = [i, *self._inside(i)]
        everything = names | {j.name: j for j in inner}
        flops = sum(matrix_flops(j, everything) for j in inner if j.opcode in ("convolution", "dot"))
        seconds = i.cycles / self._chip.clock
        if flops:
            cost.matrix += seconds
        else:
            cost.other += seconds
        cost.flops += flops
        cost.hbm_bytes += self._bytes(i, names)
        cost.parts[_part(i.origin)] += seconds
        asynchronous = any(j.target.startswith("AsyncCollective") for j in inner)
        for j in inner:
            if collective_of(j.opcode):
                scattered = any(k.opcode == "dynamic-slice" for k in inner)
                kind = "reduce-scatter" if j.opcode == "all-reduce" and scattered and not asynchronous else None
                self._transfer(j, asynchronous, cost, seen, kind)

    def _inside(self, i: Instruction) -> Iterable[Instruction]:
        for called in i.called if i.opcode == "fusion" else ():
            for j in self._program.computations[called]:
                yield j
                yield from self._inside(j)

    def _transfer(
        self, i: Instruction, asynchronous: bool, cost: Cost, seen: set[str], kind: str | None = None
    ) -> None:
        if i.channel not in seen and not i.opcode.endswith("-done"):
            seen.add(i.channel)
            group = i.group_size(self._program.devices)
            size, key = moved(i, group), (kind or collective_of(i.opcode) or "", not asynchronous, group)
            cost.transfers[key][0] += 1
            cost.transfers[key][1] += size

    def _kernel(self, i: Instruction, names: dict[str, Instruction], cost: Cost) -> None:
        name = re.sub(r"\.\d+$", "", i.name)
        cost.kernels[name] += 1
        cost.hbm_bytes += self._bytes(i, names)
        # Queries [B, N, T, H] come first, then keys [B, K, S, H]. B is left out if it is 1.
        heads = [a for o in i.operands if o in names for a in names[o].results if len(a.dims) >= 3 and "f" in a.dtype]
        products = next((n for part, n in KERNEL_PRODUCTS.items() if f"_{part}" in name), 0)
        if products and len(heads) > 1:
            *queries, features = heads[0].dims
            pairs = math.prod(queries) * heads[1].dims[-2]
            cost.kernel_flops += products * 2 * self._seen * pairs * (-(-features // LANES) * LANES)

    def _bytes(self, i: Instruction, names: dict[str, Instruction]) -> float:
        """Return the bytes that an instruction reads from and writes to HBM.

        Of an array that it slices, only slices count.
        """
        if i.opcode == "fusion":
            body = self._program.computations[i.called[0]]
            parameters = {int(j.arguments): j for j in body if j.opcode == "parameter"}
            read = 0.0
            for index, operand in enumerate(i.operands):
                arrays = names[operand].results if operand in names else ()
                if len(arrays) == 1 and arrays[0].memory == HBM and index in parameters:
                    touched, handed_on = self._read(body, parameters[index].name, arrays[0].size)
                    read += arrays[0].size if handed_on and not touched else touched
            return read + self._written(i, body)
        if i.opcode == "dynamic-slice":
            return 2.0 * i.size
        if i.opcode == "dynamic-update-slice":
            return 2.0 * names[i.operands[1]].size
        operands = [a for o in i.operands if o in names for a in names[o].results]
        return float(sum(a.size for a in (*operands, *i.results) if a.memory == HBM))

    def _read(self, body: list[Instruction], name: str, whole: int) -> tuple[float, bool]:
        """Return how many of ``whole`` bytes of value ``name`` a fusion reads, and whether it also returns it."""
        total, handed_on = 0.0, any(j.root and j.name == name for j in body)
        for user in (j for j in body if name in j.operands):
            if user.opcode in ("dynamic-slice", "slice"):
                total += user.size
                continue
            if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            if user.opcode == "fusion":
                inner = self._program.computations[user.called[0]]
                parameters = {int(j.arguments): j.name for j in inner if j.opcode == "parameter"}
                reads = [self._read(inner, parameters[k], whole) for k, o in enumerate(user.operands) if o == name]
                total += sum(touched for touched, _ in reads)
                if not any(through for _, through in reads):
                    continue
            elif user.opcode not in ("bitcast", "reshape", "copy", "transpose", "convert"):
                return whole, handed_on
            touched, through = self._read(body, user.name, whole)
            total, handed_on = total + touched, handed_on or through
        return min(total, whole), handed_on

    def _written(self, i: Instruction, body: list[Instruction]) -> float:
        by_name = {j.name: j for j in body}
        root = next(j for j in body if j.root)
        roots = [by_name[o] for o in root.operands if o in by_name] if root.opcode == "tuple" else [root]
        total = 0.0
        for array, result in zip(i.results, roots, strict=False):
            while result.opcode in ("bitcast", "copy") and result.operands and result.operands[0] in by_name:
                result = by_name[result.operands[0]]
            if array.memory == HBM:
                updated = result.opcode == "dynamic-update-slice"
                total += by_name[result.operands[1]].size if updated else array.size
        return total


def _part(origin: str) -> str:
    words = re.findall(r"\w+", origin)
    part = next((part for part, word in PARTS.items() if word in words), "norms and residuals")
    return f"{part}, again" if RECOMPUTED in origin else part


def matrix_flops(i: Instruction, names: dict[str, Instruction]) -> float:
    """Return the FLOPs, 2 per multiply-add, of a dot or of the convolution that XLA makes of it."""
    x, w, y = (a.results[0].dims for a in (names[i.operands[0]], names[i.operands[1]], i))
    if i.opcode == "dot":
        contracted = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        return 2.0 * math.prod(y) * math.prod([x[int(d)] for d in contracted[0].split(",") if d])
    x_labels, w_labels, y_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()  # type: ignore[union-attr]
    window = dict(re.findall(r"(\w+)=(\S+)", (re.search(r"window=\{([^}]*)\}", i.attributes) or ["", ""])[1]))
    spatial = [label for label in y_labels if label.isdigit()]

    def of(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(spatial)

    pairs = 1
    options = zip(
        of("size", "1"), of("stride", "1"), of("pad", "0_0"), of("lhs_dilate", "1"), of("rhs_dilate", "1"), strict=True
    )
    for label, (size, stride, pad, x_dilate, w_dilate) in zip(spatial, options, strict=True):
        at = np.arange(y[y_labels.index(label)])[:, None] * int(stride) + np.arange(int(size)) * int(w_dilate)
        at -= int(pad.split("_")[0])
        inside = (at >= 0) & (at % int(x_dilate) == 0) & (at // int(x_dilate) < x[x_labels.index(label)])
        pairs *= int(inside.sum())
    return 2.0 * y[y_labels.index("b")] * y[y_labels.index("f")] * w[w_labels.index("i")] * pairs
