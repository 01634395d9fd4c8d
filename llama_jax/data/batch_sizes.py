"""The number of sequences of each step: train.batch_size, or fewer in the beginning (train.batch_start).

It follows from the step alone. So a run reads its data in the same order, however often it stops and however long it
is.
"""

import dataclasses
import functools
from typing import NamedTuple

from llama_jax.train_args import TrainArgs


class Stage(NamedTuple):
    """Steps of one size."""

    step: int  # the steps before it
    row: int  # the sequences that these have read
    size: int  # sequences a step


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The sizes of all steps, which are counted from 1.

    size: sequences a step after the ramp. start: those of the first step; 0: ``size``. ramp_steps: the steps in which
    ``start`` doubles until it is ``size``, with as many steps, to one, for each size.
    """

    size: int
    start: int = 0
    ramp_steps: int = 0

    @classmethod
    def of(cls, train: TrainArgs) -> "BatchSizes":
        """Return the sizes that the settings ask for."""
        return cls(train.batch_size, train.batch_start, train.batch_ramp_steps)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of a run without an end, in order."""
        doublings = (self.size // (self.start or self.size)).bit_length() - 1
        found = [Stage(0, 0, self.size >> doublings)]
        for number in range(1, doublings + 1):
            step, before = -(-number * self.ramp_steps // doublings), found[-1]
            found.append(Stage(step, before.row + (step - before.step) * before.size, 2 * before.size))
        return tuple(found)

    def rows(self, step: int) -> int:
        """Return how many sequences steps 1 to ``step`` read."""
        stage = next(stage for stage in reversed(self.stages) if stage.step <= step)
        return stage.row + (step - stage.step) * stage.size

    def steps(self, rows: int) -> int:
        """Return the least number of steps that read this many sequences."""
        stage = next(stage for stage in reversed(self.stages) if stage.row <= rows)
        return stage.step + -(-(rows - stage.row) // stage.size)

    def size_of(self, step: int) -> int:
        """Return the sequences of a step."""
        return self.rows(step) - self.rows(step - 1)

    def between(self, start: int, stop: int) -> list[Stage]:
        """Return the stages of steps ``start`` + 1 to ``stop``, the first of which begins at ``start``."""
        first = Stage(start, self.rows(start), self.size_of(start + 1))
        return [first, *(stage for stage in self.stages if start < stage.step < stop)]


def with_size(train: TrainArgs, size: int) -> TrainArgs:
    """Return the settings of steps of another size, whose microbatches are those of ``train``, or a smaller batch."""
    microbatch = train.batch_size // train.gradient_accumulation_steps
    return dataclasses.replace(
        train,
        batch_size=size,
        batch_start=0,
        batch_ramp_steps=0,
        gradient_accumulation_steps=max(1, size // microbatch),
    )


def sizes_text(sizes: BatchSizes, steps: int, positions: int) -> str:
    """Return the tokens of a step, or those of the first and of the last one."""
    each = sorted({stage.size * positions for stage in sizes.between(0, steps)})
    return " to ".join(f"{tokens:,}" for tokens in (each if len(each) == 1 else (each[0], each[-1])))


def batch_lines(train: TrainArgs, start: int, steps: int) -> list[str]:
    """Say how the batch grows over a run's steps, and what this start, from step ``start``, compiles for it."""
    if not train.batch_start:
        return []
    sizes = BatchSizes.of(train)
    stages, left = sizes.between(0, steps), sizes.between(start, steps)
    lines = ["sequences a step: " + ", ".join(f"{stage.size:,} from step {stage.step + 1:,}" for stage in stages)]
    if train.gradient_accumulation_steps > 1:
        parts = (with_size(train, stage.size).gradient_accumulation_steps for stage in stages)
        lines.append("microbatches a step: " + ", ".join(map(str, parts)))
    lines.append(f"{len(left)} program{'s' * (len(left) > 1)} to compile, one for each size that is left")
    if stages[-1].size != train.batch_size:
        lines.append(f"the run ends before its batch has grown to {train.batch_size:,} sequences")
    return lines
