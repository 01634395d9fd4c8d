"""Slices of a file, read by whoever, have each document once: exactly what the file has when it is read whole."""

import gzip
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data import documents, slices, text
from llama_jax.data.corpus import Records
from llama_jax.data.parts import AnyCorpus, Part
from llama_jax.data.sources import find_files
from llama_jax.data.text import Corpus

SEPARATORS = [b"", b"\n", b"\n\n", b"<|e|>", b"--", b"\n-\n", b"abab"]
PIECES = [
    b"a", b"b", b" ", b"\n", b"\f", b"\r\n", b"word ", b"text", b"-", "é".encode(), b"\n\n\n", b"x" * 20, b"   ", b"the fox went\nto the\n",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_windows() -> Iterator[None]:
    """Windows of some bytes, so that short texts have all the cases of long ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "WINDOW_BYTES", 40)
        patch.setattr(slices, "WORDS_BYTES", 30)
        patch.setattr(documents, "BUFFER_BYTES", 64)
        patch.setattr(documents, "BACK_BYTES", 64)
        patch.setattr(documents, "LOOK_BYTES", 8)
        patch.setattr(text, "PART_BYTES", 16)
        patch.setattr(text, "BACK_BYTES", 8)
        yield


def joined(parts: Iterator[tuple[str, Part]]) -> dict[str, str]:
    """The parts of each split, with < where a document begins and > where one ends."""
    found: dict[str, list[str]] = {}
    for split, part in parts:
        found.setdefault(split, []).append("<" * part.starts + part.text + ">" * part.ends)
    return {split: "".join(texts) for split, texts in found.items()}


def by_slices(corpus: AnyCorpus, largest: int, readers: list[int]) -> Iterator[tuple[str, Part]]:
    """Read a corpus slice by slice, as several processes do."""
    copies = [pickle.loads(pickle.dumps(corpus)) for _ in range(2)]
    for i, unit in enumerate(corpus.units(largest)):
        yield from copies[readers[i % len(readers)]].read(unit)


READERS = st.lists(st.integers(0, 1), min_size=1, max_size=7)
LARGEST = st.sampled_from([5, 11, 33, 100])


@settings(max_examples=300)
@given(data=st.data(), largest=LARGEST, readers=READERS, train_size=st.sampled_from([1.0, 0.9, 0.5, 0.1]))
def test_slices_of_a_text_are_the_text(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, largest: int, readers: list[int], train_size: float
) -> None:
    separator = data.draw(st.sampled_from(SEPARATORS))
    pieces = data.draw(st.lists(st.sampled_from([separator, separator, *PIECES]), min_size=1, max_size=80))
    raw = b"".join(pieces)
    packed = data.draw(st.booleans()) and raw.strip()
    path = tmp_path_factory.mktemp("text") / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    files = find_files(str(path), as_text=True).files if packed else [path]
    corpus = Corpus(files, separator, train_size, by_documents=data.draw(st.booleans()))
    whole = joined(found for unit in corpus.units() for found in corpus.read(unit))
    assert joined(by_slices(corpus, largest, readers)) == whole


@settings(max_examples=100)
@given(
    texts=st.lists(st.sampled_from(["", "fox", "the owl\n", "ü" * 9, "x" * 60]), min_size=1, max_size=30),
    packed=st.booleans(),
    end=st.sampled_from([b"", b"\n", b"\n\n \n"]),
    largest=LARGEST,
    readers=READERS,
)
def test_slices_of_json_lines_are_the_lines(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    packed: bool,
    end: bytes,
    largest: int,
    readers: list[int],
) -> None:
    raw = b"\n".join(json.dumps({"text": each}, ensure_ascii=False).encode() for each in texts) + end
    path = tmp_path_factory.mktemp("lines") / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    corpus = Records(find_files(str(path)).files, 0.7)
    whole = joined(found for unit in corpus.units() for found in corpus.read(unit))
    assert len(corpus.units(largest)) == max(1, len(raw) // largest)
    assert joined(by_slices(corpus, largest, readers)) == whole


def test_slices_of_a_group_of_rows_are_its_rows(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": [f"document {i} " * (i % 7) for i in range(300)], "n": list(range(300))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=120)
    corpus = Records(find_files(str(tmp_path / "a.parquet")).files, 0.7)
    whole = joined(found for unit in corpus.units() for found in corpus.read(unit))
    assert len(corpus.units()) == 3 and len(corpus.units(400)) > 9
    assert joined(by_slices(corpus, 400, [0, 1, 1])) == whole
    numbers = [part.number for unit in corpus.units(400) for _, part in corpus.read(unit)]
    assert sorted(numbers) == sorted(part.number for unit in corpus.units() for _, part in corpus.read(unit))


def test_a_bad_line_in_a_slice_is_named_by_its_line_in_the_file(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(100)]
    lines[70] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = Records(find_files(str(tmp_path / "a.jsonl")).files, 1.0, skip=True)
    units = corpus.units(300)
    assert len(units) > 5
    documents = [part.text for unit in units for _, part in corpus.read(unit)]
    assert len(documents) == 99 and corpus.skipped.count == 1
    assert corpus.skipped.examples[0].startswith(f"{tmp_path}/a.jsonl: line 71: ")
