"""Signals at random moments of a run, from its first to its last: ``python -m tests.signals --moments 30``.

Each run gets SIGTERM, SIGHUP or SIGINT, now and then twice, and is started again until it is done. It prints one JSON line:
the exit statuses, the longest time from a signal to the end, and whether records, parameters and the optimizer's state equal,
bit for bit, those of a run that nobody disturbed. The exit status is 1 where something is not as documented.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llama_jax.errors import INTERRUPTED, STOPPED
from tests.commands import ROOT, SMALL_MODEL, STORIES
from tests.survival import outcome, same

FLAGS = [*SMALL_MODEL, *STORIES, "--train.max-steps=60", "--train.batch-size=2", "--train.eval-interval=8", "--train.eval-iters=0",
         "--train.log-interval=1", "--train.save-interval=5"]  # fmt: skip
EXPECTED = {signal.SIGTERM: STOPPED, signal.SIGHUP: STOPPED, signal.SIGINT: INTERRUPTED}
# Python itself takes so long until the first line of train.py has been run, and ends on a signal as any program does.
PYTHON_SECONDS = 0.4


def start(folder: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, str(ROOT / "train.py"), *FLAGS, f"--train.save-dir={folder}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}  # where a TPU's compiler is installed, JAX would look for a TPU
    return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def disturb(folder: Path, moments: int, seed: int) -> dict[str, Any]:
    """Figures of runs under signals at ``moments`` random moments, beside one without."""
    rng, statuses, wrong, longest, wholes = random.Random(seed), {}, [], 0.0, 0
    began = time.monotonic()
    process = start(folder / "whole")
    process.communicate()
    assert process.returncode == 0
    seconds, number = time.monotonic() - began, 0
    while sum(statuses.values()) < moments:
        run = folder / f"run {number}"
        number += 1
        while True:
            process = start(run)
            time.sleep(rng.uniform(PYTHON_SECONDS, seconds))
            sent = rng.choice(list(EXPECTED))
            process.send_signal(sent)
            since = time.monotonic()
            if rng.random() < 0.3:
                time.sleep(0.05)
                process.send_signal(rng.choice(list(EXPECTED)))
            out, err = process.communicate(timeout=120)
            longest = max(longest, time.monotonic() - since)
            status = process.returncode
            statuses[f"{sent.name} {status}"] = statuses.get(f"{sent.name} {status}", 0) + 1
            if status not in (0, EXPECTED[sent]) or err or (status and "stopped by" not in out):
                wrong.append(f"{sent.name}: {status}: {out[-200:]} {err[-300:]}")
            if status == 0 or sum(statuses.values()) >= moments:
                break
        process = start(run)
        _, err = process.communicate(timeout=120)
        if process.returncode:
            wrong.append(f"the last start: {process.returncode}: {err[-300:]}")
        a, b = outcome(run), outcome(folder / "whole")
        wholes += a[0] == b[0] and same(a[1], b[1]) and same(a[2], b[2])
    return {
        "signals": sum(statuses.values()), "statuses": statuses, "longest seconds to the end": round(longest, 1),
        "seconds of the whole run": round(seconds, 1), "runs": number, "equal to the undisturbed": wholes, "wrong": wrong,
    }  # fmt: skip


def held(figures: dict[str, Any]) -> bool:
    """Whether all was as documented."""
    return not figures["wrong"] and figures["runs"] == figures["equal to the undisturbed"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = disturb(Path(folder), args.moments, args.seed)
    print(json.dumps(figures))
    sys.exit(not held(figures))
