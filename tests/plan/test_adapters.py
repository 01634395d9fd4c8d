"""Plans of adapters: what is counted, and that the compiled program never holds a dequantized model."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_jax.config import Config, MeshArgs, ModelArgs, TrainArgs, to_toml
from llama_jax.lora_args import LoraArgs
from llama_jax.plan.estimate import training_bytes
from llama_jax.plan.hlo import Program
from tests.plan import ENVIRONMENT, needs_libtpu

ROOT = Path(__file__).parents[2]
# No side of a matrix, nor a chip's part of one, is a length that activations have: 640 positions, 512 a chunk of the loss.
MODEL = ModelArgs(dim=256, n_layers=4, n_heads=2, vocab_size=1024, hidden_dim=768, max_seq_len=640)
MATRICES = {(256, 256), (256, 768), (768, 256)}  # of the layers; the output's lives in the loss, which is its product
CONFIG = Config(MODEL, train=TrainArgs(batch_size=4, remat="attention", max_steps=10), mesh=MeshArgs(1, -1))


def plan(folder: Path, *flags: str, config: Config = CONFIG) -> Any:
    """What plan says in JSON, and the program's text."""
    (folder / "c.toml").write_text(to_toml(config))
    hlo = folder / "o.hlo"
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.plan", "--config", folder / "c.toml", "--output", "", "--json", "--hlo", hlo, *flags],
        capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), hlo.read_text()


@needs_libtpu
@pytest.mark.parametrize("weights", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("topology", ["v5e:1x1", pytest.param("v5e:2x2", marks=pytest.mark.slow)])
def test_no_dequantized_matrix_is_kept_from_one_loop_or_turn_to_another(
    tmp_path: Path, weights: str, topology: str
) -> None:
    found, text = plan(tmp_path, "--topology", topology, "--lora.rank", "8", "--lora.base-weights", weights)
    assert found["lora"]["rank"] == 8 and found["lora"]["base_weights"] == weights
    program, chips = Program.parse(text), found["devices"]
    loops = [i for lines in program.computations.values() for i in lines if i.opcode == "while"]
    assert sum(program.trips(i) == MODEL.n_layers for i in loops) == 2
    for loop in loops:
        for array in loop.results:
            if array.dtype in ("bf16", "f32") and len(array.dims) > 1:
                sides = (math.prod(array.dims[-2:-1]) * k for k in (1, chips))
                assert not any((side, array.dims[-1]) in MATRICES for side in sides), array
    if (weights, chips) == ("int8", 1):
        # Products cut a layer's integers out of their stack; a copy would cost a third of a product's time. There are
        # 14 products in a layer, and XLA may still copy a matrix that is as small as these.
        steps = [i for loop in loops for i in program.computations[loop.body] if i.opcode == "fusion"]
        assert sum(array.dtype == "s8" and array.dims[-2:] in MATRICES for i in steps for array in i.results) < 4
    parts = found["parts"]["bytes"]
    values = 256 * 1024 + 4 * (4 * 256 * 256 + 3 * 256 * 768)
    bits = {"int8": 8, "int4": 4 + 1}[weights]
    assert parts["frozen base"] * chips < values * bits / 8 + 3 * 1024 * 256 + 1e5
    adapters = (
        4 * 8 * (4 * (256 + 256) + 3 * (256 + 768))
    )  # in float32; a chip may hold some whole, and pads a rank of 8
    assert 4 * adapters <= parts["adapters"] * chips < 4 * 4 * adapters
    assert parts["optimizer"] == pytest.approx(2 * parts["adapters"], rel=0.01)


@needs_libtpu
@pytest.mark.slow
def test_7b_in_int4_is_tuned_on_one_chip_of_16_gb() -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "llama_jax.plan", "--config", "llama2-7b", "--topology", "v5e:1x1", "--mesh.fsdp", "1",
            "--json", "--model.max-seq-len", "2048", "--train.batch-size", "1", "--train.gradient-accumulation-steps", "1",
            "--train.remat", "attention", "--lora.rank", "16", "--lora.base-weights", "int4", "--output", "", "--advice", "0",
        ],
        capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=1200,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["fits"] and found["bytes_per_device"] < 9 * 2**30


def test_the_estimate_knows_adapters_and_quantized_bases() -> None:
    large = Config(
        ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000, max_seq_len=2048),
        train=TrainArgs(batch_size=1, remat="attention"),
        mesh=MeshArgs(data=1),
    )
    whole, plain, small = (
        training_bytes(dataclasses.replace(large, lora=lora))
        for lora in (LoraArgs(), LoraArgs(rank=16), LoraArgs(rank=16, base_weights="int4"))
    )
    assert whole > 100e9 and 16e9 < plain < 22e9 and 7e9 < small < 11e9
