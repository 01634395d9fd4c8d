"""Runs on mixtures: resumed exactly, weights that change, sources that are told apart and evaluated."""

import contextlib
import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.config import Config, DataArgs, ModelArgs, TrainArgs, load_toml
from llama_jax.data import open_tokens
from llama_jax.data.mixture import folder_of
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from llama_jax.training import loop, samples
from llama_jax.training.clock import TIMES
from llama_jax.training.command import read_command

MODEL = ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=16)
TRAIN = TrainArgs(lr=1e-2, warmup_steps=1, max_steps=8, batch_size=4, eval_interval=4, log_interval=1, save_interval=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtures")
    words = ["the", "cat", "and", "a", "dog", "sat", "on", "one", "old", "mat", "by", "the", "sea"]
    rng = random.Random(0)
    documents = [" ".join(rng.choices(words, k=8)) for _ in range(200)]
    (folder / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "books.txt").write_text("\n".join(text.upper() for text in documents[:40]))
    (folder / "more.txt").write_text("\n".join(text.title() for text in documents))
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(samples, "draw_losses", lambda *_: None)
    monkeypatch.setattr(samples, "show", lambda *_, **__: None)
    monkeypatch.chdir(folder)


@pytest.fixture
def copies(quiet: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the sources, beside which the test runs, and which it may change."""
    monkeypatch.chdir(tmp_path)
    for name in ("web.jsonl", "books.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def config(name: str, mixture: dict[str, float], data: dict[str, Any] | None = None, **train: Any) -> Config:
    args = DataArgs(mixture=mixture, vocab_size=280, **(data or {}))
    return Config(MODEL, args, dataclasses.replace(TRAIN, save_dir=name, **train))


def run(*args: Any, **options: Any) -> tuple[list[dict[str, Any]], str]:
    """Train. Return the records without times, and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found = loop.train(config(*args, **options))
    lines = found.metrics_path.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines], said.getvalue()


WEIGHTS = {"web.jsonl": 0.75, "books.txt": 0.25}


def test_a_run_is_resumed_exactly_and_each_source_is_evaluated(folder: Path) -> None:
    whole, said = run("whole", WEIGHTS)
    again, _ = run("whole2", WEIGHTS)
    assert again == whole
    resumed, _ = run("whole2", WEIGHTS, resume_step=4)
    assert resumed == whole
    last = whole[-1]
    names = [f"eval_loss/{name}" for name in WEIGHTS]
    assert last["eval_loss"] == pytest.approx(0.75 * last[names[0]] + 0.25 * last[names[1]])
    assert "a mixture of web.jsonl (75%), books.txt (25%)" in said
    assert "source 1  web.jsonl: 75% of the sequences" in said and "(web.jsonl " in said
    assert load_toml(folder / "whole" / "config.toml").data.mixture == WEIGHTS
    bits = [_bits(folder / "whole", name, last[f"eval_loss/{name}"]) for name in WEIGHTS]
    assert min(bits) < last["eval_bits_per_byte"] < max(bits)


def _bits(run: Path, name: str, loss: float) -> float:
    bits = open_tokens(folder_of(run / "tokens", name)).bits_per_byte(loss)
    assert bits is not None
    return bits


def test_a_source_that_runs_out_begins_again_and_that_is_told(folder: Path) -> None:
    _, said = run("epochs", {"web.jsonl": 0.5, "books.txt": 0.5}, max_steps=40, eval_interval=40, save_interval=40)
    tokens = open_tokens(folder_of(folder / "epochs" / "tokens", "books.txt")).train
    windows = -(-len(tokens) // 16)
    wanted = [f"books.txt has been read {n} time{'s' * (n > 1)}," for n in range(1, 80 // windows + 1)]
    assert wanted and all(words in said for words in wanted) and said.count("begins again") == len(wanted)


def test_weights_may_change_and_sources_may_be_added_and_it_is_told(folder: Path) -> None:
    before, _ = run("changed", WEIGHTS, max_steps=4)
    after, said = run("changed", {"web.jsonl": 0.5, "more.txt": 0.5}, max_steps=8)
    assert [r["train_loss"] for r in after[:4]] == [r["train_loss"] for r in before]
    assert "data.mixture {'web.jsonl': 0.75, 'books.txt': 0.25} -> {'web.jsonl': 0.5, 'more.txt': 0.5}" in said
    assert "are not comparable" in said
    stretches = json.loads((folder / "changed" / "run.json").read_text())["mixture"]
    assert [stretch["step"] for stretch in stretches] == [0, 4]
    assert "eval_loss/more.txt" in after[-1] and "eval_loss/books.txt" not in after[-1]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"mixture": WEIGHTS}, {"filepath": "web.jsonl"}, "expected the mixture that the run began with"),
        ({"filepath": "web.jsonl"}, {"mixture": WEIGHTS}, "expected none, as the run began with a single text"),
    ],
)
def test_a_run_on_a_text_and_a_run_on_a_mixture_are_two(folder: Path, tmp_path: Path, first, second, words) -> None:
    train = dataclasses.replace(TRAIN, save_dir=str(tmp_path / "run"), max_steps=2, save_interval=2, eval_interval=2)
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train(Config(MODEL, DataArgs(vocab_size=280, **first), train))
        with pytest.raises(UserError, match=words):
            loop.train(Config(MODEL, DataArgs(vocab_size=280, **second), dataclasses.replace(train, max_steps=4)))


def test_a_source_that_has_changed_is_refused(copies: Path) -> None:
    run("run", WEIGHTS, max_steps=2, save_interval=2)
    (copies / "books.txt").write_text("Something else.\n" * 50)
    with pytest.raises(UserError, match=r"found that books\.txt is another text"):
        run("run", WEIGHTS, max_steps=4)


def test_without_run_json_a_mixture_is_read_on_where_it_was(copies: Path) -> None:
    changed = {"web.jsonl": 0.5, "books.txt": 0.5}
    for name in ("run", "whole"):
        run(name, WEIGHTS, max_steps=4, save_interval=2)
        run(name, changed, max_steps=6, save_interval=2)
    whole, _ = run("whole", changed, max_steps=8)
    before = json.loads((copies / "run" / "run.json").read_text())
    (copies / "run" / "run.json").unlink()
    found, said = run("run", changed, max_steps=8)
    assert "run.json is missing: it is made of what the checkpoint of step 6 tells" in said and found == whole
    after = json.loads((copies / "run" / "run.json").read_text())
    assert (after["id"], after["mixture"], after["measured_from"]) == (before["id"], before["mixture"], 4)


def test_a_source_that_was_left_out_for_a_while_is_known_when_it_comes_back(copies: Path) -> None:
    run("run", WEIGHTS, max_steps=2, save_interval=2)
    run("run", {"web.jsonl": 1.0}, max_steps=4, save_interval=2)
    (copies / "books.txt").write_text("Something else.\n" * 50)
    with pytest.raises(UserError, match=r"found that books\.txt is another text"):
        run("run", WEIGHTS, max_steps=6)


def test_a_source_that_moved_is_read_on_where_it_was_and_that_is_told(copies: Path) -> None:
    every = {"max_steps": 6, "save_interval": 3, "eval_interval": 3}
    whole, _ = run("run", WEIGHTS, **every)
    (copies / "moved").mkdir()
    (copies / "web.jsonl").rename(copies / "moved" / "web.jsonl")
    moved, said = run("run", {"moved/web.jsonl": 0.75, "books.txt": 0.25}, **every, resume_step=3)
    assert "moved/web.jsonl has the text of web.jsonl, and is read on where that was" in said
    assert "changed" not in said, "the evaluations measure what they did"
    assert [r["train_loss"] for r in moved] == [r["train_loss"] for r in whole]
    stretches = json.loads((copies / "run" / "run.json").read_text())["mixture"]
    assert [stretch["weights"] for stretch in stretches] == [{"moved/web.jsonl": 0.75, "books.txt": 0.25}]


def test_the_vocabulary_is_trained_once_on_the_training_part_of_all_sources(folder: Path) -> None:
    run("vocabulary", WEIGHTS, max_steps=1)
    tokenizer = Tokenizer(folder / "vocabulary" / "tokenizer.model")
    stamp = (folder / "vocabulary" / "tokenizer.model").stat().st_mtime_ns
    pieces = {tokenizer.piece(i) for i in range(tokenizer.vocab_size)}
    assert {any(map(test, pieces - {"<unk>", "<s>", "</s>"})) for test in (str.islower, str.isupper)} == {True}
    run("vocabulary", WEIGHTS, max_steps=2)
    assert (folder / "vocabulary" / "tokenizer.model").stat().st_mtime_ns == stamp


def test_prepared_tokens_may_be_a_source_and_bring_their_tokenizer(folder: Path) -> None:
    from llama_jax.data.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()):
        main(["prepare", "--filepath", "more.txt", "--output", "tokens", "--vocab-size", "300", "--workers", "1"])
    _, said = run("prepared", {"tokens": 0.5, "web.jsonl": 0.5}, max_steps=2)
    assert "the tokenizer of tokens is that of all sources" in said
    assert np.asarray(open_tokens(folder_of(folder / "prepared" / "tokens", "web.jsonl")).train).max() < 300
    assert (folder / "prepared" / "tokenizer.model").read_bytes() == (
        folder / "tokens" / "tokenizer.model"
    ).read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.mixture", "a", "0"], "data.mixture, 'a': expected a weight above 0, found 0"),
        (["--data.mixture", "a", "nan"], "data.mixture, 'a': expected a weight above 0, found nan"),
        (["--data.mixture", "a", "1", "--data.filepath", "b"], "data.filepath: expected none beside data.mixture"),
        (
            ["--data.mixture", "a", "1", "--data.eval-filepath", "b"],
            "data.eval_filepath: expected none beside data.mixture",
        ),
        (["--data.mixture", "a"], "--data.mixture: expected a text and a number"),
        (["--data.mixture", "a", "1", "b", "1", "a", "3"], "--data.mixture: expected each once, found a 2 times"),
        (["my.txt", "--data.mixture", "a", "1"], "data.filepath: expected none beside data.mixture"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_mixtures_are_refused(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        read_command(flags)


def test_a_flag_replaces_the_text_or_the_mixture_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text('[data.mixture]\n"web/" = 0.7\n"books.parquet" = 3\n')
    (tmp_path / "t.toml").write_text('[data]\nfilepath = "a.txt"\n')
    read, notes = read_command(["--config", str(tmp_path / "m.toml")])
    assert read.data.mixture == {"web/": 0.7, "books.parquet": 3} and not notes
    read, notes = read_command(["--config", str(tmp_path / "m.toml"), "b.txt"])
    assert read.data.mixture == {} and read.data.filepath == "b.txt" and "data.mixture" in notes[0]
    read, notes = read_command(["--config", str(tmp_path / "t.toml"), "--data.mixture", "web/", "1"])
    assert (
        read.data.filepath == ""
        and read.data.mixture == {"web/": 1.0}
        and "data.filepath a.txt of the file" in notes[0]
    )


def test_two_sources_of_one_text_are_told(folder: Path) -> None:
    (folder / "copy.jsonl").write_bytes((folder / "web.jsonl").read_bytes())
    _, said = run("twice", {"web.jsonl": 0.5, "copy.jsonl": 0.5}, max_steps=1)
    assert "warning: web.jsonl and copy.jsonl are the same text" in said
    _, said = run("different", WEIGHTS, max_steps=1)
    assert "are the same text" not in said


def test_sources_that_have_a_file_in_common_are_told(folder: Path) -> None:
    (folder / "both").mkdir()
    for name in ("fox.txt", "owl.txt"):
        (folder / "both" / name).write_text(f"The {name} went to the river. " * 40)
    (folder / "elsewhere.txt").write_bytes((folder / "both" / "owl.txt").read_bytes())
    _, said = run("in common", {"both": 0.5, "elsewhere.txt": 0.5}, max_steps=1)
    told = "both and elsewhere.txt both have the files 1 (elsewhere.txt): their share is that of both, and what one of them"
    assert f"warning: {told}" in said and "losses are too low" in said
    _, said = run("not in common", {"both/fox.txt": 0.5, "elsewhere.txt": 0.5}, max_steps=1)
    assert "both have" not in said


def test_a_source_is_refused_without_a_line_before(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llama_jax.data.__main__ import main

    main(["prepare", "--filepath", "more.txt", "--output", "of more", "--vocab-size", "300", "--workers", "1"])
    capsys.readouterr()
    for mixture in (WEIGHTS, {"of more": 0.5, "web.jsonl": 0.5}):
        given = config("refused", mixture, {"bad_records": "skip", "text_field": "body"})
        with pytest.raises(UserError, match="text_field"):
            loop.train(given)
        assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"^data\.separator: expected none.* beside web\.jsonl"):
        loop.train(config("refused", WEIGHTS, {"separator": "took"}))
    assert capsys.readouterr().out == ""


def test_a_missing_source_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.mixture, 'nowhere\.txt': .*found nothing at nowhere\.txt"):
        run("missing", {"web.jsonl": 0.5, "nowhere.txt": 0.5})
    assert not (folder / "missing").exists()
