"""train.eval_tasks: tasks are scored at every evaluation, checked before anything begins, and change no parameter."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.config import Config, DataArgs, ModelArgs, TrainArgs, load_toml, to_toml
from llama_jax.errors import UserError
from llama_jax.evaluate.scores import evaluate_task
from llama_jax.evaluate.suite import records
from llama_jax.evaluate.tasks import read_tasks
from llama_jax.training import loop, samples
from llama_jax.training.command import read_command
from tests.processes import end, flags
from tests.processes import start as start_job

MODEL = ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=32)
RUN = TrainArgs(
    lr=1e-2, warmup_steps=1, max_steps=4, batch_size=4, eval_interval=2, eval_iters=1, log_interval=1, save_interval=2
)  # fmt: skip
DATA = DataArgs(stories=40, vocab_size=290)


@pytest.fixture(autouse=True, scope="module")
def undrawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "show", lambda *_: 0)
        patch.setattr(samples, "draw_losses", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    (path / "counting.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records("counting", 6)))
    (path / "pages.jsonl").write_text('{"text": "Pip had a kite."}\n')
    return path


def start(folder: Path, name: str, data: DataArgs = DATA, **changes: Any) -> tuple[Path, str]:
    """The run folder, and what the run printed."""
    run = dataclasses.replace(RUN, save_dir=str(folder / name), **changes)
    with contextlib.redirect_stdout(printed := io.StringIO()):
        path = loop.train(Config(MODEL, data, run)).path
    return path, printed.getvalue()


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def parameters(path: Path) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(llama_jax.load(str(path / "checkpoints" / "4")).params)]


def test_scores_are_those_of_the_checkpoint_and_no_parameter_depends_on_them(folder: Path) -> None:
    tasks = (str(folder / "counting.jsonl"), str(folder / "pages.jsonl"))
    plain, _ = start(folder, "plain")
    path, printed = start(folder, "scored", eval_tasks=tasks)
    found = metrics(path)
    names = ["task/counting/accuracy", "task/pages/loss"]
    assert [[name in record for name in names] for record in found] == [[False] * 2, [True] * 2] * 2
    counting, pages = (
        evaluate_task(llama_jax.load(str(path / "checkpoints/4")), one).summary for one in read_tasks(tasks)
    )
    assert found[-1][names[0]] == pytest.approx(counting["accuracy"])
    assert found[-1][names[1]] == pytest.approx(pages["loss"], rel=1e-4)
    assert f"; counting/accuracy {counting['accuracy']:.3f}, pages/loss {pages['loss']:.3f}" in printed
    assert parameters(path) == parameters(plain)
    assert [r["train_loss"] for r in found] == [r["train_loss"] for r in metrics(plain)]


def test_a_run_that_goes_on_with_tasks_is_the_one_that_never_stopped(folder: Path) -> None:
    start(folder, "resumed", max_steps=2)
    path, printed = start(folder, "resumed", eval_tasks=(str(folder / "counting.jsonl"),))
    assert "task/counting/accuracy" in metrics(path)[-1] and "train.eval_tasks () -> " in printed
    whole, _ = start(folder, "whole", eval_tasks=(str(folder / "counting.jsonl"),), max_steps=2)
    start(folder, "whole", eval_tasks=(str(folder / "counting.jsonl"),))
    assert parameters(path) == parameters(whole)


def test_a_task_whose_items_have_changed_since_it_was_scored_is_told(folder: Path) -> None:
    own = folder / "own.jsonl"
    own.write_text((folder / "counting.jsonl").read_text())
    start(folder, "changed", eval_tasks=(str(own),), max_steps=2)
    _, printed = start(folder, "changed", eval_tasks=(str(own),), max_steps=3)
    assert "has other items" not in printed
    start(folder, "changed", max_steps=4)  # without it for a while
    own.write_text("".join(own.read_text().splitlines(keepends=True)[1:]))
    path, printed = start(folder, "changed", eval_tasks=(str(own),), max_steps=5)
    assert f"warning: train.eval_tasks: {own} has other items than when it was scored last" in printed
    assert "task/own/accuracy" in metrics(path)[-1]
    _, printed = start(folder, "changed", eval_tasks=(str(own),), max_steps=6)
    assert "has other items" not in printed


def test_tasks_are_checked_before_anything_begins(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"context": "a", "answer": 3}\n')
    (folder / "long.jsonl").write_text(json.dumps({"context": "a", "answer": "b " * 99}) + "\n")
    for name, words in (
        ("none.jsonl", r"^train\.eval_tasks: expected a file of records .*none\.jsonl"),
        ("bad.jsonl", r"bad\.jsonl: line 1: answer: expected a text"),
        ("long.jsonl", r"long\.jsonl: line 1: expected a continuation of up to 32 tokens"),
    ):
        with pytest.raises(UserError, match=words):
            start(folder, "refused", eval_tasks=(str(folder / name),))
        assert not (folder / "refused" / "metrics.jsonl").exists()
    with pytest.raises(UserError, match=r"^train\.eval_tasks: expected a path, found an empty text"):
        start(folder, "refused", eval_tasks=("",))
    with pytest.raises(UserError, match=r"^train\.eval_tasks: expected a held-out text"):
        nothing = dataclasses.replace(DATA, train_size=1.0)
        start(folder, "unheld", nothing, eval_tasks=(str(folder / "counting.jsonl"),))


def test_what_is_cut_and_what_is_not_read_is_told_at_the_start(folder: Path) -> None:
    (tasks := folder / "several").mkdir()
    (tasks / "more.json").touch()
    record = {"context": "a fox and " * 20, "choices": ["b", "b", "c"], "answer": 2}
    (tasks / "wide.jsonl").write_text(json.dumps(record) + "\n")
    _, printed = start(folder, "told", eval_tasks=(str(tasks),), max_steps=2)
    assert "wide: 1 of 1 items exceed the context of 32 tokens and lose their beginning" in printed
    assert "wide: 1 of 1 items have a choice twice" in printed
    assert f"in {tasks} are: 1 (more.json)" in " ".join(printed.split())


def test_the_flag_takes_several_files_and_the_text_comes_before_it() -> None:
    argv = ["my.txt", "--train.eval-tasks", "a.jsonl", "b.jsonl", "--train.seed", "1"]
    config, _ = read_command(argv)
    assert config.train.eval_tasks == ("a.jsonl", "b.jsonl") and config.data.filepath == "my.txt"


def test_a_list_of_tasks_is_kept_in_toml(tmp_path: Path) -> None:
    config = Config(train=TrainArgs(eval_tasks=("a.jsonl", "b c.jsonl")))
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_toml(tmp_path / "config.toml") == config
    (tmp_path / "config.toml").write_text("[train]\neval_tasks = [1]\n")
    with pytest.raises(UserError, match=r"config\.toml: train\.eval_tasks: expected str, found 1"):
        load_toml(tmp_path / "config.toml")


@pytest.mark.slow
def test_the_processes_of_a_job_score_what_one_scores(folder: Path) -> None:
    found = []
    for name, count in (("one", 1), ("two", 2)):
        argv = flags(data__train_size=0.9, train__max_steps=2, train__eval_iters=1, train__save_dir=folder / name)
        tasks = ["--train.eval-tasks", str(folder / "counting.jsonl"), str(folder / "pages.jsonl")]
        ended = end(start_job(["train.py", *argv, "--model.max-seq-len=32", *tasks], count, 2))
        assert [one.status for one in ended] == [0] * count, ended
        found.append(metrics(folder / name)[-1])
    one, two = found
    assert two["task/counting/accuracy"] == pytest.approx(one["task/counting/accuracy"], abs=0.2)
    assert two["task/pages/loss"] == pytest.approx(one["task/pages/loss"], rel=1e-3)
