"""CI's own parts: stray files are refused, and the lowest versions are those of pyproject.toml."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import commands
from tests.commands import ROOT


def part(name: str) -> ModuleType:
    return commands.script(f".ci/{name}.py")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The check, of a repository of four files."""
    found = part("files")
    monkeypatch.setattr(found, "ROOT", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name in ("train.py", "docs/losses.png", "tests/plan/golden.json", "llama_jax/py.typed"):
        add(found, name, b"\x89PNG\0" if name.endswith("png") else b"")
    return found


def add(files: ModuleType, name: str, content: bytes) -> None:
    path = files.ROOT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    subprocess.run(["git", "add", "-f", "--", name], cwd=files.ROOT, check=True)


def test_every_file_of_the_repository_is_explained() -> None:
    done = subprocess.run([sys.executable, ".ci/files.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("''", b"\x89PNG\0", "expected a name"),
        ("a b.py", b"", "expected a name"),
        ("-rf", b"", "expected a name"),
        ("notes.txt", b"", "explains"),
        ("llama_jax/weights.npz", b"", "explains"),
        ("llama_jax/model.py~", b"", "expected a name"),
        ("configs/deep/a.toml", b"", "explains"),
        ("tests/golden.json", b"\x00", "found binary content"),
        ("tests/golden.json", b"caf\xe9", "found binary content"),
        ("docs/large.png", bytes(2 << 20), "expected at most 1,048,576 bytes"),
    ],
)
def test_a_stray_file_is_refused(
    name: str, content: bytes, words: str, files: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.main() == 0, capsys.readouterr()
    add(files, name, content)
    assert files.main() == 1
    said = capsys.readouterr()
    assert repr(name) in said.err and words in said.err and "1 refused" in said.out


def test_the_lowest_versions_are_printed_as_constraints(capsys: pytest.CaptureFixture[str]) -> None:
    part("lowest")
    lines = capsys.readouterr().out.splitlines()
    assert {"jax", "flax", "orbax-checkpoint", "fsspec", "tyro"} <= {line.split("==")[0] for line in lines}
    assert all(line.count("==") == 1 for line in lines)
