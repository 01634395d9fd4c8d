"""What commands refuse, in one line and with status 2, before they compute anything. What they do: test_commands.py."""

import os
import subprocess
from pathlib import Path

import pytest

from tests import forked, inside
from tests.commands import SMALL, STORIES, run, told


@pytest.mark.parametrize(
    ("argv", "stdin", "words"),
    [
        (["a"], None, "--ckpt: expected a checkpoint folder"),
        (["a", "--ckpt", "nothing"], None, "nothing"),
        (["a", "--ckpt", "texts"], None, "texts"),
        (["a", "--ckpt", "my.txt"], None, "a file"),
        (["--ckpt", "runs/tiny"], "", "prompts: expected one or more"),
        (["the " * 40, "--ckpt", "runs/tiny"], None, "expected fewer than 32 tokens"),
        (["a", "the " * 40, "--ckpt", "runs/tiny", "--json"], None, "expected fewer than 32 tokens"),
        (["a", "--ckpt", "runs/tiny", "--temperature", "-1"], None, "temperature: expected"),
        (["a", "--ckpt", "runs/tiny", "--temperature", "nan"], None, "temperature: expected"),
        (["a", "--ckpt", "runs/tiny", "--temperature", "1e300"], None, "temperature: expected"),
        (["a", "--ckpt", "runs/tiny", "--top-p", "2"], None, "top_p: expected"),
        (["a", "--ckpt", "runs/tiny", "--max-new-tokens", "0"], None, "max_new_tokens: expected"),
        (["a", "--ckpt", "runs/tiny", "--max-new-tokens", "many"], None, "--max-new-tokens: expected a whole number"),
        (["a", "--ckpt", "runs/tiny", "--seed", "-1"], None, "seed: expected"),
        (["a", "--ckpt", "runs/tiny", "--n", "0"], None, "n: expected"),
        (["a", "--ckpt", "runs/tiny", "--top-k", "-1"], None, "top_k: expected"),
        (["a", "--ckpt", "runs/tiny", "--logit-bias", "999999", "1"], None, "logit_bias: expected ids from 0 to"),
        (["a", "--ckpt", "runs/tiny", "--stop", ""], None, "stop: expected"),
        (["a", "--ckpt", "runs/tiny", "--stop"], None, "--stop: expected a text, found none"),
        (["a", "--ckpt", "runs/tiny", "--logit-bias", "5", "1e300"], None, "logit_bias: expected numbers up to"),
        (["a", "--ckpt", "runs/tiny", "--too-long", "drop"], None, "--too-long: expected one of"),
        (["a", "the " * 40, "--ckpt", "runs/tiny"], None, "prompt 2 ('the the"),
        (["--ckpt", "runs/tiny", "--prompts-file", "latin.txt"], None, "latin.txt: line 2: expected text in UTF-8"),
        (
            ["--ckpt", "runs/tiny", "--prompts-file", "my.txt", "--stop", ".", "!"],
            None,
            "found others as arguments, '!'",
        ),
        (["--ckpt", "runs/tiny", "--prompts-file", "nothing"], None, "--prompts-file: expected a file of prompts"),
        (["--ckpt", "runs/tiny", "--prompts-file", "typo.jsonl"], None, "typo.jsonl: line 2: unknown key temprature"),
        (
            ["a", "--ckpt", "runs/tiny", "--prompts-file", "my.txt"],
            None,
            "--prompts-file: expected all prompts in the file",
        ),
        (["a", "--ckpt", "runs/tiny", "--output", "no/out"], None, "--output: expected a file in a folder"),
        (["a", "--ckpt", "runs/tiny", "--output", "my.txt"], None, "my.txt: expected up to 1 results"),
        (["--chat", "--ckpt", "runs/tiny", "--n", "2"], None, "n: expected 1 for a conversation"),
        (["--chat", "--ckpt", "runs/tiny", "--output", "out"], None, "--output: expected prompts"),
        (["a", "--ckpt", "runs/tiny", "--compute-dtype", "float16"], None, "--compute-dtype: expected one of"),
    ],
)
def test_sample_refuses_in_one_line(argv: list[str], stdin: str | None, words: str, place: Path) -> None:
    (place / "typo.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "temprature": 1}\n')
    (place / "latin.txt").write_bytes(b"a\ncaf\xe9\n")
    result = inside.run(["sample.py", *argv], place, stdin)
    line = told(result)
    assert line.startswith("error: ") and words in line
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--ckpt"),
        (["--ckpt", "runs/tiny"], "--text"),
        (["--ckpt", "runs/tiny", "--text", "nothing"], "--text: expected"),
        (["--ckpt", "runs/tiny", "--text", "my.txt", "--window", "33"], "--window"),
        (["--ckpt", "runs/tiny", "--text", "my.txt", "--stride", "0.5"], "--stride"),
    ],
)
def test_evaluate_refuses_in_one_line(argv: list[str], words: str, place: Path) -> None:
    assert words in told(inside.run(["-m", "llama_jax.evaluate", *argv], place))


@pytest.mark.parametrize(
    "changes",
    [
        {"train.batch-size": "99999999999999999999"},
        pytest.param(
            {"train.batch-size": "100000000"}, marks=pytest.mark.slow
        ),  # compiles for as long as all others together
        {"model.dim": "1000000000"},
        {"model.dim": "1048576", "model.n-layers": "1000"},
        {"model.max-seq-len": "999999999999"},
        {"model.ffn-dim-multiplier": "1e300"},
        {"data.vocab-size": "2147483648"},
        {"train.save-dir": "my.txt/run"},
        {"data.filepath": "b\udcff.txt"},
    ],
    ids=str,
)
def test_train_refuses_what_no_machine_can_hold_or_name(changes: dict[str, str], place: Path, tmp_path: Path) -> None:
    flags = [part for key, value in changes.items() for part in (f"--{key}", value)]
    save = [] if "train.save-dir" in changes else ["--train.save-dir", str(tmp_path / "run")]
    base = ["train.py", *SMALL, "--data.filepath", "my.txt", "--data.vocab-size", "300", *save]
    # The code generator that tests compile with refuses some sizes by itself, before the memory is known (tests/conftest.py).
    told(forked.run([*base, *flags], place, environment={"XLA_FLAGS": ""}))


@pytest.mark.parametrize("damage", ["another model", "a cut file", "a missing file", "no parameters"])
def test_a_damaged_checkpoint_is_one_line_whatever_libraries_have_to_say(
    damage: str, place: Path, tmp_path: Path
) -> None:
    run_folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(place / "runs" / "tiny"), str(run_folder)], check=True)
    for step in (run_folder / "checkpoints").iterdir():
        if damage == "another model":
            path = step / "model" / "model.json"
            path.write_text(path.read_text().replace('"dim": 32', '"dim": 64'))
        largest = max((p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        if damage == "a cut file":
            os.truncate(largest, largest.stat().st_size // 2)
        if damage == "a missing file":
            largest.unlink()
        if damage == "no parameters":
            subprocess.run(["rm", "-r", str(step / "params")], check=True)
    line = told(forked.run(["sample.py", "--ckpt", str(run_folder), "a"], place))
    assert str(run_folder) in line and "expected" in line and "found" in line
    if damage != "another model":  # a run goes by its own config.toml
        again = [*SMALL, *STORIES, "--train.save-dir", str(run_folder), "--train.max-steps", "9"]
        resumed = forked.run(["train.py", *again], place)
        assert str(run_folder) in told(resumed)


def test_debug_shows_the_traceback_before_the_line(place: Path) -> None:
    result = run(["sample.py", "--ckpt", "nothing", "a"], place, environment={"LLAMA_JAX_DEBUG": "1"})
    assert result.returncode == 2 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: nothing: expected")
