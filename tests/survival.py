"""A 2-process run under kill -9 of either process, or of both, at random moments: ``python -m tests.survival --kills 20``.

Each time the job is started again, as a scheduler would. It prints one JSON line: whether the run ended with the numbers
and the parameters of one that nobody touched, bit for bit, and how the processes that were not killed ended. Tests run it
with two kills.
"""

import argparse
import json
import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import llama_jax
from llama_jax.checkpoint import steps_of
from llama_jax.training.clock import TIMES
from tests.processes import end, flags, start

NOTICE_SECONDS = 120  # JAX's own limit is 100


def survive(folder: Path, kills: int, seed: int, notice_seconds: float, steps: int = 60) -> dict[str, Any]:
    """Figures of a run under ``kills`` and of one without.

    A process that lost the other has ``notice_seconds`` to end by itself, then it is killed, as schedulers do.
    """
    rng, began = random.Random(seed), time.monotonic()
    victims, survivors, notice, steps_at = {"0": 0, "1": 0, "both": 0}, [], [], []
    for _ in range(kills):
        job = _start(folder / "killed", steps)
        which = rng.choice(list(victims))
        _wait(folder / "killed", job, rng)
        if any(process.poll() is not None for process in job):
            raise RuntimeError(f"the run ended by itself: {end(job)}")
        killed = job if which == "both" else [job[int(which)]]
        for process in killed:
            process.kill()
        victims[which] += 1
        steps_at.append(_step(folder / "killed"))
        since = time.monotonic()
        for process in job:
            if process not in killed:
                survivors.append(_status(process, notice_seconds))
                notice.append(time.monotonic() - since)
            process.communicate()
    for name in ("killed", "whole"):
        for ended in end(_start(folder / name, steps)):
            if ended.status:
                raise RuntimeError(ended.err)
    a, b = (_outcome(folder / name) for name in ("killed", "whole"))
    return {
        "kills": kills,
        "of process": victims,
        "at step": steps_at,
        "exit statuses of those not killed": survivors,
        "seconds until they ended, most": round(max(notice, default=0.0), 1),
        "same metrics": a[0] == b[0] and len(a[0]) == steps,
        "same parameters": len(a[1]) > 0 and all(map(np.array_equal, a[1], b[1])),
        "seconds in all": round(time.monotonic() - began),
    }


def _status(process: subprocess.Popen[str], seconds: float) -> int | str:
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return "had to be killed"
    return process.returncode


def _start(folder: Path, steps: int) -> list[subprocess.Popen[str]]:
    argv = flags(
        train__save_dir=folder, train__max_steps=steps, train__save_interval=1, mesh__data=1,
        mesh__fsdp=2,
    )  # fmt: skip
    return start(["train.py", *argv], count=2)


def _wait(folder: Path, job: list[subprocess.Popen[str]], rng: random.Random) -> None:
    """A random moment: now and then before the first step, else a while after one, or in the midst of what follows it."""
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, 4))
        return
    target = _step(folder) + rng.randint(1, 2)
    while _step(folder) < target and all(process.poll() is None for process in job):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.15))


def _step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    try:
        return json.loads(path.read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def _outcome(run: Path) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Records without times, and the parameters."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    params = llama_jax.load(str(run / "checkpoints" / str(steps_of(run)[-1]))).params
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records], list(
        map(np.asarray, jax.tree.leaves(params))
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(survive(Path(folder), args.kills, args.seed, NOTICE_SECONDS)))
