"""The command line of tasks: JSON lines, the table, --output, several checkpoints, and what is refused."""

import json
import os
from pathlib import Path

import pytest

from tests import inside
from tests.commands import SMALL, told

LINE = ["task", "ckpt", "kind", "n", "accuracy", "stderr", "accuracy_norm", "stderr_norm", "loss", "perplexity",
        "bits_per_byte", "shots", "seed", "cut"]  # fmt: skip


@pytest.fixture(scope="module")
def files(place: Path) -> Path:
    (place / "choices.jsonl").write_text(
        "".join(
            json.dumps({"question": f"Is it {i}?", "choices": ["yes", "no"], "answer": i % 2}) + "\n" for i in range(6)
        )
    )
    (place / "pages.jsonl").write_text('{"text": "The fox."}\n{"text": "An owl saw 12 boats."}\n')
    os.mkfifo(place / "pipe")
    (place / "wrong.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}\n{"context": "a"}\n')
    return place


def test_a_line_a_checkpoint_and_task_a_table_and_the_items(files: Path) -> None:
    steps = [f"runs/tiny/checkpoints/{step}" for step in (3, 6)]
    argv = ["-m", "llama_jax.evaluate", "--ckpt", *steps, "--tasks", "choices.jsonl", "pages.jsonl", "--shots", "1"]
    result = inside.run([*argv, "--output", "scores.jsonl"], files)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]
    assert [(line["ckpt"], line["task"]) for line in lines] == [
        (step, task) for step in steps for task in ("choices", "pages")
    ]
    assert all(list(line) == LINE for line in lines)
    choices, pages = lines[:2]
    assert choices["n"] == 6 and 0 <= choices["accuracy"] <= 1 and choices["stderr"] is not None
    assert pages["accuracy"] is None and pages["perplexity"] > 1 and pages["bits_per_byte"] > 0
    assert "--shots: no effect on pages.jsonl" in result.stderr
    header = next(line for line in result.stderr.splitlines() if line.startswith("task"))
    assert header.split() == ["task", "n", "score", *steps]
    kept = [json.loads(line) for line in (files / "scores.jsonl").read_text().splitlines()]
    assert [{key: one[key] for key in LINE} for one in kept] == lines
    assert [len(one["per_item"]) for one in kept] == [6, 2, 6, 2]
    first = kept[0]["per_item"][0]
    assert first["continuations"] == [" yes", " no"] and first["prompt"].endswith("\n\nQuestion: Is it 0?\nAnswer:")
    share = sum(one["correct"] for one in kept[0]["per_item"]) / 6
    assert share == pytest.approx(choices["accuracy"])
    again = inside.run([*argv, "--output", "scores.jsonl"], files)
    assert again.stdout == result.stdout, "a second time, its own results are replaced"


def test_settings_without_effect_and_what_is_lost_are_told(files: Path) -> None:
    (files / "contexts.jsonl").write_text('{"context": "The owl saw", "answer": "a fox"}\n')
    argv = ["-m", "llama_jax.evaluate", "--ckpt", "runs/tiny", "--output", "mine.jsonl", "--tasks"]
    idle = ["--chat-template", "llama2", "--seed", "3", "--question-format", "Q {question}", "--seed", "4"]
    result = inside.run([*argv, "contexts.jsonl", *idle], files)
    assert result.returncode == 0, result.stderr
    for words in (
        "--chat-template: no effect, since no record has messages",
        "--seed: no effect without --shots",
        "--question-format: no effect, since no record has a question",
        "warning: --seed is given 2 times: 4 counts, and not 3",
    ):
        assert words in result.stderr
    result = inside.run([*argv, "pages.jsonl"], files)
    assert "--output: mine.jsonl is replaced, with its scores of contexts of runs/tiny" in result.stderr
    assert "no effect" not in result.stderr


def test_several_checkpoints_are_named_in_the_lines_about_a_text(files: Path) -> None:
    steps = [f"runs/tiny/checkpoints/{step}" for step in (3, 6)]
    result = inside.run(["-m", "llama_jax.evaluate", "--ckpt", *steps, "--text", "held_out.txt"], files)
    assert [json.loads(line)["ckpt"] for line in result.stdout.splitlines()] == steps


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tasks", "wrong.jsonl"], "wrong.jsonl: line 2: answer: expected a text"),
        (["--tasks", "none.jsonl"], "--tasks: expected a file of records in JSON lines, found no file none.jsonl"),
        (["--tasks", "choices.jsonl", "--text", "my.txt"], "found both"),
        (["--tasks", "choices.jsonl", "--shots", "6"], "--shots: expected up to 5"),
        (["--tasks", "choices.jsonl", "--shots", "-1"], "--shots: expected 0 or more"),
        (["--tasks", "choices.jsonl", "--cache", "int8"], "--cache: expected --text beside it"),
        (["--tasks", "choices.jsonl", "--output", "my.txt"], "--output: expected a new file"),
        (["--tasks", "choices.jsonl", "--output", "pipe"], "--output: expected a file, found pipe, a pipe or a device"),
        (["--tasks", "choices.jsonl", "--output", "no/where.jsonl"], "--output: expected a file in a folder"),
        (["--text", "my.txt", "--shots", "1"], "--shots: expected --tasks beside it"),
        (["--tasks", "choices.jsonl", "--ckpt", "runs/none"], "runs/none: expected a checkpoint folder"),
        (["--tasks", "choices.jsonl", "--output", ""], "--output: expected a value, found an empty text"),
        (["--tasks", "choices.jsonl", "--chat-template", "lama2"], "--chat-template: expected a file or one of"),
        (
            ["--tasks", "choices.jsonl", "--ckpt", "runs/tiny/"],
            "--ckpt: expected each checkpoint once, found runs/tiny",
        ),
        (["--make-suite", "suite"], "--make-suite: expected no flags beside it"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(argv: list[str], words: str, files: Path) -> None:
    line = told(inside.run(["-m", "llama_jax.evaluate", "--ckpt", "runs/tiny", *argv], files))
    assert line.startswith("error: ") and words in line


def test_a_text_that_the_model_was_trained_on_is_told_also_as_a_copy(files: Path) -> None:
    for name, end in (("train.txt", ""), ("own.txt", " An owl."), ("other.txt", " A fox.")):
        (files / name).write_text("The fox went to the river. " * 60 + end)
    argv = ["train.py", *SMALL, "--train.max-steps=2", "--data.filepath=train.txt", "--data.eval-filepath=own.txt"]
    result = inside.run([*argv, "--train.save-dir=runs/of_train"], files)
    assert result.returncode == 0, result.stderr
    (files / "copies").mkdir()
    (files / "copies" / "a.txt").write_bytes((files / "train.txt").read_bytes())
    argv = ["-m", "llama_jax.evaluate", "--ckpt", "runs/of_train", "--text"]
    for text in ("train.txt", "copies"):
        result = inside.run([*argv, text], files)
        assert (
            f"runs/of_train: note: the model was trained on 1 ({'a' * (text == 'copies') or 'train'}.txt) of {text}: this is"
            in result.stderr
        )
        assert json.loads(result.stdout)["loss"] > 0
    for text in ("own.txt", "other.txt"):
        result = inside.run([*argv, text], files)
        assert result.returncode == 0 and "note" not in result.stderr
    refused = inside.run([*argv, "train.txt", "--window", "9999"], files)
    assert refused.returncode == 2 and refused.stderr.startswith("error: --window") and refused.stderr.count("\n") == 1
