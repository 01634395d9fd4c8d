"""Starts the project's commands with a small model, and a folder for them to work in."""

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from llama_jax.recipe.command import SEAL
from tests import forked

ROOT = Path(__file__).parents[1]
SMALL_MODEL = [
    "--model.dim=32", "--model.n-layers=1", "--model.n-heads=2", "--model.n-kv-heads=2", "--model.max-seq-len=32",
]  # fmt: skip
SHORT_RUN = [
    "--train.max-steps=6", "--train.batch-size=2", "--train.eval-interval=3", "--train.eval-iters=1", "--train.log-interval=1",
    "--train.save-interval=3",
]  # fmt: skip
SMALL = [*SMALL_MODEL, *SHORT_RUN]
# Defines what returns the most memory that a process had, in MB. Its ru_maxrss would begin with that of the process that
# has started it.
PEAK = r"""
import re
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) // 1000
"""
STORIES = ["--data.stories=60", "--data.vocab-size=300"]


def run(
    argv: Sequence[str], cwd: Path, stdin: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *argv]
    if argv[0].endswith(".py"):
        command[1] = str(ROOT / argv[0])
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=300, env=env)


def script(path: str) -> ModuleType:
    """A script of the repository that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(result: subprocess.CompletedProcess[str], status: int = 2) -> str:
    """The one line on stderr of a command that ended with ``status``."""
    assert result.returncode == status, result.stderr
    (line,) = result.stderr.splitlines()
    return line


def make_place(folder: Path) -> Path:
    """Puts texts into ``folder``, and a small run in runs/tiny."""
    (folder / "texts" / "deep").mkdir(parents=True)
    text = "The fox went to the river.\nThe owl said: 12 boats!\n\n" * 60
    for name in ("my.txt", "input.txt", "held_out.txt", "stories.txt", "texts/a.txt", "texts/deep/b.txt"):
        (folder / name).write_text(text)
    result = forked.run(["train.py", *SMALL, *STORIES], folder)
    assert result.returncode == 0, result.stderr
    # A recipe, as an earlier start wrote it: without any settings.
    (folder / "my.toml").write_text(f"{SEAL}{hashlib.sha256(b'').hexdigest()}\n\n")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "tokenizer.model").write_bytes((folder / "runs" / "tiny" / "tokenizer.model").read_bytes())
    return folder
