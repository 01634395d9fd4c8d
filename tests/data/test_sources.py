"""Which files a path stands for: each once, hidden ones not, and nothing skipped unsaid."""

import builtins
import errno
import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llama_jax.data.sources import files_as_before, find_files
from llama_jax.errors import UserError


def make(folder: Path, *names: str, content: str = "the fox\n") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}: {content}")


def found(folder: Path, target: str = ".") -> list[str]:
    return [os.path.relpath(path, folder) for path in find_files(str(folder / target)).paths]


def notes(folder: Path, target: str = ".") -> str:
    return " / ".join(find_files(str(folder / target)).notes)


def test_a_file_a_folder_and_a_glob_are_found_in_order(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a.txt", "deep/er/c.txt", "notes.md")
    (tmp_path / "folder.txt").mkdir()
    assert found(tmp_path, "notes.md") == ["notes.md"]
    assert found(tmp_path) == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert found(tmp_path, "*.txt") == ["a.txt", "b.txt"]
    assert found(tmp_path, "**/*.txt") == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert found(tmp_path, "deep/**") == ["deep/er/c.txt"]
    assert found(tmp_path, "d*/**/c.*") == ["deep/er/c.txt"]
    assert found(tmp_path, "**/deep/**/er/*") == ["deep/er/c.txt"]
    assert found(tmp_path, "**/er/**/c.txt") == ["deep/er/c.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    make(tmp_path, "[a].txt", "a.txt")
    assert found(tmp_path, "[a].txt") == ["[a].txt"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path, "a.txt")
    assert find_files("~/a.txt").paths == [tmp_path / "a.txt"]


@pytest.mark.parametrize("target", [".", "**/*.txt"])
def test_hidden_files_and_folders_are_not_read_and_are_counted(tmp_path: Path, target: str) -> None:
    make(tmp_path, "a.txt", "._a.txt", ".ipynb_checkpoints/a.txt", "deep/.cache/x/b.txt", "deep/b.txt")
    assert found(tmp_path, target) == ["a.txt", "deep/b.txt"]
    assert "not read, as they are hidden: 3 (._a.txt, .ipynb_checkpoints, .cache)" in notes(tmp_path, target)


def test_what_is_hidden_is_read_where_it_is_named(tmp_path: Path) -> None:
    make(tmp_path, ".hidden/a.txt", ".hidden/.b.txt", ".c.txt")
    assert found(tmp_path, ".hidden") == [".hidden/a.txt"]
    assert found(tmp_path, ".c.txt") == [".c.txt"]
    assert found(tmp_path, "**/.*.txt") == [".c.txt"]
    assert found(tmp_path, ".hidden/**/.*.txt") == [".hidden/.b.txt"]
    assert found(tmp_path, ".h*/*.txt") == [".hidden/a.txt"]


def test_other_files_and_folders_that_are_passed_over_are_told(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b.md", "c.md", "d.jsonl", "README", "sub/e.txt")
    assert "not read, as their names do not end in .txt: 2 *.md" in notes(tmp_path)
    assert "1 *.jsonl" in notes(tmp_path) and "1 without a suffix" in notes(tmp_path)
    assert "folders (** in a glob goes into them): 1 (sub)" in notes(tmp_path, "*")
    assert notes(tmp_path, "a.txt") == notes(tmp_path, "sub") == ""


def test_linked_files_and_folders_are_read(tmp_path: Path) -> None:
    make(tmp_path, "text/a.txt", "elsewhere/deep/b.txt", "c.txt")
    (tmp_path / "text" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text" / "c.txt").symlink_to(tmp_path / "c.txt")
    assert found(tmp_path, "text") == ["text/a.txt", "text/c.txt", "text/linked/deep/b.txt"]
    assert found(tmp_path, "text/**/*.txt") == ["text/a.txt", "text/c.txt", "text/linked/deep/b.txt"]
    assert notes(tmp_path, "text") == ""


@pytest.mark.parametrize("target", [".", "**/*.txt", "**"])
def test_loops_of_links_are_read_once(tmp_path: Path, target: str) -> None:
    make(tmp_path, "a/a.txt", "b/b.txt")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "side").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "itself").symlink_to(tmp_path / "b")
    assert found(tmp_path, target) == ["a/a.txt", "b/b.txt"]
    assert "read once" in notes(tmp_path, target)


def test_a_file_with_two_names_is_read_once_and_that_is_told(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    os.link(tmp_path / "a.txt", tmp_path / "c.txt")
    for target in (".", "*.txt", "**/*.txt"):
        assert found(tmp_path, target) == ["a.txt"]
        assert "more than one name or link leads to them: 2 (b.txt, c.txt)" in notes(tmp_path, target)


def test_copies_with_names_of_their_own_are_all_read(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same")
    assert found(tmp_path) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("target", [".", "*.txt", "**/*.txt"])
@pytest.mark.parametrize("kind", ["broken link", "link to itself", "pipe"])
def test_what_cannot_be_read_is_named_and_never_passed_over(tmp_path: Path, target: str, kind: str) -> None:
    make(tmp_path, "a.txt", "z.txt")
    path = tmp_path / "m.txt"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "none" if kind == "broken link" else path)
    with pytest.raises(UserError, match=r"data\.filepath: expected a file, found .*m\.txt"):
        found(tmp_path, target)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O error")])
def test_a_file_that_the_system_does_not_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    make(tmp_path, "a.txt", "m.txt", "z.txt")
    original = builtins.open

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith("m.txt"):
            raise error
        return original(path, *args, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(UserError, match=r"data\.filepath: expected a file that can be read, found .*m\.txt") as told:
        found(tmp_path)
    assert ("permission" in str(told.value)) == isinstance(error, PermissionError)


def test_a_folder_that_the_system_does_not_list_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.txt", "deep/b.txt")
    original = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for target in (".", "**/*.txt"):
        with pytest.raises(UserError, match=r"data\.filepath: expected a folder that can be read, found .*deep"):
            found(tmp_path, target)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read every file")
def test_files_and_folders_without_permission_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "deep/b.txt")
    for path in (tmp_path / "a.txt", tmp_path / "deep"):
        path.chmod(0)
        with pytest.raises(UserError, match="ermission"):
            found(tmp_path)
        path.chmod(0o755)


@pytest.mark.parametrize(
    ("contents", "target", "words"),
    [
        ({}, "missing.txt", "found nothing at"),
        ({}, "*.txt", "found nothing at"),
        ({"notes.md": b"x"}, ".", "only others (1 *.md)"),
        ({".a.txt": b"x"}, ".", "only hidden ones (1 (.a.txt))"),
        ({"a.txt": b""}, "a.txt", "empty"),
        ({"a.txt": b"", "b.txt": b""}, ".", "empty"),
        ({"a.txt": "the fox".encode("utf-16")}, "a.txt", "UTF-16"),
        ({"a.txt": b"ok", "b.txt": b"\xfe\xff\0a"}, ".", "UTF-16"),
        ({"a.txt": b"ok", "b.txt": b'{"a": 1}\n{"a": 2}\n'}, ".", "JSON lines"),
    ],
)
def test_what_holds_no_text_is_refused_in_one_line(
    tmp_path: Path, contents: Mapping[str, bytes], target: str, words: str
) -> None:
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        found(tmp_path, target)
    message = str(error.value)
    assert message.startswith("data.filepath: expected ") and words in message and "\n" not in message
    assert str(tmp_path) in message


def test_all_of_it_is_taken_as_text_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b'{"a": 1}\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"a\.txt; .*--data\.as-text"):
        find_files(str(tmp_path))
    assert find_files(str(tmp_path), as_text=True).paths == [tmp_path / "a.txt"]


def test_what_earlier_versions_read_is_still_known(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", ".b.txt", "real/c.txt")
    (tmp_path / "d.txt").symlink_to(tmp_path / "a.txt")
    names = [".b.txt", "a.txt", "d.txt", "real/c.txt"]
    assert [os.path.relpath(path, tmp_path) for path in files_as_before(str(tmp_path))] == names


def test_a_plain_text_that_is_named_as_records_is_told(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "a.txt")
    assert "read as plain text, though named as records: 1 (a.jsonl)" in notes(tmp_path, "a.jsonl")
    assert "though named" not in notes(tmp_path, "a.txt")
    assert not find_files(str(tmp_path / "a.jsonl"), as_text=True).notes


def test_a_field_that_is_taken_because_it_alone_has_texts_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"meta": {"author": "A fox"}, "story": "x"}\n' * 2)
    assert "the text is taken from the field 'story', the only one with texts; --data.text-field" in notes(
        tmp_path, "a.jsonl"
    )
    assert not find_files(str(tmp_path / "a.jsonl"), text_field="story").notes
    (tmp_path / "b.jsonl").write_text('{"text": "The fox", "url": "x"}\n' * 2)
    assert not find_files(str(tmp_path / "b.jsonl")).notes


def test_a_file_that_is_there_compressed_too_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "The fox"}\n' * 2)
    assert "compressed" not in notes(tmp_path)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert "read compressed and decompressed, perhaps the same twice: 1 (a.jsonl.gz)" in notes(tmp_path)


def test_plain_texts_that_describe_the_others_or_stand_beside_records_are_told(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "README.txt", "LICENSE.txt", "sha256sums.txt", "notice of a fox.md")
    said = "warning: read, though their names say that they describe the other files: 3 (LICENSE.txt, README.txt, sha256sums.txt)"
    assert said in notes(tmp_path) and "beside the records" not in notes(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"text": "the fox"}\n')
    assert said in notes(tmp_path) and "read beside the records, a document each: 1 (a.txt)" in notes(tmp_path)
    make(tmp_path / "readmes", "a/README.txt", "b/README.txt")
    assert notes(tmp_path / "readmes") == "", "a corpus of such files is one"


def test_unfinished_downloads_and_copies_of_records_are_not_read_and_are_told(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.part", "c.jsonl.incomplete", "d.jsonl~", "e.jsonl.bak", "party.jsonl"):
        (tmp_path / name).write_text('{"text": "the fox"}\n')
    assert found(tmp_path) == ["a.jsonl", "party.jsonl"] and found(tmp_path, "e.jsonl.bak") == ["e.jsonl.bak"]
    assert "not read, as their names say that they are unfinished, or copies: 4 (" in notes(tmp_path)
    assert len(find_files(str(tmp_path), by_name=False).files) == 6, "a run that began with them goes on"


def test_what_spark_dask_and_delta_lake_keep_beside_their_data_is_not_read(tmp_path: Path) -> None:
    for name in ("part-0.json", "_temporary/0/part-1.json", "deep/_metadata", "deep/part-2.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "the fox"}\n' * 2)
    assert found(tmp_path) == ["deep/part-2.json", "part-0.json"]
    assert "keep them beside their data: 2 (_temporary, _metadata)" in notes(tmp_path) and "warning" not in notes(
        tmp_path
    )
    (tmp_path / "_delta_log").mkdir()
    (tmp_path / "_delta_log" / "0.json").write_text('{"add": {"path": "part-0.json"}}\n')
    assert "warning: a table of Delta Lake: all its files are read" in notes(tmp_path)


def test_of_a_data_set_in_the_hubs_cache_the_train_split_of_its_main_revision_is_read(tmp_path: Path) -> None:
    hub = tmp_path / "datasets--owls--foxes"
    for revision, split, blob in (("old", "train", "3c"), ("new", "train", "2b"), ("new", "test", "1a")):
        (hub / "blobs").mkdir(parents=True, exist_ok=True)
        (hub / "blobs" / blob).write_text('{"text": "the fox"}\n' * 2)
        link = hub / "snapshots" / revision / f"{split}.jsonl"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(hub / "blobs" / blob)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("new")
    name = "datasets--owls--foxes/snapshots/new/train.jsonl"
    assert found(tmp_path) == found(tmp_path, hub.name) == found(tmp_path, f"{hub.name}/snapshots") == [name]
    assert "has the files of the main revision by their names: 2 (blobs, old)" in notes(tmp_path)
    assert "they are the test split: 1 (test.jsonl)" in notes(tmp_path)
    (hub / "refs" / "main").unlink()
    assert "the train splits of 2 folders are read" in notes(tmp_path), "nothing tells which revision is meant"


def test_of_records_that_stand_alone_in_their_file_a_text_within_a_field_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"meta": {"text": "the fox"}}')
    assert len(find_files(str(tmp_path), text_field="meta.text").files) == 1


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ('"text": ["the fox"], "title": "fox"', "text (a list of texts)"),
        ('"text": null, "title": "fox"', "text (null)"),
        ('"input_ids": [1, 2], "source": "web"', "input_ids (a list) without texts) from line 1 on"),
        ('"meta": {"text": "the fox"}, "title": "fox"', "--data.text-field meta.text"),
        ('"docId": "7", "n": 3', "the field docId, which by its name describes the text"),
        ('"source_url": "https://fox", "n": 3', "the field source_url, which by its name"),
    ],
)
def test_the_only_field_with_texts_is_not_taken_where_another_one_is_meant(
    tmp_path: Path, others: str, words: str
) -> None:
    (tmp_path / "a.jsonl").write_text(f"{{{others}}}\n" * 3)
    with pytest.raises(UserError) as error:
        find_files(str(tmp_path / "a.jsonl"))
    assert words in str(error.value) and "\n" not in str(error.value)
    field = next(name for name in ("title", "source", "docId", "source_url") if name in json.loads(f"{{{others}}}"))
    assert find_files(str(tmp_path / "a.jsonl"), text_field=field).files[0].field == field, "it can be asked for"


def test_words_in_a_list_are_no_token_ids(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    record = {"id": 3, "tokens": ["the", "fox"], "sentence": "the fox"}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
    parquet.write_table(pa.Table.from_pylist([record] * 3), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert find_files(str(tmp_path / name)).files[0].field == "sentence"


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table([["the fox"], ["the owl"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"text \(in two columns\)"):
        find_files(str(tmp_path / "a.parquet"))
