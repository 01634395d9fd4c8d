"""Plans for GPUs: their names, what XLA is told about them, and steps that its compiler for them compiles."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from llama_jax.compat.jax_internals import is_described
from llama_jax.config import Config, MeshArgs, ModelArgs, TrainArgs, to_toml
from llama_jax.devices.chips import BANDWIDTH, GPUS, PEAK_FLOPS
from llama_jax.devices.compiling import untried_options
from llama_jax.plan import gpus
from llama_jax.plan.advice import smallest_slice
from llama_jax.plan.topology import Topology
from llama_jax.training.flops import train_flops_per_token
from tests import forked
from tests.plan import ENVIRONMENT, needs_cuda

ROOT = Path(__file__).parents[2]
MODEL = ModelArgs(dim=256, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=256, multiple_of=128, max_seq_len=128)
CONFIG = Config(MODEL, train=TrainArgs(batch_size=4, max_steps=10), mesh=MeshArgs(data=1, fsdp=-1))


@pytest.mark.parametrize(("typed", "count"), [("h100:8", 8), ("H100: 1", 1), ("h100", 1), ("h100x4", 4), ("h100-2", 2)])
def test_gpus_are_read_however_they_are_typed(typed: str, count: int) -> None:
    topology = Topology.parse(typed)
    assert (topology.name, topology.chips, topology.unit) == (f"h100:{count}", count, "GPU")
    assert topology.is_gpu and topology.is_offered and topology.chip == GPUS["h100"]


def test_an_h100_is_the_same_wherever_its_figures_stand() -> None:
    chip, kind = GPUS["h100"], "NVIDIA H100 80GB HBM3"
    assert (chip.peak_flops, chip.hbm_bandwidth) == (PEAK_FLOPS[kind], BANDWIDTH[kind])
    told = gpus.description("h100")
    assert kind in told and "device_memory_size: 80000000000" in told and told.count("{") == told.count("}")


def test_more_gpus_of_a_host_are_larger_and_fewer_are_parts() -> None:
    topology = Topology.parse("h100:4")
    assert [larger.name for larger in topology.larger()] == ["h100:8"]
    assert [part.name for part in topology.parts()] == ["h100:1", "h100:2", "h100:4"]
    large = replace(CONFIG, model=replace(MODEL, dim=4096, n_layers=48, n_heads=32, n_kv_heads=32, vocab_size=32000))
    found = smallest_slice(replace(large, train=replace(CONFIG.train, batch_size=8)), Topology.parse("h100:1"))
    assert found is not None and found.topology in ("h100:4", "h100:8")


def test_a_device_that_is_here_is_not_described_and_has_no_options_of_one() -> None:
    assert not is_described(jax.devices()[0]) and untried_options(jax.devices()[0]) == {}


def plan(folder: Path, *flags: str, config: Config = CONFIG) -> subprocess.CompletedProcess[str]:
    (folder / "c.toml").write_text(to_toml(config))
    argv = ["-m", "llama_jax.plan", "--config", str(folder / "c.toml"), "--output=", *flags]
    return forked.run(argv, folder, environment=ENVIRONMENT | {"PYTHONPATH": os.fspath(ROOT)})


@pytest.mark.skipif(gpus.has_plugin(), reason="needs a machine without the compiler for GPUs")
@pytest.mark.parametrize("flags", [[], ["--decode"], ["--json"]])
def test_without_the_plugin_one_line_names_the_extra(tmp_path: Path, flags: list[str]) -> None:
    done = plan(tmp_path, "--topology=h100:8", *flags)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: plan: expected XLA's compiler for NVIDIA GPUs") and "[cuda]" in line


def compiled(folder: Path, *flags: str, config: Config = CONFIG) -> Any:
    """What plan says in JSON of a step that it compiles in a process of its own."""
    (folder / "c.toml").write_text(to_toml(config))
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.plan", "--config", folder / "c.toml", "--output", "", "--json", *flags],
        capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) | {"said": done.stderr}


@needs_cuda
@pytest.mark.slow
def test_a_step_for_eight_h100s_is_compiled_without_one(tmp_path: Path) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, batch_size=8))
    found = compiled(tmp_path, "--topology", "h100:8", config=config)
    assert found["fits"] and found["hbm_per_device"] == 80_000_000_000 and found["attention"] == "cudnn"
    assert (found["devices"], found["mesh"]["fsdp"], found["time"]) == (8, 8, "roofline, a lower bound")
    assert found["step_seconds"] == max(found["parts"]["seconds"].values())
    assert found["parts"]["kernels"] == {"cudnn$fmhaSoftmax": 2, "cudnn$fmhaSoftmaxBackward": 2}
    # cuDNN computes the scores again in the backward pass: one product more than the twelve halves of the model's count.
    again = 2 * MODEL.n_layers * MODEL.n_heads * MODEL.head_width * MODEL.max_seq_len / 2
    counted = 8 * 128 * (train_flops_per_token(MODEL) + again)
    assert 8 * found["parts"]["compiled_flops_per_device"] == pytest.approx(counted, rel=0.02)
    assert found["parts"]["bytes"]["parameters"] == pytest.approx(4 * 1_705_216 / 8, rel=0.01)
    assert "lower bounds" in found["said"]


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--lora.rank", "8", "--lora.base-weights", "int4"],
        ["--lora.rank", "8", "--lora.base-weights", "int8"],
        ["--train.param-dtype", "bfloat16", "--train.moments", "int8"],
        ["--train.objective", "dpo", "--lora.rank", "8"],
        ["--decode", "--batch", "2", "--slots", "128", "--weights", "int8"],
    ],
)
def test_tunes_are_planned_for_one_h100(tmp_path: Path, flags: list[str]) -> None:
    decoding = "--decode" in flags
    config = replace(CONFIG, mesh=MeshArgs()) if decoding else CONFIG
    found = compiled(tmp_path, "--topology", "h100:1", *flags, config=config)
    assert found["fits"] and 0 < found["step_seconds"] < math.inf
    assert found["bytes_per_device"] >= sum(found["parts"]["bytes"].values()) * 0.99
    if "dpo" in flags:
        assert found["tokens_per_step"] == 4 * 2 * 128 and found["reference"]["seconds_of_rows"] > 0
