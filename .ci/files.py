"""Refuses files that have no place in the repository: ``python .ci/files.py``.

Each file is explained by one of ``EXPLAINED``, has an ordinary name, and is text unless it is in docs/. The files are those that
git knows. The exit status is 1 if one is refused.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What each kind of file is there for. * stands for anything within a folder, ** for folders too.
EXPLAINED = {
    "README.md": "what people read first",
    "CHANGELOG.md": "what changed between versions",
    "CONTRIBUTING.md": "how to work on it",
    "LICENSE": "the licence",
    ".gitignore": "what is not committed",
    ".dockerignore": "what does not go into an image",
    "pyproject.toml": "the package and its tools",
    "mkdocs.yml": "the documentation site",
    "train.py": "the command",
    "sample.py": "the command",
    "convert_torch_weights.py": "the command",
    ".ci/*": "the checks",
    "benchmarks/*.py": "measurements",
    "benchmarks/*.md": "their results",
    "benchmarks/records/*": "runs that anyone can repeat",
    "configs/*.toml": "the shipped configurations",
    "docs/**.md": "documentation",
    "docs/**.py": "what documentation is made with",
    "docs/**.css": "its looks",
    "docs/**.js": "what its pages do",
    "docs/**.png": "its pictures",
    "docs/**.svg": "its pictures",
    "Dockerfile": "an image with the package",
    "launch/**": "recipes for clusters",
    "scripts/*": "what recipes start",
    "llama_jax/**.py": "the package",
    "llama_jax/compat/*.pth": "what Python reads at its start",
    "llama_jax/py.typed": "says that the package has types",
    "notebooks/*.ipynb": "notebooks",
    "notebooks/*.md": "what the notebooks are",
    "notebooks/*.py": "what notebooks are made with",
    "tests/**.py": "the tests",
    "tests/**.json": "values that tests expect",
}
# Binary files may lie here: pictures of the documentation.
PICTURES = "docs/"
MOST_BYTES = 1 << 20


def files() -> list[str]:
    """Return the paths of all files that git knows, relative to the root."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached"], cwd=ROOT, capture_output=True, check=True).stdout
    return sorted(name for name in map(os.fsdecode, listed.split(b"\0")) if name and os.path.lexists(ROOT / name))


def fault(name: str) -> str:
    """Return what is wrong with a file, or "" if nothing is."""
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*", os.path.basename(name)):
        return "expected a name of letters, digits, -, _ and ."
    if not any(re.fullmatch(_expression(pattern), name) for pattern in EXPLAINED):
        return "expected a file that a pattern of .ci/files.py explains; remove it, or add a pattern there"
    path = ROOT / name
    if path.is_symlink():
        return "expected a file, found a link"
    if path.stat().st_size > MOST_BYTES:
        return f"expected at most {MOST_BYTES:,} bytes, found {path.stat().st_size:,}"
    if not name.startswith(PICTURES) and _is_binary(path.read_bytes()):
        return f"expected text outside of {PICTURES}, found binary content"
    return ""


def _expression(pattern: str) -> str:
    """Return a pattern as a regular expression."""
    return re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")


def _is_binary(content: bytes) -> bool:
    try:
        return "\0" in content.decode()
    except UnicodeDecodeError:
        return True


def main() -> int:
    """Print what is wrong. Return the exit status."""
    try:
        names = files()
    except (OSError, subprocess.CalledProcessError):
        print("no git here: files are not checked")
        return 0
    faults = [f"{name!r}: {found}" for name in names if (found := fault(name))]
    for line in faults:
        print(line, file=sys.stderr)
    print(f"{len(names)} files, {len(faults)} refused")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
