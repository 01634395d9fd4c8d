"""Shards are the same for any number of workers, parts and restarts, and what is done stays done."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llama_jax.config import DataArgs
from llama_jax.data import find_text, shards, workers
from llama_jax.data.__main__ import main
from llama_jax.data.encode import encode_task, read_result
from llama_jax.data.manifest import read_manifest
from llama_jax.data.shards import RefuseOthers, encode_tasks, job_of, prepare, unfinished_in
from llama_jax.data.text import Corpus
from llama_jax.data.tokens import document_starts, open_tokens
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer

DOCUMENTS = [f"document {i}: the fox went to the river {i % 7} times\n" * (1 + i % 5) for i in range(600)]
TASK_BYTES = 5000


@pytest.fixture(scope="module", autouse=True)
def small_tasks() -> Iterator[None]:
    """Tasks of some kilobytes, so that a short text has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "TASK_BYTES", TASK_BYTES)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer, small_tasks: None) -> Path:
    """A text, as plain text and as JSON lines, and its tokens in one shard each, made by one process."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "a.txt").write_text("\n\n".join(DOCUMENTS))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    for name in ("a.txt", "a.jsonl"):
        made(folder, name, folder / f"whole {name}", small_tokenizer)
    return folder


def made(folder: Path, name: str, output: Path, tokenizer: Tokenizer, number: int = 1) -> dict[str, bytes]:
    """Prepare a text, and return the content of the files that this makes."""
    args = DataArgs(str(folder / name), separator=r"\n\n" * (name == "a.txt"))
    prepare(find_text(args, output).corpus, tokenizer, output, number)
    return contents(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".owner"}


def job_in(folder: Path, output: Path, tokenizer: Tokenizer) -> shards.Job:
    corpus = find_text(DataArgs(str(folder / "a.txt"), separator=r"\n\n"), output).corpus
    made_from = f"{corpus.digest()} {shards.sha256(tokenizer.model_bytes)}"
    return job_of(corpus, tokenizer, output, made_from, None, {"source": "a.txt"})


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_shards_are_the_tokens_of_the_whole_text_whoever_makes_them(
    folder, tmp_path, small_tokenizer, name, monkeypatch
):
    found = made(folder, name, tmp_path / "out", small_tokenizer, 2)
    assert found == contents(folder / f"whole {name}")
    assert sum("train-" in file for file in found) > 9 and not unfinished_in(tmp_path / "out")
    monkeypatch.setattr(shards, "TASK_BYTES", 1 << 24)
    alone = made(folder, name, tmp_path / "alone", small_tokenizer)
    assert {"train.bin", "eval.bin"} <= alone.keys()
    several, one = open_tokens(tmp_path / "out"), open_tokens(tmp_path / "alone")
    for split in ("train", "eval"):
        assert np.array_equal(getattr(several, split), getattr(one, split))
        ids = np.asarray(getattr(one, split))
        starts = document_starts(tmp_path / "out", several.manifest)[split]
        assert np.array_equal(starts, np.flatnonzero(ids == small_tokenizer.bos_id))
        assert len(starts) == several.manifest.documents[split]
    same = {
        field.name: None for field in dataclasses.fields(one.manifest) if field.name in ("sha256", "shards", "counts")
    }
    assert dataclasses.replace(several.manifest, **same) == dataclasses.replace(one.manifest, **same)
    assert several.manifest.counts is not None and one.manifest.counts is not None
    # Of a text in tasks the beginning of each is compared, and a document that a cut goes through is not among the copies.
    counts = dataclasses.asdict(several.manifest.counts) | {"compared_bytes": one.manifest.counts.compared_bytes}
    assert counts == dataclasses.asdict(one.manifest.counts)


def test_a_slice_of_the_stream_goes_over_the_borders_of_shards(folder, small_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("llama_jax.data.stream.OPEN_FILES", 2)
    tokens = open_tokens(folder / "whole a.txt")
    whole = np.asarray(tokens.train)
    rng = np.random.default_rng(0)
    for start, length in zip(rng.integers(0, len(whole), 300), rng.integers(0, 9000, 300), strict=True):
        assert np.array_equal(tokens.train[start : start + length], whole[start : start + length])
    assert len(tokens.train._files) == 2


def test_a_damaged_or_missing_shard_is_named(folder, tmp_path):
    for damage, words in (("flip", "changed since"), ("cut", "found 9;"), ("gone", "found none")):
        shutil.copytree(folder / "whole a.txt", tmp_path / damage)
        path = tmp_path / damage / "train-00003.bin"
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content[:9] if damage == "cut" else content)
        if damage == "gone":
            path.unlink()
        with pytest.raises(UserError, match=rf"train-00003\.bin: expected .*{words}"):
            open_tokens(tmp_path / damage)


def test_finished_tasks_are_not_done_again(folder, tmp_path, small_tokenizer, monkeypatch, capsys):
    job = job_in(folder, tmp_path / "out", small_tokenizer)
    encode_tasks(job, [0, 3, 4], small_tokenizer, 1)
    (job.folder / "000004.train.bin").write_bytes(b"half")
    done = []
    monkeypatch.setattr(
        workers, "encode_task", lambda job, task, *rest: (done.append(task), encode_task(job, task, *rest))
    )
    assert made(folder, "a.txt", tmp_path / "out", small_tokenizer) == contents(folder / "whole a.txt")
    assert done == [task for task in range(len(job.tasks)) if task not in (0, 3)]
    assert f"2 of {len(job.tasks)} shards are there from an earlier start" in capsys.readouterr().out


def test_a_failure_between_the_last_task_and_the_manifest_is_mended_by_the_next_start(
    folder, tmp_path, small_tokenizer
):
    wanted = contents(folder / "whole a.txt")
    for call in range(1, len(wanted) + 3):
        calls = 0

        def fails(*args, call=call, step=os.replace):
            nonlocal calls
            calls += 1
            if calls == call + 4 * 3:  # four files of the only task that is left
                raise KeyboardInterrupt
            return step(*args)

        output = tmp_path / str(call)
        job = job_in(folder, output, small_tokenizer)
        encode_tasks(job, range(3, len(job.tasks)), small_tokenizer, 1)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", fails)
            made(folder, "a.txt", output, small_tokenizer)
        assert made(folder, "a.txt", output, small_tokenizer) == wanted
        shutil.rmtree(output)


def test_unfinished_tokens_with_other_settings_are_refused_by_prepare_and_removed_by_a_run(
    folder, tmp_path, small_tokenizer, capsys
):
    def other() -> Corpus:
        return Corpus([folder / "a.txt"], b"\n", 0.9)

    job = job_in(folder, tmp_path, small_tokenizer)
    encode_tasks(job, [0], small_tokenizer, 1)
    with pytest.raises(UserError, match=r"--output: .* unfinished tokens of a\.txt, .* with other settings"):
        prepare(other(), small_tokenizer, tmp_path, others=RefuseOthers("--output"))
    assert read_result(job, 0) is not None
    prepare(other(), small_tokenizer, tmp_path)
    assert "unfinished tokens of a.txt" in capsys.readouterr().out and not unfinished_in(tmp_path)


def test_a_worker_that_is_killed_is_told_and_the_next_start_goes_on(folder, tmp_path, small_tokenizer, monkeypatch):
    started = []
    start = subprocess.Popen

    def watched(*args, **options):
        started.append(start(*args, **options))
        if len(started) == 2:
            started[0].kill()
        return started[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", watched)
    with pytest.raises(UserError, match=r"expected 2 processes to encode, found that one ended \(signal 9"):
        made(folder, "a.txt", tmp_path / "out", small_tokenizer, 2)
    assert all(process.poll() is not None for process in started)
    assert made(folder, "a.txt", tmp_path / "out", small_tokenizer) == contents(folder / "whole a.txt")


def test_an_error_in_a_worker_is_the_error_of_the_command(folder, tmp_path, small_tokenizer):
    lines = (folder / "a.jsonl").read_text().splitlines()
    lines[400] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = find_text(DataArgs(str(tmp_path / "a.jsonl")), tmp_path).corpus
    with pytest.raises(UserError, match=r"a\.jsonl: line 401: expected JSON"):
        prepare(corpus, small_tokenizer, tmp_path / "out", 2)


COMMAND = f"from llama_jax.data import shards; shards.TASK_BYTES = {TASK_BYTES}; from llama_jax.data.__main__ import main; main()"


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_prepare_that_is_killed_again_and_again_ends_in_the_same_shards(folder, tmp_path, small_tokenizer, kills):
    """The processes that it starts end with it."""
    flags = ["--filepath", str(folder / "a.txt"), "--separator", r"\n\n", "--output", str(tmp_path / "out")]
    argv = [sys.executable, "-c", COMMAND, "prepare", *flags, "--tokenizer-model-path", str(small_tokenizer.model_path)]
    rng = random.Random(kills)
    for _ in range(kills):
        running = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.6))
        running.kill()
        running.wait()
        until = time.monotonic() + 10
        while time.monotonic() < until and _lives(running.pid):
            time.sleep(0.02)
        assert not _lives(running.pid)
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    found = contents(tmp_path / "out")
    wanted = contents(folder / "whole a.txt") | {"tokenizer.model": small_tokenizer.model_bytes}
    assert {name: found[name] for name in found if name != "manifest.json"} == {
        name: wanted[name] for name in wanted if name != "manifest.json"
    }


def _lives(group: int) -> bool:
    """Whether a process of the group is alive."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def part(folder: Path, output: Path, which: str, tokenizer: Tokenizer, name: str = "a.jsonl", *more: str) -> None:
    flags = ["--filepath", str(folder / name), "--output", str(output), "--workers", "1", *more]
    main(["prepare", *flags, "--tokenizer-model-path", str(tokenizer.model_path), "--part", which])


@pytest.mark.parametrize("count", [1, 3, 40])
def test_parts_merge_into_the_tokens_of_one_prepare(folder, tmp_path, small_tokenizer, count, capsys):
    output = tmp_path / "out"
    for number in random.Random(count).sample(range(1, count + 1), count):
        part(folder, output, f"{number}/{count}", small_tokenizer)
    with pytest.raises(UserError, match="unfinished tokens"):
        find_text(DataArgs(str(output)), tmp_path)
    main(["merge", "--output", str(output)])
    assert read_manifest(output) is not None and not unfinished_in(output)
    wanted = contents(folder / "whole a.jsonl") | {"tokenizer.model": small_tokenizer.model_bytes}
    found = contents(output)
    assert found.keys() == wanted.keys() and all(
        found[name] == wanted[name] for name in wanted if name != "manifest.json"
    )
    manifests = [json.loads(each["manifest.json"]) for each in (found, wanted)]
    for manifest in manifests:
        del manifest["source"], manifest["manifest_sha256"]
    assert manifests[0] == manifests[1]
    capsys.readouterr()
    main(["merge", "--output", str(output)])
    assert "holds these tokens already" in capsys.readouterr().out
    part(folder, output, f"1/{count}", small_tokenizer)
    assert "holds the tokens of all parts already" in capsys.readouterr().out and contents(output) == found
    with pytest.raises(UserError, match=r"train_size was 0\.9 and is 0\.5 now"):
        part(folder, output, f"1/{count}", small_tokenizer, "a.jsonl", "--train-size", "0.5")


def test_a_part_tells_what_of_the_folder_is_not_read(tmp_path, small_tokenizer, capsys):
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        (tmp_path / "set" / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    part(tmp_path, tmp_path / "out", "1/1", small_tokenizer, "set")
    assert "not read, as their names say that they are the test split: 1 (test.jsonl)" in capsys.readouterr().out


def test_merge_names_the_parts_that_are_missing(folder, tmp_path, small_tokenizer):
    for which in ("1/4", "3/4"):
        part(folder, tmp_path / "out", which, small_tokenizer)
    with pytest.raises(
        UserError, match=r"expected all parts, found that these are missing or unfinished: 2/4, 4/4; run"
    ):
        main(["merge", "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--part", "5/4"], "--part: expected a number and how many"),
        (["--part", "two"], "--part: expected a number and how many"),
        (["--train-size", "0.5"], "unfinished tokens of .* with other settings"),
        (
            ["--tokenizer-model-path", "other.model"],
            "--tokenizer-model-path: expected the tokenizer of the other parts",
        ),
        (["--tokenizer-model-path", ""], "--tokenizer-model-path: expected the tokenizer of all parts, found none"),
        (["--filepath", "-"], "expected a path, found -"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_parts_of_something_else_are_refused(
    folder, tmp_path, small_tokenizer, llama2_tokenizer, monkeypatch, more, words
):
    monkeypatch.chdir(tmp_path)
    part(folder, tmp_path / "out", "1/4", small_tokenizer)
    shutil.copy(llama2_tokenizer.model_path, tmp_path / "other.model")
    flags = ["--filepath", str(folder / "a.jsonl"), "--output", str(tmp_path / "out"), "--part", "2/4"]
    with pytest.raises(UserError, match=words):
        main(["prepare", *flags, "--tokenizer-model-path", str(small_tokenizer.model_path), *more])


def test_a_part_with_a_separator_that_occurs_nowhere_is_refused_and_makes_nothing(folder, tmp_path, small_tokenizer):
    with pytest.raises(UserError, match="expected what stands between documents"):
        part(folder, tmp_path / "out", "1/2", small_tokenizer, "a.txt", "--separator", "<|end|>")
    assert not (tmp_path / "out").exists()


def test_a_text_that_changes_between_the_parts_is_refused(folder, tmp_path, small_tokenizer):
    shutil.copy(folder / "a.jsonl", tmp_path / "a.jsonl")
    part(tmp_path, tmp_path / "out", "1/2", small_tokenizer)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    for command in (
        lambda: part(tmp_path, tmp_path / "out", "2/2", small_tokenizer),
        lambda: main(["merge", "--output", str(tmp_path / "out")]),
    ):
        with pytest.raises(UserError, match=r"unfinished tokens of .*, of another state of it"):
            command()


def test_a_prepare_of_its_own_over_parts_says_that_they_are_parts(folder, tmp_path, small_tokenizer):
    part(folder, tmp_path / "out", "1/2", small_tokenizer)
    flags = ["--filepath", str(folder / "a.jsonl"), "--tokenizer-model-path", str(small_tokenizer.model_path)]
    with pytest.raises(
        UserError, match=r"found parts of .*a\.jsonl, which prepare --part made of it, and which merge joins"
    ):
        main(["prepare", *flags, "--output", str(tmp_path / "out")])


def test_merge_of_nothing_is_refused(tmp_path):
    for output, words in ((tmp_path / "none", "found none at"), (tmp_path, "found no parts in")):
        with pytest.raises(UserError, match=words):
            main(["merge", "--output", str(output)])


def test_a_run_that_began_with_one_file_of_tokens_goes_on_with_shards(folder, tmp_path, small_tokenizer):
    """Earlier versions kept the tokens of a split in one file, and their checksums are in the record of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "TASK_BYTES", 1 << 24)
        made(folder, "a.txt", tmp_path / "before", small_tokenizer)
    before = open_tokens(tmp_path / "before").manifest.origin
    corpus = find_text(DataArgs(str(folder / "a.txt"), separator=r"\n\n"), tmp_path).corpus
    for _ in range(2):  # made again, and then found
        tokens = prepare(corpus, small_tokenizer, tmp_path / "now", expected=before)
        assert len(tokens.train.shards) > 9 and tokens.manifest.origin.tokens_sha256 == before.tokens_sha256
    with pytest.raises(UserError, match="expected the tokens that the run began with"):
        prepare(corpus, small_tokenizer, tmp_path / "3", expected=dataclasses.replace(before, tokens_sha256="0" * 64))


def test_workers_leave_standard_error_to_errors(folder, tmp_path, small_tokenizer, monkeypatch, capfd):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    made(folder, "a.txt", tmp_path / "out", small_tokenizer, 2)
    assert capfd.readouterr().err == ""


def test_workers_are_no_more_than_cores_and_that_is_told(folder, tmp_path, small_tokenizer, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    start = subprocess.Popen
    monkeypatch.setattr(
        workers.subprocess, "Popen", lambda *args, **options: started.append(1) or start(*args, **options)
    )
    made(folder, "a.txt", tmp_path / "out", small_tokenizer, 64)
    assert len(started) == 2
    assert "2 processes encode, as many as there are cores, not 64" in capsys.readouterr().out


def test_a_file_that_is_called_as_a_module_of_pythons_is_not_taken_for_it(
    folder, tmp_path, small_tokenizer, monkeypatch
):
    (tmp_path / "queue.py").write_text("raise SystemExit('another queue')")
    monkeypatch.chdir(tmp_path)
    assert made(folder, "a.txt", tmp_path / "out", small_tokenizer, 2) == contents(folder / "whole a.txt")
