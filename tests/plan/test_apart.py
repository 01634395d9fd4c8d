"""A function in a process of its own: what it returns, what it raises, and how it ends."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from llama_jax.errors import UserError
from llama_jax.plan import apart
from llama_jax.plan.apart import Bug, CompilerError, run_apart

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys, time
from llama_jax.plan.apart import run_apart

def work(begun):
    print("not to be seen")
    begun()
    time.sleep(600)

def begun():
    print("begun", flush=True)

run_apart(work, begun)
"""


@pytest.fixture(autouse=True)
def not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests run apart leaves JAX alone, which other tests of this process may have started."""
    monkeypatch.setattr(apart, "has_started", lambda: False)


def test_a_process_in_which_jax_has_started_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    jax.devices()
    with pytest.raises(RuntimeError, match="expected that JAX's backends have not started"):
        run_apart(lambda _: None)


def told(function: Callable[[Callable[[], None]], object]) -> str:
    with pytest.raises(Exception) as error:
        run_apart(function)
    return f"{error.type.__name__}: {error.value}"


def test_the_result_comes_back_and_the_beginning_is_told() -> None:
    heard = []

    def work(begun: Callable[[], None]) -> dict[str, int]:
        begun()
        return {"process": os.getpid()}

    result = run_apart(work, lambda: heard.append("begun"))
    assert result["process"] != os.getpid() and heard == ["begun"]


def test_long_work_beats() -> None:
    beats: list[float] = []
    run_apart(lambda _: time.sleep(1.2), beat=beats.append)
    assert beats == sorted(beats) and beats and beats[0] < 1.2


def test_what_is_raised_is_raised_here() -> None:
    def wrong(_: object) -> None:
        raise UserError("mesh: expected 4, found 5")

    def fails(_: object) -> None:
        raise CompilerError("it knows no such thing")

    def bug(_: object) -> None:
        raise KeyError("a fault of ours")

    assert told(wrong) == "UserError: mesh: expected 4, found 5"
    assert told(fails) == "CompilerError: it knows no such thing"
    assert told(bug).startswith("Bug: Traceback") and "a fault of ours" in told(bug)
    assert issubclass(Bug, Exception) and not issubclass(Bug, UserError)


def test_an_abort_is_told_with_the_check_that_failed() -> None:
    def abort(_: object) -> None:
        faulthandler.disable()  # pytest's
        os.write(
            2, b"F1128 16:35:59.341370 31258 target.cc:1468] Check failed: bounds().y <= 16 (32 vs. 16) \n*** trace\n"
        )
        os.abort()

    assert told(abort) == "CompilerError: Check failed: bounds().y <= 16 (32 vs. 16) "

    def segfault(_: object) -> None:
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGSEGV)

    assert told(segfault) == "CompilerError: its process ended with status -11"
    assert "memory" in told(lambda _: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_when_its_parent_is_stopped(number: signal.Signals) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert command.stdout is not None and command.stdout.readline() == "begun\n"
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    command.send_signal(number)
    assert command.wait(20) != 0 and children
    for child in children:
        wait_for(
            lambda child=child: not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text()
        )


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
