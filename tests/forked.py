"""Runs a command in a fork of a process that has imported what commands import, which takes longer than to refuse.

A fork has the command's arguments, environment, folder and streams, and ends as it does. Tests of how a command starts,
and of what it computes, start it instead.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 120
FORKS = multiprocessing.get_context("forkserver")
# Not what is itself a command: it is run as __main__.
FORKS.set_forkserver_preload(["llama_jax.training.loop", "llama_jax.plan.search", "llama_jax.convert.report", "tyro"])


def run(
    argv: Sequence[str], cwd: Path, stdin: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What ``python *argv`` says and how it ends; ``argv`` is "train.py" and its like, or "-m", a module, and what follows."""
    with tempfile.TemporaryDirectory() as folder:
        given, out, err = (Path(folder, name) for name in ("in", "out", "err"))
        given.write_text(stdin or "")
        fork = FORKS.Process(
            target=_become, args=(list(argv), cwd, os.environ | (environment or {}), (given, out, err))
        )
        fork.start()
        fork.join(SECONDS)
        if fork.exitcode is None:
            fork.kill()
            raise subprocess.TimeoutExpired(argv, SECONDS)
        return subprocess.CompletedProcess(argv, fork.exitcode, out.read_text(), err.read_text())


def _become(argv: list[str], cwd: Path, environment: Mapping[str, str], streams: tuple[Path, Path, Path]) -> None:
    for number, (path, mode) in enumerate(zip(streams, ("r", "w", "w"), strict=True)):
        with path.open(mode) as stream:
            os.dup2(stream.fileno(), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
