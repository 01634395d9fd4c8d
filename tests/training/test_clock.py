"""Where time goes, and the speeds that records tell."""

import json
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.config import Config, MeshArgs, ModelArgs, TrainArgs
from llama_jax.devices.sharding import make_mesh
from llama_jax.training import clock as module
from llama_jax.training import log
from llama_jax.training.bad_steps import LossHistory
from llama_jax.training.clock import ACTIVITIES, TIMES, Clock, Recorder
from llama_jax.training.run_folder import RunFolder
from llama_jax.training.step import StepMetrics


class Time:
    """Time that passes when a test says so."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Result:
    """A step's result, which comes when a test says so."""

    def __init__(self) -> None:
        self._there = threading.Event()

    def block_until_ready(self) -> None:
        assert self._there.wait(30)

    def come(self, clock: Clock, step: int) -> None:
        """Returns when the clock has noted it."""
        self._there.set()
        while clock.finished < step:
            pass


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    fake = Time()
    monkeypatch.setattr(module, "time", fake)
    return fake


def test_every_second_belongs_to_one_activity_the_innermost(time: Time) -> None:
    clock = Clock()
    time.now += 7
    with clock.steps(0):
        time.now += 3
        with clock.spent_on("evaluation"):
            time.now += 2
            with clock.spent_on("saving"):
                time.now += 1
            time.now += 4
        time.now += 5
        assert (clock.total, clock.goodput) == (22, 8 / 22)  # while it runs
    expected = dict.fromkeys(ACTIVITIES, 0.0) | {"start": 7, "step": 8, "evaluation": 6, "saving": 1}
    assert clock.seconds == expected
    time.now += 2
    assert (clock.total, clock.goodput) == (24, 8 / 24)


def test_waiting_for_data_counts_only_while_the_devices_have_nothing_to_do(time: Time) -> None:
    clock, first, second = Clock(), Result(), Result()

    def data() -> Any:
        time.now += 5  # nothing was dispatched yet: lost
        yield 1
        time.now += 4  # step 1 is under way
        yield 2
        time.now += 1
        second.come(clock, 2)  # the device ran dry within the wait
        time.now += 10
        yield 3

    with clock.steps(0):
        batches = clock.waiting_for("data", data())
        next(batches)
        clock.dispatched(1, first)  # type: ignore[arg-type]
        next(batches)
        assert clock.seconds["data"] == 5 and clock.seconds["step"] == 4
        first.come(clock, 1)
        clock.dispatched(2, second)  # type: ignore[arg-type]
        next(batches)
        assert clock.seconds["data"] == 15 and clock.seconds["step"] == 5
        assert list(batches) == []


def metrics() -> StepMetrics:
    history = LossHistory(np.float32(2.0), 3, 2, 1, 0, 0)  # type: ignore[arg-type]
    return StepMetrics(np.float32(2.5), np.float32(0.5), history)  # type: ignore[arg-type]


def test_a_record_tells_speeds_a_device_and_the_utilisation_that_the_formula_gives(
    time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelArgs(dim=16, n_layers=2, n_heads=2, multiple_of=16, vocab_size=100, max_seq_len=32)
    train = TrainArgs(batch_size=4, max_steps=20)
    mesh = make_mesh(MeshArgs(data=1), jax.devices()[:1])
    monkeypatch.setattr(module, "peak_flops", lambda device: 1e6)
    clock = Clock()
    time.now += 50
    with clock.steps(10):
        recorder = Recorder(Config(model, train=train), mesh, 20, 10, clock, spent=110, spent_in_steps=42)
        time.now += 8
        with clock.spent_on("data"):
            time.now += 2
        with clock.spent_on("saving"):
            time.now += 30
        record = recorder.record(15, metrics())
        time.now += 1
        second = recorder.record(16, metrics())
    assert record["step_seconds"] == 2.0 and record["tokens"] == 15 * 4 * 32
    assert record["tokens_per_second"] == 64.0 == record["tokens_per_second_per_device"]
    assert (record["start_seconds"], record["data_seconds"], record["saving_seconds"]) == (50, 2, 30)
    assert record["goodput"] == 8 / 90
    assert (record["run_seconds"], record["run_step_seconds"]) == (200, 50)
    assert (record["bad_steps"], record["skipped_steps"]) == (2, 1)
    # 6 x (matrices and norms, without the embedding) + 6 L T D, each token: causal attention counted once, nothing twice.
    hidden = model.hidden_width
    parameters = 2 * (4 * 16 * 16 + 3 * 16 * hidden + 2 * 16) + 16 + 16 * 100
    assert record["mfu"] == pytest.approx(64 * (6 * parameters + 6 * 2 * 32 * 16) / 1e6)
    assert (second["step_seconds"], second["start_seconds"], second["data_seconds"]) == (1.0, 0, 0)
    assert record["memory_bytes"] > 1e7
    assert {name for name in record if name not in TIMES} == {
        "step", "tokens", "train_loss", "lr", "grad_norm", "bad_steps", "skipped_steps",
    }  # fmt: skip


def test_the_text_beside_the_bar_is_short_and_speaks_of_trouble_only_where_there_is_some() -> None:
    record: dict[str, Any] = {
        "train_loss": 10.123456, "tokens_per_second_per_device": 13456.7, "mfu": 0.5123, "memory_bytes": 15.1e9,
        "data_seconds": 0.01, "saving_seconds": 0.0, "bad_steps": 0,
    }  # fmt: skip
    assert log.progress_text(record, 256) == "loss 10.123, 13,457 tokens/s a device, MFU 51%, 15.10 GB"
    assert "a device" not in log.progress_text(record, 1)
    late = log.progress_text(record | {"data_seconds": 4.0, "saving_seconds": 3.0, "bad_steps": 2}, 1)
    assert late.endswith("2 bad, data 4 s, saving 3 s, MFU 51%, 15.10 GB") and len(late) < 80
    assert log.progress_text(record | {"train_loss": None}, 1).startswith("loss not finite")


def test_the_time_of_steps_that_are_made_again_after_a_kill_is_lost(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [
        {"step": s, "tokens": s, "train_loss": None, "run_seconds": 10.0 * s, "run_step_seconds": 9.0 * s}
        for s in (1, 2, 3, 4)
    ]
    folder.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert folder.read_metrics(3) == []
    assert (folder.spent, folder.spent_in_steps) == (40.0, 27.0)
    folder.write_metrics()
    folder.read_metrics(0)
    assert (folder.spent, folder.spent_in_steps) == (30.0, 0.0)
