"""The compiled decoding step of the 7B model's width, read: it reads its bytes once, and copies neither cache nor matrices."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_jax.plan.hlo import Instruction, Program
from tests.plan import ENVIRONMENT, needs_libtpu

ROOT = Path(__file__).parents[2]
MODEL = ["--model.dim", "4096", "--model.n-heads", "32", "--model.vocab-size", "32000"]
# Enough of them that what is not theirs, the logits above all, does not count.
LAYERS = {1: 4, 4: 8, 8: 16}
SLOTS = 2048
# Sequences, chips that share them, weights.
CASES = [
    (1, 1, "auto"),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in [(1, 1, "int8"), (1, 1, "int4"), (8, 8, "auto"), (8, 8, "int4"), (32, 4, "auto"), (32, 4, "int4")]
    ),
]
SLICES = {1: "v5e:1x1", 4: "v5e:2x2", 8: "v5e:2x4"}

pytestmark = needs_libtpu


@pytest.fixture(scope="module", params=CASES, ids=str)
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Program]:
    """What plan says of a decoding step, and the program."""
    batch, chips, weights = request.param
    hlo = tmp_path_factory.mktemp("plan") / "step.hlo"
    command = [sys.executable, "-m", "llama_jax.plan", "--decode", *MODEL, "--topology", SLICES[chips]]
    command += ["--model.n-layers", str(LAYERS[chips])]
    command += ["--mesh.data", "1", "--mesh.tensor", str(chips), "--batch", str(batch), "--slots", str(SLOTS)]
    command += ["--weights", weights, "--json", "--output", "", "--hlo", os.fspath(hlo)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), Program.parse(hlo.read_text())


def everything(program: Program) -> list[Instruction]:
    """The instructions of all computations."""
    return [i for instructions in program.computations.values() for i in instructions]


def test_a_step_reads_weights_and_cache_once_and_little_else(step: tuple[dict[str, Any], Program]) -> None:
    planned, program = step
    parts = planned["parts"]
    embeddings = 2 * 32000 * 4096 // planned["mesh"]["tensor"]  # of which a row a token is read
    needed = parts["bytes"]["parameters"] - embeddings + parts["bytes"]["cache"]
    # What a program keeps in the fast memory for its next run is fetched once in a chunk of steps, not once a step.
    kept = {i.operands[0] for i in everything(program) if "cross_program_prefetch_index" in i.attributes}
    fetches = [i for i in everything(program) if i.opcode == "copy-start" and i.operands[0] in kept]
    assert parts["hbm_bytes"] >= 0.98 * needed
    assert parts["hbm_bytes"] - sum(min(array.size for array in i.results[:2]) for i in fetches) <= 1.1 * needed


def test_neither_the_cache_nor_a_layers_matrix_is_copied_or_transposed(step: tuple[dict[str, Any], Program]) -> None:
    planned, program = step
    smallest = 4096 * 4096 // planned["mesh"]["tensor"]
    output = [4096, 32000 // planned["mesh"]["tensor"]]  # which a copy may bring into the fast memory ahead of its use
    # Copies onto themselves, which say that what lies there is to be taken for another tiling.
    in_place = {name for i in everything(program) if "output_to_operand_aliasing" in i.attributes for name in i.called}
    for name in program.computations.keys() - in_place:
        for instruction in program.computations[name]:
            if instruction.opcode in ("copy", "transpose"):
                for array in instruction.results:
                    assert math.prod(array.dims) < smallest or list(array.dims) == output, instruction


def test_no_matrix_is_written_in_another_type_before_its_product(step: tuple[dict[str, Any], Program]) -> None:
    """As int4 was, where a device's number of inputs is no power of two: w2 of 7B."""
    planned, program = step
    fused = {name for i in everything(program) if i.opcode == "fusion" for name in i.called}
    smallest = 4096 * 4096 // planned["mesh"]["tensor"]
    kept = planned["parts"]["bytes"]["cache"] // (2 * LAYERS[planned["mesh"]["tensor"]])
    for name in program.computations.keys() - fused:
        for instruction in program.computations[name]:
            if instruction.opcode in ("fusion", "convert", "multiply"):
                for array in instruction.results:
                    assert math.prod(array.dims) < smallest or array.size == kept, instruction


def test_each_layers_cache_is_written_once(step: tuple[dict[str, Any], Program]) -> None:
    planned, program = step
    buffers = 2 * LAYERS[planned["mesh"]["tensor"]]  # keys and values
    size = planned["parts"]["bytes"]["cache"] // buffers
    written = [i for i in everything(program) if i.opcode == "dynamic-update-slice" and i.results[0].size == size]
    assert len(written) == buffers
