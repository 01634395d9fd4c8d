"""The compiled step of the 7B model on 256 chips, read: what is gathered, what is summed, what is held.

After a change that is meant, ``python -m tests.plan.test_programs`` writes golden.json anew; its difference is to be reviewed.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llama_jax.config import load_toml
from llama_jax.plan import resolve
from llama_jax.plan.hlo import Program
from tests.plan import ENVIRONMENT, needs_libtpu

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden.json")
CONFIG = ROOT / "configs" / "llama2-7b.toml"
CHIPS, ROWS = 256, 2  # sequences a chip
FLAGS = ["--topology", "v5e:16x16", "--train.batch-size", str(ROWS * CHIPS), "--train.gradient-accumulation-steps", "1"]
LEAVES = 12  # parameters of the tree

pytestmark = needs_libtpu


def compile_7b() -> tuple[dict[str, Any], str]:
    """What plan says of the step, and the program's text."""
    with tempfile.TemporaryDirectory() as folder:
        hlo = Path(folder) / "o.hlo"
        command = [
            sys.executable,
            "-m",
            "llama_jax.plan",
            "--config",
            CONFIG,
            *FLAGS,
            "--json",
            "--output",
            "",
            "--hlo",
            hlo,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, timeout=1200)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout), hlo.read_text()


def summary(planned: dict[str, Any]) -> dict[str, Any]:
    """What is reviewed when it changes: collectives by kind, with their number and bytes a step, and the kernels' runs."""
    kinds: dict[str, list[int]] = {}
    for c in planned["parts"]["collectives"]:
        count, size = kinds.setdefault(f"{c['kind']} over {c['devices']}", [0, 0])
        kinds[f"{c['kind']} over {c['devices']}"] = [count + round(c["count"]), size + round(c["bytes"])]
    return {"collectives": dict(sorted(kinds.items())), "kernels": dict(sorted(planned["parts"]["kernels"].items()))}


@pytest.fixture(scope="module")
def compiled() -> tuple[dict[str, Any], str]:
    return compile_7b()


@pytest.fixture(scope="module")
def program(compiled: tuple[dict[str, Any], str]) -> Program:
    return Program.parse(compiled[1])


def test_collectives_and_kernels_are_those_that_were_reviewed(compiled: tuple[dict[str, Any], str]) -> None:
    assert summary(compiled[0]) == json.loads(GOLDEN.read_text())


def test_the_step_fits_and_is_as_fast_as_promised(compiled: tuple[dict[str, Any], str]) -> None:
    seconds = compiled[0]["parts"]["seconds"]
    assert compiled[0]["fits"]
    assert seconds["matrix"] + seconds["other"] + seconds["blocking_collectives"] < 2.4


def test_attention_runs_forward_once_a_layer(compiled: tuple[dict[str, Any], str]) -> None:
    runs = Counter()
    for name, count in compiled[0]["parts"]["kernels"].items():
        runs["fwd" if "fwd" in name else "dq" if "_dq" in name else "dkv"] += count
    assert runs == {"fwd": 32, "dq": 32, "dkv": 32}


def test_no_stacked_parameter_is_gathered_whole(program: Program) -> None:
    layers = load_toml(CONFIG).model.n_layers
    gathered = [
        array.dims
        for instructions in program.computations.values()
        for i in instructions
        if i.opcode.startswith("all-gather")
        for array in i.results
    ]
    assert gathered and not [dims for dims in gathered if dims[:1] == (layers,)]


def test_no_logits_of_a_whole_batch_are_held_in_float32(program: Program) -> None:
    model = resolve(load_toml(CONFIG)).model
    whole = ROWS * model.max_seq_len * model.vocab_size
    largest = max(
        math.prod(array.dims)
        for instructions in program.computations.values()
        for i in instructions
        for array in i.results
        if array.dtype == "f32"
    )
    assert largest < whole


def test_every_parameter_lies_in_256_parts_and_the_norms_alone_are_whole(
    compiled: tuple[dict[str, Any], str], program: Program
) -> None:
    model = resolve(load_toml(CONFIG)).model
    D, F, V, L = model.dim, model.hidden_dim, model.vocab_size, model.n_layers
    shard = (L * (4 * D * D + 3 * D * F) + 2 * V * D) // CHIPS + (2 * L + 1) * D
    assert compiled[0]["parts"]["bytes"]["parameters"] == 4 * shard
    given = sum(i.size for i in program.computations[program.entry] if i.opcode == "parameter")
    batch = 3 * ROWS * model.max_seq_len * 4
    assert given == pytest.approx(3 * 4 * shard + batch, rel=1e-4)


def test_the_state_is_donated_whole(compiled: tuple[dict[str, Any], str]) -> None:
    header = compiled[1].splitlines()[0]
    assert header.count("may-alias") + header.count("must-alias") >= 3 * LEAVES


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(summary(compile_7b()[0]), indent=1) + "\n")
