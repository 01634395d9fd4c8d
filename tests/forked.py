"""Runs a command in a fork of a process that has imported what commands import, which takes longer than to refuse.

A fork has the command's arguments, environment, folder and streams, and ends as it does. Tests of how a command starts, or
of what signals do to it, start it instead.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 600
FORKS = multiprocessing.get_context("forkserver")
# Not what is itself a command: it is run as __main__. What commands import late is here too.
FORKS.set_forkserver_preload([
    "llama_jax.training.loop", "llama_jax.plan.command", "llama_jax.convert.summary", "tyro",
    "matplotlib.figure", "matplotlib.backends.backend_agg",
])  # fmt: skip


class Fork:
    """A command in a fork, begun; as much of subprocess.Popen as tests want."""

    def __init__(
        self,
        argv: Sequence[str],
        cwd: Path,
        stdin: str | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.args = argv
        self._folder = tempfile.TemporaryDirectory()
        given, self._out, self._err = (Path(self._folder.name, name) for name in ("in", "out", "err"))
        given.write_text(stdin or "")
        # A process may be killed before it opens them.
        self._out.touch()
        self._err.touch()
        streams = given, self._out, self._err
        environment = os.environ | (environment or {})
        self._process = FORKS.Process(target=_become, args=(list(argv), cwd, environment, streams))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has said, when it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._out.read_text(), self._err.read_text()


def run(
    argv: Sequence[str], cwd: Path, stdin: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What ``python *argv`` says and how it ends; ``argv`` is "train.py" and its like, or "-m", a module, and what follows."""
    fork = Fork(argv, cwd, stdin, environment)
    try:
        out, err = fork.communicate(SECONDS)
    finally:
        fork.kill()
    assert fork.returncode is not None
    return subprocess.CompletedProcess(argv, fork.returncode, out, err)


def _become(argv: list[str], cwd: Path, environment: Mapping[str, str], streams: tuple[Path, Path, Path]) -> None:
    for number, (path, mode) in enumerate(zip(streams, ("r", "w", "w"), strict=True)):
        with path.open(mode) as stream:
            os.dup2(stream.fileno(), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:  # the end of an interpreter, which a fork would leave out
        threading._shutdown()
        atexit._run_exitfuncs()
