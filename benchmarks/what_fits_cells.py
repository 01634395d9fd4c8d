"""The cells of the page "what fits where", and what plan's own search and estimates say of each without compiling.

A cell is a model, a task and a slice. An estimate is corrected by the cells that were compiled before, as the search of
plan corrects it, and its error is that of these cells, each estimated from the others.
"""

import functools
import math
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from llama_jax.config import Config, Weights
from llama_jax.errors import UserError
from llama_jax.plan import Decoding, resolve
from llama_jax.plan.arguments import read_request
from llama_jax.plan.calibration import REFUSED, Calibration, Errors, Guess, features_of
from llama_jax.plan.decoding import lay_out
from llama_jax.plan.estimate import FILLED, Candidate, candidate
from llama_jax.plan.search import Search
from llama_jax.plan.topology import Topology

Line = dict[str, Any]
T = TypeVar("T")

ONE_HOST = ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5p:2x2x1", "v6e:1x1", "v6e:2x4", "h100:1", "h100:8")
UP_TO_16 = ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5p:2x2x1", "v5p:2x2x4", "v6e:1x1", "v6e:2x4", "h100:1", "h100:8")  # fmt: skip
ALL = (
    "v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4",
    "v6e:1x1", "v6e:2x4", "v6e:16x16", "h100:1", "h100:8",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A shape: ``flags`` change that of a configuration that comes with the package into it."""

    name: str
    what: str
    config: str
    flags: str
    checkpoint: str


MODELS = {
    model.name: model
    for model in (
        Model("1B", "TinyLlama 1.1B", "tinyllama-1.1b", "", "tinyllama-1.1b"),
        Model(
            "3B", "OpenLLaMA 3B", "tinyllama-1.1b",
            "--model.dim 3200 --model.n-layers 26 --model.n-kv-heads 32 --model.hidden-dim 8640", "open-llama-3b",
        ),
        Model("7B", "LLaMA 2 7B", "llama2-7b", "", "llama-2-7b"),
        Model("13B", "LLaMA 2 13B", "llama2-13b", "", "llama-2-13b"),
        Model(
            "34B", "Code Llama 34B, at 4,096 positions", "llama2-70b",
            "--model.n-layers 48 --model.hidden-dim 22016 --model.rope-theta 1000000", "code-llama-34b",
        ),
        Model("70B", "LLaMA 2 70B", "llama2-70b", "", "llama-2-70b"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is done with a model.

    ``plan`` has the flags of plan beside the model's, ``choices`` those that may follow, of which the first that fits is
    taken. ``command`` is what a person types before the flags of a cell. ``tokens`` is a length whose time is told.
    """

    name: str
    plan: str
    command: str
    slices: tuple[str, ...]
    choices: tuple[str, ...] = ("",)
    tokens: float | None = None
    weights: Weights | None = None  # of a decoding step

    @property
    def family(self) -> str:
        """The tasks whose steps are alike, which share a section of the page."""
        return self.name.partition(",")[0]


def _decoding(weights: Weights, kind: str) -> Task:
    flags = "" if weights == "auto" else f"--weights {weights}"
    command = 'python sample.py --ckpt checkpoints/{checkpoint} "The capital of France is"'
    plan = f"--decode --batch 8 --slots 2048 {flags}".strip()
    return Task(f"decoding, {kind}", plan, command, ONE_HOST, weights=weights)


TASKS = {
    task.name: task
    for task in (
        Task(
            "pretraining", "",
            "python train.py --config {config}{flags} --data.filepath tokens --train.save-dir runs/{checkpoint}", ALL, tokens=1e12,
        ),
        Task(
            "full tuning", "--train.param-dtype bfloat16 --train.moments int8 --train.batch-size 64",
            "python train.py --config llama2-7b-tune --train.init-from checkpoints/{checkpoint} --data.filepath my.txt "
            "--train.save-dir runs/tuned", ALL, tokens=1e8,
        ),
        Task(
            "adapter tuning", "--lora.rank 16 --train.batch-size 16",
            "python train.py --train.init-from checkpoints/{checkpoint} --data.filepath my.txt --train.save-dir runs/tuned "
            "--lora.rank 16 --train.batch-size 16", UP_TO_16,
            ("", "--lora.base-weights int8", "--lora.base-weights int4"), tokens=1e8,
        ),
        _decoding("auto", "bfloat16"), _decoding("int8", "int8"), _decoding("int4", "int4"),
    )
}  # fmt: skip
# The cells that people want first. All others follow, model by model in this order.
BY_MODEL = ("7B", "13B", "70B", "1B", "34B", "3B")
FIRST = (
    "7B, pretraining, v5e:16x16", "7B, pretraining, v5p:4x4x4", "7B, adapter tuning, v5e:1x1", "7B, adapter tuning, h100:1",
    "7B, decoding, int8, v5e:1x1", "7B, decoding, int4, v5e:1x1", "7B, full tuning, h100:1", "7B, full tuning, h100:8",
    "13B, adapter tuning, v5e:1x1", "13B, adapter tuning, h100:1", "7B, full tuning, v5p:2x2x1", "7B, pretraining, v6e:16x16",
    "7B, decoding, bfloat16, v5e:2x4", "7B, adapter tuning, v6e:1x1", "7B, full tuning, v5e:4x4", "13B, decoding, int4, v5e:1x1",
    "70B, adapter tuning, v5e:2x4", "13B, pretraining, v5p:4x4x4", "70B, pretraining, v5p:4x4x4", "1B, pretraining, v5e:2x4",
    "7B, decoding, int8, v6e:1x1", "13B, full tuning, v5p:2x2x1", "70B, decoding, int8, v5p:2x2x1", "1B, adapter tuning, v5e:1x1",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A model and a task on a slice."""

    model: Model
    task: Task
    slice: str

    @property
    def name(self) -> str:
        """The name by which a line of the records knows it."""
        return f"{self.model.name}, {self.task.name}, {self.slice}"

    @property
    def topology(self) -> Topology:
        """The chips."""
        return Topology.parse(self.slice)

    def asked(self, choice: str = "") -> str:
        """Return the flags of plan that every candidate of the cell has."""
        parts = (f"--config {self.model.config}", self.model.flags, self.task.plan, choice)
        return " ".join(part for part in parts if part)

    @property
    def command(self) -> str:
        """What a person types before the flags of the cell."""
        model = self.model
        flags = f" {model.flags}" if model.flags else ""
        return self.task.command.format(config=model.config, flags=flags, checkpoint=model.checkpoint)


def all_cells() -> list[Cell]:
    """Return the cells in the order in which they are compiled."""
    rest = [Cell(MODELS[name], task, slice_) for name in BY_MODEL for task in TASKS.values() for slice_ in task.slices]
    cells = {cell.name: cell for cell in rest}
    return [cells[name] for name in FIRST] + [cell for name, cell in cells.items() if name not in FIRST]


@functools.cache
def config_of(flags: str) -> Config:
    """Return the configuration that flags of plan make. Raises UserError if they are wrong."""
    return resolve(read_request([*shlex.split(flags), "--topology", "v5e:1x1"]).config)


@dataclass(frozen=True)
class Known:
    """A compiled step of a training cell: its candidate, and the compiler's bytes and seconds."""

    task: str
    topology: Topology
    candidate: Candidate
    bytes: float
    seconds: float | None

    @classmethod
    def of(cls, line: Line) -> "Known":
        """Return what a line of the compiled records says of a training step."""
        topology = Topology.parse(line["slice"])
        made = candidate(config_of(f"{line['asked']} {line['flags']}"), topology)
        return cls(
            line["task"], topology, made, line["bytes"] or REFUSED * topology.chip.hbm_bytes, line["step_seconds"]
        )


@dataclass(frozen=True)
class Answer:
    """What a cell's settings are, with estimates: plain, and as compiled cells correct them. ``tokens`` are of a step."""

    flags: str
    fits: bool
    plain: Guess
    expected: Guess
    tokens: int
    corrected_by: int = 0  # compiled cells


def calibration_of(known: Sequence[Known]) -> Calibration:
    """Return the corrections that compiled steps suggest. Without any, all factors are 1."""
    sizes = [(k.candidate, k.bytes / k.candidate.bytes) for k in known]
    return Calibration.fitted(sizes, [(k.candidate, k.seconds / k.candidate.seconds) for k in known if k.seconds])


def alike(known: Sequence[Known], task: str, topology: Topology) -> list[Known]:
    """Return the compiled training steps ``nearest`` to a cell."""
    return nearest([(k.task, k.topology, k) for k in known], task, topology)


def nearest(steps: Sequence[tuple[str, Topology, T]], task: str, topology: Topology) -> list[T]:
    """Return the compiled steps nearest to a cell: of its task and version, else of its task, else all of its kind.

    ``steps`` stand behind their tasks and slices. TPUs and GPUs are two kinds, since a GPU's times are lower bounds.
    """
    kind = [step for step in steps if step[1].is_gpu == topology.is_gpu]
    same = [step for step in kind if step[0] == task]
    found = [step for step in same if step[1].version == topology.version] or same or kind
    return [step for _, _, step in found]


def training_answer(cell: Cell, known: Sequence[Known]) -> Answer:
    """Return the settings that are expected to be the fastest of those that fit, or else the smallest.

    ``known`` are the compiled steps that correct the estimates. Raises UserError if no mesh divides the cell.
    """
    calibration, room = calibration_of(known), cell.topology.chip.hbm_bytes
    for choice in cell.task.choices:
        asked = config_of(cell.asked(choice))
        search = Search.begin(asked, cell.topology)
        guesses = calibration.guesses(search.possible, search.features)
        fitting = [i for i, guess in enumerate(guesses) if guess.bytes <= FILLED * room]
        fitting = fitting or [i for i, guess in enumerate(guesses) if guess.bytes <= room]

        costs = {i: _cost(search.possible[i], guesses[i]) for i in fitting}
        i = min(costs, key=lambda i: costs[i]) if costs else min(range(len(guesses)), key=lambda i: guesses[i].bytes)
        chosen = search.possible[i]
        flags = " ".join(part for part in (choice, chosen.flags(asked)) if part)
        tokens = asked.train.batch_size * asked.model.max_seq_len
        answer = Answer(flags, bool(fitting), Guess(chosen.bytes, chosen.seconds), guesses[i], tokens, len(known))
        if fitting:
            break
    return answer


def _cost(chosen: Candidate, guess: Guess) -> tuple[float, int, float]:
    """Return what is least for the best candidate: seconds, then the parts of a batch, as in plan's advice, then bytes."""
    return float(f"{guess.seconds:.3g}"), chosen.config.train.gradient_accumulation_steps, guess.bytes


def decoding_answer(cell: Cell, near: Sequence[Line]) -> Answer:
    """Return the mesh that plan lays out for a decoding step. The lines ``near``, of compiled ones, correct its estimates."""
    factors = decoding_factors(near)
    decoding = Decoding(8, 2048, cell.task.weights or "auto", "auto")
    layout = lay_out(config_of(cell.asked()), cell.topology, decoding)
    flags = [] if cell.task.weights == "auto" else [f"--weights {cell.task.weights}"]
    flags += [f"--mesh.{axis} {size}" for axis, size in asdict(layout.mesh).items() if size != 1 or axis == "data"]
    expected = Guess(layout.bytes * factors[0], layout.seconds * factors[1])
    fits = layout.fits and expected.bytes <= cell.topology.chip.hbm_bytes
    return Answer(" ".join(flags), fits, Guess(layout.bytes, layout.seconds), expected, decoding.batch, len(near))


def is_decoding(line: Line) -> bool:
    """Return whether a line is of a decoding step."""
    return TASKS[line["task"]].weights is not None


def near_lines(lines: Sequence[Line], task: str, topology: Topology) -> list[Line]:
    """Return the lines of the compiled decoding steps ``nearest`` to a cell."""
    return nearest([(one["task"], Topology.parse(one["slice"]), one) for one in lines], task, topology)


def decoding_factors(lines: Sequence[Line]) -> tuple[float, float]:
    """Return the median factors of compiled decoding steps over their plain estimates: of bytes and of seconds."""
    sizes = [one["bytes"] / one["plain"]["bytes"] for one in lines if one["bytes"]]
    times = [one["step_seconds"] / one["plain"]["seconds"] for one in lines if one["step_seconds"]]
    return statistics.median(sizes or [1.0]), statistics.median(times or [1.0])


def errors_by_task(lines: Sequence[Line]) -> dict[tuple[str, bool], dict[str, Errors | None]]:
    """Return the errors of the estimates by task and kind (of a GPU or not): each compiled cell, from the others.

    ``lines`` are of compiled cells. A cell that nothing else corrects is left out, since its error is the plain
    estimate's.
    """
    pairs: dict[tuple[str, bool], dict[str, list[tuple[float, float]]]] = {}
    training = {one["cell"]: Known.of(one) for one in lines if not is_decoding(one)}
    for line in lines:
        topology = Topology.parse(line["slice"])
        if line["cell"] in training:
            this = training[line["cell"]]
            others = alike([k for name, k in training.items() if name != line["cell"]], line["task"], topology)
            if not others:
                continue
            (expected,) = calibration_of(others).guesses([this.candidate], features_of([this.candidate]))
        else:
            rest = [one for one in lines if one["cell"] not in (*training, line["cell"])]
            if not (near := near_lines(rest, line["task"], topology)):
                continue
            size, time = decoding_factors(near)
            expected = Guess(line["plain"]["bytes"] * size, line["plain"]["seconds"] * time)
        found = pairs.setdefault((line["task"].partition(",")[0], topology.is_gpu), {"bytes": [], "seconds": []})
        if line["bytes"]:
            found["bytes"].append((expected.bytes, line["bytes"]))
        if line["step_seconds"]:
            found["seconds"].append((expected.seconds, line["step_seconds"]))
    return {key: {name: Errors.of(each) for name, each in found.items()} for key, found in pairs.items()}


def estimate(cell: Cell, known: Sequence[Known], decoded: Sequence[Line]) -> Answer:
    """Return a cell's settings and what is expected of them. Raises UserError if no mesh divides the cell.

    ``known`` are compiled training steps, ``decoded`` lines of compiled decoding steps, of any cells.
    """
    if cell.task.weights is None:
        return training_answer(cell, alike(known, cell.task.name, cell.topology))
    return decoding_answer(cell, near_lines(decoded, cell.task.name, cell.topology))


def estimates(cells: Sequence[Cell], lines: Sequence[Line]) -> Iterator[Line]:
    """Yield a line of estimates for each cell, corrected by the ``lines`` of compiled cells, with their errors."""
    decoded = [one for one in lines if is_decoding(one)]
    known = [Known.of(one) for one in lines if not is_decoding(one)]
    errors = errors_by_task(lines)
    for cell in cells:
        topology = cell.topology
        about = {
            "cell": cell.name, "model": cell.model.name, "task": cell.task.name, "slice": cell.slice, "from": "estimate",
            "room": int(topology.chip.hbm_bytes),
        }  # fmt: skip
        try:
            answer = estimate(cell, known, decoded)
        except UserError as error:
            yield about | {"asked": cell.asked(), "flags": "", "fits": None, "why": str(error)}
            continue
        of_task = errors.get((cell.task.family, topology.is_gpu), {})
        yield about | {
            "asked": cell.asked(), "flags": answer.flags, "fits": answer.fits, "bytes": round(answer.expected.bytes),
            "step_seconds": float(f"{answer.expected.seconds:.5g}"), "tokens_per_step": answer.tokens,
            "corrected_by": answer.corrected_by,
            "errors": {name: each and asdict(each) for name, each in of_task.items()},
        }  # fmt: skip


def seconds_for(cell: Cell, step_seconds: float, tokens_per_step: int) -> float:
    """Return the seconds that the task's number of tokens takes, infinite if it has none."""
    return math.inf if cell.task.tokens is None else cell.task.tokens / tokens_per_step * step_seconds
