"""The command: its last line, the TOML that it writes, what it keeps and refuses."""

import json
from pathlib import Path

import pytest

from llama_jax.config import load_toml
from tests import inside
from tests.commands import run, told
from tests.plan import ENVIRONMENT, needs_libtpu

FLAGS = ["--flops", "3e11"]
NAMES = ["parameters", "tokens", "steps", "expected_bits_per_byte", "low", "high"]

SMALL = ["--model.dim=16", "--model.n-layers=1", "--model.n-heads=1", "--model.max-seq-len=16", "--train.eval-iters=1"]


def recipe(folder: Path, *argv: str) -> tuple[str, dict[str, float]]:
    result = inside.run(["-m", "llama_jax.recipe", *argv], folder)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "text", [["my.txt"], ["my.txt.gz"], ["my.jsonl"], ["many"], ["my.txt", "--data.eval-filepath", "held_out.txt"]]
)
def test_the_last_line_is_one_object_for_every_kind_of_text(text: list[str], folder: Path) -> None:
    told, found = recipe(folder, "--data.filepath", *text, *FLAGS)
    assert list(found) == NAMES
    assert found["low"] < found["expected_bits_per_byte"] < found["high"] and min(found.values()) > 0
    for name in ("text", "level", "vocabulary", "model", "training", "rate", "expected"):
        assert f"{name:>10}  " in told


def test_the_bytes_and_tokens_of_a_text_are_counted_as_training_counts_them(folder: Path) -> None:
    lines = recipe(folder, "--data.filepath", "my.txt", *FLAGS)[0].splitlines()
    said = next(line for line in lines if "tokens to train on" in line)
    about = int(said.rpartition("about ")[2].split()[0].replace(",", ""))
    flags = [
        "--data.filepath",
        "my.txt",
        "--data.vocab-size",
        "512",
        "--train.max-steps",
        "1",
        "--train.save-dir",
        "runs/count",
    ]
    result = inside.run(["train.py", *flags, *SMALL], folder)
    assert result.returncode == 0, result.stderr
    tokens = json.loads((folder / "runs" / "count" / "tokens" / "manifest.json").read_text())["tokens"]["train"]
    assert about == pytest.approx(tokens, rel=0.05)


def test_prepared_tokens_have_recipes_too(folder: Path) -> None:
    run_folder = [
        "--data.filepath",
        "my.txt",
        "--train.max-steps",
        "1",
        "--train.save-dir",
        "runs/made",
        "--data.vocab-size",
        "300",
    ]
    assert inside.run(["train.py", *run_folder, *SMALL], folder).returncode == 0
    prepare = ["--filepath", "my.txt", "--tokenizer-model-path", "runs/made/tokenizer.model", "--output", "tokens"]
    assert inside.run(["-m", "llama_jax.data", "prepare", *prepare], folder).returncode == 0
    told, of_tokens = recipe(folder, "--data.filepath", "tokens", *FLAGS)
    of_text = recipe(
        folder, "--data.filepath", "my.txt", "--data.tokenizer-model-path", "runs/made/tokenizer.model", *FLAGS
    )[1]
    assert "of the given tokenizer" in told
    assert of_tokens["expected_bits_per_byte"] == pytest.approx(of_text["expected_bits_per_byte"], rel=0.05)


def test_the_file_runs_as_it_is(folder: Path) -> None:
    argv = ["--data.filepath", "my.txt", "--tokens", "3000", "--output", "runs.toml", "--model.dim", "32"]
    told, found = recipe(folder, *argv)
    config = load_toml(folder / "runs.toml")
    config.check()
    assert (config.data.filepath, config.train.max_steps, config.model.dim) == ("my.txt", found["steps"], 32)
    assert "kept  as you gave them: model.dim 32" in told
    result = inside.run(["train.py", "--config", "runs.toml", "--train.save-dir", "runs/by-recipe"], folder)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert f"{found['parameters']:,} parameters" in result.stdout and f"{found['steps']:,} steps of" in result.stdout
    assert config.expected.tokens[-1] == found["tokens"] and config.expected.parameters == found["parameters"]
    assert f"expected  {found['expected_bits_per_byte']:.3f} bits per byte held out at the end" in result.stdout
    assert load_toml(folder / "runs" / "by-recipe" / "config.toml").expected == config.expected


def test_only_a_recipe_that_nobody_changed_is_replaced(folder: Path) -> None:
    argv = ["--data.filepath", "my.txt", "--output", "twice.toml"]
    recipe(folder, *argv, *FLAGS)
    first = (folder / "twice.toml").read_text()
    told_again, _ = recipe(folder, *argv, "--flops", "4e11")
    second = (folder / "twice.toml").read_text()
    assert "it replaces an earlier recipe" in told_again and second != first
    for changed in (second.replace("lr = ", "lr = 1"), "something of mine\n"):
        (folder / "twice.toml").write_text(changed)
        result = inside.run(["-m", "llama_jax.recipe", *argv, *FLAGS], folder)
        assert "--output: expected a new file, or a recipe as it was made" in told(result)
        assert (folder / "twice.toml").read_text() == changed
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data.filepath", "my.txt"], "--minutes: expected one of --minutes, --tokens, --flops, --parameters, found none"),
        (["--data.filepath", "my.txt", "--train.minutes", "3"], "train.minutes: expected --minutes, which recipe takes"),
        (["--data.filepath", "my.txt", "--tokens", "3", "--flops", "3"], "found --tokens and --flops; give one"),
        (["--data.filepath", "my.txt", "--flops", "-1"], "--flops: expected a number above 0, found -1"),
        (["--data.filepath", "my.txt", "--flops", "nan"], "--flops: expected a number above 0, found nan"),
        (["--data.filepath", "my.txt", "--flops", "1e5"], "--flops 100000: expected enough for a step"),
        (FLAGS, "data.filepath: expected a text, found none"),
        (["--data.filepath", "no.txt", *FLAGS], "no.txt"),
        (["--data.filepath", "my.toml", *FLAGS], "data.filepath: expected a text, found my.toml, which has the name of a configuration"),
        (["--data.filepath", "chats.jsonl", *FLAGS], "data.filepath: expected a text for a recipe, found conversations"),
        (["--data.mixture", "my.txt", "1", "many", "2", *FLAGS], "data.mixture: expected one text for a recipe"),
        (["--data.filepath", "my.txt", *FLAGS, "--train.max-steps", "9"], "train.max_steps: expected none beside a recipe"),
        (["--data.filepath", "my.txt", *FLAGS, "--train.n-epochs", "9"], "train.n_epochs: expected none beside a recipe"),
        (["--data.filepath", "my.txt", *FLAGS, "--train.rate-width", "9"], "train.rate_width: expected train.lr beside it"),
        (["--data.filepath", "my.txt", *FLAGS, "--train.init-from", "runs/x"], "train.init_from: expected none beside a recipe"),
        (["--data.filepath", "my.txt", *FLAGS, "--train.hold-lr"], "train.hold_lr: expected none beside a recipe"),
        (["--data.filepath", "my.txt", *FLAGS, "--train.resume-step", "5"], "train.resume_step: expected none beside a recipe"),
        (["--data.filepath", "my.txt", *FLAGS, "--train.batch-start", "1", "--train.batch-size", "4", "--train.batch-ramp-steps", "9"],
         "train.batch_start: expected none beside a recipe"),
        (["--data.filepath", "my.txt", "--parameters", "10"], "--parameters 10: expected about"),
        (["--data.filepath", "my.txt", "--tokens", "10"], "--tokens 10: expected enough for a step"),
        (["--data.filepath", "my.txt", *FLAGS, "--train.minutes", "3"], "train.minutes: expected --minutes"),
        (["--data.filepath", "my.txt", *FLAGS, "--output", "no/my.toml"], "--output: expected a file in a folder"),
        (["--data.filepath", "my.txt", *FLAGS, "--expected.parameters", "9"], "expected.tokens: expected none beside a recipe"),
        (["--data.filepath", "my.txt", *FLAGS, "--model.dim", "33"], "model.n_heads: expected a divisor of the width"),
        (["--data.filepath", "my.txt", *FLAGS, "--output", "many"], "--output: expected a new file, found a folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(argv: list[str], words: str, folder: Path) -> None:
    before = sorted(folder.iterdir())
    assert words in told(inside.run(["-m", "llama_jax.recipe", *argv], folder))
    assert sorted(folder.iterdir()) == before


def test_what_the_laws_do_not_know_of_what_is_given_is_told(folder: Path) -> None:
    argv = [
        "--data.filepath",
        "my.txt",
        *FLAGS,
        "--model.dim",
        "32",
        "--train.optimizer",
        "muon",
        "--train.eval-iters",
        "3",
    ]
    told, _ = recipe(folder, *argv, "--train.lr", "1", "--train.warmup-steps", "100000")
    given = "model.dim 32, train.eval_iters 3, train.lr 1.0, train.optimizer muon, train.warmup_steps 100000"
    assert f"kept  as you gave them: {given}\n" in told
    assert "the laws know nothing of train.lr, train.optimizer, train.warmup_steps, and" in told
    assert "not 100,000, as the run is short, then a line to 0 at step" in told
    assert "know nothing" not in recipe(folder, "--data.filepath", "my.txt", *FLAGS, "--model.dim", "32")[0]


def test_a_vocabulary_that_the_text_cannot_fill_is_told_and_counted_as_the_run_has_it(folder: Path) -> None:
    (folder / "few.txt").write_text("the quick brown fox\n" * 150)
    argv = ["--data.filepath", "few.txt", "--tokens", "3000", "--output", "few.toml", "--model.dim", "32"]
    told, found = recipe(folder, *argv)
    assert "the text cannot fill a vocabulary of 512 tokens, and gets one of" in told
    result = inside.run(["train.py", "--config", "few.toml", "--train.save-dir", "runs/few"], folder)
    assert result.returncode == 0, result.stderr
    assert f"{found['parameters']:,} parameters" in result.stdout and "no loss is expected" not in result.stdout


def test_a_text_of_one_letter_is_said_to_have_nothing_to_learn(folder: Path) -> None:
    (folder / "one.txt").write_text("a" * 20000)
    assert (
        "there is nothing to learn, and the laws know no such text"
        in recipe(folder, "--data.filepath", "one.txt", *FLAGS)[0]
    )


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_slice_is_planned_for(folder: Path) -> None:
    argv = [
        "--data.filepath",
        "my.txt",
        "--minutes",
        "0.01",
        "--topology",
        "v5e:2x2",
        "--model.dim",
        "256",
        "--output",
        "tpu.toml",
    ]
    result = run(["-m", "llama_jax.recipe", *argv], folder, environment=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert "planned for v5e:2x2" in result.stdout and list(json.loads(result.stdout.splitlines()[-1])) == NAMES
    assert load_toml(folder / "tpu.toml").train.batch_size % 4 == 0
