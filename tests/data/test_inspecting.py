"""The command inspect, against counts in plain Python, and SentencePiece itself."""

import collections
import gzip
import itertools
import json
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.cli.progress import Progress
from llama_jax.config import DataArgs
from llama_jax.data import counting, inspecting, reading
from llama_jax.data.counting import Distinct, Documents
from llama_jax.data.inspecting import inspect
from llama_jax.data.report import Report
from llama_jax.tokenizer import Tokenizer
from tests import forked, inside
from tests.data.test_token_files import llm_c, megatron, nano_gpt

CONTRACT = [
    "documents", "bytes", "tokens", "bytes_per_token", "unknown_share", "byte_share", "duplicates", "longest", "median",
]  # fmt: skip
WORDS = ["the", "fox", "12 boats", "Où", "Где сова", "中文字", "🦊", "été", "\n", "אבג"]


def some_texts(count: int = 90) -> list[str]:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(count)]
    return [*texts, texts[3], texts[3], texts[7], "é" * 200_000]


def write_json(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))


def command(folder: Path, *argv: str, status: int = 0):
    done = inside.run(["-m", "llama_jax.data", "inspect", *argv], folder)
    assert done.returncode == status, done.stderr
    return done


def report_of(folder: Path, *argv: str) -> dict:
    """The report as JSON, which is all of standard output."""
    done = command(folder, "--json", "--filepath", *argv)
    report = json.loads(done.stdout, parse_constant=pytest.fail)
    lines = [*report["notes"], *(f"warning: {line}" for line in report["warnings"])]
    assert [line for line in done.stderr.splitlines() if line] == lines
    return report


def counted(texts: list[str], model: Path) -> dict:
    """The report's numbers, by SentencePiece and plain Python."""
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(model))
    rows = [encoder.encode(text) for text in texts]
    ids = [i for row in rows for i in row]
    size, tokens = sum(len(text.encode()) for text in texts), len(ids) + 2 * len(texts)
    return {
        "documents": len(texts),
        "bytes": size,
        "characters": sum(map(len, texts)),
        "tokens": tokens,
        "bytes_per_token": size / tokens,
        "unknown_share": sum(map(encoder.is_unknown, ids)) / tokens,
        "byte_share": sum(map(encoder.is_byte, ids)) / tokens,
        "used_tokens": len({*ids}),
        "vocab_size": encoder.vocab_size(),
        "duplicates": len(texts) - len({*texts}),
        "longest": max(map(len, rows)),
        "median": sorted(map(len, rows))[len(rows) // 2],
        "length_unit": "tokens",
    }


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt", "folder"])
def test_every_form_of_a_corpus_has_the_counts_of_plain_python_and_sentencepiece(name, tmp_path, small_tokenizer):
    texts = some_texts()
    model = str(small_tokenizer.model_path)
    write_json(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=20)
    (tmp_path / "a.txt").write_text("<|end|>".join(texts))
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "folder" / f"{i:03}.txt").write_text(text)
    flags = ["--separator", "<|end|>"] if name == "a.txt" else []
    report = report_of(tmp_path, name, "--tokenizer-model-path", model, *flags)
    if name == "a.txt":  # blank lines at the borders of documents are left out
        corpus = inspecting.find_text(DataArgs(str(tmp_path / name), 1.0, separator="<|end|>"), tmp_path).corpus
        parts = list(corpus.parts("train"))
        starts = [i for i, part in enumerate(parts) if part.starts]
        texts = ["".join(p.text for p in parts[i:j]) for i, j in itertools.pairwise([*starts, len(parts)])]
    wanted = counted(texts, small_tokenizer.model_path)
    assert {key: report[key] for key in wanted} == wanted
    assert {*CONTRACT} <= report.keys()
    assert report["files"] == (len(texts) if name == "folder" else 1)


def test_without_a_tokenizer_lengths_are_in_bytes_and_tokens_are_null(tmp_path):
    texts = some_texts()
    write_json(tmp_path / "a.jsonl", texts)
    report = report_of(tmp_path, "a.jsonl")
    sizes = sorted(len(text.encode()) for text in texts)
    assert (report["length_unit"], report["longest"], report["median"]) == ("bytes", sizes[-1], sizes[len(sizes) // 2])
    for name in ("tokens", "bytes_per_token", "unknown_share", "byte_share", "vocab_size", "used_tokens"):
        assert report[name] is None
    assert report["bytes"] == sum(sizes) and report["duplicates"] == 3


def test_shares_of_scripts_are_those_of_the_characters_names(tmp_path):
    texts = some_texts()
    write_json(tmp_path / "a.jsonl", texts)
    first = {"LATIN": "Latin", "CYRILLIC": "Cyrillic", "HEBREW": "Hebrew", "CJK": "Han"}
    chars = "".join(texts)
    wanted = collections.Counter(first.get(unicodedata.name(c, "-").split()[0], "Common") for c in chars)
    scripts = report_of(tmp_path, "a.jsonl")["scripts"]
    assert scripts == {name: pytest.approx(count / len(chars)) for name, count in wanted.items()}
    assert list(scripts.values()) == sorted(scripts.values(), reverse=True)


def test_the_histogram_counts_each_document_once_between_powers_of_two(tmp_path):
    texts = ["a" * length for length in (1, 2, 3, 4, 7, 8, 100)]
    write_json(tmp_path / "a.jsonl", texts)
    bins = [(each["from"], each["to"], each["documents"]) for each in report_of(tmp_path, "a.jsonl")["histogram"]]
    assert bins == [(1, 1, 1), (2, 3, 2), (4, 7, 2), (8, 15, 1), (16, 31, 0), (32, 63, 0), (64, 127, 1)]


def test_documents_that_are_shown_are_where_it_says(tmp_path):
    texts = some_texts()
    write_json(tmp_path / "a.jsonl", texts)
    report = report_of(tmp_path, "a.jsonl")
    lengths = [len(text.encode()) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: (-lengths[i], i))[:10]
    assert [each["record"] for each in report["longest_documents"]] == [i + 1 for i in order]
    assert len(report["random_documents"]) == 5
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    for each in report["longest_documents"] + report["random_documents"]:
        assert (each["file"], each["word"]) == ("a.jsonl", "line") and each["excerpt"].isprintable()
        text = json.loads(lines[each["record"] - 1])["text"]
        assert each["length"] == len(text.encode())
        assert text.replace("\n", r"\n").startswith(each["excerpt"]) and len(each["excerpt"]) <= 200


def test_of_plain_text_and_parquet_too(tmp_path):
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        (tmp_path / "two" / f"{name}.txt").write_text("\n".join(f"{name}{i}" * i for i in range(1, 40)))
    report = report_of(tmp_path, "two", "--separator", r"\n")
    first = report["longest_documents"][0]
    assert (first["file"], first["word"], first["record"], first["length"]) == ("two/a.txt", "document", 39, 117)
    for each in report["longest_documents"] + report["random_documents"]:
        name, number = each["file"][4], each["record"]
        assert f"{name}{number}" * number == each["excerpt"]
    table = pyarrow.table({"text": [f"row {i}" for i in range(1, 30)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    shown = report_of(tmp_path, "a.parquet")["random_documents"]
    assert all(each["word"] == "row" and each["excerpt"] == f"row {each['record']}" for each in shown)


def test_the_report_depends_on_the_seed_and_not_on_how_much_is_read_at_once(tmp_path, small_tokenizer, monkeypatch):
    write_json(tmp_path / "a.jsonl", some_texts())
    args = DataArgs(str(tmp_path / "a.jsonl"), 1.0, str(small_tokenizer.model_path))
    first = inspect(args, seed=3)
    for parts in (1, 7):
        monkeypatch.setattr(inspecting, "PARTS_AT_ONCE", parts)
        assert inspect(args, seed=3) == first
    assert {tuple(each.record for each in inspect(args, seed).random_documents) for seed in range(5)} > {
        tuple(each.record for each in first.random_documents)
    }


def prepared(folder: Path, *argv: str) -> None:
    done = inside.run(["-m", "llama_jax.data", "prepare", "--output", "tokens", *argv], folder)
    assert done.returncode == 0, done.stderr


def test_prepared_tokens_have_the_numbers_of_their_corpus(tmp_path, small_tokenizer):
    texts = some_texts()
    write_json(tmp_path / "a.jsonl", texts)
    model = ["--tokenizer-model-path", str(small_tokenizer.model_path)]
    prepared(tmp_path, "--filepath", "a.jsonl", *model)
    of_text, of_tokens = report_of(tmp_path, "a.jsonl", *model), report_of(tmp_path, "tokens")
    for name in [*CONTRACT, "length_unit", "used_tokens", "vocab_size", "histogram"]:
        assert of_tokens[name] == of_text[name], name
    (note,) = of_tokens["notes"]
    assert note.startswith("tokens: tokens of a.jsonl: ") and "held out" in note
    # The same documents are shown as the longest. A tokenizer gives their text back.
    key = lambda each: (each["length"], each["excerpt"][:40])  # noqa: E731
    assert sorted(map(key, of_tokens["longest_documents"])) == sorted(map(key, of_text["longest_documents"]))
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert of_tokens["tokens"] == sum(manifest["tokens"].values())
    assert of_tokens["documents"] == sum(manifest["documents"].values())
    assert report_of(tmp_path, "tokens", *model) == of_tokens


def test_prepared_tokens_of_a_tokenizer_with_one_mark_for_both_ends(tmp_path):
    texts = some_texts(40)[:-1]
    write_json(tmp_path / "a.jsonl", texts)
    (tmp_path / "lines").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines"), model_prefix=str(tmp_path / "m"), vocab_size=60, model_type="unigram", bos_id=-1,
        pad_id=-1, eos_id=1, unk_id=0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    prepared(tmp_path, "--filepath", "a.jsonl", "--tokenizer-model-path", "m.model")
    wanted = counted(texts, tmp_path / "m.model")
    for report in (report_of(tmp_path, "tokens"), report_of(tmp_path, "a.jsonl", "--tokenizer-model-path", "m.model")):
        assert {name: report[name] for name in CONTRACT} == {name: wanted[name] for name in CONTRACT}


def test_documents_of_tokens_are_found_however_many_are_read_at_once(tmp_path, small_tokenizer, monkeypatch):
    write_json(tmp_path / "a.jsonl", some_texts(30)[:-1])
    prepared(tmp_path, "--filepath", "a.jsonl", "--tokenizer-model-path", str(small_tokenizer.model_path))
    args = DataArgs(str(tmp_path / "tokens"), 1.0)
    first = inspect(args)
    for count in (1, 5, 64):
        monkeypatch.setattr(inspecting, "TOKENS_AT_ONCE", count)
        report = inspect(args)
        for name in [*CONTRACT, "histogram"]:
            assert getattr(report, name) == getattr(first, name), (name, count)


def test_token_files_of_other_programs_are_counted(tmp_path, small_tokenizer):
    model = ["--tokenizer-model-path", str(small_tokenizer.model_path)]
    rows = [[1, *np.random.default_rng(i).integers(3, 300, 5 + i % 9).tolist(), 2] for i in range(50)]
    ids = np.array([i for row in rows for i in row])
    nano_gpt(tmp_path / "with_bos.bin", ids)
    llm_c(tmp_path / "without.bin", ids[(ids != 1) & (ids != 2)])
    megatron(tmp_path / "indexed", [np.array(row[1:-1]) for row in rows])
    for name in ("with_bos.bin", "indexed"):
        report = report_of(tmp_path, name, *model)
        assert (report["documents"], report["longest"], report["median"]) == (50, 13, 9), name
    assert report["tokens"] == len(ids) - 100 and report["bytes"] is None and report["bytes_per_token"] is None
    assert report["duplicates"] == 50 - len({tuple(row) for row in rows})
    unknown = report_of(tmp_path, "without.bin", *model)
    assert (
        unknown["tokens"] == len(ids) - 100
        and unknown["documents"] is unknown["median"] is unknown["duplicates"] is None
    )
    done = command(tmp_path, "--filepath", "without.bin", *model)
    assert done.stdout.startswith("documents   unknown: the ids have no BOS") and " documents " not in done.stderr
    done = command(tmp_path, "--filepath", "without.bin", *model, "--picture", "a.png")
    assert "warning: a.png: not drawn" in done.stderr and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("name", "content", "argv", "words"),
    [
        ("a.txt", "A poem about a fox. " * 9, [], "the corpus is one document; name what stands between"),
        ("a.jsonl", '{"text": "alone"}\n', [], "the corpus is one document"),
        ("a.txt", " \n\t\n" * 9, [], "the text is nothing but white space"),
        ("a.jsonl", '{"text": "a fox"}\n{"text": " \\n"}\n', [], "1 of 2 documents is nothing but white space"),
        ("a.txt", "\ufffd\ufffd\ufffda" * 50, [], "mostly replacement characters: 75.00% of the characters are U+FFFD"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\ufffd\ufffd."}\n', [], "(1 of 2 documents is mostly that)"),
        ("a.txt", bytes(range(256)) * 20, ["--as-text"], "it looks binary: "),
        ("a.txt", bytes(range(256)) * 20, ["--as-text"], "byte sequences are not UTF-8"),
        ("a.jsonl", '{"text": "good text"}\n{"text": "\\u0000\\u0001\\u0002"}\n', [], "(1 of 2 documents has many)"),
        ("a.jsonl", '{"text": "same"}\n' * 9 + '{"text": "b"}\n', [], "most documents are equal: 8 of 10 are exact copies"),
        ("a.jsonl", '{"text": "a"}\n' * 2 + "".join(f'{{"text": "{i}"}}\n' for i in range(18)), [], "5.00% of the documents"),
        ("a.jsonl", "".join(f'{{"text": "{str(i) * (99 if i == 5 else 1)}"}}\n' for i in range(12)), [], "one document holds"),
        ("a.jsonl", '{"text": "a fox"}\n{"text": 5}\n{"text": "b"}\n', ["--bad-records", "skip"], "1 records cannot be read"),
        ("a.txt", "o" * 60 + "\n" + "o" * 60, ["--separator", r"\n", "TOKENIZER"], "of the tokens are one and the same"),
        ("a.txt", "中文字。" * 40, ["TOKENIZER"], "of the tokens are single bytes: the tokenizer does not know these"),
        ("a.txt", "e", ["TOKENIZER"], "the text is one token"),
    ],
)  # fmt: skip
def test_what_looks_wrong_is_said(tmp_path, small_tokenizer, name, content, argv, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if "TOKENIZER" in argv:
        argv = [*argv[:-1], "--tokenizer-model-path", str(small_tokenizer.model_path)]
    assert words in "\n".join(report_of(tmp_path, name, *argv)["warnings"])


def test_an_ordinary_corpus_has_no_warnings(tmp_path, llama2_tokenizer):
    texts = [f"Document {i}: the fox went to the river, and the owl saw {i} boats." for i in range(50)]
    write_json(tmp_path / "a.jsonl", texts)
    report = report_of(tmp_path, "a.jsonl", "--tokenizer-model-path", str(llama2_tokenizer.model_path))
    assert report["warnings"] == report["notes"] == [] and report["unknown_share"] == 0


def test_a_tokenizer_that_loses_text_is_said(tmp_path):
    (tmp_path / "lines").write_text("a b ab ba\n" * 99)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines"), model_prefix=str(tmp_path / "m"), vocab_size=9, model_type="char",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    write_json(tmp_path / "a.jsonl", ["ab ab xyz", "a b"])
    report = report_of(tmp_path, "a.jsonl", "--tokenizer-model-path", "m.model")
    wanted = counted(["ab ab xyz", "a b"], tmp_path / "m.model")
    assert report["unknown_share"] == wanted["unknown_share"] > 0
    assert any(line.startswith("the tokenizer loses text") for line in report["warnings"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--filepath: expected a path, found none"),
        (["--filepath", "nothing"], "found nothing at nothing"),
        (["--filepath", "-"], "prepare alone reads standard input"),
        (["--filepath", "empty.txt"], "expected text, found empty.txt empty"),
        (["--filepath", "binary.txt"], "found binary data: binary.txt"),
        (["--filepath", "bad.jsonl"], "bad.jsonl: line 2: expected JSON, found a fault"),
        (["--filepath", "blank.jsonl"], "found no document in blank.jsonl (2 records have an empty text"),
        (["--filepath", "good.txt", "--separator", "#"], "found '#' nowhere in good.txt"),
        (["--filepath", "good.txt", "--text-field", "text"], "data.text_field: expected records"),
        (["--filepath", "good.txt", "--tokenizer-model-path", "good.txt"], "good.txt: expected a SentencePiece model"),
        (["--filepath", "good.txt", "--picture", "good.txt"], "--picture: expected a name that ends in .png"),
        (["--filepath", "good.txt", "--picture", "fake.png"], "found something else in fake.png"),
        (["--filepath", "good.txt", "--picture", "no/a.png"], "found no folder no; create it first"),
        (["--filepath", "good.txt", "--bad-records", "keep"], "--bad-records"),
        (["--filepath", "fake.bin"], "data.tokenizer_model_path: expected the tokenizer of the token files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_in_one_line(tmp_path, argv, words):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "good.txt").write_text("A fox.\n" * 9)
    (tmp_path / "fake.png").write_text("A fox.\n" * 9)
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n{"text": "b"}\n')
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    llm_c(tmp_path / "fake.bin", np.arange(50))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = command(tmp_path, *argv, status=2)
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--separator", "x"], "--separator: expected none, as tokens holds tokens"),
        (
            ["--tokenizer-model-path", "other.model"],
            "expected the tokenizer that made the tokens in tokens, found another",
        ),
    ],
)
def test_options_that_prepared_tokens_contradict_are_refused(tmp_path, small_tokenizer, llama2_tokenizer, argv, words):
    write_json(tmp_path / "a.jsonl", some_texts(30)[:-1])
    (tmp_path / "other.model").write_bytes(llama2_tokenizer.model_bytes)
    prepared(tmp_path, "--filepath", "a.jsonl", "--tokenizer-model-path", str(small_tokenizer.model_path))
    assert words in command(tmp_path, "--filepath", "tokens", *argv, status=2).stderr


def test_empty_files_and_hidden_ones_are_noted(tmp_path):
    (tmp_path / "c").mkdir()
    for name, text in (("a.txt", "a fox"), ("b.txt", ""), (".hidden.txt", "x"), ("d.md", "x")):
        (tmp_path / "c" / name).write_text(text)
    notes = report_of(tmp_path, "c")["notes"]
    assert len(notes) == 3 and "1 file is empty: c/b.txt" in notes


def test_the_text_has_the_same_numbers_and_a_picture_is_drawn_and_drawn_again(tmp_path, small_tokenizer):
    write_json(tmp_path / "a.jsonl", some_texts())
    argv = ["--filepath", "a.jsonl", "--tokenizer-model-path", str(small_tokenizer.model_path), "--picture", "a.png"]
    report = report_of(tmp_path, *argv[1:4])
    done = command(tmp_path, *argv)
    for name in ("documents", "duplicates", "longest", "median", "tokens", "bytes", "characters"):
        assert f"{report[name]:,} " in done.stdout or f"{report[name]:,}\n" in done.stdout, name
    assert f"{report['bytes_per_token']:.2f} bytes a token" in done.stdout and "drawn in a.png" in done.stdout
    bars = [line for line in done.stdout.splitlines() if "#" in line]
    assert sum(int(line.split()[-1].replace(",", "")) for line in bars) == report["documents"]
    picture = (tmp_path / "a.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and command(tmp_path, *argv).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.png"]


def test_it_is_a_command_of_llama_jax_data_too(tmp_path):
    write_json(tmp_path / "a.jsonl", ["a", "b"])
    done = forked.run(["-m", "llama_jax", "data", "inspect", "--filepath", "a.jsonl", "--json"], tmp_path)
    assert json.loads(done.stdout)["documents"] == 2
    shown = forked.run(["-m", "llama_jax", "data", "--help"], tmp_path).stdout
    assert all(
        f" data {name} " in shown or f".data {name} " in shown for name in ("prepare", "inspect", "train-tokenizer")
    )


@given(st.lists(st.integers(0, 60), max_size=300), st.integers(1, 40))
def test_different_documents_are_counted_exactly_below_the_limit_and_said_to_be_estimated_above(values, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "WAITING", 7)
        distinct = Distinct(limit)
        for value in values:
            distinct.add(np.uint64(value * 0x9E3779B97F4A7C15 % 2**64).tobytes())
    different = len({*values})
    assert distinct.is_estimate == (different > limit)
    if different <= limit:
        assert distinct.count == different


def test_an_estimate_of_copies_is_near_the_truth_even_if_one_document_is_most_of_the_corpus():
    documents = Documents(0)
    documents.distinct = Distinct(2000)
    for i in range(30_000):
        text = b"same" if i % 3 else b"%d" % i
        documents.start(0, i, "")
        documents.extend(len(text), text)
        documents.end()
    assert documents.distinct.is_estimate and abs(documents.duplicates - 19_999) < 1500


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60), st.integers(0, 9))
def test_lengths_of_documents_are_those_of_sorting(lengths, seed):
    documents = Documents(seed)
    for i, length in enumerate(lengths):
        documents.add(0, i, "", length, b"%08d" % i)
    assert documents.median == sorted(lengths)[len(lengths) // 2] and documents.longest_length == max(lengths)
    assert [shown.length for shown in documents.longest] == sorted(lengths, reverse=True)[:10]
    assert len({shown.record for shown in documents.random}) == min(5, len(lengths))
    assert sum(count for _, _, count in documents.histogram()) == len(lengths)
    for low, high, count in documents.histogram():
        assert count == sum(low <= length <= high for length in lengths)


def test_each_document_is_as_likely_to_be_among_the_random_ones():
    chosen = collections.Counter[int]()
    for seed in range(400):
        documents = Documents(seed)
        for i in range(25):
            documents.add(0, i, "", 1, b"%08d" % i)
        chosen.update(shown.record for shown in documents.random)
    assert all(45 < chosen[i] < 120 for i in range(25)), "80 is the mean"


def test_the_names_that_training_has_for_its_flags_are_taken_too(tmp_path):
    write_json(tmp_path / "a.jsonl", ["The fox", "The owl"])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": null}\n')
    assert report_of(tmp_path, "a.jsonl", "--data.bad-records", "skip")["skipped_records"] == 1
    assert "--bad-records skip" in command(tmp_path, "--data.filepath=a.jsonl", status=2).stderr


@pytest.mark.parametrize("name", ["c/0.txt", "c"])
def test_the_progress_tells_bytes_rate_and_the_time_that_is_left(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(Progress, "SECONDS", 0)
    monkeypatch.setattr(reading, "TOLD_BYTES", 1000)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.txt").write_text("A fox.\n" * 30_000)
    write_json(tmp_path / "c" / "1.jsonl", ["A fox."] * 300)
    inspect(DataArgs(str(tmp_path / name), 1.0))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reading")]
    whole = " of 210.00 kB" if name == "c/0.txt" else ""
    assert any(re.fullmatch(rf"reading [\d.]+ kB{whole}, [\d.,]+ [kMG]B/s, \d+ s to go", line) for line in lines), lines


def test_a_report_is_a_plain_object(tmp_path, small_tokenizer: Tokenizer):
    write_json(tmp_path / "a.jsonl", ["a fox"] * 3)
    report = inspect(DataArgs(str(tmp_path / "a.jsonl"), 1.0, str(small_tokenizer.model_path)))
    assert isinstance(report, Report) and json.loads(json.dumps(report.to_dict()))["duplicates"] == 2
