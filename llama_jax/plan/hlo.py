"""Parses the text of a compiled program into instructions: XLA's HLO after scheduling.

    %fusion.3 = bf16[2,64]{1,0:T(8,128)S(1)} fusion(%a, %b), kind=kOutput, calls=%computation, backend_config={...}

A result is an array or a tuple of arrays. ``S(n)`` in its layout is its memory space: 0 (left out) is the chip's main
memory, HBM, and 5 the host's.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property

# Floats of eight bits are named after their exponent and mantissa.
FLOATS = ("e3m4", "e4m3", "e4m3fn", "e4m3b11fnuz", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
ITEM_BITS = (
    {"pred": 8, "s4": 4, "u4": 4, "f4e2m1fn": 4, "bf16": 16, "c64": 64, "c128": 128}
    | {f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)}
    | {f"f8{kind}": 8 for kind in FLOATS}
)
HBM, HOST = 0, 5

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_MEMORY = re.compile(r"S\((\d+)\)")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Array:
    """An array's type, sizes and memory space."""

    dtype: str
    dims: tuple[int, ...]
    memory: int

    @property
    def size(self) -> int:
        """The size in bytes."""
        return math.prod(self.dims) * ITEM_BITS.get(self.dtype, 8) // 8


@dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    arguments: str  # the text in its parentheses
    attributes: str  # the text after them
    root: bool

    @cached_property
    def operands(self) -> list[str]:
        """The names of the instructions whose results it reads."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @cached_property
    def called(self) -> list[str]:
        """The names of the computations that it runs, except a loop's condition."""
        branches = _BRANCHES.search(self.attributes)
        more = re.findall(r"[\w.\-]+", branches[1].replace("%", "")) if branches else []
        return _CALLED.findall(self.attributes) + more

    @property
    def size(self) -> int:
        """The bytes of all results."""
        return sum(array.size for array in self.results)

    @property
    def body(self) -> str:
        """The name of the computation that a loop repeats, or ""."""
        return self._attribute(r"body=%?([\w.\-]+)") or ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate of its cycles, or 0."""
        return int(self._attribute(r'"estimated_cycles":"(\d+)"') or 0)

    @property
    def trips(self) -> int | None:
        """The number of iterations of a loop, if the compiler knows it."""
        found = self._attribute(r'"known_trip_count":\{"n":"(\d+)"')
        return int(found) if found else None

    @property
    def origin(self) -> str:
        """Its place in the model's code: "jit(train_step)/.../layers/attention/BTD,DNH->BTNH/dot_general"."""
        return self._attribute(r'op_name="([^"]*)"') or ""

    @property
    def target(self) -> str:
        """The target of a custom call, or ""."""
        return self._attribute(r'custom_call_target="([^"]*)"') or ""

    @property
    def between_slices(self) -> tuple[str, int] | None:
        """The collective of a send to other slices, such as "all-reduce", and the number of slices; else None."""
        kind = self._attribute(r'_xla_megascale_transfer_type="(\w+)"')
        target = self._attribute(r'_xla_megascale_target="\{([\d,:]+)\}')
        if self.opcode != "send" or not kind or not target:
            return None
        ranges = [part.split(":") for part in target.split(",")]
        return kind.lower().replace("_", "-"), sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)

    @property
    def channel(self) -> str:
        """An id that all pieces of the same collective share."""
        return self._attribute(r"channel_id=(\d+)") or self.name

    def group_size(self, devices: int) -> int:
        """Return the number of devices that a collective connects."""
        if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", self.attributes):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
        if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", self.attributes):
            return int(counted[1])
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", self.attributes):
            return listed[1].count(",") + 1
        return devices

    def _attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclass(frozen=True)
class Program:
    """A compiled program: its computations by name, each a list of instructions in the order of execution."""

    computations: dict[str, list[Instruction]]
    entry: str
    devices: int

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Parse the text of a compiled program. Raises ValueError if it has no entry."""
        computations: dict[str, list[Instruction]] = {}
        entry, current = None, None
        for line in text.splitlines():
            if line[:1] not in ("", " ", "}") and (header := _HEADER.match(line)):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                current.append(_instruction(found[2], bool(found[1]), line[found.end() :]))
        if entry is None:
            raise ValueError("expected the text of a compiled program, found no ENTRY")
        devices = re.search(r"num_partitions=(\d+)", text)
        return cls(computations, entry, int(devices[1]) if devices else 1)

    def trips(self, loop: Instruction) -> int:
        """Return the number of iterations of a loop, from the compiler or else the constant in its condition."""
        if loop.trips is not None:
            return loop.trips
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        return max(self._constants(condition[1]), default=1) if condition else 1

    def changed(self, loop: Instruction) -> list[Array]:
        """Return the arrays that a loop's iterations change: its results, except those passed through."""
        body = self.computations[loop.body]
        by_name = {i.name: i for i in body}
        root = next(i for i in body if i.root)
        new = []
        for index, (array, name) in enumerate(zip(loop.results, root.operands, strict=True)):
            value = by_name[name]
            handed_on = value.opcode == "get-tuple-element" and f"index={index}" in re.split(
                r"[,\s]+", value.attributes
            )
            if not handed_on:
                new.append(array)
        return new

    def _constants(self, computation: str) -> list[int]:
        found = []
        for instruction in self.computations[computation]:
            if instruction.opcode == "constant" and instruction.arguments.strip().isdigit():
                found.append(int(instruction.arguments))
            for called in instruction.called:
                found += self._constants(called)
        return found


def _instruction(name: str, root: bool, text: str) -> Instruction:
    """Parse an instruction. ``text`` is what follows the equals sign."""
    end = _closing(text, 0) + 1 if text[0] == "(" else text.index(" ")
    results = tuple(
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), _memory(layout))
        for dtype, dims, layout in _ARRAY.findall(_COMMENT.sub("", text[:end]))
        if dtype in ITEM_BITS
    )
    rest = text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(name, rest[:opening], results, rest[opening + 1 : closing], rest[closing + 1 :], root)


def _memory(layout: str) -> int:
    found = _MEMORY.search(layout)
    return int(found[1]) if found else HBM


def _closing(text: str, opening: int) -> int:
    """Return the index of the parenthesis that closes the one at ``opening``."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1
