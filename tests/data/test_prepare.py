"""From DataArgs to tokens: load_data, and preparing tokens ahead of training from the command line."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llama_jax.config import DataArgs
from llama_jax.data import Data, load_data, write_stories
from llama_jax.data.batches import train_batches
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
TEXT = 'The fox went to the river.\nThe owl said: "12 boats!" Où?\n\n' * 40


def load(folder: Path, begun: bool = False, **options) -> Data:
    run = folder / "run"
    return load_data(DataArgs(**options), run / "tokens", run / "tokenizer.model", begun=begun)


def text_of(data: Data) -> str:
    bos, decode = data.tokenizer.bos_id, data.tokenizer.decode
    streams = (np.split(stream, np.flatnonzero(stream == bos)) for stream in (data.tokens.train, data.tokens.eval))
    return "".join(decode(document) for stream in streams for document in stream)


def command(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "llama_jax.data", *argv]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)


def test_without_a_tokenizer_one_is_trained_on_the_text_and_kept(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    data = load(tmp_path, filepath=str(tmp_path / "a.txt"), vocab_size=300)
    assert text_of(data) == TEXT
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == data.tokenizer.model_bytes
    assert data.tokenizer.vocab_size == 300
    assert data.source == str(tmp_path / "a.txt") and data.floor is None


def test_the_held_out_text_has_no_part_in_the_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    kept = load(tmp_path / "1", filepath=str(tmp_path / "a.txt"), vocab_size=300)
    held_out = kept.tokenizer.decode(kept.tokens.eval)
    (tmp_path / "a.txt").write_text(TEXT.removesuffix(held_out) + "z" * len(held_out.encode()))
    changed = load(tmp_path / "2", filepath=str(tmp_path / "a.txt"), vocab_size=300)
    assert changed.tokenizer.decode(changed.tokens.eval).strip("z") == ""
    assert changed.tokenizer.model_bytes == kept.tokenizer.model_bytes


def test_a_given_tokenizer_is_used_and_copied(tmp_path, small_tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    args = {"filepath": str(tmp_path / "a.txt"), "tokenizer_model_path": str(small_tokenizer.model_path)}
    data = load(tmp_path, **args)
    assert text_of(data) == TEXT
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == small_tokenizer.model_bytes


def test_llama2s_own_tokenizer_keeps_the_whole_text(tmp_path, llama2_tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    args = {"filepath": str(tmp_path / "a.txt"), "tokenizer_model_path": str(llama2_tokenizer.model_path)}
    assert text_of(load(tmp_path, **args)) == TEXT


@pytest.mark.parametrize("target", [".", "*.txt", "**/*.txt"])
def test_a_folder_or_a_glob_is_read_whole(tmp_path, small_tokenizer, target):
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text(f"text {i}\n" * 30)
    data = load(
        tmp_path, filepath=str(tmp_path / "text" / target), tokenizer_model_path=str(small_tokenizer.model_path)
    )
    assert text_of(data) == "".join(f"text {i}\n" * 30 for i in range(4))
    # The cut goes through the last file, so it is a document of both.
    assert data.tokens.manifest.documents == {"train": 4, "eval": 1}


def test_a_second_start_uses_the_tokenizer_and_the_tokens_of_the_first(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    load(tmp_path, filepath=str(tmp_path / "a.txt"), vocab_size=300)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    before = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 4
    again = load(tmp_path, filepath=str(tmp_path / "a.txt"), vocab_size=300)
    assert [path.stat().st_mtime_ns for path in files] == before
    assert text_of(again) == TEXT


def test_before_the_first_checkpoint_a_changed_text_or_size_makes_all_anew(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    first = load(tmp_path, filepath=str(tmp_path / "a.txt"), vocab_size=300)
    (tmp_path / "a.txt").write_text(TEXT.upper())
    second = load(tmp_path, filepath=str(tmp_path / "a.txt"), vocab_size=300)
    assert text_of(second) == TEXT.upper()
    assert second.tokenizer.model_bytes != first.tokenizer.model_bytes
    third = load(tmp_path, filepath=str(tmp_path / "a.txt"), vocab_size=310)
    assert third.tokenizer.vocab_size == 310 and text_of(third) == TEXT.upper()


def test_a_run_that_has_begun_keeps_its_text_and_its_split_wherever_the_text_lies(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    args = {"filepath": str(tmp_path / "a.txt"), "vocab_size": 300}
    first = load(tmp_path, **args)
    (tmp_path / "b.txt").write_text(TEXT)
    again = load(tmp_path, begun=True, filepath=str(tmp_path / "b.txt"), vocab_size=300)
    assert again.tokens.manifest == first.tokens.manifest
    for changed in ({"train_size": 0.5}, {"separator": "\n"}):
        with pytest.raises(UserError, match=r"data\.filepath: expected the text, separator and train_size"):
            load(tmp_path, begun=True, **args, **changed)
    (tmp_path / "a.txt").write_text(TEXT + "more")
    with pytest.raises(UserError, match=r"data\.filepath: .*--train\.init-from"):
        load(tmp_path, begun=True, **args)


def test_a_run_that_has_begun_does_not_change_its_tokenizer(tmp_path, small_tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    args = {"filepath": str(tmp_path / "a.txt")}
    load(tmp_path, vocab_size=300, **args)
    other = str(small_tokenizer.model_path)
    with pytest.raises(UserError, match=r"data\.tokenizer_model_path: expected .* found another"):
        load(tmp_path, begun=True, tokenizer_model_path=other, **args)
    assert load(tmp_path, tokenizer_model_path=other, **args).tokenizer.model_bytes == small_tokenizer.model_bytes


def test_options_that_prepared_tokens_contradict_are_refused(tmp_path, small_tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    out = tmp_path / "out"
    load_data(DataArgs(str(tmp_path / "a.txt"), vocab_size=300, train_size=0.8), out, out / "tokenizer.model")
    assert load(tmp_path, filepath=str(out)).tokens.manifest.train_size == 0.8
    for name, value in {
        "train_size": 0.7,
        "separator": "x",
        "tokenizer_model_path": str(small_tokenizer.model_path),
    }.items():
        with pytest.raises(UserError, match=r"^data\."):
            load(tmp_path, filepath=str(out), **{name: value})
    assert load(tmp_path, filepath=str(out), train_size=0.8).tokens.manifest.train_size == 0.8


@pytest.mark.parametrize("content", [b"a", b"a fox", "é".encode(), b"\0", b"\xff\xfb\xff", b"x" * 100_000], ids=len)
def test_the_smallest_and_strangest_texts_train_or_are_refused_by_the_key(tmp_path, small_tokenizer, content):
    (tmp_path / "a.txt").write_bytes(content)
    args = {"filepath": str(tmp_path / "a.txt"), "tokenizer_model_path": str(small_tokenizer.model_path)}
    if int(0.9 * len(content)) == 0 or content == "é".encode():  # no character lies before the cut
        with pytest.raises(UserError, match=r"data\.filepath: expected text to train on"):
            load(tmp_path, **args)
    else:
        assert text_of(load(tmp_path, **args)) == content.decode(errors="replace")
    assert text_of(load(tmp_path / "all", train_size=1.0, **args)) == content.decode(errors="replace")


@pytest.mark.parametrize("content", [b"", b" \n\n  ", b"\xef\xbb\xbf", "fox".encode("utf-16")], ids=ascii)
def test_a_text_without_text_is_refused_and_leaves_no_tokenizer(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.filepath: expected "):
        load(tmp_path, filepath=str(tmp_path / "a.txt"))
    assert not (tmp_path / "run" / "tokenizer.model").exists()


def test_built_in_stories_are_made_once_and_come_with_their_floor(tmp_path):
    data = load(tmp_path, stories=40, vocab_size=300)
    (path,) = (tmp_path / "run" / "tokens").glob("stories*.txt")
    text = path.read_text()
    assert text_of(data) == text.replace("\n\n", "")
    manifest = data.tokens.manifest
    assert 40 <= sum(manifest.documents.values()) <= 41  # the cut may go through one
    assert data.floor is not None and 0.1 < data.floor < 3
    before = path.stat().st_mtime_ns
    assert write_stories(path.with_name("stories.txt"), 40) == (path, data.floor)
    assert path.stat().st_mtime_ns == before


def test_another_seed_reads_the_same_tokens_in_another_order(tmp_path, small_tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    data = load(tmp_path, filepath=str(tmp_path / "a.txt"), tokenizer_model_path=str(small_tokenizer.model_path))
    first, same, other = (next(train_batches(data.tokens.train, 4, 32, seed, 0, 1)) for seed in (1, 1, 2))
    assert np.array_equal(first.inputs, same.inputs) and not np.array_equal(first.inputs, other.inputs)


def test_prepared_tokens_train_as_the_text_would(tmp_path, small_tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    tokenizer = str(small_tokenizer.model_path)
    flags = ["--filepath", "a.txt", "--tokenizer-model-path", tokenizer, "--output", "out", "--workers", "2"]
    done = command("prepare", *flags, "--separator", r"\n\n", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "eval.bin",
        "manifest.json",
        "tokenizer.model",
        "train.bin",
    ]
    direct = load(tmp_path / "1", filepath=str(tmp_path / "a.txt"), tokenizer_model_path=tokenizer, separator="\n\n")
    prepared = load(tmp_path / "2", filepath=str(tmp_path / "out"))
    assert prepared.tokens.manifest == direct.tokens.manifest
    assert np.array_equal(prepared.tokens.train, direct.tokens.train)
    assert np.array_equal(prepared.tokens.eval, direct.tokens.eval)
    assert (tmp_path / "2" / "run" / "tokenizer.model").read_bytes() == small_tokenizer.model_bytes
    counts = direct.tokens.manifest.tokens
    assert f"{counts['train']:,} tokens to train on, {counts['eval']:,} held out" in done.stdout


def test_prepare_trains_a_vocabulary_when_none_is_given(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    done = command("prepare", "--filepath", "a.txt", "--output", "out", "--vocab_size", "300", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Tokenizer(tmp_path / "out" / "tokenizer.model").vocab_size == 300
    assert text_of(load(tmp_path, filepath=str(tmp_path / "out"))) == TEXT


def test_prepared_tokens_with_another_tokenizer_than_theirs_are_refused(tmp_path, small_tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    out = tmp_path / "out"
    load_data(DataArgs(str(tmp_path / "a.txt"), vocab_size=300), out, out / "tokenizer.model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    with pytest.raises(UserError, match=r"data\.filepath: .* tokens of another tokenizer"):
        load(tmp_path, begun=True, filepath=str(out))
    (out / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    with pytest.raises(UserError, match="prepare them again"):
        load(tmp_path, filepath=str(out))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "expected the command prepare, found none"),
        (["cook"], "expected the command prepare, found cook"),
        (["prepare"], "--filepath: expected a path"),
        (["prepare", "--filepath", "a.txt"], "--output: expected a path"),
        (
            ["prepare", "--filepath", "a.txt", "--output", "out", "--workers", "0"],
            "--workers: expected 1 or more, found 0",
        ),
        (["prepare", "--filepath", "a.txt", "--output", "out", "--workers", "two"], "--workers"),
        (["prepare", "--filepath", "a.txt", "--output", "out", "--train-size", "2"], "train_size: expected"),
        (["prepare", "--filepath", "b.txt", "--output", "out"], "found nothing at b.txt"),
        (["prepare", "--filepath", "a.txt", "--output", "a.txt"], "a.txt"),
        (
            ["prepare", "--filepath", "a.txt", "--output", "out", "--tokenizer-model-path", "a.txt"],
            "expected a SentencePiece",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_prepare_refuses_bad_arguments_in_one_line_with_status_2(tmp_path, argv, words):
    (tmp_path / "a.txt").write_text(TEXT)
    done = forked.run(["-m", "llama_jax.data", *argv], tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr
    assert (tmp_path / "a.txt").read_text() == TEXT and not (tmp_path / "out").exists()
