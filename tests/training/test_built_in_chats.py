"""Training on the built-in conversations: no file is needed, and the model of the first minute learns to answer."""

import json
from pathlib import Path
from typing import Any

import pytest

import llama_jax
from llama_jax.data.built_in_chats import is_right, questions
from llama_jax.evaluate.scores import evaluate_task
from llama_jax.evaluate.tasks import read_tasks
from tests import forked, inside
from tests.commands import SHORT_RUN, STORIES, told

MODEL = ["--model.dim=32", "--model.n-layers=1", "--model.n-heads=2", "--model.max-seq-len=256"]
TUNE = ["train.py", "--config", "chat-tiny", "--train.init-from=base", "--data.chats=40", *SHORT_RUN]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    done = inside.run(["train.py", *MODEL, *SHORT_RUN, *STORIES, "--train.save-dir=base"], folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def tuned(place: Path) -> str:
    """What the tune in runs/chat-tiny printed."""
    done = inside.run(TUNE, place)
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_tune_needs_no_file_leaves_questions_to_judge_it_by_and_goes_on(place: Path, tuned: str) -> None:
    assert "40 built-in conversations" in tuned and "40 conversations to train on, 5 held out" in tuned
    run = place / "runs" / "chat-tiny"
    asked = run / "tokens" / "questions.jsonl"
    assert [json.loads(line) for line in asked.read_text().splitlines()] == questions()
    again = inside.run([*TUNE, "--train.max-steps=8", "--train.eval-interval=4", f"--train.eval-tasks={asked}"], place)
    assert again.returncode == 0, again.stderr
    last = metrics(run)[-1]
    assert last["step"] == 8
    (task,) = read_tasks([str(asked)])
    found = evaluate_task(llama_jax.load(str(run / "checkpoints" / "8")), task).summary
    assert (found["n"], last["task/questions/accuracy"]) == (200, found["accuracy"])


def test_the_number_of_conversations_changes_the_run_and_stays(place: Path, tuned: str) -> None:
    done = inside.run([*TUNE, "--data.chats=60", "--train.save-dir=more"], place)
    assert done.returncode == 0, done.stderr
    runs = place / "runs" / "chat-tiny", place / "more"
    few, more = ([record["train_loss"] for record in metrics(run)][:6] for run in runs)
    assert few != more
    line = told(inside.run([*TUNE, "--data.chats=31", "--train.save-dir=more"], place))
    assert line.startswith("error: data.filepath: expected the text, separator and train_size that the run began with")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.eval-filepath=a.jsonl"], "data.eval_filepath: expected none with the built-in conversations"),
        (["--data.text-field=text"], "data.text_field: expected none with the built-in conversations"),
        (["--data.chats=-1"], "data.chats: expected "),
    ],
)
def test_settings_that_contradict_them_are_refused(flags: list[str], words: str, place: Path) -> None:
    assert words in told(inside.run([*TUNE, *flags, "--train.save-dir=refused"], place))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_model_of_the_first_minute_learns_to_answer(tmp_path: Path) -> None:
    """The two commands of the README: of 200 held-out questions 90% are answered, before it at most 10%.

    Steps are many and programs few: compiled as for users, they take less time.
    """
    for argv in (["train.py"], ["train.py", "--config", "chat-tiny"]):
        training = forked.Fork(argv, tmp_path, environment={"XLA_FLAGS": ""})
        try:
            _, err = training.communicate(1700)
        finally:
            training.kill()
        assert training.returncode == 0, err
    (task,) = read_tasks([str(tmp_path / "runs" / "chat-tiny" / "tokens" / "questions.jsonl")])
    base = llama_jax.load(str(tmp_path / "runs" / "tiny"), chat_template="llama2")
    assert evaluate_task(base, task).summary["accuracy"] <= 0.1
    tuned = llama_jax.load(str(tmp_path / "runs" / "chat-tiny"))
    found = evaluate_task(tuned, task)
    assert found.summary["accuracy"] >= 0.9
    greedy = llama_jax.SampleArgs(temperature=0.0, max_new_tokens=16)
    said = [tuned.chat(item.messages, greedy).text for item in task.items[:40]]
    right = [is_right(text, item.gold) for text, item in zip(said, task.items[:40], strict=True)]
    assert right == [item["correct"] for item in found.per_item[:40]]
