"""Runs a command in this process, where all that it imports is imported, and JAX has started.

It has the command's arguments, environment, folder and streams, and ends as it does. What starts JAX in a way of its own, or
what libraries' threads outlive, runs in a fork: tests/forked.py; how a command starts, and what signals do to it, is tested on
one that is started: tests/commands.py.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def run(
    argv: Sequence[str], cwd: Path, stdin: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What ``python *argv`` says and how it ends; ``argv`` is "train.py" and its like, or "-m", a module, and what follows."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("in", "out", "err")]
        streams[0].write_text(stdin or "")
        with pytest.MonkeyPatch.context() as patch, _handlers_kept(), _streams(streams):
            patch.chdir(cwd)
            for name, value in (environment or {}).items():
                patch.setenv(name, value)
            patch.setattr(sys, "unraisablehook", sys.unraisablehook)
            patch.setattr(os, "_exit", _end)
            patch.setattr(sys, "argv", list(argv[1:] if argv[0] == "-m" else argv))
            status = _status(argv)
        return subprocess.CompletedProcess(argv, status, streams[1].read_text(), streams[2].read_text())


def _end(status: int) -> NoReturn:
    """The end of the command's process, in place of this one's."""
    raise SystemExit(status)


def _status(argv: Sequence[str]) -> int:
    try:
        if argv[0] == "-m":
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """A command that ends leaves signals ignored."""
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _streams(paths: Sequence[Path]) -> Iterator[None]:
    """Files in place of the process's streams: what libraries write there, past Python, is the command's too."""
    python = sys.stdin, sys.stdout, sys.stderr
    for stream in python[1:]:
        stream.flush()
    kept = [os.dup(number) for number in range(3)]
    for number, (path, mode) in enumerate(zip(paths, ("r", "w", "w"), strict=True)):
        with path.open(mode) as file:
            os.dup2(file.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        for number in range(3)
    )
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = python
        for number, descriptor in enumerate(kept):
            os.dup2(descriptor, number)
            os.close(descriptor)
