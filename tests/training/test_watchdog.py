"""A run that hangs is ended and named; one that goes on is not."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llama_jax.errors import LOST
from llama_jax.training.clock import Clock
from llama_jax.training.watchdog import LOOKS, Watchdog

ROOT = Path(__file__).parents[2]


class Ended:
    """What the watchdog does instead of ending these tests."""

    def __init__(self) -> None:
        self.status = -1
        self.event = threading.Event()

    def __call__(self, status: int) -> None:
        self.status = status
        self.event.set()


def test_a_step_whose_result_never_comes_is_named_and_every_thread_with_its_stack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    came, ended, clock = threading.Event(), Ended(), Clock()

    class Never:
        def block_until_ready(self) -> None:
            came.wait()

    with clock.steps(41), Watchdog(clock, 0.2, tmp_path, ended):
        clock.dispatched(42, Never())  # type: ignore[arg-type]
        assert ended.event.wait(30)
    came.set()
    assert ended.status == LOST == 76
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: train: step 42: expected progress within 0.2 s (train.watchdog_seconds)")
    assert "waiting for the devices" in line and str(tmp_path / "hang-0.txt") in line
    stacks = (tmp_path / "hang-0.txt").read_text()
    assert "in block_until_ready" in stacks and f"in {test_a_step_whose_result_never_comes_is_named_and_every_thread_with_its_stack.__name__}" in stacks  # fmt: skip


@pytest.mark.parametrize("sign", ["results", "activities"])
def test_progress_of_any_kind_keeps_a_run_alive(sign: str, tmp_path: Path) -> None:
    ended, clock = Ended(), Clock()

    class Now:
        def block_until_ready(self) -> None:
            pass

    looks = threading.Event()
    with clock.steps(0), Watchdog(clock, 1.0, tmp_path, ended):
        for step in range(1, 3 * LOOKS):
            if sign == "results":
                clock.dispatched(step, Now())  # type: ignore[arg-type]
            else:
                with clock.spent_on("evaluation"):
                    pass
            looks.wait(1.0 / LOOKS)
        assert not ended.event.is_set()
    assert not list(tmp_path.iterdir())


def test_zero_seconds_is_no_watchdog(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with Watchdog(Clock(), 0, tmp_path):
        assert not set(threading.enumerate()) - before
    with Watchdog(Clock(), 1, tmp_path):
        assert {thread.name for thread in set(threading.enumerate()) - before} == {"watchdog"}


RUN = """
import sys, threading
sys.argv = ["train.py", *sys.argv[2:]]
from llama_jax.training import steps
original = steps.train_batches
def batches_that_stop(*args):
    for step, batch in enumerate(original(*args), args[4] + 1):
        if step == 4:
            threading.Event().wait()
        yield batch
steps.train_batches = batches_that_stop
from llama_jax.commands import run
run("train")
"""


def test_a_run_that_waits_for_data_in_vain_ends_with_its_own_status_and_goes_on_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    flags = {
        "model.dim": 16, "model.n-layers": 1, "model.n-heads": 2, "model.max-seq-len": 16, "data.stories": 40,
        "data.vocab-size": 300, "train.max-steps": 5, "train.batch-size": 2, "train.eval-interval": 5, "train.save-interval": 2,
        "train.save-dir": tmp_path / "run", "train.watchdog-seconds": 6,
    }  # fmt: skip
    argv = [f"--{name}={value}" for name, value in flags.items()]
    hung = subprocess.run(
        [sys.executable, "-c", RUN, "-", *argv], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert hung.returncode == LOST, hung.stderr
    (line,) = hung.stderr.splitlines()
    assert "step 4: expected progress within 6 s" in line and "waiting for data" in line
    assert "batches_that_stop" in (tmp_path / "run" / "hang-0.txt").read_text()
    argv.append("--train.watchdog-seconds=60")  # a slow machine may take long over the sample
    again = subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "at step 2" in again.stdout
