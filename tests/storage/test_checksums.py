"""Every file of a finished folder has a checksum; what is damaged is named and not used."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_jax.errors import UserError
from llama_jax.storage import checksums
from llama_jax.storage.checksums import verified, verify, write_checksums
from llama_jax.storage.locations import location
from tests import bucket


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A finished folder on disk or in a bucket."""
    if request.param == "disk":
        yield finished(tmp_path / "folder")
        return
    with bucket.running() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield finished(location(f"gs://bucket/{tmp_path.name}"))


def finished(folder: Path) -> Path:
    for name, content in {"a": b"1234", "deep/b": bytes(range(256)) * 50, "deep/empty": b""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_checksums(folder)
    return folder


def test_an_untouched_folder_is_whole(folder: Path) -> None:
    verify(folder, "advice")
    table = json.loads((folder / "checksums.json").read_text())["files"]
    assert {name: known["size"] for name, known in table.items()} == {"a": 4, "deep/b": 12800, "deep/empty": 0}


@pytest.mark.parametrize("name", ["a", "deep/b"])
def test_a_flipped_byte_a_cut_and_a_missing_file_are_named(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(UserError, match=f"{name} is damaged; advice"):
        verify(folder, "advice")
    (folder / name).write_bytes(bytes(content[:-1]))
    with pytest.raises(UserError, match=f"{name} is damaged"):
        verify(folder, "advice")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        verify(folder, "advice")


def test_any_flip_within_the_table_is_named(tmp_path: Path) -> None:
    path = finished(tmp_path / "folder") / checksums.NAME
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(200):
        spoilt = bytearray(whole)
        spoilt[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(spoilt))
        with pytest.raises(UserError, match=r"checksums\.json: expected"):
            verify(path.parent, "advice")


def test_a_file_that_nobody_listed_does_no_harm_and_a_folder_without_a_table_is_not_verified(folder: Path) -> None:
    (folder / "more").write_bytes(b"1")
    verify(folder, "advice")
    (folder / checksums.NAME).unlink()
    (folder / "a").write_bytes(b"other")
    verify(folder, "advice")


def test_damage_is_the_reason_that_is_told_where_reading_fails_for_it(tmp_path: Path) -> None:
    path = finished(tmp_path / "folder") / "a"
    path.write_bytes(b"4321")
    with pytest.raises(UserError, match="a is damaged"), verified(path.parent, "advice"):
        raise ValueError("cannot parse")
    with pytest.raises(UserError, match="a is damaged"), verified(path.parent, "advice"):
        pass
    path.write_bytes(b"1234")
    with pytest.raises(ValueError, match="cannot parse"), verified(path.parent, "advice"):
        raise ValueError("cannot parse")
