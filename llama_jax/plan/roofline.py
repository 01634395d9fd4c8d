"""A lower bound of the time of a compiled program on a GPU, for which XLA estimates no schedule.

The program's matrix products take their FLOPs at the peak; its arrays, their bytes at the memory's bandwidth; its
collectives, their bytes over the links. A step takes at least as long as the longest of the three.

GPUs run matrix products in cuBLAS and attention in cuDNN, which the program calls by name. XLA's text says which sides
are contracted.
"""

import math
import re
from dataclasses import dataclass

from llama_jax.devices.chips import Chip
from llama_jax.plan.cost import Cost, Reader, matrix_flops
from llama_jax.plan.hlo import Instruction, Program
from llama_jax.plan.links import collective_of

MATRIX = "__cublas$"
ATTENTION = "__cudnn$fmha"
# Products of [T, S] scores in cuDNN's attention: forward (scores, values), and scores again with four gradients.
PRODUCTS_FORWARD, PRODUCTS_BACKWARD = 2, 5
# The peak of products of these types, as a multiple of that of bfloat16. Float32 is multiplied as TF32.
SPEEDS = {"f32": 0.5, "s8": 2.0, "f8e4m3fn": 2.0, "f8e5m2": 2.0}


@dataclass(frozen=True)
class Roofline:
    """The cost of a program on one GPU, and the least seconds that each part of the GPU takes for its share."""

    cost: Cost
    links: float  # seconds of all collectives
    chip: Chip

    @property
    def by_resource(self) -> dict[str, float]:
        """The least seconds of the matrix units, the memory and the links."""
        memory = self.cost.hbm_bytes / self.chip.hbm_bandwidth
        return {"matrix": self.cost.matrix, "memory": memory, "links": self.links}

    @property
    def seconds(self) -> float:
        """The least seconds of one run: nothing overlaps better than completely."""
        return max(self.by_resource.values())


def roofline_of(program: Program, chip: Chip, seen: float = 0.5) -> Roofline:
    """Return the bound of one run of a program.

    seen: the share of all pairs of a query and a key that attention looks at. A causal mask leaves half of them.
    """
    cost = _GpuReader(program, chip, seen).cost_of_entry()
    moved = sum(_moved(kind, size, group) for (kind, _, group), (_, size) in cost.transfers.items())
    return Roofline(cost, moved / chip.link_bytes, chip)


def _moved(kind: str, size: float, group: int) -> float:
    """Return the bytes that a GPU sends or receives at least, whichever are more, for results of ``size`` bytes.

    The switch between the GPUs of a host can add up what it passes on, so that a sum is sent and received once.
    """
    if group <= 1:
        return 0.0
    if kind == "reduce-scatter":
        return size * (group - 1)
    return size if kind in ("all-reduce", "collective-permute") else size * (group - 1) / group


class _GpuReader(Reader):
    """Sums the cost of a program's computations on a GPU."""

    def _compute(self, i: Instruction, names: dict[str, Instruction], cost: Cost, seen: set[str]) -> None:
        inner = [i, *self._inside(i)]
        everything = names | {j.name: j for j in inner}
        for j in inner:
            if j.target.startswith(ATTENTION):
                flops = self._attention_flops(j)
                cost.kernel_flops += flops
                cost.kernels[j.target.removeprefix("__")] += 1
            elif j.target.startswith(MATRIX):
                cost.flops += (flops := _gemm_flops(j, everything))
            elif j.opcode in ("dot", "convolution"):
                cost.flops += (flops := matrix_flops(j, everything))
            else:
                continue
            cost.matrix += flops / (self._chip.peak_flops * SPEEDS.get(_type_of(j, everything), 1.0))
        cost.hbm_bytes += self._bytes(i, names)
        for j in inner:
            if collective_of(j.opcode):
                self._transfer(j, True, cost, seen)

    def _attention_flops(self, i: Instruction) -> float:
        """Return the FLOPs of cuDNN's attention, with scores [B, N, T, S] and [B, N, T, H] as its first result."""
        scores = re.search(r'"intermediate_tensor_shape":\s*\{[^}]*?"dimensions":\s*\[([^\]]*)\]', i.attributes)
        if scores is None:
            return 0.0
        pairs = math.prod(int(size) for size in re.findall(r"\d+", scores[1]))
        products = PRODUCTS_BACKWARD if "Backward" in i.target else PRODUCTS_FORWARD
        return products * 2.0 * self._seen * pairs * i.results[0].dims[-1]

    def _transfer(
        self, i: Instruction, asynchronous: bool, cost: Cost, seen: set[str], kind: str | None = None
    ) -> None:
        """Add a collective, whose start returns its operands next to its results for some kinds."""
        if i.channel in seen or i.opcode.endswith("-done"):
            return
        seen.add(i.channel)
        arrays = i.results
        if i.opcode in ("all-gather-start", "collective-permute-start"):
            arrays = arrays[len(arrays) // 2 :]
        group = i.group_size(self._program.devices)
        transfer = cost.transfers[kind or collective_of(i.opcode) or "", False, group]
        transfer[0] += 1
        transfer[1] += sum(a.size for a in arrays)

    def _bytes(self, i: Instruction, names: dict[str, Instruction]) -> float:
        """Return the bytes that an instruction reads and writes. The libraries' working memory does not count."""
        work = [a.size for a in i.results[1:] if a.dtype in ("s8", "u8") and len(a.dims) == 1]
        is_call = i.opcode == "custom-call" or (i.opcode == "fusion" and "kind=kCustom" in i.attributes)
        return max(0.0, super()._bytes(i, names) - (sum(work) if is_call else 0))


def _gemm_flops(i: Instruction, names: dict[str, Instruction]) -> float:
    """Return the FLOPs, 2 per multiply-add, of a product in cuBLAS."""
    contracted = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', i.attributes)
    operand = names.get(i.operands[0])
    if contracted is None or operand is None or not operand.results:
        return 0.0
    sides = [operand.results[0].dims[int(d)] for d in re.findall(r"\d+", contracted[1])]
    return 2.0 * math.prod(i.results[0].dims) * math.prod(sides)


def _type_of(i: Instruction, names: dict[str, Instruction]) -> str:
    """Return the type of an instruction's first operand, or "" if it is not known."""
    operand = names.get(i.operands[0]) if i.operands else None
    return operand.results[0].dtype if operand is not None and operand.results else ""
