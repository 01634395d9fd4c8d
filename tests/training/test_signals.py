"""SIGTERM, SIGHUP and Ctrl-C at any moment: saved, a documented status, and the numbers of a run that nobody disturbed."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_jax.checkpoint import steps_of
from llama_jax.cli.stopping import StopSignals, output_may_vanish
from llama_jax.errors import INTERRUPTED, STOPPED
from llama_jax.training import evaluating, loop, samples, steps
from llama_jax.training.run import Run
from tests.commands import ROOT
from tests.signals import disturb, held
from tests.training.test_resuming import assert_same, records, train

STATUSES = [(signal.SIGTERM, STOPPED), (signal.SIGHUP, STOPPED), (signal.SIGINT, INTERRUPTED)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


NOTED = threading.Semaphore(0)


@pytest.fixture(autouse=True, scope="module")
def watched() -> Iterator[None]:
    """It is told when a signal has been noted."""

    def note(signals: StopSignals, number: int) -> None:
        original(signals, number)
        NOTED.release()

    original = StopSignals._note
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignals, "_note", note)
        yield


def interrupt(number: int = signal.SIGTERM) -> None:
    """Send this process a signal, and wait until it is noted."""
    os.kill(os.getpid(), number)
    assert NOTED.acquire(timeout=60)


def stopped(folder: Path, **changes: Any) -> int:
    """The status of a run that a signal ends."""
    with pytest.raises(SystemExit) as ended:
        train(folder, **changes)
    return int(ended.value.code or 0)


@pytest.mark.parametrize(("number", "status"), STATUSES)
def test_a_signal_in_a_step_saves_it_and_leaves(
    number: int, status: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note_saved(run: Run) -> None:
        if run.folder.records and run.folder.records[-1]["step"] == 2:
            interrupt(number)
            interrupt(number)  # and once more
        original(run)

    original = steps._note_saved
    with monkeypatch.context() as patch:
        patch.setattr(steps, "_note_saved", note_saved)
        assert stopped(tmp_path / "run") == status
    assert steps_of(tmp_path / "run")[-1] == records(tmp_path / "run")[-1]["step"] == 4
    train(tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_a_signal_in_an_evaluation_ends_it_and_the_next_start_makes_up_for_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(*args: Any) -> Iterator[Any]:
        for batch in original(*args):
            interrupt()
            yield batch
        pytest.fail("the evaluation goes on")

    original = evaluating.eval_batches
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "eval_batches", batches)
        assert stopped(tmp_path / "run", eval_iters=2) == STOPPED
    assert "eval_loss" not in records(tmp_path / "run")[-1] and steps_of(tmp_path / "run") == [2, 4]
    train(tmp_path / "run")
    assert_same(tmp_path / "run", whole)
    losses = [
        json.loads((run / "checkpoints" / "4" / "metrics" / "metrics").read_text()) for run in (tmp_path / "run", whole)
    ]
    assert losses[0] == losses[1]
    assert (tmp_path / "run" / "best.json").read_text() == (whole / "best.json").read_text()


def test_a_signal_in_the_last_evaluation_leaves_it_to_the_next_start(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(*args: Any) -> Iterator[Any]:
        for batch in original(*args):
            evaluations.append(1)
            if len(evaluations) > 4:  # of the first one, at step 4
                interrupt()
            yield batch

    original, evaluations = evaluating.eval_batches, list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "eval_batches", batches)
        assert stopped(tmp_path / "run") == STOPPED
    assert records(tmp_path / "run")[-1]["step"] == 8 and "eval_loss" not in records(tmp_path / "run")[-1]
    train(tmp_path / "run")
    assert_same(tmp_path / "run", whole)
    assert "already complete" in train(tmp_path / "run")


def test_a_signal_while_a_sample_is_made_saves_what_was_not(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(run: Run, params: Any, step: int) -> int:
        interrupt()
        return run.stop_asked()

    with monkeypatch.context() as patch:
        patch.setattr(samples, "show", draw)
        assert stopped(tmp_path / "run") == STOPPED
    assert steps_of(tmp_path / "run")[-1] == 4
    train(tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_a_sample_heeds_a_signal_between_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Talking:
        """A model that tells of progress."""

        def __init__(self, *_: Any):
            pass

        def generate(self, prompts: Any, args: Any, on_progress: Any) -> Any:
            interrupt()
            on_progress(None)
            pytest.fail("the sample goes on")

    monkeypatch.setattr(samples, "Model", Talking)
    monkeypatch.setattr(samples, "draw_losses", lambda *_: None)
    assert stopped(tmp_path / "run") == STOPPED


def test_a_signal_behind_the_last_step_comes_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_finish", lambda *_: interrupt())
    train(tmp_path / "run")


LEAVE = """
import sys, time
from llama_jax.cli.stopping import StopSignals
with StopSignals() as signals:
    signals.before_leaving.append(lambda: print("released", flush=True))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), STATUSES)
def test_with_nothing_to_save_a_signal_ends_the_process_at_once(number: int, status: int) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", LEAVE], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == status
    assert "nothing to save" in out and out.endswith("released\n")


def test_a_run_under_nohup_does_not_hear_that_the_terminal_closes() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signals.set_mode("note")
            os.kill(os.getpid(), signal.SIGHUP)
            interrupt(signal.SIGTERM)
            assert signals.received == signal.SIGTERM, "the first that was heard"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_signal_is_the_one_that_counts_and_the_handlers_before_come_back() -> None:
    before = [signal.getsignal(number) for number, _ in STATUSES]
    with StopSignals() as signals:
        signals.set_mode("note")
        interrupt(signal.SIGHUP)
        interrupt(signal.SIGTERM)
        assert signals.received == signal.SIGHUP and signals.name == "SIGHUP"
    assert [signal.getsignal(number) for number, _ in STATUSES] == before


def test_another_thread_than_the_main_one_changes_nothing() -> None:
    def enter() -> None:
        with StopSignals():
            handlers.append(signal.getsignal(signal.SIGTERM))

    handlers: list[Any] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_a_run_whose_terminal_is_gone_goes_on(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe, contextlib.redirect_stdout(pipe), output_may_vanish():
        print("nobody reads this", flush=True)
        print("nor this", flush=True)
    with contextlib.redirect_stdout(io.StringIO()) as out, output_may_vanish():
        print("this is read", flush=True)
    assert out.getvalue() == "this is read\n"


@pytest.mark.slow
def test_whole_commands_under_signals_at_random_moments_end_as_documented_with_the_same_numbers() -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = disturb(Path(folder), 6, seed=1)
    assert held(figures), json.dumps(figures)
