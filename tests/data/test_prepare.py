"""From DataArgs to tokens: load_data, and preparing tokens ahead of training from the command line."""

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llama_jax.config import DataArgs
from llama_jax.data import Data, load_data, open_tokens, write_stories
from llama_jax.data.__main__ import main
from llama_jax.data.batches import train_batches
from llama_jax.data.shards import prepare
from llama_jax.data.summary import documents_text, remarks, repeats_warning
from llama_jax.data.text import Corpus
from llama_jax.errors import UserError
from llama_jax.storage.owner import owning
from llama_jax.tokenizer import Tokenizer, train_tokenizer
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
    assert len(files) == 6
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
    path = str(tmp_path / "a.txt")
    args = {"filepath": path, "tokenizer_model_path": str(small_tokenizer.model_path), "as_text": True}
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
        "checksums.bin",
        "documents.bin",
        "eval.bin",
        "manifest.json",
        "tokenizer.model",
        "train.bin",
    ]
    direct = load(tmp_path / "1", filepath=str(tmp_path / "a.txt"), tokenizer_model_path=tokenizer, separator="\n\n")
    prepared = load(tmp_path / "2", filepath=str(tmp_path / "out"))
    assert dataclasses.replace(prepared.tokens.manifest, source=str(tmp_path / "a.txt")) == direct.tokens.manifest
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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def told(folder: Path, *argv: str, status: int = 0) -> str:
    """What prepare, run in ``folder``, says on both streams; of an error, the one line."""
    done = forked.run(["-m", "llama_jax.data", "prepare", *argv], folder)
    assert done.returncode == status, done.stderr
    if status:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and done.stdout == ""
    return done.stdout + done.stderr


def test_the_same_tokens_once_more_are_there_already(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    flags = ["--filepath", "a.txt", "--output", "out", "--vocab-size", "300"]
    first = told(tmp_path, *flags)
    assert "out: " in first and "already" not in first
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = told(tmp_path, *flags)
    assert "out: holds these tokens already" in again
    assert set(first.splitlines()) <= set(again.splitlines())
    own = told(tmp_path, *flags[:4], "--tokenizer-model-path", "out/tokenizer.model")
    assert "out: holds these tokens already" in own
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--filepath", "b.txt"], "b.txt is another text"),
        (["--filepath", "more.txt"], "more.txt has grown by 5 bytes since"),
        (["--separator", r"\n\n"], r"the separator was '' and is '\n\n' now"),
        (["--train-size", "0.5"], "train_size was 0.9 and is 0.5 now"),
        (["--vocab-size", "310"], "was trained with vocab_size 300 and is trained with vocab_size 310 now"),
        (["--tokenizer-model-path", "other.model"], "the tokenizer is another one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_finished_tokens_of_something_else_are_not_replaced(tmp_path, small_tokenizer, change, words):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "more.txt").write_text(TEXT + "more\n")
    (tmp_path / "b.txt").write_text(TEXT.upper())
    (tmp_path / "other.model").write_bytes(small_tokenizer.model_bytes)
    flags = ["--filepath", "a.txt", "--output", "out", "--vocab-size", "300"]
    told(tmp_path, *flags)
    beside = told(tmp_path, *flags, "--output", "beside", "--tokenizer-model-path", "other.model")
    assert "--vocab-size: no effect beside --tokenizer-model-path other.model, which decides it" in beside
    before = contents(tmp_path / "out")
    line = told(tmp_path, *flags, *change, status=2)
    assert (
        line.startswith("error: --output: expected a new folder")
        and "tokens of a.txt (1 file, " in line
        and words in line
    )
    assert "choose another --output, or delete out" in line
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["train.bin", "eval.bin", "checksums.bin", "tokenizer.model"])
def test_files_of_others_are_not_replaced(tmp_path, name):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"of another program")
    (tmp_path / "out" / "readme.txt").write_text("x")
    line = told(tmp_path, "--filepath", "a.txt", "--output", "out", status=2)
    assert f"found out/{name}, which is not this command's" in line
    assert contents(tmp_path / "out") == {name: b"of another program", "readme.txt": b"x"}
    told(tmp_path, "--filepath", "a.txt", "--output", ".")  # a folder with other things in it will do
    assert (tmp_path / "a.txt").read_text() == TEXT


def test_a_tokenizer_that_lies_in_the_output_already_may_be_given(tmp_path, small_tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    told(tmp_path, "--filepath", "a.txt", "--output", "out", "--tokenizer-model-path", "out/tokenizer.model")
    assert text_of(load(tmp_path, filepath=str(tmp_path / "out"))) == TEXT


def test_a_second_prepare_of_a_folder_is_refused_and_touches_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "out").mkdir()
    with owning(tmp_path / "out", "key", "wait"):
        before = contents(tmp_path / "out")
        line = told(tmp_path, "--filepath", "a.txt", "--output", "out", "--vocab-size", "300", status=2)
        assert contents(tmp_path / "out") == before
    assert (
        re.match(rf"error: --output: .* out in use by process {os.getpid()} ", line)
        and "choose another --output" in line
    )


@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_several_starts_in_one_folder_some_of_them_killed_end_in_the_tokens_of_an_undisturbed_one(rounds, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i} {TEXT}" for i in range(60)))
    flags = [
        "-m",
        "llama_jax.data",
        "prepare",
        "--filepath",
        "a.txt",
        "--vocab-size",
        "400",
        "--separator",
        r"\n",
        "--output",
    ]
    assert forked.run([*flags, "undisturbed"], tmp_path).returncode == 0
    rng = random.Random(0)
    for round in range(rounds):
        started, killed = [], []
        for _ in range(rng.randint(2, 4)):
            started.append(forked.Fork([*flags, f"out{round}"], tmp_path))
            time.sleep(rng.uniform(0, 0.4))
            if rng.random() < 0.5:
                victim = rng.choice(started)
                victim.kill()
                killed.append(victim)
        for process in started:
            _, err = process.communicate(60)
            if process not in killed:
                assert process.returncode == 0 or (process.returncode == 2 and "in use" in err), err
        # The last to own the folder may be one that was killed.
        assert forked.run([*flags, f"out{round}"], tmp_path).returncode == 0
        assert contents(tmp_path / f"out{round}") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "kept", [("tokenizer.model",), ("tokenizer.model", "train.bin"), ("train.bin", "eval.bin", "checksums.bin")]
)
def test_what_a_killed_prepare_left_is_gone_on_from(tmp_path, kept):
    (tmp_path / "a.txt").write_text(TEXT)
    flags = ["--filepath", "a.txt", "--vocab-size", "300", "--output"]
    told(tmp_path, *flags, "whole")
    told(tmp_path, *flags, "out")
    for path in (tmp_path / "out").iterdir():
        if path.name not in kept:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "out" / ".unfinished").touch()
    (tmp_path / "out" / "train.bin.0123456789ab.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match=r"data\.filepath: .* found unfinished tokens in .*out"):
        load(tmp_path, filepath=str(tmp_path / "out"))
    told(tmp_path, *flags, "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # The last thing that it does is to take the mark away.
    (tmp_path / "out" / ".unfinished").touch()
    told(tmp_path, *flags, "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_token_files_of_another_program_are_not_taken_for_ours(tmp_path):
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (tmp_path / name).write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"found token files without manifest\.json .* another program made them"):
        load(tmp_path, filepath=str(tmp_path))
    (tmp_path / "input.txt").write_text(TEXT)
    assert text_of(load(tmp_path, filepath=str(tmp_path), vocab_size=300)) == TEXT


def test_a_failed_prepare_leaves_no_folder_behind(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(" \n")
    told(tmp_path, "--filepath", "b.txt", "--output", "out", status=2)
    told(tmp_path, "--filepath", "a.txt", "--output", "out", "--separator", "<x>", status=2)
    assert not (tmp_path / "out").exists()


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.txt, and its tokens in out."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "a.txt").write_text("".join(f"{i} {TEXT}" for i in range(20)))
    told(folder, "--filepath", "a.txt", "--output", "out", "--vocab-size", "300")
    return folder


def test_a_changed_byte_in_any_file_is_named_and_not_trained_on(tmp_path, finished):
    rng = random.Random(0)
    names = sorted(path.name for path in (finished / "out").iterdir())
    assert names == [
        "checksums.bin", "documents.bin", "eval.bin", "manifest.json", "tokenizer.model", "train.bin",
    ]  # fmt: skip
    for i in range(100):
        shutil.copytree(finished / "out", tmp_path / "out")
        flip(tmp_path / "out" / names[i % 6], rng)
        for read in (open_tokens, lambda folder: load(tmp_path, filepath=str(folder))):
            with pytest.raises(UserError, match=rf"out/{names[i % 6]}: expected "):
                read(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("name", ["checksums.bin", "eval.bin", "tokenizer.model", "train.bin"])
def test_prepare_names_damaged_tokens_and_makes_them_again(tmp_path, finished, name):
    shutil.copytree(finished, tmp_path / "copy")
    flip(tmp_path / "copy" / "out" / name, random.Random(1))
    said = told(tmp_path / "copy", "--filepath", str(finished / "a.txt"), "--output", "out", "--vocab-size", "300")
    assert f"warning: out/{name}: expected " in said and "made again" in said
    found = contents(tmp_path / "copy" / "out")
    wanted = contents(finished / "out")
    assert {n: c for n, c in found.items() if n != "manifest.json"} == {
        n: c for n, c in wanted.items() if n != "manifest.json"
    }
    open_tokens(tmp_path / "copy" / "out")


def test_prepare_does_not_replace_what_a_damaged_manifest_does_not_tell(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "copy")
    flip(tmp_path / "copy" / "out" / "manifest.json", random.Random(1))
    before = contents(tmp_path / "copy" / "out")
    line = told(tmp_path / "copy", "--filepath", "a.txt", "--output", "out", "--vocab-size", "300", status=2)
    assert "out/manifest.json: expected a manifest of prepared tokens, found it damaged; delete out" in line
    assert contents(tmp_path / "copy" / "out") == before


@pytest.mark.parametrize("name", ["checksums.bin", "eval.bin", "manifest.json", "train.bin"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_runs_own_damaged_tokens_are_named_and_made_again_or_the_run_does_not_start(tmp_path, capsys, name, begun):
    (tmp_path / "a.txt").write_text(TEXT)
    args = {"filepath": str(tmp_path / "a.txt"), "vocab_size": 300}
    first = load(tmp_path, **args)
    before = contents(tmp_path / "run" / "tokens")
    flip(tmp_path / "run" / "tokens" / name, random.Random(1))
    capsys.readouterr()
    if begun and name == "manifest.json":  # nothing else tells what the run was trained on
        with pytest.raises(UserError, match=rf"tokens/{name}: expected "):
            load(tmp_path, begun=True, **args)
        told_by = {"began_with": {"": first.tokens.manifest.origin}}
    else:
        told_by = {}
    run = tmp_path / "run"
    again = load_data(DataArgs(**args), run / "tokens", run / "tokenizer.model", begun=begun, **told_by)
    assert re.search(rf"warning: .*tokens/{name}: expected .*made again", capsys.readouterr().out)
    assert contents(tmp_path / "run" / "tokens") == before
    assert text_of(again) == TEXT


def test_a_runs_damaged_tokenizer_is_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    args = {"filepath": str(tmp_path / "a.txt"), "vocab_size": 300}
    first = load(tmp_path, **args)
    path = tmp_path / "run" / "tokenizer.model"
    other = train_tokenizer([TEXT.upper()], 300, tmp_path / "other.model").model_bytes
    path.write_bytes(other)
    with pytest.raises(UserError, match=r"tokenizer\.model: expected the tokenizer that the run began with"):
        load(tmp_path, begun=True, **args)
    path.unlink()
    assert load(tmp_path, begun=True, **args).tokenizer.model_bytes == first.tokenizer.model_bytes  # trained once more
    path.write_bytes(other)
    assert load(tmp_path, **args).tokenizer.model_bytes == first.tokenizer.model_bytes
    assert re.search(
        r"warning: .*tokenizer\.model: expected the tokenizer that made these tokens", capsys.readouterr().out
    )


def test_a_run_that_has_begun_tells_a_text_that_grew_from_another(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    args = {"filepath": str(tmp_path / "a.txt"), "vocab_size": 300}
    origin = load(tmp_path, **args).tokens.manifest.origin
    (tmp_path / "a.txt").write_text(TEXT + "more")
    with pytest.raises(
        UserError, match=r"data\.filepath: .* found that .*a\.txt has grown by 4 bytes since; .*--train\.init-from"
    ):
        load(tmp_path, begun=True, **args)
    shutil.rmtree(tmp_path / "run" / "tokens")
    load(tmp_path, begun=True, **args)
    assert "manifest.json: expected a description of the run's text, found no such file" in capsys.readouterr().out
    # What the run was trained on may be known elsewhere.
    for text, words in ((TEXT + "more", "has grown by 4 bytes since"), (TEXT.upper(), "is another text")):
        (tmp_path / "a.txt").write_text(text)
        with pytest.raises(UserError, match=words):
            load_data(
                DataArgs(**args),
                tmp_path / "t",
                tmp_path / "run" / "tokenizer.model",
                begun=True,
                began_with={"": origin},
            )
    (tmp_path / "a.txt").write_text(TEXT)
    load_data(
        DataArgs(**args), tmp_path / "t", tmp_path / "run" / "tokenizer.model", begun=True, began_with={"": origin}
    )


def test_other_tokens_than_the_run_began_with_are_not_put_in_place(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    args = {"filepath": str(tmp_path / "a.txt"), "vocab_size": 300}
    origin = load(tmp_path, **args).tokens.manifest.origin
    other = dataclasses.replace(origin, tokens_sha256="of another version")
    before = contents(tmp_path / "run" / "tokens")
    for cache in ("run/tokens", "new"):  # tokens that are there, and tokens that are made
        with pytest.raises(UserError, match="expected the tokens that the run began with, found that the same text"):
            path = tmp_path / "run" / "tokenizer.model"
            load_data(DataArgs(**args), tmp_path / cache, path, begun=True, began_with={"": other})
    assert contents(tmp_path / "run" / "tokens") == before and contents(tmp_path / "new") == {}


def as_version_2(folder: Path) -> None:
    """Make of a token folder what an earlier version would have written."""
    (folder / "checksums.bin").unlink()
    table = json.loads((folder / "manifest.json").read_text())
    names = list(table)[: list(table).index("source")]
    (folder / "manifest.json").write_text(json.dumps({name: table[name] for name in names} | {"version": 2}, indent=1))


def test_tokens_of_an_earlier_version_open_and_are_told_not_to_be_verified(tmp_path, finished):
    shutil.copytree(finished / "out", tmp_path / "out")
    as_version_2(tmp_path / "out")
    old, new = open_tokens(tmp_path / "out"), open_tokens(finished / "out")
    assert np.array_equal(old.train, new.train) and np.array_equal(old.eval, new.eval)
    assert old.bits_per_byte(1.0) == new.bits_per_byte(1.0)
    data = load(tmp_path, filepath=str(tmp_path / "out"))
    assert any("without checksums" in line for line in remarks(data))
    again = load(tmp_path, begun=True, filepath=str(tmp_path / "out"))
    assert documents_text(again.tokens.manifest) == "1 to train on, 1 held out"
    said = told(tmp_path, "--filepath", str(finished / "a.txt"), "--output", "out", "--vocab-size", "300")
    assert "holds these tokens already" in said and "without checksums" in said


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    (tmp_path / "text").mkdir()
    for name in ("a.txt", "._b.txt"):
        (tmp_path / "text" / name).write_text(TEXT)
    args = {"filepath": str(tmp_path / "text"), "vocab_size": 300, "separator": r"\n\n"}
    # What an earlier version made: of the hidden file too, and with other rules for documents.
    corpus = Corpus([tmp_path / "text" / "._b.txt", tmp_path / "text" / "a.txt"], b"\n\n", 0.9)
    tokenizer = train_tokenizer([TEXT], 300, tmp_path / "run" / "tokenizer.model")
    old = prepare(corpus, tokenizer, tmp_path / "run" / "tokens", trained_vocab_size=300)
    as_version_2(tmp_path / "run" / "tokens")
    before = contents(tmp_path / "run" / "tokens")
    data = load(tmp_path, begun=True, **args)
    assert np.array_equal(data.tokens.train, old.train) and contents(tmp_path / "run" / "tokens") == before
    (tmp_path / "text" / "a.txt").write_text(TEXT + "more")
    with pytest.raises(UserError, match="the text is another one"):
        load(tmp_path, begun=True, **args)


def test_json_lines_without_texts_are_refused_and_taken_as_text_where_that_is_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text('{"title": "The fox went.", "author": "the owl"}\n' * 100)
    line = told(tmp_path, "--filepath", "a.txt", "--output", "out", "--vocab-size", "300", status=2)
    assert "the fields title, author from line 1 on: a.txt" in line and "with --as-text" in line
    assert "--text-field" in line and not (tmp_path / "out").exists()
    told(tmp_path, "--filepath", "a.txt", "--output", "out", "--vocab-size", "300", "--as-text")
    with pytest.raises(UserError, match=r"--data\.as-text"):
        load(tmp_path, filepath=str(tmp_path / "a.txt"), vocab_size=300)
    args = {"filepath": str(tmp_path / "a.txt"), "vocab_size": 300}
    load(tmp_path, as_text=True, **args)
    load(tmp_path, begun=True, **args)  # a run that was begun with it goes on


def test_prepare_tells_documents_and_what_is_odd(tmp_path):
    (tmp_path / "text").mkdir()
    for name in ("a.txt", ".hidden.txt", "b.md"):
        (tmp_path / "text" / name).write_text("the fox\n<x>\nan owl\n<x>\n" * 20)
    said = told(tmp_path, "--filepath", "text", "--output", "out", "--separator", "<x>", "--vocab-size", "1000")
    assert "documents: 36 to train on, 4 held out; median " in said and "0% unknown tokens" in said
    assert "text: not read, as they are hidden: 1 (.hidden.txt)" in said
    assert "text: not read, as their names do not end in .txt: 1 *.md" in said
    assert "vocabulary: 1,000 was asked for, and the text has pairs for " in said
    assert "warning: 4 of 4 held-out documents are exact copies of documents to train on" in said


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("hello world", {}, ["vocabulary: 1,024 was asked for, and the text has pairs for"]),
        ("a" * 100, {"train_size": 1.0}, ["nothing is held out: there is no evaluation"]),
        (TEXT, {"vocab_size": 300, "train_size": 0.99}, ["tokens are held out: the held-out loss says little"]),
        (TEXT + "\udcff", {"vocab_size": 300}, ["warning: 1 byte sequences are not UTF-8"]),
        (TEXT * 9, {"vocab_size": 300}, []),
    ],
    ids=["two words", "all trains", "little is held out", "an odd byte", "usual"],
)
def test_what_is_odd_about_a_text_is_told_at_every_start(tmp_path, content, options, words):
    (tmp_path / "a.txt").write_bytes(content.encode("utf-8", "surrogateescape"))
    for begun in (False, True):
        lines = remarks(load(tmp_path, begun=begun, filepath=str(tmp_path / "a.txt"), **options))
        assert len(lines) >= len(words) and all(any(word in line for line in lines) for word in words)
        assert words or not lines


def test_a_run_that_repeats_a_tiny_text_is_warned():
    assert repeats_warning(1_000_000, 3, 256) == ""
    assert "3 tokens are read 477,866 times: the model will memorize them" in repeats_warning(3, 477_866.1, 256)
    assert "fewer than a sequence of 256" in repeats_warning(100, 2, 256)


@pytest.mark.parametrize("content", [" \n\t ", "\u2028 \u3000"], ids=ascii)
def test_white_space_is_no_text_whatever_the_tokenizer(tmp_path, small_tokenizer, content):
    (tmp_path / "a.txt").write_text(content * 20)
    for path in ("", str(small_tokenizer.model_path)):
        with pytest.raises(
            UserError, match=r"data\.filepath: expected text to train on, found nothing but white space"
        ):
            load(tmp_path, filepath=str(tmp_path / "a.txt"), tokenizer_model_path=path)


def test_a_separator_in_backslashes_is_the_one_that_prepared_tokens_have(tmp_path, small_tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    out = tmp_path / "out"
    load_data(DataArgs(str(tmp_path / "a.txt"), separator=r"\n\n", vocab_size=300), out, out / "tokenizer.model")
    for separator in ("", r"\n\n", "\n\n"):
        assert load(tmp_path, filepath=str(out), separator=separator).tokens.manifest.separator == "\n\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "expected a command, one of prepare, merge, inspect, train-tokenizer, found none"),
        (["cook"], "found cook"),
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


def test_of_several_texts_with_a_separator_documents_are_held_out_all_over(tmp_path, small_tokenizer):
    documents = [f"document {i}: the fox and the owl" for i in range(300)]
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text("\n\n".join(documents[100 * i : 100 * (i + 1)]))
    args = {"filepath": str(tmp_path / "texts"), "tokenizer_model_path": str(small_tokenizer.model_path)}
    tokens = load(tmp_path, **args, separator=r"\n\n").tokens
    held_out = small_tokenizer.decode(np.asarray(tokens.eval).tolist())
    numbers = [int(number) for number in re.findall(r"document (\d+):", held_out)]
    assert 12 < len(numbers) < 60 and numbers == sorted(numbers) and {n // 100 for n in numbers} == {0, 1, 2}
    assert tokens.manifest.documents == {"train": 300 - len(numbers), "eval": len(numbers)}
    assert tokens.manifest.held_out == "documents"
    # Without a separator a text is a document; of a few of them, the end of the last is held out.
    assert load(tmp_path / "whole", **args).tokens.manifest.held_out == "end"


def test_a_run_and_tokens_of_several_texts_whose_end_was_held_out_stay_as_they_are(
    tmp_path, small_tokenizer, monkeypatch
):
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text("\n\n".join(f"document {i} {j}" for j in range(50)))
    args = {"filepath": str(tmp_path / "texts"), "vocab_size": 300, "separator": r"\n\n"}
    flags = ["--filepath", "texts", "--vocab-size", "300", "--separator", r"\n\n", "--workers", "1", "--output", "out"]
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("llama_jax.data.corpus.Corpus", lambda *given, by_documents: Corpus(*given))
        before = load(tmp_path, **args)
        main(["prepare", *flags])
    assert before.tokens.manifest.held_out == "end"
    known = {"": before.tokens.manifest.origin}
    path = tmp_path / "run" / "tokenizer.model"
    again = load_data(DataArgs(**args), tmp_path / "other", path, begun=True, began_with=known)
    assert np.array_equal(again.tokens.eval, before.tokens.eval) and np.array_equal(
        again.tokens.train, before.tokens.train
    )
    kept = contents(tmp_path / "out")
    main(["prepare", *flags])
    assert contents(tmp_path / "out") == kept


@pytest.mark.parametrize("flag", ["--tokenizer-model-path", "--eval-filepath"])
def test_a_path_without_a_value_is_not_left_out(flag: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The fox.")
    with pytest.raises(UserError, match=f"{flag}: expected a value, found an empty text"):
        main(["prepare", "--filepath", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"), flag, ""])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [[], ["--part", "1/2"]])
@pytest.mark.parametrize("output", ["a.txt", "a.txt/tokens"])
def test_an_output_that_is_a_file_is_refused_by_the_flag(tmp_path, small_tokenizer, output, flags):
    (tmp_path / "a.txt").write_text(TEXT)
    model = str(small_tokenizer.model_path)
    done = command(
        "prepare", "--filepath", "a.txt", "--output", output, "--tokenizer-model-path", model, *flags, cwd=tmp_path
    )
    assert (
        done.returncode == 2
        and done.stderr == "error: --output: expected a folder, found the file a.txt; choose another\n"
    )
    assert (tmp_path / "a.txt").read_text() == TEXT


def test_token_files_of_other_programs_need_not_be_prepared(tmp_path, small_tokenizer):
    np.random.default_rng(0).integers(3, 390, 20_000).astype("<u2").tofile(tmp_path / "train.bin")
    model = str(small_tokenizer.model_path)
    done = command(
        "prepare", "--filepath", "train.bin", "--output", "tokens", "--tokenizer-model-path", model, cwd=tmp_path
    )
    assert (
        done.returncode == 2
        and "found token files of nanoGPT in train.bin; give them to training as they are" in done.stderr
    )
    assert not (tmp_path / "tokens").exists()


def test_several_texts_are_not_silently_taken_for_one(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(TEXT)
    flags = ["--output", "tokens", "--vocab-size", "300"]
    done = command("prepare", "--filepath", "a.txt", "b.txt", *flags, cwd=tmp_path)
    assert (
        done.returncode == 2 and "b.txt: expected a flag before it" in done.stderr and "a glob in quotes" in done.stderr
    )
    done = command("prepare", "--filepath", "a.txt", "--filepath=b.txt", *flags, cwd=tmp_path)
    assert done.returncode == 0 and "warning: --filepath is given 2 times: b.txt is read, and not a.txt" in done.stderr
