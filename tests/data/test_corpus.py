"""From corpora of records to tokens: the same tokens as of plain text, held-out documents, folders of data sets."""

import gzip
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import DataArgs
from llama_jax.data import Data, find_text, load_data
from llama_jax.data.corpus import Records
from llama_jax.data.documents import Rewinding
from llama_jax.data.sources import find_files
from llama_jax.data.splits import split_of
from llama_jax.data.summary import held_out_text, remarks
from llama_jax.data.text import PART_BYTES
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from tests import forked

DOCUMENTS = [
    "The fox went to the river.\n", 'The owl said: "12 boats!" Où?', "a\r\nb\0c", "word " * 30_000, "x" * 300_000,
    *(f"document {i} by the river\n" for i in range(200)),
]  # fmt: skip


def json_lines(documents: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def load(folder: Path, tokenizer: Tokenizer, filepath: Path | str, begun: bool = False, **options) -> Data:
    args = DataArgs(str(filepath), tokenizer_model_path=str(tokenizer.model_path), **options)
    return load_data(args, folder / "run" / "tokens", folder / "run" / "tokenizer.model", begun=begun)


def documents_in(stream: np.ndarray, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    ids = np.asarray(stream)
    return [tuple(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == tokenizer.bos_id))[1:]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens of each document, stored as a plain text of its own."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "text").mkdir()
    for i, text in enumerate(DOCUMENTS):
        (folder / "text" / f"{i:05}.txt").write_bytes(text.encode())
    data = load(folder, small_tokenizer, folder / "text", train_size=1.0)
    return documents_in(data.tokens.train, small_tokenizer)


def test_records_give_the_tokens_of_the_plain_text_and_one_in_ten_is_held_out_by_its_hash(
    tmp_path: Path, small_tokenizer: Tokenizer, plain: list[tuple[int, ...]]
) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(DOCUMENTS)))
    data = load(tmp_path, small_tokenizer, tmp_path / "a.jsonl.gz")
    found = {split: documents_in(getattr(data.tokens, split), small_tokenizer) for split in ("train", "eval")}
    held_out = [
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=b"llama-jax: held out").digest(), "big")
        >= 0.9 * 2**64
        for text in DOCUMENTS
    ]
    assert found["train"] == [ids for ids, out in zip(plain, held_out, strict=True) if not out]
    assert found["eval"] == [ids for ids, out in zip(plain, held_out, strict=True) if out]
    manifest = data.tokens.manifest
    assert 8 <= manifest.documents["eval"] <= 40 and sum(manifest.documents.values()) == len(DOCUMENTS)
    assert sum(manifest.text_bytes.values()) == sum(len(text.encode()) for text in DOCUMENTS)
    assert held_out_text(manifest).startswith("10% of the documents, chosen by a hash")
    assert remarks(data) == []


def test_the_split_does_not_depend_on_the_format_the_order_or_the_files(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    pd = pytest.importorskip("pandas")
    documents = DOCUMENTS[3:]
    (tmp_path / "1.jsonl").write_bytes(json_lines(documents))
    (tmp_path / "2").mkdir()
    pd.DataFrame({"text": documents[:50]}).to_parquet(tmp_path / "2" / "a.parquet", row_group_size=7)
    (tmp_path / "2" / "b.json.gz").write_bytes(gzip.compress(json_lines(documents[50:])))
    (tmp_path / "3.json").write_text(json.dumps([{"text": text} for text in reversed(documents)]))
    held_out = []
    for name in ("1.jsonl", "2", "3.json"):
        files = find_files(str(tmp_path / name)).files
        held_out.append(sorted(p.text for p in Records(files, 0.8).parts("eval")))
    assert held_out[0] == held_out[1] == held_out[2] and len(held_out[0]) > 10


@settings(max_examples=40)
@given(
    texts=st.lists(st.text("ab\n é😀", max_size=40), min_size=1, max_size=12),
    train_size=st.floats(0.05, 1),
    part_bytes=st.integers(4, 30),
)
def test_copies_are_on_the_same_side_and_a_text_file_is_on_that_of_the_record(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], train_size: float, part_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.jsonl").write_bytes(json_lines(["the record", *texts, *texts]))
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    corpus = Records(find_files(str(folder)).files, train_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_jax.data.corpus.PART_BYTES", part_bytes)
        patch.setattr("llama_jax.data.text.PART_BYTES", part_bytes)
        sides = {split: whole(corpus.parts(split)) for split in ("train", "eval")}
        by_unit = [whole(part for _, part in corpus.read(unit)) for unit in corpus.units()]
    assert not set(sides["train"]) & set(sides["eval"])
    wanted = ["the record", *texts, *texts, *texts]
    assert sorted(sides["train"] + sides["eval"]) == sorted(text for text in wanted if text)
    assert sorted(text for unit in by_unit for text in unit) == sorted(text for text in wanted if text)


def whole(parts) -> list[str]:
    """The documents of parts."""
    found: list[str] = []
    for part in parts:
        found = [*found, part.text] if part.starts else [*found[:-1], found[-1] + part.text]
    return found


def test_the_parts_of_a_document_are_those_of_the_plain_text(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    text = ("The fox went, " * 7 + "\n") * 9000
    (tmp_path / "a.jsonl").write_bytes(json_lines(["b", text]))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text + "x")
    corpus = Records(find_files(str(tmp_path)).files, 1.0)
    parts = {part.text: part for part in corpus.parts("train")}
    assert max(part.size for part in parts.values()) < 2 * PART_BYTES and len(parts) < 40


@pytest.mark.parametrize("separator", ["", r"\n\n", r"\n"])
def test_a_compressed_text_gives_the_tokens_and_the_cut_of_the_text(
    tmp_path: Path, small_tokenizer: Tokenizer, separator: str
) -> None:
    text = "\n\n".join(f"{i} The fox went\nto the river {'and on ' * (i % 7) * 1000}" for i in range(60)) + "é"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b").write_bytes(gzip.compress(text.encode()))
    one = load(tmp_path / "1", small_tokenizer, tmp_path / "a.txt", separator=separator)
    other = load(tmp_path / "2", small_tokenizer, tmp_path / "b", separator=separator)
    assert np.array_equal(one.tokens.train, other.tokens.train) and np.array_equal(one.tokens.eval, other.tokens.eval)
    assert one.tokens.manifest.text_sha256 == other.tokens.manifest.text_sha256
    assert "the last 10% of the text" in held_out_text(other.tokens.manifest)
    load(tmp_path / "2", small_tokenizer, tmp_path / "b", begun=True, separator=separator)
    load(tmp_path / "2", small_tokenizer, tmp_path / "a.txt", begun=True, separator=separator)


@given(moves=st.lists(st.tuples(st.integers(0, 120), st.integers(1, 40)), max_size=20), kept=st.integers(1, 50))
def test_a_stream_that_only_goes_forward_is_read_at_any_offset(moves: list[tuple[int, int]], kept: int) -> None:
    content = bytes(range(100))
    file = Rewinding(lambda: io.BytesIO(content), kept)
    for offset, count in moves:
        file.seek(offset)
        found = b""
        while len(found) < count and (piece := file.read(count - len(found))):
            found += piece
        assert found == content[offset : offset + count]


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A data set as a hub stores it: shards of parquet by split, and files that describe it."""
    pd = pytest.importorskip("pandas")
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("validation", 1), ("test", 1)):
        for i in range(count):
            frame = pd.DataFrame({"text": [f"{split} {i} {j}" for j in range(5)], "url": "http://x"})
            frame.to_parquet(folder / "data" / f"{split}-{i:05}-of-{count:05}.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (folder / "dataset_infos.json").write_text(json.dumps({"default": {"description": "x", "features": {}}}))
    (folder / "dataset_info.json").write_text(json.dumps({"description": "x", "splits": {}}, indent=2))
    return folder


def test_of_a_data_sets_folder_the_train_split_is_read_and_what_is_left_out_is_told(data_set: Path) -> None:
    files, notes = find_files(str(data_set))
    texts = whole(Records(files, 1.0).parts("train"))
    assert texts == [f"train {i} {j}" for i in range(3) for j in range(5)]
    told = " / ".join(notes)
    assert "the validation split: 1 (validation-00000-of-00001.parquet)" in told and "the test split: 1 (" in told
    assert "hidden: 1 (.gitattributes)" in told and "1 *.md" in told and "2 *.json" in told
    assert "--data.eval-filepath" in told
    assert len(find_files(str(data_set / "data" / "t*.parquet")).files) == 3
    (test,) = find_files(str(data_set / "data" / "test-*")).files
    assert "test-00000" in test.name


@pytest.mark.parametrize(
    ("names", "trained", "held_out"),
    [
        (["train.txt", "val.txt", "test.txt"], ["train.txt"], ["val.txt"]),
        (["stories-v2-train.txt", "stories-v2-valid.txt"], ["stories-v2-train.txt"], ["stories-v2-valid.txt"]),
        (["train/pos/1.txt", "train/neg/1.txt", "test/pos/1.txt"], ["train/neg/1.txt", "train/pos/1.txt"], ["test/pos/1.txt"]),
        (["The train.txt", "Dev notes.txt", "other.txt"], ["Dev notes.txt", "The train.txt", "other.txt"], ...),
        (["test.txt", "val.txt"], ["test.txt", "val.txt"], ...),
    ],
)  # fmt: skip
def test_texts_that_a_folder_holds_out_are_not_trained_on(tmp_path: Path, names: list[str], trained, held_out) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"The fox of {name}")
    files, notes = find_files(str(tmp_path))
    assert [os.path.relpath(file.name, tmp_path) for file in files] == trained
    for name in set(names) - set(trained):
        assert f"({name})" in " / ".join(notes)
    given = find_files(str(tmp_path), "data.eval_filepath").files
    assert [os.path.relpath(file.name, tmp_path) for file in given] == (trained if held_out is ... else held_out)


def test_a_run_that_began_with_all_texts_of_a_folder_goes_on_with_them(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("train", "test"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} " * 400)
    args = DataArgs(str(tmp_path / "texts"), tokenizer_model_path=str(small_tokenizer.model_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_jax.data.sources.of_one_split", lambda files, held_out: (files, []))
        before = load_data(args, tmp_path / "run", tmp_path / "run.model")
    after = load_data(args, tmp_path / "run", tmp_path / "run.model", begun=True)
    assert np.array_equal(after.tokens.train, before.tokens.train)
    new = load_data(args, tmp_path / "new", tmp_path / "new.model")
    assert new.tokens.train.size < before.tokens.train.size


def test_a_file_of_a_data_set_that_is_missing_is_named(data_set: Path) -> None:
    (data_set / "data" / "train-00001-of-00003.parquet").unlink()
    told = " / ".join(find_files(str(data_set)).notes)
    assert "1 of 3 files that their names count are missing: train-00001-of-00003.parquet" in told
    assert "missing" not in " ".join(find_files(str(data_set / "data" / "train-00002-of-00003.parquet")).notes)


def test_a_data_set_that_its_own_library_saved_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    both = {s: datasets.Dataset.from_dict({"text": [f"{s} {i}" for i in range(5)]}) for s in ("train", "test")}
    saved = datasets.DatasetDict(both)
    saved.save_to_disk(tmp_path / "saved")
    both["train"].map(lambda row: {"text": row["text"].upper()}, cache_file_name=str(tmp_path / "saved" / "train" / "cache-0123456789abcdef.arrow"))  # fmt: skip
    both["train"].to_json(tmp_path / "a.jsonl.gz", compression="gzip")
    both["train"].to_parquet(tmp_path / "a.parquet")
    for name in ("saved", "saved/train", "a.jsonl.gz", "a.parquet"):
        files = find_files(str(tmp_path / name)).files
        assert whole(Records(files, 1.0).parts("train")) == [f"train {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00012.parquet", "train"), ("data/test-0.parquet", "test"), ("en/validation/0000.parquet", "validation"),
        ("c4-train.00000-of-01024.json.gz", "train"), ("dev.jsonl", "validation"), ("val_1.jsonl.zst", "validation"),
        ("train/test.jsonl", "test"), ("books.jsonl", ""), ("pretraining.jsonl", ""), ("contest.parquet", ""),
        ("eval.jsonl", "test"), ("my-training-set.parquet", "train"), ("wiki.train.jsonl", "train"), ("a.b.val.0.jsonl.gz", "validation"),
        ("trainData.jsonl", "train"), ("holdout.jsonl", "test"), ("hold-out/0.jsonl", "test"), ("testset_1.parquet", "test"),
        ("TestData.parquet", "test"), ("greatest.jsonl", ""), ("heldout.train.jsonl", "train"),
    ],
)  # fmt: skip
def test_a_split_is_a_word_of_the_name(name: str, split: str) -> None:
    assert split_of(name) == split


def test_records_and_texts_in_one_folder_are_all_read_and_a_file_that_describes_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"a compressed text"))
    (tmp_path / "c").write_bytes(json_lines(["a record", "another"]))
    (tmp_path / "one.json").write_bytes(json_lines(["a single record"]))
    (tmp_path / "state.json").write_text('{"version": "1"}')
    (tmp_path / "names.json").write_text('["a", "b"]')
    (tmp_path / "script.gz").write_bytes(gzip.compress(b"some other text"))
    files, notes = find_files(str(tmp_path))
    assert [os.path.basename(file.name) for file in files] == ["a.txt", "b.txt.gz", "c", "one.json"]
    assert "2 *.json" in notes[0] and "1 *.gz" in notes[0]
    assert whole(Records(files, 1.0).parts("train")) == [
        "a text", "a compressed text", "a record", "another", "a single record",
    ]  # fmt: skip


def test_options_for_records_and_for_text_are_not_mixed_up(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(DOCUMENTS[:3]))
    (tmp_path / "a.txt").write_text("The fox.\n" * 9)
    with pytest.raises(UserError, match=r"data\.separator: expected none, as a record is a document"):
        load(tmp_path, small_tokenizer, tmp_path / "a.jsonl", separator=r"\n")
    with pytest.raises(UserError, match=r"data\.text_field: expected records, .*found plain text"):
        load(tmp_path, small_tokenizer, tmp_path / "a.txt", text_field="text")
    with pytest.raises(UserError, match=r"data\.filepath: expected a path, found -"):
        load(tmp_path, small_tokenizer, "-")


def test_a_held_out_text_of_its_own_is_all_that_is_held_out(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("The fox.\n" * 90)
    (tmp_path / "b.jsonl").write_bytes(json_lines(DOCUMENTS[5:15]))
    data = load(tmp_path, small_tokenizer, tmp_path / "a.txt", eval_filepath=str(tmp_path / "b.jsonl"))
    assert small_tokenizer.decode(data.tokens.train) == "The fox.\n" * 90
    held_out = documents_in(data.tokens.eval, small_tokenizer)
    assert [small_tokenizer.decode(ids) for ids in held_out] == DOCUMENTS[5:15]
    assert data.tokens.manifest.documents == {"train": 1, "eval": 10}
    assert held_out_text(data.tokens.manifest) == f"{tmp_path / 'b.jsonl'}, a text of its own"
    with pytest.raises(UserError, match=r"data\.train_size: expected none beside data\.eval_filepath"):
        load(tmp_path, small_tokenizer, tmp_path / "a.txt", eval_filepath=str(tmp_path / "b.jsonl"), train_size=0.5)
    with pytest.raises(UserError, match=r"data\.eval_filepath: expected .* found nothing at"):
        load(tmp_path, small_tokenizer, tmp_path / "a.txt", eval_filepath=str(tmp_path / "c.jsonl"))


def test_a_run_that_has_begun_keeps_its_field_its_records_and_its_held_out_text(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    rows = [{"text": f"the fox {i}", "body": f"an owl {i}"} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("held out\n" * 9)
    (tmp_path / "c.txt").write_text("held out too\n" * 9)
    path, own = tmp_path / "a.jsonl", {"eval_filepath": str(tmp_path / "b.txt")}
    first = load(tmp_path, small_tokenizer, path, **own)
    again = load(tmp_path, small_tokenizer, path, begun=True, **own)
    assert again.tokens.manifest == first.tokens.manifest
    for changed, words in (
        ({"eval_filepath": str(tmp_path / "c.txt")}, r"the held-out text was .*b\.txt and is .*c\.txt now"),
        ({}, r"the held-out text was .*b\.txt and is a part of the text now"),
        (own | {"text_field": "body"}, "the text was the field text and is the field body now"),
    ):
        with pytest.raises(
            UserError, match=rf"data\.filepath: expected .* that the run began with, found that {words}"
        ):
            load(tmp_path, small_tokenizer, path, begun=True, **changed)
    (tmp_path / "b.txt").write_text("something else\n" * 9)
    with pytest.raises(UserError, match=r"b\.txt has changed"):
        load(tmp_path, small_tokenizer, path, begun=True, **own)
    path.write_bytes(path.read_bytes() + json_lines(["more"]))
    with pytest.raises(UserError, match="has grown by"):
        load(tmp_path, small_tokenizer, path, begun=True, **own)


def test_a_run_on_json_lines_as_text_goes_on_as_text(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(json_lines(DOCUMENTS[5:90]))
    first = load(tmp_path, small_tokenizer, tmp_path / "text", as_text=True)
    (tmp_path / "text" / "b.jsonl").write_bytes(json_lines(["of a later version"]))
    again = load(tmp_path, small_tokenizer, tmp_path / "text", begun=True)
    assert again.tokens.manifest == first.tokens.manifest


def test_what_was_skipped_is_told_at_every_start(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(DOCUMENTS[5:]) + b"{oops\n" + json_lines([""]))
    with pytest.raises(UserError, match=r"a\.jsonl: line 201: expected JSON"):
        load(tmp_path, small_tokenizer, tmp_path / "a.jsonl")
    for begun in (False, True):
        data = load(tmp_path, small_tokenizer, tmp_path / "a.jsonl", begun=begun, bad_records="skip")
        (line,) = remarks(data)
        assert line.startswith("warning: 1 records cannot be read and were skipped: ") and "line 201" in line


def test_prepare_reads_standard_input_and_says_what_it_held_out(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    lines = json_lines(DOCUMENTS[5:90]).decode()
    (tmp_path / "a.jsonl").write_text(lines)
    tokenizer = ["--tokenizer-model-path", str(small_tokenizer.model_path)]
    prepare = ["-m", "llama_jax.data", "prepare", *tokenizer]
    piped = forked.run([*prepare, "--filepath", "-", "--output", "piped"], tmp_path, stdin=lines)
    assert piped.returncode == 0, piped.stderr
    assert "held out: 10% of the documents, chosen by a hash of their text" in piped.stdout
    assert forked.run([*prepare, "--filepath", "a.jsonl", "--output", "out"], tmp_path).returncode == 0
    for name in ("train.bin", "eval.bin"):
        assert (tmp_path / "piped" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "piped").iterdir()) == sorted(
        p.name for p in (tmp_path / "out").iterdir()
    )
    again = forked.run([*prepare, "--filepath", "-", "--output", "piped"], tmp_path, stdin=lines)
    assert "holds these tokens already" in again.stdout
    empty = forked.run([*prepare, "--filepath", "-", "--output", "new"], tmp_path, stdin="")
    assert empty.returncode == 2 and "found standard input empty" in empty.stderr and not (tmp_path / "new").exists()


def test_of_a_folder_without_a_train_split_what_is_named_for_evaluation_is_read_and_that_is_told(
    tmp_path: Path,
) -> None:
    for name in ("corpus", "test", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    files, notes = find_files(str(tmp_path))
    assert len(files) == 3
    told = [note for note in notes if note.startswith("warning: read to train on, though their names say")]
    assert [("validation split: 1 (validation.jsonl)" in note, "test split: 1 (test.jsonl)" in note) for note in told] == [
        (True, False), (False, True),
    ]  # fmt: skip
    assert not find_files(str(tmp_path / "test.jsonl")).notes


@pytest.mark.parametrize(
    ("names", "taken", "told"),
    [
        (("train.jsonl", "test.txt"), ["train.jsonl"], "not read, as their names say that they are the test split: 1 (test.txt)"),
        (("wiki.train.jsonl", "wiki.test.jsonl"), ["wiki.train.jsonl"], "the test split: 1 (wiki.test.jsonl)"),
        (("a.txt", "a.test.txt"), ["a.test.txt", "a.txt"], "warning: read to train on, though their names say that they are the test"),
        (("a.txt", "a_heldout.txt"), ["a.txt", "a_heldout.txt"], "they are the test split: 1 (a_heldout.txt)"),
        (("fox-train.txt", "owl-test.txt"), ["fox-train.txt", "owl-test.txt"], "warning: read to train on, though their names say"),
        (("a.txt", "crash test.txt"), ["a.txt", "crash test.txt"], ""),
    ],
)  # fmt: skip
def test_held_out_splits_are_left_out_or_told_however_the_files_are_named(
    tmp_path: Path, names: tuple[str, ...], taken: list[str], told: str
) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    files, notes = find_files(str(tmp_path))
    assert [os.path.basename(file.name) for file in files] == taken
    assert told in " / ".join(notes) if told else not notes


@pytest.mark.parametrize("name", ["heldout.jsonl", "held_out.jsonl", "held-out-1.jsonl", "held out/0.jsonl"])
def test_what_is_named_held_out_is_not_trained_on(tmp_path: Path, name: str) -> None:
    for path in ("train.jsonl", name):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(json.dumps({"text": path}))
    files, notes = find_files(str(tmp_path))
    assert [os.path.basename(file.name) for file in files] == ["train.jsonl"] and f"({name})" in " ".join(notes)


def test_the_built_in_stories_have_a_separator_of_their_own(tmp_path: Path) -> None:
    for separator in ("took", "\\n"):
        with pytest.raises(UserError, match=r"^data\.separator: expected none with the built-in stories, found"):
            find_text(DataArgs(stories=20, separator=separator), tmp_path)
    for separator in ("", "\\n\\n"):  # a run's settings tell it
        find_text(DataArgs(stories=20, separator=separator), tmp_path)
    find_text(DataArgs(stories=20, separator="took"), tmp_path, begun=True)


def test_a_file_that_is_trained_on_and_held_out_is_told(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"The fox of {name}")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "b.txt")
    text = find_text(DataArgs(str(tmp_path / "*.txt"), eval_filepath=str(tmp_path / "linked.txt")), tmp_path)
    assert any("1 of 1 held-out files are also trained on (linked.txt)" in note for note in text.notes)
    text = find_text(DataArgs(str(tmp_path / "a.txt"), eval_filepath=str(tmp_path / "b.txt")), tmp_path)
    assert not text.notes
