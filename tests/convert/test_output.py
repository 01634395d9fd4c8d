"""A conversion's folder: whole or not there, one process's at a time; what is not of this command is never touched."""

import dataclasses
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint import Checkpoint
from llama_jax.config import ModelArgs
from llama_jax.convert import ConvertArgs, convert, output
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from tests import forked
from tests.commands import run as command
from tests.commands import told
from tests.convert.test_convert import ARGS, random_weights, write_meta_folder


@pytest.fixture
def source(small_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    args = dataclasses.replace(ARGS, vocab_size=small_tokenizer.vocab_size)
    return write_meta_folder(tmp_path / "meta", args, random_weights(args, np.dtype("<f4")), 1, small_tokenizer)


def run(source: Path, to: Path, **fields: Any) -> None:
    convert(ConvertArgs(input=str(source), output=str(to), **fields))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_folders_of_the_user_s_beside_the_output_are_not_touched(source: Path, tmp_path: Path) -> None:
    names = ["ours.unfinished", "ours.tmp", ".ours", "ours-1"]
    for name in names:
        (tmp_path / name / "params").mkdir(parents=True)
        (tmp_path / name / "params" / "precious").write_text("mine")
    run(source, tmp_path / "ours")
    assert all((tmp_path / name / "params" / "precious").read_text() == "mine" for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"meta", "ours", *names}


def test_what_is_of_the_user_s_in_the_working_folder_is_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".ours.converting").mkdir()
    (tmp_path / ".ours.converting" / "notes").write_text("mine")
    run(source, tmp_path / "ours")
    assert (tmp_path / ".ours.converting" / "notes").read_text() == "mine" and (tmp_path / "ours" / "params").is_dir()


@pytest.mark.parametrize("to", ["llama-jax", "huggingface", "meta", "llama2c"])
def test_a_disk_that_fills_halfway_is_told_in_one_line_and_leaves_nothing(
    to: str, source: Path, tmp_path: Path
) -> None:
    program = f"""
import resource
from llama_jax.commands import run
resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 14}, {1 << 14}))  # as if the disk ended there
import sys
sys.argv = ["convert", "--input", {str(source)!r}, "--output", "ours", "--to", {to!r}]
run("convert")
"""
    line = told(command(["-c", program], tmp_path))
    assert line.startswith("error: ") and "File too large" in line and "disk" in line
    assert {path.name for path in tmp_path.iterdir()} <= {"meta", ".ours.converting"}
    run(source, tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"meta", "ours"}


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT], ids=lambda signum: signum.name)
def test_what_a_stopped_conversion_left_is_cleared_away_and_told(
    signum: signal.Signals, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    args = ModelArgs(dim=64, n_layers=16, n_heads=8, vocab_size=small_tokenizer.vocab_size)
    source = write_meta_folder(tmp_path / "meta", args, random_weights(args, np.dtype("<f4")), 1, small_tokenizer)
    command = ["convert_torch_weights.py", "--input", str(source), "--output", "made/ours"]
    first = forked.Fork(command, tmp_path)
    work = tmp_path / "made" / ".ours.converting"
    while not any(work.glob("unfinished-*/*/*")):
        assert first.poll() is None
        time.sleep(0.005)
    os.kill(first.pid, signum)
    first.communicate(60)
    assert not (tmp_path / "made" / "ours").exists()
    left = any(work.glob("unfinished-*"))
    assert left == (signum != signal.SIGINT)
    again = forked.run(command, tmp_path)
    assert again.returncode == 0 and ("that a conversion left in made/.ours.converting" in again.stdout) == left
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["ours"]
    assert Checkpoint.find(tmp_path / "made" / "ours").args.n_layers == 16


def test_of_conversions_into_one_folder_at_once_one_goes_on(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "alone")
    for i in range(2):
        command = ["convert_torch_weights.py", "--input", str(source), "--output", f"ours{i}"]
        forks = [forked.Fork(command, tmp_path) for _ in range(3)]
        ended = [(fork.communicate(100), fork.returncode) for fork in forks]
        assert sorted(status for _, status in ended) == [0, 2, 2]
        for (_, err), status in ended:
            if status:
                (line,) = err.splitlines()
                assert line.startswith("error: --output: ") and (
                    "in use by process" in line or "does not exist" in line
                )
        assert files(tmp_path / f"ours{i}") == files(tmp_path / "alone")
        assert not list(tmp_path.glob(".*"))


def test_a_second_conversion_is_refused_at_once_and_harms_nothing(source: Path, tmp_path: Path) -> None:
    with output.new_folder(tmp_path / "ours") as temporary:
        (temporary / "half").write_text("x")
        line = told(forked.run(["convert_torch_weights.py", "--input", str(source), "--output", "ours"], tmp_path))
        assert f"in use by process {os.getpid()}" in line and "choose another folder" in line
        assert (temporary / "half").exists()
    assert files(tmp_path / "ours") == {"half"} and not list(tmp_path.glob(".*"))


def test_a_folder_that_appears_meanwhile_is_not_replaced(source: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="--output: expected a folder that does not exist"),
        output.new_folder(tmp_path / "ours"),
    ):
        (tmp_path / "ours").mkdir()
    assert not files(tmp_path / "ours") and not list(tmp_path.glob(".*"))


def test_a_failure_leaves_neither_the_folder_nor_those_above_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="failed"), output.new_folder(tmp_path / "a" / "b" / "ours"):
        raise ValueError("failed")
    assert not list(tmp_path.iterdir())


def test_names_that_lead_nowhere_are_taken_as_they_are(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="--output: expected a folder that does not exist"):
        run(source, tmp_path / "link")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run(source, Path("~/deep/ours"))
    assert (tmp_path / "home" / "deep" / "ours" / "model" / "model.json").exists()
    monkeypatch.chdir(tmp_path)
    run(source, Path("~nobody-of-this-name/ours"))
    assert (tmp_path / "~nobody-of-this-name" / "ours" / "model" / "model.json").exists()


def test_a_checkpoint_is_not_written_into_the_run_that_it_is_of(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "ours")
    before = files(tmp_path / "ours")
    for inside in ("5", "params/x", "a/b"):
        with pytest.raises(UserError, match="--output: expected a folder outside of --input"):
            run(tmp_path / "ours", tmp_path / "ours" / inside)
    with pytest.raises(UserError, match="--output: expected a folder that does not exist"):
        run(tmp_path / "ours", tmp_path / "ours")
    assert files(tmp_path / "ours") == before
    run(source, source / "ours")  # Meta's folder is not ours
    assert (source / "ours" / "params").is_dir()


def test_a_folder_that_may_not_be_written_is_one_line(source: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser may write anywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in told(
        forked.run(["convert_torch_weights.py", "--input", str(source), "--output", "locked/ours"], tmp_path)
    )


def test_an_output_below_a_file_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    command = ["convert_torch_weights.py", "--input", str(source), "--output", "file/ours"]
    assert "file" in told(forked.run(command, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"meta", "file"}


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_a_flip_in_a_checkpoint_of_ours_is_named_and_neither_converted_nor_sampled_on(
    weights: Any, source: Path, tmp_path: Path
) -> None:
    ours = tmp_path / "ours"
    run(source, ours, weights=weights)
    rng = random.Random(0)
    for path in rng.sample(sorted(path for path in ours.rglob("*") if path.is_file() and path.stat().st_size), 12):
        before = path.read_bytes()
        spoilt = bytearray(before)
        spoilt[rng.randrange(len(before))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(spoilt))
        with pytest.raises(UserError, match=re.escape(str(ours))):
            llama_jax.load(str(ours))
        if weights == "auto":
            with pytest.raises(UserError, match=re.escape(str(ours))):
                convert(ConvertArgs(str(ours), str(tmp_path / "hf"), "huggingface"))
            assert not (tmp_path / "hf").exists()
        path.write_bytes(before)
