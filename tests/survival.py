"""A 2-process run under kill -9 of either process, or of both, at random moments: ``python -m tests.survival --kills 20``.

Each time the job is started again, as a scheduler would. It prints one JSON line: whether the run ended with the numbers,
the parameters and the optimizer's state of one that nobody touched, bit for bit; whether the newest checkpoint that each
kill left could be read; and how the processes that were not killed ended. The exit status is 1 where it did not survive. Tests run it
with one kill, and with six where slow tests are asked for.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint import Checkpoint, checkpoints_of, steps_of
from llama_jax.checkpoint.stored_array import open_array
from llama_jax.errors import LOST, UserError
from llama_jax.training.clock import TIMES
from tests.processes import Process, end, flags, start

KILLED = "had to be killed"
NOTICE_SECONDS = 120  # JAX's own limit is 100
MOST_STEPS = 5  # from a start to a kill: up to 2 are waited for, and a few pass until it comes
Arrays = dict[str, np.ndarray]


def survive(folder: Path, kills: int, seed: int, notice_seconds: float) -> dict[str, Any]:
    """Figures of a run under ``kills`` and of one without.

    A process that lost the other has ``notice_seconds`` to end by itself, then it is killed, as schedulers do.
    """
    rng, began = random.Random(seed), time.monotonic()
    steps = MOST_STEPS * (kills + 1)
    victims, survivors, notice, steps_at = {"0": 0, "1": 0, "both": 0}, [], [], []
    left, half_deleted, unreadable = 0, 0, []
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
        if found := [checkpoints_of(folder / "killed") / str(step) for step in steps_of(folder / "killed")]:
            left += 1
            unreadable += _unreadable([folder / "killed", found[-1]])
            half_deleted += len(_unreadable(found[:-1]))
    for name in ("killed", "whole"):
        for ended in end(_start(folder / name, steps)):
            if ended.status:
                raise RuntimeError(ended.err)
    a, b = (outcome(folder / name) for name in ("killed", "whole"))
    return {
        "kills": kills,
        "of process": victims,
        "at step": steps_at,
        "exit statuses of those not killed": survivors,
        "seconds until they ended, most": round(max(notice, default=0.0), 1),
        "kills that left a checkpoint": left,
        "older checkpoints that it left half deleted": half_deleted,
        "newest checkpoints that could not be read": unreadable,
        "same metrics": a[0] == b[0] and len(a[0]) == steps,
        "same parameters": same(a[1], b[1]),
        "same optimizer state": same(a[2], b[2]),
        "seconds in all": round(time.monotonic() - began),
    }


def _status(process: Process, seconds: float) -> int | str:
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return KILLED
    return process.returncode


def _start(folder: Path, steps: int) -> list[Process]:
    argv = flags(
        train__save_dir=folder, train__max_steps=steps, train__save_interval=1, mesh__data=1,
        mesh__fsdp=2,
    )  # fmt: skip
    return start(["train.py", *argv], count=2)


def _wait(folder: Path, job: list[Process], rng: random.Random) -> None:
    """A random moment: now and then before the first step, else a while after a checkpoint, or in the midst of what follows it."""
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, 4))
        return
    target = _saved(folder) + rng.randint(1, 2)
    while _saved(folder) < target and all(process.poll() is None for process in job):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.15))


def _saved(folder: Path) -> int:
    """The newest step that has a checkpoint; 0 where none has."""
    return (steps_of(folder) or [0])[-1]


def _step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    try:
        return json.loads(path.read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def survived(figures: dict[str, Any]) -> bool:
    """Whether nothing was lost, whatever a kill left could be read, and those that lost another said so by their status."""
    ends = {*figures["exit statuses of those not killed"]} - {LOST, KILLED}
    alike = not ends and all(figures[f"same {what}"] for what in ("metrics", "parameters", "optimizer state"))
    return alike and not figures["newest checkpoints that could not be read"]


def same(a: Arrays, b: Arrays) -> bool:
    """Bit for bit: NaN is NaN, and -0 is not 0."""
    return len(a) > 0 and a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def outcome(run: Path) -> tuple[list[dict[str, Any]], Arrays, Arrays]:
    """Records without times, the parameters, and the optimizer's state."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = checkpoints_of(run) / str(steps_of(run)[-1])
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records], *_arrays(newest)


def _arrays(path: Path) -> tuple[Arrays, Arrays]:
    """Parameters and optimizer's state of a run's checkpoint, or of one of its steps."""
    checkpoint = Checkpoint.find(path)
    params, state = (
        {name: open_array(checkpoint.folder / item, name).read().result() for name in checkpoint.arrays(item)}
        for item in ("params", "state")
    )
    return params, state


def _unreadable(paths: list[Path]) -> list[str]:
    """Which of them do not hold all that training goes on from, and why."""
    why = []
    for path in paths:
        try:
            if not all(_arrays(path)):
                raise ValueError("no parameters or no state")
        except (UserError, OSError, ValueError) as error:
            why.append(f"{path.name}: {' '.join(str(error).split())[:160]}")
    return why


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = survive(Path(folder), args.kills, args.seed, NOTICE_SECONDS)
    print(json.dumps(figures))
    sys.exit(not survived(figures))
