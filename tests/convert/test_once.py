"""A model of another project that a command is given: converted once into a cache, told, used again, and never stale."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint import Checkpoint
from llama_jax.config import ModelArgs
from llama_jax.convert import ConvertArgs, convert, once
from llama_jax.convert.once import model_arguments, open_checkpoint
from llama_jax.errors import UserError
from llama_jax.storage.owner import owning
from llama_jax.tokenizer import Tokenizer
from tests import inside
from tests.commands import SMALL
from tests.convert.test_convert import random_weights, write_meta_folder

ARGS = ModelArgs(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, multiple_of=16, max_seq_len=64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(once, "_told", set())
    return tmp_path / "cache" / "llama_jax" / "converted"


@pytest.fixture
def model(tmp_path: Path, small_tokenizer: Tokenizer) -> Path:
    """A folder in Meta's layout."""
    args = ModelArgs(**{**vars(ARGS), "vocab_size": small_tokenizer.vocab_size})
    return write_meta_folder(
        tmp_path / "model", args, random_weights(args, np.dtype("<f4")), 1, small_tokenizer, max_seq_len=64
    )


def forget() -> None:
    """As in a new process."""
    once._told.clear()


def contents(folder: Path) -> dict[str, bytes]:
    """The arrays, the arguments and the tokenizer of a checkpoint, without orbax's records, which have times and places."""
    files = [path for part in ("params", "model") for path in (folder / part).rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if not path.name.startswith(("_", "commit"))
    }


def test_a_model_is_converted_once_told_and_used_again(
    model: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = open_checkpoint(model)
    (folder,) = cache.iterdir()
    out, err = capsys.readouterr()
    assert found.folder == folder and out == ""
    assert f"{model}: converting LLaMA" in err and f" once into {folder}, " in err and "used from now on" in err
    convert(ConvertArgs(input=str(model), output=str(tmp_path / "by hand")))
    assert contents(folder) == contents(tmp_path / "by hand"), "it is what the converter writes"
    assert len(contents(folder)) > 12
    capsys.readouterr()
    forget()
    before = os.stat(folder / "model" / "model.json").st_mtime_ns
    assert open_checkpoint(str(model)).folder == folder
    assert capsys.readouterr().err == f"{model}: its conversion is used, {folder}\n"
    assert os.stat(folder / "model" / "model.json").st_mtime_ns == before
    open_checkpoint(model)
    assert capsys.readouterr().err == "", "it is told once a process"


def test_keys_that_were_not_read_are_told_as_by_the_converter(
    model: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = json.loads((model / "params.json").read_text())
    (model / "params.json").write_text(json.dumps(table | {"mup_scale": 2.0}))
    open_checkpoint(model)
    assert "warning: keys of the configuration that were not read: 'mup_scale'" in capsys.readouterr().err


def test_a_model_that_changes_is_converted_again_and_nothing_else_counts(
    model: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = open_checkpoint(model).folder
    (model / "README.md").write_text("read me")
    (model / "results.jsonl").write_text("{}")
    assert open_checkpoint(model).folder == first
    table = json.loads((model / "params.json").read_text())
    (model / "params.json").write_text(json.dumps(table | {"max_seq_len": 32}))
    second = open_checkpoint(model)
    assert second.folder != first and second.args.max_seq_len == 32
    assert f"an earlier conversion of it is {first}; delete it if nothing uses it" in capsys.readouterr().err
    os.utime(model / "consolidated.00.pth", ns=(1, 1))
    third = open_checkpoint(model).folder
    assert third not in (first, second.folder)
    above = (model / "tokenizer.model").rename(model.parent / "tokenizer.model")
    assert open_checkpoint(model).folder == third, "the tokenizer of the folder above counts, and is the same"
    os.utime(above, ns=(1, 1))
    fourth = open_checkpoint(model).folder
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "default.jinja").write_text("{{ messages[0].content }}")
    fifth = open_checkpoint(model)
    assert fifth.chat.template and len({third, fourth, fifth.folder}) == 3
    assert len(list(cache.iterdir())) == 5


def _open(model: Path, results: Any) -> None:
    results.put(str(open_checkpoint(model).folder))


def test_of_two_models_in_a_folder_the_one_that_is_read_is_told(
    model: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "consolidated.safetensors").write_bytes(b"")
    open_checkpoint(model)
    assert (
        "warning: decided by params.json and consolidated.00.pth; not read: consolidated.safetensors"
        in capsys.readouterr().err
    )


def test_files_that_change_while_they_are_converted_become_no_conversion(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writes_and_meanwhile_a_file_arrives(*args: Any) -> Any:
        (model / "params.json").write_text((model / "params.json").read_text() + " ")
        return write(*args)

    write = once.write
    monkeypatch.setattr(once, "write", writes_and_meanwhile_a_file_arrives)
    with pytest.raises(UserError, match="expected files that do not change while they are converted"):
        open_checkpoint(model)
    assert not cache.exists() or not [*cache.iterdir()]


def test_two_processes_at_once_make_one(model: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_open, args=(model, results)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert folders == {str(path) for path in cache.iterdir()} and len(folders) == 1


def test_one_that_another_process_makes_is_waited_for(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = open_checkpoint(model).folder
    aside = made.rename(cache.parent / "aside")
    work = cache / f".{made.name}.converting"
    work.mkdir()
    monkeypatch.setattr(once.time, "sleep", lambda _: aside.exists() and aside.rename(made))
    forget()
    with owning(work, "--output", ""):
        assert open_checkpoint(model).folder == made
    assert "another process converts it" in capsys.readouterr().err


def test_what_a_killed_conversion_left_is_removed(model: Path, cache: Path) -> None:
    made = open_checkpoint(model).folder
    shutil.rmtree(made)
    left = cache / f".{made.name}.converting" / "unfinished-1"
    left.mkdir(parents=True)
    assert open_checkpoint(model).folder == made
    assert [path.name for path in cache.iterdir()] == [made.name]


def test_a_conversion_that_somebody_broke_is_told_with_what_to_do(model: Path, cache: Path) -> None:
    folder = open_checkpoint(model).folder
    shutil.rmtree(folder / "model")
    with pytest.raises(UserError, match=r"expected its conversion in .* to be whole, .*; delete .* again") as told:
        open_checkpoint(model)
    assert str(folder) in str(told.value) and "\n" not in str(told.value)
    shutil.rmtree(folder)
    assert open_checkpoint(model).folder == folder
    largest = max((folder / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    raw = largest.read_bytes()
    largest.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(UserError, match=r"is damaged; delete .*, and .*model is converted again") as told:
        llama_jax.load(str(model))
    assert str(folder) in str(told.value)


def test_too_little_disk_and_a_cache_that_cannot_be_written_are_told(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(1, 1, 1000)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(
            UserError, match=r"expected [\d.]+ \w+ of free disk .* found 1.* XDG_CACHE_HOME .*--input .*model"
        ):
            open_checkpoint(model)
    assert not cache.exists()
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file in the place of the cache")
    with pytest.raises(UserError, match=r"expected to write a conversion of .* set XDG_CACHE_HOME"):
        open_checkpoint(model)


def test_errors_name_the_command_whose_flags_they_speak_of(model: Path, cache: Path) -> None:
    (model / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"with --tokenizer; the command that takes --tokenizer: python .*--input"):
        open_checkpoint(model)
    assert not cache.exists()


def test_arguments_alone_need_no_conversion(model: Path, cache: Path) -> None:
    assert model_arguments(model).dim == 32 and not cache.exists()


def test_checkpoints_of_this_project_are_opened_as_they_are(model: Path, cache: Path, tmp_path: Path) -> None:
    convert(ConvertArgs(input=str(model), output=str(tmp_path / "ours")))
    assert open_checkpoint(tmp_path / "ours").folder == Checkpoint.find(tmp_path / "ours").folder
    with pytest.raises(UserError, match="expected a checkpoint folder, found nothing"):
        open_checkpoint(tmp_path / "nothing")
    assert not cache.exists()


def test_commands_take_a_folder_and_a_file_of_llama2c(model: Path, cache: Path, tmp_path: Path) -> None:
    convert(ConvertArgs(input=str(model), output=str(tmp_path / "c"), to="llama2c"))
    (tmp_path / "text").write_text("The fox went to the river.\n" * 50)
    sample = ["sample.py", "The owl", "--max-new-tokens", "4", "--json", "--temperature", "0", "--ckpt"]
    lines = []
    for given in ("model", "c/model.bin"):
        result = inside.run([*sample, given], tmp_path)
        assert result.returncode == 0, result.stderr
        assert f"{given}: converting" in result.stderr or f"{given}: its conversion is used" in result.stderr
        lines.append(result.stdout)
    assert lines[0] == lines[1] and json.loads(lines[0])["prompt"] == "The owl"
    result = inside.run(["-m", "llama_jax.evaluate", "--text", "text", "--ckpt", "model"], tmp_path)
    assert result.returncode == 0 and json.loads(result.stdout)["tokens"], result.stderr
    train = [
        "train.py",
        *SMALL[-6:],
        "--data.filepath",
        "text",
        "--train.save-dir",
        "run",
        "--train.init-from",
        "model",
    ]
    result = inside.run(train, tmp_path)
    assert result.returncode == 0, result.stderr
    assert llama_jax.load(str(tmp_path / "run")).args.dim == 32
