"""Several starts of one run, at random distances, some of them killed: ``python -m tests.starts --rounds 20``.

In each round two to four processes start the same command in one folder. One of them owns the run; the others end at once
with one line that says so. It prints one JSON line: how the starts ended, and whether each round's run equals, bit for bit,
one that was started once. The exit status is 1 where something is not as documented.
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

from tests.signals import start
from tests.survival import outcome, same


def compete(folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Figures of ``rounds`` rounds, beside a run that was started once."""
    rng, ends, wrong, wholes = random.Random(seed), dict[str, int](), list[str](), 0
    began = time.monotonic()
    start(folder / "whole").communicate()
    seconds = time.monotonic() - began
    for number in range(rounds):
        run = folder / f"run {number}"
        processes = []
        for _ in range(rng.randint(2, 4)):
            processes.append(start(run))
            time.sleep(rng.uniform(0, 0.3 * seconds) if rng.random() < 0.5 else 0)
        if rng.random() < 0.6:
            time.sleep(rng.uniform(0, 0.8 * seconds))
            rng.choice(processes).kill()
        found = [_end(process) for process in processes]
        for end in found:
            ends[end] = ends.get(end, 0) + 1
            if end not in ("done", "complete already", "in use", "killed"):
                wrong.append(f"round {number}: {end}")
        if "killed" not in found and found.count("done") != 1:
            wrong.append(f"round {number}: {found}")
        for _ in range(2):  # what was killed goes on; what is done is done
            end = _end(start(run))
            if end not in ("done", "complete already"):
                wrong.append(f"round {number}, afterwards: {end}")
        a, b = outcome(run), outcome(folder / "whole")
        equal = a[0] == b[0] and same(a[1], b[1]) and same(a[2], b[2])
        wholes += equal
        if not equal:
            wrong.append(f"round {number}: another outcome")
    return {"rounds": rounds, "ends": ends, "equal to a run that was started once": wholes, "wrong": wrong}


def _end(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    if process.returncode == -9:
        return "killed"
    if process.returncode == 2 and " in use by process " in err and err.count("\n") == 1:
        return "in use"
    if process.returncode == 0 and not err:
        return "complete already" if "already complete" in out else "done"
    return f"status {process.returncode}: {out[-200:]} {err[-400:]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = compete(Path(folder), args.rounds, args.seed)
    print(json.dumps(figures))
    sys.exit(bool(figures["wrong"]))
