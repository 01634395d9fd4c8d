"""The compiled training step, read: what is gathered, what is summed, what is held.

A small model on 4 chips always; the 7B model on 256, which takes minutes, where slow tests are asked for.
After a change that is meant, ``python -m tests.plan.test_programs`` writes golden.json anew; its difference is to be reviewed.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from llama_jax.config import Config, ModelArgs, load_toml
from llama_jax.plan import resolve
from llama_jax.plan.hlo import Program
from tests.plan import ENVIRONMENT, needs_libtpu

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden.json")
CONFIG = ROOT / "configs" / "llama2-7b.toml"
LARGE = load_toml(CONFIG)
SMALL_MODEL = ModelArgs(
    dim=256, n_layers=6, n_heads=2, n_kv_heads=2, vocab_size=2048, multiple_of=256, max_seq_len=2048
)
LEAVES = 12  # parameters of the tree

pytestmark = needs_libtpu


@dataclass(frozen=True)
class Case:
    """A step to compile: its configuration, spread over all chips of a slice, and the seconds that it may take there."""

    name: str
    config: Config
    topology: str
    chips: int
    rows: int  # sequences a chip
    seconds: float

    @cached_property
    def model(self) -> ModelArgs:
        return resolve(self.config).model

    def compile(self) -> "Compiled":
        """What plan says of the step, and the program's text."""
        with tempfile.TemporaryDirectory() as folder:
            hlo = Path(folder) / "o.hlo"
            command = [sys.executable, "-m", "llama_jax.plan", "--config", CONFIG, "--topology", self.topology]
            for name, value in asdict(self.config.model).items():
                if value != getattr(LARGE.model, name):
                    command += [f"--model.{name}", str(value)]
            command += ["--train.batch-size", str(self.rows * self.chips), "--train.gradient-accumulation-steps", "1"]
            command += ["--json", "--output", "", "--hlo", hlo]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, timeout=2400)
            assert done.returncode == 0, done.stderr[-2000:]
            return Compiled(self, json.loads(done.stdout), hlo.read_text())


@dataclass(frozen=True)
class Compiled:
    """A case's plan, and the text of its program."""

    case: Case
    planned: dict[str, Any]
    text: str

    @cached_property
    def program(self) -> Program:
        return Program.parse(self.text)


CASES = [
    Case("small on 4", replace(LARGE, model=SMALL_MODEL), "v5e:2x2", 4, 2, 7e-3),
    Case("7B on 256", LARGE, "v5e:16x16", 256, 1, 1.0),
]


def summary(planned: dict[str, Any]) -> dict[str, Any]:
    """What is reviewed when it changes: collectives by kind, with their number and bytes a step, and the kernels' runs."""
    kinds: dict[str, list[int]] = {}
    for c in planned["parts"]["collectives"]:
        count, size = kinds.setdefault(f"{c['kind']} over {c['devices']}", [0, 0])
        kinds[f"{c['kind']} over {c['devices']}"] = [count + round(c["count"]), size + round(c["bytes"])]
    return {"collectives": dict(sorted(kinds.items())), "kernels": dict(sorted(planned["parts"]["kernels"].items()))}


@pytest.fixture(
    scope="module", params=[CASES[0], pytest.param(CASES[1], marks=pytest.mark.slow)], ids=lambda case: case.name
)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    return request.param.compile()


def test_collectives_and_kernels_are_those_that_were_reviewed(compiled: Compiled) -> None:
    assert summary(compiled.planned) == json.loads(GOLDEN.read_text())[compiled.case.name]


def test_the_step_fits_and_is_as_fast_as_promised(compiled: Compiled) -> None:
    seconds = compiled.planned["parts"]["seconds"]
    assert compiled.planned["fits"]
    assert seconds["matrix"] + seconds["other"] + seconds["blocking_collectives"] < compiled.case.seconds


def test_attention_runs_forward_once_a_layer(compiled: Compiled) -> None:
    runs = Counter()
    for name, count in compiled.planned["parts"]["kernels"].items():
        runs["fwd" if "fwd" in name else "dq" if "_dq" in name else "dkv"] += count
    layers = compiled.case.model.n_layers
    assert runs == {"fwd": layers, "dq": layers, "dkv": layers}


def test_no_stacked_parameter_is_gathered_whole(compiled: Compiled) -> None:
    gathered = [
        array.dims
        for instructions in compiled.program.computations.values()
        for i in instructions
        if i.opcode.startswith("all-gather")
        for array in i.results
    ]
    model = compiled.case.model
    of_a_layer = (model.n_heads, model.head_width, model.dim)  # 7B has as many heads as layers
    assert gathered and not [dims for dims in gathered if dims[:1] == (model.n_layers,) and dims != of_a_layer]


def test_no_logits_of_a_whole_batch_are_held_in_float32(compiled: Compiled) -> None:
    model = compiled.case.model
    whole = compiled.case.rows * model.max_seq_len * model.vocab_size
    largest = max(
        math.prod(array.dims)
        for instructions in compiled.program.computations.values()
        for i in instructions
        for array in i.results
        # The gradients of the embeddings and of the output have as many numbers, where a sequence is as long as D is wide.
        if array.dtype == "f32" and sorted(array.dims) != sorted((model.dim, model.vocab_size))
    )
    assert largest < whole


def test_every_parameter_lies_in_parts_on_all_chips_and_the_norms_alone_are_whole(compiled: Compiled) -> None:
    model, chips, program = compiled.case.model, compiled.case.chips, compiled.program
    D, F, V, L = model.dim, model.hidden_width, model.vocab_size, model.n_layers
    shard = (L * (4 * D * D + 3 * D * F) + 2 * V * D) // chips + (2 * L + 1) * D
    assert compiled.planned["parts"]["bytes"]["parameters"] == 4 * shard
    given = sum(i.size for i in program.computations[program.entry] if i.opcode == "parameter")
    batch = 3 * compiled.case.rows * model.max_seq_len * 4
    assert given == pytest.approx(3 * 4 * shard + batch, rel=1e-4)


def test_the_state_is_donated_whole(compiled: Compiled) -> None:
    header = compiled.text.splitlines()[0]
    assert header.count("may-alias") + header.count("must-alias") >= 3 * LEAVES


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({case.name: summary(case.compile().planned) for case in CASES}, indent=1) + "\n")
