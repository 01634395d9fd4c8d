"""The command train-tokenizer, and the sample of a text that a vocabulary is trained on."""

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import DataArgs
from llama_jax.data import find_text, vocabulary
from llama_jax.data.parts import Part
from llama_jax.data.vocabulary import Block, Sentences, blocks, sample
from llama_jax.tokenizer import trained_model
from tests import inside

WORDS = [f"{a}{b}{c}" for a in ("fox", "owl", "Où", "грач") for b in ("ing", "er", "n", "") for c in ("", "s", "1")]


def document(number: int, words: int = 12) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=words))


def write(folder: Path, count: int = 400) -> list[str]:
    texts = [document(i) for i in range(count)]
    (folder / "corpus").mkdir()
    for half in (0, 1):
        lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts) if i * 2 // count == half]
        (folder / "corpus" / f"{half}.jsonl").write_text("\n".join(lines))
    return texts


def command(folder: Path, *argv: str, status: int = 0, vocab_size: int = 320):
    flags = ["--vocab-size", str(vocab_size), *argv]
    done = inside.run(["-m", "llama_jax.data", "train-tokenizer", *flags], folder)
    assert done.returncode == status, done.stderr
    return done


def refused(folder: Path, *argv: str, **options) -> str:
    done = command(folder, *argv, status=2, **options)
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_it_writes_the_vocabulary_that_prepare_trains_on_the_same_text(tmp_path):
    write(tmp_path)
    done = command(tmp_path, "--filepath", "corpus", "--output", "new/tokenizer.model")
    assert done.stderr == "" and "new/tokenizer.model: 320 tokens" in done.stdout and "10% is held out" in done.stdout
    prepare = ["-m", "llama_jax.data", "prepare", "--filepath", "corpus", "--vocab-size", "320", "--output", "tokens"]
    assert inside.run(prepare, tmp_path).returncode == 0
    model = (tmp_path / "new" / "tokenizer.model").read_bytes()
    assert model == (tmp_path / "tokens" / "tokenizer.model").read_bytes()
    given = ["--tokenizer-model-path", "new/tokenizer.model", "--output", "again"]
    assert inside.run([*prepare[:5], *given], tmp_path).returncode == 0
    assert (tmp_path / "again" / "train.bin").read_bytes() == (tmp_path / "tokens" / "train.bin").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.model"]


def test_a_text_that_is_no_sample_gives_the_vocabulary_of_all_its_lines(tmp_path):
    texts = write(tmp_path)
    command(tmp_path, "--filepath", "corpus", "--output", "t.model", "--train-size", "1")
    assert (tmp_path / "t.model").read_bytes() == trained_model(texts, 320)
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert encoder.decode(encoder.encode("Où 12 🦊\n")) == "Où 12 🦊\n" and encoder.vocab_size() == 320


def test_every_form_of_a_corpus_gives_the_same_vocabulary(tmp_path):
    texts = [text for text in write(tmp_path)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": t}) for t in texts).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=50)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    flags = {"a.txt": ["--separator", r"\n", "--train-size", "1"]}
    for name in ("corpus", "a.jsonl.gz", "a.parquet", "a.txt"):
        command(tmp_path, "--filepath", name, "--output", f"{name}.model", *flags.get(name, ["--train-size", "1"]))
    assert (
        len({(tmp_path / f"{name}.model").read_bytes() for name in ("corpus", "a.jsonl.gz", "a.parquet", "a.txt")}) == 1
    )


def test_the_order_in_which_files_were_written_does_not_matter(tmp_path):
    write(tmp_path)
    (tmp_path / "other").mkdir()
    for name in ("1.jsonl", "0.jsonl"):
        (tmp_path / "other" / name).write_bytes((tmp_path / "corpus" / name).read_bytes())
    for name in ("corpus", "other"):
        command(tmp_path, "--filepath", name, "--output", f"{name}.model")
    assert (tmp_path / "corpus.model").read_bytes() == (tmp_path / "other.model").read_bytes()


def test_held_out_documents_have_no_part_in_it(tmp_path):
    texts = write(tmp_path)
    corpus = find_text(DataArgs(filepath=str(tmp_path / "corpus"), train_size=0.5), tmp_path).corpus
    kept = [part.text for part in corpus.parts("train")]
    assert 100 < len(kept) < 300 and "\n".join(Sentences(corpus.parts("train"))).split("\n") == kept
    command(tmp_path, "--filepath", "corpus", "--output", "t.model", "--train-size", "0.5")
    assert (tmp_path / "t.model").read_bytes() == trained_model(kept, 320) != trained_model(texts, 320)


def test_a_second_start_says_so_and_another_vocabulary_is_never_replaced(tmp_path):
    write(tmp_path)
    argv = ["--filepath", "corpus", "--output", "t.model"]
    command(tmp_path, *argv)
    model, time = (tmp_path / "t.model").read_bytes(), (tmp_path / "t.model").stat().st_mtime_ns
    assert "t.model: holds this vocabulary already, 320 tokens" in command(tmp_path, *argv).stdout
    assert "found another vocabulary in t.model" in refused(tmp_path, *argv, vocab_size=330)
    assert "found a vocabulary of 320 tokens in t.model" in refused(tmp_path, *argv, vocab_size=300)
    assert ((tmp_path / "t.model").read_bytes(), (tmp_path / "t.model").stat().st_mtime_ns) == (model, time)
    (tmp_path / "notes.txt").write_text("mine")
    assert "found something else than a vocabulary in notes.txt" in refused(tmp_path, *argv[:3], "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--output", "t.model"], "--filepath: expected a path, found none"),
        (["--filepath", "corpus"], "--output: expected a path, found none"),
        (
            ["--filepath", "corpus", "--output", "corpus"],
            "found the folder corpus; name a file in it, such as corpus/tok",
        ),
        (["--filepath", "corpus", "--output", "blank.txt/t.model"], "--output: expected a file in a folder"),
        (["--filepath", "corpus", "--output", "gs://a/t.model"], "--output: expected"),
        (["--filepath", "nothing", "--output", "t.model"], "found nothing at nothing"),
        (["--filepath", "-", "--output", "t.model"], "prepare alone reads standard input"),
        (["--filepath", "blank.txt", "--output", "t.model"], "found nothing but white space in blank.txt"),
        (["--filepath", "one.txt", "--output", "t.model"], "found none in one.txt beside what is held out"),
        (["--filepath", "corpus", "--output", "t.model", "--train-size", "0"], "train_size: expected"),
        (["--filepath", "corpus", "--output", "t.model", "--vocab-size", "9"], "vocab_size: expected 262"),
        (
            ["--filepath", "corpus", "--output", "t.model", "--text-field", "no"],
            "found JSON lines with the fields text",
        ),
        (["--filepath", "bad.jsonl", "--output", "t.model"], "line 2: expected JSON"),
        (["--filepath", "blank.txt", "--output", "t.model", "--separator", "#"], "found '#' nowhere in blank.txt"),
        (["--filepath", "tokens", "--output", "t.model"], "found tokens that are prepared already in tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_in_one_line_and_nothing_is_written(tmp_path, argv, words):
    write(tmp_path, 60)
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "bad.jsonl").write_text('{"text": "a fox"}\n{"text": \n' + '{"text": "an owl"}\n' * 3)
    if "tokens" in argv:
        prepare = ["prepare", "--filepath", "corpus", "--vocab-size", "300", "--output", "tokens"]
        assert inside.run(["-m", "llama_jax.data", *prepare], tmp_path).returncode == 0
    before = sorted(tmp_path.rglob("*"))
    assert words in refused(tmp_path, *argv)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_told_before_the_text_is_read(tmp_path, monkeypatch):
    write(tmp_path, 60)
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    argv = ["--filepath", "corpus", "--output", "new/t.model"]
    assert f"found that {tmp_path} cannot" in refused(tmp_path, *argv) and not (tmp_path / "new").exists()


def test_records_that_are_skipped_are_said(tmp_path):
    records = [json.dumps({"text": document(i)}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join([*records, "{", '{"text": null}']))
    done = command(
        tmp_path, "--filepath", "a.jsonl", "--bad-records", "skip", "--output", "t.model", "--train-size", "1"
    )
    assert done.stderr.startswith("warning: 2 records cannot be read and were skipped: a.jsonl: line 61")
    (tmp_path / "b.jsonl").write_text("\n".join(records))
    command(tmp_path, "--filepath", "b.jsonl", "--output", "u.model", "--train-size", "1")
    assert (tmp_path / "t.model").read_bytes() == (tmp_path / "u.model").read_bytes()


def test_fewer_tokens_than_asked_for_are_said(tmp_path):
    (tmp_path / "a.txt").write_text("ab ab\n" * 50)
    done = command(tmp_path, "--filepath", "a.txt", "--output", "t.model", vocab_size=32000)
    assert "vocabulary: 32,000 was asked for, and the text has pairs for 26" in done.stdout


def test_a_large_text_gives_a_sample_and_says_its_size(tmp_path, monkeypatch):
    write(tmp_path, 2000)
    monkeypatch.setattr(vocabulary, "VOCABULARY_BYTES", 40_000)
    done = command(tmp_path, "--filepath", "corpus", "--output", "t.model")
    (size,) = [line.split()[5] for line in done.stdout.splitlines() if "trained on a sample of" in line]
    assert 30 < float(size) <= 40
    corpus = find_text(DataArgs(filepath=str(tmp_path / "corpus")), tmp_path).corpus
    first, second = list(Sentences(corpus.parts("train"))), list(Sentences(corpus.parts("train")))
    assert first == second and (tmp_path / "t.model").read_bytes() == trained_model(first, 320)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=40), st.integers(1, 60))
def test_blocks_have_the_lines_of_their_parts(texts, least):
    parts = [Part(text, len(text.encode()), True, True) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "BLOCK_BYTES", least)
        found = list(blocks(parts))
    assert [line for block in found for line in block.text.split("\n")] == "\n".join(texts).split("\n") * bool(texts)
    assert sum(block.size for block in found) == sum(part.size for part in parts)


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 400), st.integers(1, 400))
def test_a_sample_is_in_order_within_its_size_and_part_of_any_larger_one(sizes, most, more):
    everything = [Block(f"{i}", size) for i, size in enumerate(sizes)]
    smaller, larger = sample(everything, most), sample(everything, most + more)
    assert sum(block.size for block in smaller) <= most
    assert smaller == [block for block in everything if block in smaller] and set(smaller) <= set(larger)
    if sum(sizes) <= most:
        assert smaller == everything
    elif len(larger) < len(everything):
        assert sum(block.size for block in larger) > most + more - 50, "the next one would not fit"


def test_a_sample_is_spread_evenly_and_holds_what_repeats_in_its_share():
    everything = [Block("same" if i % 4 else f"{i}", 100) for i in range(40_000)]
    taken = sample(everything, 400_000)
    assert len(taken) == 4000
    numbers = [int(block.text) for block in taken if block.text != "same"]
    assert 850 < len(numbers) < 1150, "a quarter"
    assert all(190 < sum(lo <= n < lo + 10_000 for n in numbers) < 310 for lo in range(0, 40_000, 10_000))
