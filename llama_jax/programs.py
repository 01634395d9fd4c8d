"""How to type the project's commands and its installation, so that a printed command works if it is pasted.

It depends on how this process was started. A clone has scripts (``python train.py``), an installed package
has one console command (``llama-jax train``), and both have ``python -m llama_jax train``.
"""

import os
import shlex
import sys
from pathlib import Path

# The console command. It has the same name in pyproject.toml.
CONSOLE = "llama-jax"
# The script at the root of a clone for each command that has one. The other commands are modules of the package.
SCRIPTS = {"train": "train.py", "sample": "sample.py", "convert": "convert_torch_weights.py"}
PACKAGE = Path(__file__).resolve().parent
# The folder that contains the package: the root of a clone, or a folder of installed packages.
ROOT = PACKAGE.parent


def typed(command: str) -> str:
    """Return what to type for ``command`` ("sample") before its arguments: "python sample.py" or "llama-jax sample"."""
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
    """Return the name of ``command`` for use in a sentence: "sample.py" in a clone, "llama-jax sample" elsewhere."""
    words = typed(command).removeprefix("python ")
    return Path(words).name if words.endswith(".py") else words


def started_as() -> str:
    """Return the command that started this process, without a path: "train.py" or "llama-jax train"."""
    start = Path(sys.argv[0])
    is_console = start.name == CONSOLE or (start.name == "__main__.py" and start.resolve().parent == PACKAGE)
    return " ".join([CONSOLE, *sys.argv[1:2]]) if is_console else start.name


def install_command(extra: str = "") -> str:
    """Return the command that installs the project's dependencies and those of the extra ``extra`` ("tpu")."""
    wanted = f"[{extra}]" if extra else ""
    if not is_clone():
        return f"pip install {_quoted(CONSOLE + wanted)}"
    root = _root_as_typed(Path(sys.argv[0])) or "."
    return f"pip install -e {_quoted(root + wanted)}"


def is_clone() -> bool:
    """Return whether the package is in a clone of the repository, next to its scripts."""
    return all((ROOT / name).is_file() for name in ("pyproject.toml", *SCRIPTS.values()))


def _root_as_typed(start: Path) -> str:
    """Return the path of the clone's root as the person typed it for the script ``start``.

    It is empty if the root is the working directory, and absolute if ``start`` is not a script of the clone.
    """
    if start.name in SCRIPTS.values() and start.resolve().parent == ROOT:
        return "" if start.absolute().parent == Path.cwd() else str(start.parent)
    return "" if Path.cwd() == ROOT else str(ROOT)


def _quoted(word: str) -> str:
    """Return ``word`` quoted for a shell. Square brackets are always quoted, since some shells expand them."""
    return f"'{word}'" if "[" in word and "'" not in word else shlex.quote(word)
