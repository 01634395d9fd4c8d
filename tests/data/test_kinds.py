"""What a file is, told by its bytes: text is taken, and what would be trained on as if it were text is named."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_jax.data import kinds
from llama_jax.data.kinds import bad_bytes, kind_of
from tests.commands import ROOT

ENGLISH = "All happy families are alike; each unhappy family is unhappy in its own way.\n" * 40
GERMAN = "Alle glücklichen Familien ähneln einander; jede unglückliche ist auf ihre eigene Art unglücklich.\n" * 40
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая несчастлива по-своему.\n" * 40  # noqa: RUF001
CHINESE = "幸福的家庭都是相似的，不幸的家庭各有各的不幸。\n" * 40  # noqa: RUF001
RECORDS = [{"text": f"The fox {i} went to the river.", "id": i} for i in range(60)]


def ids(highest: int, dtype: str) -> bytes:
    return np.random.default_rng(0).integers(0, highest, 30_000).astype(dtype).tobytes()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(ROOT / "train.py", "train.py")
    return file.getvalue()


def zip_of(names: list[str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, ENGLISH)
    return file.getvalue()


def numpy_file(save: Callable[..., None]) -> bytes:
    file = io.BytesIO()
    save(file, np.arange(10))
    return file.getvalue()


def sqlite_file(folder: Path) -> bytes:
    connection = sqlite3.connect(folder / "a.db")
    connection.execute("create table a (b)")
    connection.commit()
    connection.close()
    return (folder / "a.db").read_bytes()


def safetensors() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def lines(records: list[object]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


OTHERS: dict[str, tuple[bytes, str]] = {
    "gzip": (gzip.compress(ENGLISH.encode()), "gzip"),
    "bzip2": (bz2.compress(ENGLISH.encode()), "bzip2"),
    "xz": (lzma.compress(ENGLISH.encode()), "xz"),
    "lzma": (lzma.compress(ENGLISH.encode(), lzma.FORMAT_ALONE), "lzma"),
    "zstd": (b"\x28\xb5\x2f\xfd\x24\x05text", "zstd"),
    "zstd, a skippable frame first": (b"\x50\x2a\x4d\x18\4\0\0\0text", "zstd"),
    "zip": (zip_of(["a.txt"]), "zip"),
    "tar": (tar(), "tar"),
    "JSON lines of texts": (lines(["The \"fox\" ran.\n", "The owl."] * 9), "JSON lines of texts"),
    "lines that Python printed": ("".join(f"{record}\n" for record in RECORDS).encode(), "objects that are not JSON"),
    "JSON with a comma behind each line": (lines(RECORDS).replace(b"}\n", b"},\n"), "objects that are not JSON"),
    "parquet": (b"PAR1\x15\4\x15\x10" + bytes(40) + b"PAR1", "parquet"),
    "arrow file": (b"ARROW1\0\0" + bytes(40), "arrow"),
    "arrow stream": (b"\xff\xff\xff\xff\x80\0\0\0" + bytes(40), "arrow"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
    "numpy": (numpy_file(np.save), "numpy"),
    "npz": (numpy_file(np.savez), "zip"),
    "safetensors": (safetensors(), "safetensors"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(40), "GGUF"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "PDF"),
    "RTF": (b"{\\rtf1\\ansi the fox}", "RTF"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "PNG"),
    "JPEG": (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "JPEG"),
    "a companion file of macOS": (b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(40), "macOS"),
    "token ids of two bytes": (ids(50_257, "<u2"), "token ids"),
    "token ids of a small vocabulary": (ids(300, "<u2"), "token ids"),
    "token ids of characters": (ids(65, "<u2"), "token ids"),
    "token ids of one byte": (ids(65, "u1"), "binary"),
    "token ids of four bytes": (ids(32_000, "<u4"), "binary"),
    "a token file of llm.c": ((20240520).to_bytes(4, "little") + bytes(1020) + ids(50_257, "<u2"), "llm.c"),
    "random bytes": (np.random.default_rng(0).bytes(50_000), "binary"),
    "zeros": (bytes(50_000), "binary"),
    "Latin-1": (GERMAN.encode("latin-1"), "another encoding"),
    "Windows-1251": (RUSSIAN.encode("cp1251"), "another encoding"),
    "GB18030": (CHINESE.encode("gb18030"), "another encoding"),
    "JSON lines": (lines(RECORDS), "JSON lines"),
    "JSON lines with an empty and a broken one": (lines(RECORDS) + b"\n\n{oops\n", "JSON lines"),
    "JSON lines, the first of which is long": (lines([{"text": ENGLISH * 900}] * 3), "JSON"),
    "a JSON array": (json.dumps(RECORDS).encode(), "JSON"),
    "a JSON array, indented": (json.dumps(RECORDS * 900, indent=1).encode(), "JSON"),
    "a JSON object": (json.dumps(RECORDS[0]).encode(), "JSON"),
    "HTML": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "HTML"),
    "HTML behind a comment": (b"<!-- saved from -->\n<html lang='en'><body>Sign in</body></html>", "HTML"),
    "HTML without a beginning": (b"<head><title>Sign in</title></head><body></body>", "HTML"),
    "a web archive": (b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 8\r\n\r\nThe fox.\r\n", "WARC"),
    "WikiExtractor's articles": (b'<doc id="12" url="https://x" title="Fox">\nFox\n\nThe fox.\n</doc>\n', "WikiExtractor"),
    "token ids in a text": (" ".join(map(str, range(300))).encode(), "numbers"),
    "token ids, a document a line": (b"5, 17, 3, 12\n" * 40, "numbers"),
    "a table without the names of columns": (b"The fox went.\tDer Fuchs ging.\n" * 20, "a table"),
    "a table in JSON by columns, of pandas": (b'{"text":{"0":"The fox","1":"The owl"},"n":{"0":1,"1":2}}', "column by column"),
    "a table in JSON by columns, of lists": (b'{"text":["The fox","The owl"],"n":[1,2]}\n', "column by column"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS"),
    "an answer of GitHub": (b"404: Not Found", "server's answer"),
    "an answer of a hub": (b"Entry not found\n", "server's answer"),
} | {
    f"{codec} without a mark, {name}": (text.encode(codec), codec.upper().removesuffix("-LE").removesuffix("-BE"))
    for codec in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-16", "utf-32")
    for name, text in {"English": ENGLISH, "German": GERMAN, "Russian": RUSSIAN, "Chinese": CHINESE, "short": "fox"}.items()
}  # fmt: skip


def kind_in(folder: Path, content: bytes, name: str = "a.txt") -> str | None:
    path = folder / name
    path.write_bytes(content)
    found = kind_of(path, len(content))
    return None if found is None else found.name


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_plain_text_is_named(tmp_path: Path, name: str) -> None:
    content, words = OTHERS[name]
    assert words in (kind_in(tmp_path, content) or "plain text")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_named(tmp_path: Path, protocol: int) -> None:
    assert "pickle" in (kind_in(tmp_path, pickle.dumps({"a": [1, 2]}, protocol)) or "")


def test_a_pickle_of_the_protocol_that_is_text_is_named(tmp_path: Path) -> None:
    assert "pickle" in (kind_in(tmp_path, pickle.dumps(["The fox", "The owl"], 0)) or "")
    assert "pickle" in (kind_in(tmp_path, pickle.dumps({"a": [1, 2]}, 0)) or "")


def test_a_database_and_a_tokenizer_and_a_program_are_named(tmp_path: Path, small_tokenizer) -> None:
    assert "SQLite" in (kind_in(tmp_path, sqlite_file(tmp_path)) or "")
    assert "SentencePiece" in (kind_in(tmp_path, small_tokenizer.model_bytes) or "")
    assert "ELF" in (kind_in(tmp_path, b"\x7fELF\2\1\1\0") or "")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_table_that_is_named_one_is_a_table(tmp_path: Path, name: str) -> None:
    mark = "," if name == "a.csv" else "\t"
    assert kind_in(tmp_path, f"text{mark}label\nThe fox{mark}1\nThe owl{mark}2\n".encode(), name) == "a table"
    assert kind_in(tmp_path, b"text\nThe fox went\nto the river\n", name) == "a table", "of one column, with its name"
    assert kind_in(tmp_path, b"The fox went\nto the river\nand saw an owl\n", name) is None


TEXTS = {
    "English": ENGLISH, "German": GERMAN, "Russian": RUSSIAN, "Chinese": CHINESE, "a mark": "\ufeffThe fox", "one letter": "a",
    "CRLF": "a\r\nb\r\n", "old Mac": "a\rb\r", "form feeds": "page\fpage\f", "colours": "\x1b[31mred\x1b[0m\n" * 50,
    "DOS": "the end\x1a", "NUL": "a\0b\0\0c and the rest of the line", "one NUL": "\0",
    "BZh": "BZh is a word", "ORC": "ORCHIDS are flowers", "MZ": "MZ", "BM": "BMW", "RIFF": "RIFF RAFF", "PK": "PK is short",
    "ID3": "ID3 is an algorithm", "GIF": "GIF8 is no format", "GGUF": "GGUF is a format",
    "braces": "{ this is no JSON }\nmore", "brackets": "[Chapter 1]\nOnce", "a list": "[1] Introduction\n[2] More\n",
    "LaTeX": "{\\bf the fox} went", "JSON in prose": '{"a": 1}\nand then prose\nmore prose\n',
    "quotations": '"The fox."\n"The owl."\n', "commas": "one, two\nthree, four\n", "a wiki": "<mediawiki xmlns='x'>\n text",
    "digits": "3.14159 26535 89793 23846\n" * 20, "a sum": "12 + 30 = 42\n" * 40, "one number": "31415926535" * 40,
    "tabs that indent": "for fox in foxes:\n\tprint(fox)\n" * 20, "tabs in some lines": "The\tfox\nwent\n" * 20,
    "a tag": "<doc>\nThe fox\n</doc>\n", "a heading": "<header>\nThe fox\n", "WARC in prose": "WARC is a format",
    "not found": "Not found was the fox, and the owl was sad all day long.", "Markdown": "# Title\n\ntext", "code": "import os\n",
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_text(tmp_path: Path, name: str) -> None:
    assert kind_in(tmp_path, TEXTS[name].encode()) is None


def test_the_projects_own_files_are_text(tmp_path: Path) -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("llama_jax/**/*.py"), *ROOT.glob("configs/*.toml")]:
        assert kind_of(path, path.stat().st_size) is None, path


@pytest.mark.parametrize("bad", [b"\xff", b"\xe9t\xe9", b"\xf0\x9f\x98"])
def test_a_few_odd_bytes_are_taken_and_more_are_not(tmp_path: Path, bad: bytes) -> None:
    assert kind_in(tmp_path, ENGLISH.encode() + bad + ENGLISH.encode()) is None
    assert kind_in(tmp_path, (ENGLISH[:100].encode() + bad) * 20) is not None


def test_what_goes_wrong_far_into_a_large_file_is_seen(tmp_path: Path) -> None:
    text = ENGLISH.encode() * 1000
    assert kind_in(tmp_path, text) is None
    assert kind_in(tmp_path, text + gzip.compress(np.random.default_rng(0).bytes(len(text) // 8))) is not None
    cut = GERMAN.encode() * 1000  # windows that begin and end within characters
    assert len(cut) > kinds.WHOLE and kind_in(tmp_path, cut) is None


def test_bad_bytes_are_counted() -> None:
    assert [bad_bytes(raw) for raw in (b"", b"a", "é字😀".encode(), b"\xff\xfea", "é".encode()[:1], b"\x80\x80x")] == [
        0, 0, 0, 2, 1, 2,
    ]  # fmt: skip


@pytest.mark.parametrize("mark", [",", "\t", ";"])
def test_a_table_with_the_names_of_its_columns_is_a_table_in_a_file_of_any_name(tmp_path: Path, mark: str) -> None:
    rows = "".join(f'{i}{mark}"The fox, he said; went\nto ""the"" river {i}"\n' for i in range(40))
    assert kind_in(tmp_path, f"id{mark}text\n{rows}".encode(), "a.txt") == "a table"
    assert kind_in(tmp_path, f"{mark}text\n{rows}".encode(), "a") == "a table", "pandas leaves the index without a name"
    assert kind_in(tmp_path, f"id{mark}text\n{rows * 3000}".encode(), "a.txt") == "a table", "rows may be cut"
    assert kind_in(tmp_path, f"id{mark}text\n{rows}{mark * 3}\n".encode(), "a.txt") is None
    assert kind_in(tmp_path, f"fox{mark}owl\n{rows}".encode(), "a.txt") is None, "prose may have commas"
