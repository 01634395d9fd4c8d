"""How the project's commands and its installation are typed, as this process was started: what is printed must be right as it is.

A clone has scripts (``python train.py``), an installed package has one console command (``llama-jax train``), and both have
``python -m llama_jax train``.
"""

import os
import shlex
import sys
from pathlib import Path

# The console command, which pyproject.toml names too.
CONSOLE = "llama-jax"
# The scripts at the root of a clone, by their commands. The other commands are modules of the package.
SCRIPTS = {"train": "train.py", "sample": "sample.py", "convert": "convert_torch_weights.py"}
PACKAGE = Path(__file__).resolve().parent
# Where the package lies: the root of a clone, or a folder of installed packages.
ROOT = PACKAGE.parent


def typed(command: str) -> str:
    """What a person types for ``command`` ("sample"), up to its arguments: "python sample.py", "llama-jax sample"."""
    start = Path(sys.argv[0])
    if start.name == CONSOLE:
        return f"{CONSOLE} {command}"
    if start.name == "__main__.py" and start.resolve().parent == PACKAGE:
        return f"python -m llama_jax {command}"
    if not is_clone():
        return f"{CONSOLE} {command}"
    if command not in SCRIPTS:
        return f"python -m llama_jax.{command}"
    return f"python {shlex.quote(os.path.join(_root_as_typed(start), SCRIPTS[command]))}"


def named(command: str) -> str:
    """How a sentence names ``command``: "sample.py" in a clone, "llama-jax sample" elsewhere."""
    words = typed(command).removeprefix("python ")
    return Path(words).name if words.endswith(".py") else words


def started_as() -> str:
    """What this process was started as, without a path: "train.py", "llama-jax train"."""
    start = Path(sys.argv[0])
    is_console = start.name == CONSOLE or (start.name == "__main__.py" and start.resolve().parent == PACKAGE)
    return " ".join([CONSOLE, *sys.argv[1:2]]) if is_console else start.name


def install_command(extra: str = "") -> str:
    """What a person types to install all that the project needs, and what the extra ``extra`` ("tpu") brings."""
    wanted = f"[{extra}]" if extra else ""
    if not is_clone():
        return f"pip install {_quoted(CONSOLE + wanted)}"
    root = _root_as_typed(Path(sys.argv[0])) or "."
    return f"pip install -e {_quoted(root + wanted)}"


def is_clone() -> bool:
    """Whether the package lies in a clone of the repository, beside its scripts."""
    return all((ROOT / name).is_file() for name in ("pyproject.toml", *SCRIPTS.values()))


def _root_as_typed(start: Path) -> str:
    """The root of the clone from the working directory, as the person named it; empty where they stand in it."""
    if start.name in SCRIPTS.values() and start.resolve().parent == ROOT:
        return "" if start.absolute().parent == Path.cwd() else str(start.parent)
    return "" if Path.cwd() == ROOT else str(ROOT)


def _quoted(word: str) -> str:
    """``word`` for a shell; square brackets, which some shells expand, are always quoted."""
    return f"'{word}'" if "[" in word and "'" not in word else shlex.quote(word)
