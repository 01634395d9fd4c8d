"""train.py --train.minutes: it chooses, says so, and trains; started again it goes on with the same choice, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llama_jax.config import Config, ModelArgs, TrainArgs, load_toml
from llama_jax.recipe import making
from llama_jax.recipe import speed as speed_room
from llama_jax.recipe.choose import Budget
from llama_jax.recipe.speed import Speed, seconds_of_steps
from llama_jax.recipe.telling import _time_rows
from llama_jax.training.clock import TIMES
from tests import inside
from tests.commands import told

MINUTES = ["train.py", "--data.filepath", "my.txt", "--train.minutes", "1"]


@pytest.fixture(autouse=True)
def of_one_speed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine that is always as fast, and as slow as a test needs it. Return the widths that are measured."""
    measured: list[int] = []

    def measure(config: Any) -> Speed:
        measured.append(config.model.dim)
        return Speed(1e8, "measured in a test")

    monkeypatch.setattr(making, "measure", measure)
    monkeypatch.setattr(making, "guess", lambda: 1e8)
    return measured


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def test_a_stopped_run_goes_on_with_its_choice_to_the_same_bits(folder: Path, of_one_speed: list[int]) -> None:
    whole = inside.run([*MINUTES, "--train.save-dir", "runs/whole"], folder)
    assert (whole.returncode, whole.stderr) == (0, ""), whole.stderr
    for words in (
        "recipe  of 1 minutes",
        "speed  100 MFLOP/s, measured in a test",
        "expected  ",
        "run folder  runs/whole",
    ):
        assert words in whole.stdout, words
    config, count = load_toml(folder / "runs" / "whole" / "config.toml"), len(of_one_speed)
    assert config.train.minutes == 1 and config.train.max_steps and count >= 1
    tokens = config.train.max_steps * config.train.batch_size * config.model.max_seq_len
    assert config.expected.tokens[-1] == tokens and "bits per byte held out at the end" in whole.stdout
    # The newest checkpoint is lost, as if the run had been killed before it.
    steps = sorted(int(path.name) for path in (folder / "runs" / "whole" / "checkpoints").iterdir())
    assert len(steps) > 1
    first = inside.run([*MINUTES, "--train.save-dir", "runs/whole", "--train.resume-step", str(steps[0])], folder)
    assert (first.returncode, first.stderr) == (0, ""), first.stderr
    assert "nothing is measured anew" in first.stdout and f"at step {steps[0]:,}" in first.stdout
    assert len(of_one_speed) == count, "the second start measures nothing"
    aside = next((folder / "runs" / "whole").glob("metrics-set-aside-*.jsonl"))
    before = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in aside.read_text().splitlines()]
    assert records(folder / "runs" / "whole") == before
    now = load_toml(folder / "runs" / "whole" / "config.toml")
    assert replace(now, train=replace(now.train, resume_step=0)) == config
    (folder / "runs" / "whole" / "config.toml").unlink()
    again = inside.run([*MINUTES, "--train.save-dir", "runs/whole"], folder)
    assert again.returncode == 0 and "nothing is measured anew" in again.stdout and "already complete" in again.stdout
    assert len(of_one_speed) == count, "each checkpoint knows the choice, too"


def test_minutes_are_those_of_the_whole_command_and_too_few_are_said_to_be_overrun() -> None:
    """What was counted and measured before the run is a part of them."""
    speed = Speed(1e8, "measured in a test", 5.0)
    assert seconds_of_steps(3, speed) - seconds_of_steps(3, speed, 20) == pytest.approx(0.95 * 20)
    assert seconds_of_steps(0.1, speed, 20) == pytest.approx(0.3 * 6)
    choice = SimpleNamespace(flops=1e8 * seconds_of_steps(0.1, speed, 20))
    rows = _time_rows(Budget("minutes", 0.1, "--train.minutes 0.1"), cast(Any, choice), speed, 20)
    assert "20 s were spent up to here" in rows[1][1]
    assert "this will take longer than --train.minutes 0.1, about 42 s in all" in rows[2][1]
    choice = SimpleNamespace(flops=1e8 * seconds_of_steps(3, speed, 20))
    assert len(_time_rows(Budget("minutes", 3, "--train.minutes 3"), cast(Any, choice), speed, 20)) == 2


def test_of_many_minutes_the_model_and_the_batch_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of half a gigabyte, for which nothing larger is measured."""
    for module in (making, speed_room):
        monkeypatch.setattr(module, "memory_of", lambda devices: 5e8)
    large = Config(
        ModelArgs(dim=256, n_layers=4, n_heads=4, vocab_size=2048, max_seq_len=256), train=TrainArgs(batch_size=64)
    )
    parted = speed_room.in_parts(large)
    assert parted.train.gradient_accumulation_steps in (8, 16, 32, 64) and parted.train.batch_size == 64
    assert speed_room.in_parts(replace(large, train=TrainArgs(batch_size=1))).train.gradient_accumulation_steps == 1
    assert making._most_parameters(Config()) == pytest.approx(0.6 * 5e8 / 16, rel=0.01)
    assert making._most_parameters(Config(train=TrainArgs(moments="int8"))) > 0.6 * 5e8 / 13


def test_other_minutes_and_settings_are_told_as_other_changes_are(folder: Path) -> None:
    argv = [*MINUTES, "--train.save-dir", "runs/changed"]
    assert inside.run(argv, folder).returncode == 0
    other = inside.run([*argv[:-4], "--train.minutes", "2", *argv[-2:]], folder)
    assert "train.minutes: expected 1.0, with which the run in runs/changed began, found 2.0" in told(other)
    changed = inside.run([*argv, "--train.lr", "0.001"], folder)
    assert changed.returncode == 0 and "train.lr" in changed.stdout and "-> 0.001" in changed.stdout
    assert "train.batch_size: expected" in told(inside.run([*argv, "--train.batch-size", "3"], folder))


def test_what_is_given_is_kept_and_said_to_be(folder: Path) -> None:
    (folder / "mine.toml").write_text("[model]\ndim = 48\nn_heads = 2\n[train]\nweight_decay = 0.3\n")
    argv = ["--config", "mine.toml", "--train.lr", "0.002", "--train.save-dir", "runs/kept", "--model.tie-embeddings"]
    found = inside.run([*MINUTES, *argv], folder)
    assert (found.returncode, found.stderr) == (0, ""), found.stderr
    assert (
        "kept  as you gave them: model.dim 48, model.n_heads 2, model.tie_embeddings True, train.lr 0.002, train.weight_decay 0.3"
        in found.stdout
    )
    config = load_toml(folder / "runs" / "kept" / "config.toml")
    assert (config.model.dim, config.train.lr, config.train.weight_decay) == (48, 0.002, 0.3)
    assert config.model.tie_embeddings and config.train.optimizer == "adamw"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--train.max-steps", "3"], "train.max_steps: expected none beside a recipe"),
        (["--train.n-epochs", "3"], "train.n_epochs: expected none beside a recipe"),
        (["--config", "shakespeare"], "train.max_steps: expected none beside a recipe"),
        (["--train.minutes", "-1"], "train.minutes: expected above 0"),
        (["--distributed.num-processes", "2", "--distributed.process-id", "0", "--distributed.coordinator-address", "a:1"],
         "minutes: expected one process"),
    ],
)  # fmt: skip
def test_what_contradicts_minutes_is_refused_in_a_line(argv: list[str], words: str, folder: Path) -> None:
    assert words in told(inside.run([*MINUTES, "--train.save-dir", "runs/refused", *argv], folder))
    assert not (folder / "runs" / "refused").exists()


def test_minutes_without_a_choice_are_refused_where_python_starts_a_run(folder: Path) -> None:
    from llama_jax.config import DataArgs
    from llama_jax.errors import UserError
    from llama_jax.training.loop import train

    model = ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=16)
    args = TrainArgs(minutes=3.0, save_dir=str(folder / "runs" / "python"))
    with pytest.raises(UserError, match=r"^train\.minutes: expected steps that were chosen"):
        train(Config(model, DataArgs(str(folder / "my.txt"), vocab_size=280), args))
