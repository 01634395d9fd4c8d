"""Starts a command as the processes of one job, on this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from tests.forked import Fork

ROOT = Path(__file__).parents[1]
SMALL = {
    "model.dim": 64, "model.n_layers": 2, "model.n_heads": 4, "model.n_kv_heads": 2, "model.multiple_of": 32,
    "model.max_seq_len": 16, "data.vocab_size": 304, "data.stories": 60, "data.train_size": 1.0, "train.batch_size": 8, "train.warmup_steps": 5,
    "train.log_interval": 1, "train.lr": 1e-2,
}  # fmt: skip


class Ended(NamedTuple):
    """A process that has ended."""

    status: int
    out: str
    err: str


def flags(**changes: object) -> list[str]:
    """Flags of a small run: ``SMALL`` with ``changes`` ("train__seed" is train.seed)."""
    return [f"--{k}={v}" for k, v in (SMALL | {k.replace("__", "."): v for k, v in changes.items()}).items()]


def free_address() -> str:
    """An address on this machine with a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


Process = subprocess.Popen[str] | Fork


def start(argv: Sequence[str], count: int = 1, devices: int = 1, fork: bool = True) -> list[Process]:
    """``python *argv`` as ``count`` processes of one job, each with so many devices; ``fork``: as tests/forked.py runs it."""
    xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla}
    address = free_address()
    job = [
        [f"--distributed.{key}={value}" for key, value in
         (("coordinator-address", address), ("num-processes", count), ("process-id", i), ("timeout-seconds", 60))]
        for i in range(count)
    ]  # fmt: skip
    commands = [[*argv, *(job[i] if count > 1 else [])] for i in range(count)]
    if fork:
        return [Fork(command, ROOT, environment=env) for command in commands]
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT, env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for command in commands
    ]  # fmt: skip


def end(processes: Sequence[Process], seconds: float = 240) -> list[Ended]:
    """Wait for all; those that have not ended in time are killed, and an error is raised."""
    ended = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=seconds)
            ended.append(Ended(cast(int, process.returncode), out, err))
    finally:
        for process in processes:
            process.kill()
    return ended
