"""What a second start of a run does: it is refused, goes on or goes back; nothing is lost, nothing silently begun anew."""

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import sentencepiece as spm

import llama_jax
from llama_jax.checkpoint import steps_of
from llama_jax.cli import progress
from llama_jax.config import Config, DataArgs, ModelArgs, TrainArgs
from llama_jax.errors import UserError
from llama_jax.storage.checksums import write_checksums
from llama_jax.storage.owner import owning
from llama_jax.training import loop, opening, samples
from llama_jax.training.clock import TIMES
from llama_jax.training.run_folder import RunFolder
from llama_jax.training.saving import CheckpointWriter, kept

MODEL = ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=16)
RUN = TrainArgs(
    lr=1e-2,
    warmup_steps=1,
    max_steps=8,
    batch_size=4,
    eval_interval=4,
    eval_iters=1,
    log_interval=1,
    save_interval=2,
    keep=9,
)


@pytest.fixture(autouse=True, scope="module")
def undrawn() -> Iterator[None]:
    """Runs are not drawn here, nor do they tell samples, which these tests are not about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "show", lambda *_: 0)
        patch.setattr(samples, "draw_losses", lambda *_: None)
        yield


def write_text(folder: Path, line: str = "the cat sat on the mat and the dog ran to the sea\n") -> Path:
    text = folder / "text.txt"
    text.write_text(line * 100)
    return text


def train(folder: Path, text: Path | None = None, **changes: Any) -> str:
    """What a run in ``folder`` prints; its text lies beside it."""
    text = text or write_text(folder.parent)
    args = dataclasses.replace(RUN, save_dir=str(folder), **changes)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        loop.train(Config(MODEL, DataArgs(str(text), vocab_size=280), args))
    return out.getvalue()


def refusal(folder: Path, **changes: Any) -> str:
    """The line of a start that is refused, and that changes nothing."""
    before = content(folder.parent)
    with pytest.raises(UserError) as caught:
        train(folder, **changes)
    assert content(folder.parent) == before, "nothing is touched"
    return str(caught.value)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "text.txt"}


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def parameters(folder: Path, step: int) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(llama_jax.load(str(folder / "checkpoints" / str(step))).params)]


def assert_same(a: Path, b: Path, step: int = 8, unknown: str = "") -> None:
    """``unknown``: a key of metrics.jsonl that records may lack, since it adds up what an older checkpoint did not count."""
    ours, theirs = ([{k: v for k, v in r.items() if k != unknown} for r in records(folder)] for folder in (a, b))
    assert ours == theirs
    for x, y in zip(parameters(a, step), parameters(b, step), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, with a checkpoint of every second one."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return shutil.copytree(whole, tmp_path / "run")


def flip(path: Path, count: int = 64) -> None:
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + count] = bytes(b ^ 0xFF for b in raw[middle : middle + count])
    path.write_bytes(bytes(raw))


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_run_that_another_process_writes_is_refused_and_not_touched(run: Path) -> None:
    with owning(run, "key", ""):
        line = refusal(run, max_steps=12)
    assert "train.save_dir" in line and "in use by process" in line and str(os.getpid()) in line
    train(run, max_steps=12)


@pytest.mark.parametrize("what", ["checkpoints", "checkpoints and run.json"])
def test_checkpoints_that_are_out_of_sight_are_missed(run: Path, what: str) -> None:
    (run / "checkpoints").rename(run.parent / "elsewhere")
    if "run.json" in what:  # as earlier versions left it
        (run / "run.json").unlink()
    line = refusal(run)
    assert "saved step" in line and "found none" in line and str(run / "checkpoints") in line
    (run.parent / "elsewhere").rename(run / "checkpoints")
    assert "already complete" in train(run)


def test_an_unmounted_store_is_missed_and_a_moved_one_is_found_where_it_is_said_to_be(
    whole: Path, tmp_path: Path
) -> None:
    run, store = tmp_path / "run", tmp_path / "store"
    train(run, checkpoint_dir=str(store), max_steps=4)
    store.rename(tmp_path / "moved")
    assert str(store) in refusal(run)
    assert str(store) in refusal(run, checkpoint_dir=str(store))
    train(run, checkpoint_dir=str(tmp_path / "moved"))
    assert steps_of(run) == [2, 4, 6, 8] and not store.exists()
    assert records(run)[4:] != [] and records(run)[-1]["step"] == 8


def test_a_pointer_that_was_deleted_is_found_again(tmp_path: Path) -> None:
    run, store = tmp_path / "run", tmp_path / "store"
    train(run, checkpoint_dir=str(store), max_steps=4)
    (run / "checkpoints").unlink()
    train(run)
    assert steps_of(run) == [2, 4, 6, 8] and (run / "checkpoints").read_text() == f"{store}\n"


def test_a_copy_of_a_run_does_not_share_its_store(tmp_path: Path) -> None:
    run, store = tmp_path / "run", tmp_path / "store"
    train(run, checkpoint_dir=str(store), max_steps=4)
    copy = shutil.copytree(run, tmp_path / "copy")
    line = refusal(copy)
    assert "is a copy" in line and str(run) in line and str(store) in line
    assert "is a copy" in refusal(copy, checkpoint_dir=str(store))
    shutil.copytree(store, tmp_path / "own store")
    train(copy, checkpoint_dir=str(tmp_path / "own store"), max_steps=6)
    assert steps_of(run) == [2, 4] and steps_of(copy) == [2, 4, 6]


def test_a_damaged_tokenizer_is_restored_from_where_the_error_says(run: Path, whole: Path) -> None:
    (run / "tokenizer.model").write_text("damaged")
    assert refusal(run).endswith("restore it from model/ of a checkpoint, each of which has a copy")
    shutil.copy(run / "checkpoints" / str(steps_of(run)[-1]) / "model" / "tokenizer.model", run)
    assert (run / "tokenizer.model").read_bytes() == (whole / "tokenizer.model").read_bytes()


def test_a_copy_of_a_run_whose_checkpoints_are_a_link_does_not_share_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "disk").mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    train(run, max_steps=4)
    shutil.copytree(run, tmp_path / "copy", symlinks=True)
    assert "is a copy" in refusal(tmp_path / "copy")
    train(run)
    assert_same(run, run)


def test_a_run_that_was_moved_goes_on(whole: Path, tmp_path: Path) -> None:
    run, store = tmp_path / "run", tmp_path / "store"
    train(run, checkpoint_dir=str(store), max_steps=4)
    run.rename(tmp_path / "moved")
    assert f"has moved here from {run}" in train(tmp_path / "moved", checkpoint_dir=str(store))
    shutil.copytree(whole, tmp_path / "whole").rename(tmp_path / "whole moved")
    assert "already complete" in train(tmp_path / "whole moved")


def test_the_store_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    other, store = tmp_path / "other", tmp_path / "store"
    train(other, checkpoint_dir=str(store), max_steps=2)
    shutil.rmtree(run / "checkpoints")
    assert "those of the run in" in refusal(run, checkpoint_dir=str(store))


def test_a_text_is_the_runs_and_not_the_caches(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("quite another text, of which the run knows nothing\n" * 100)
    shutil.rmtree(run / "tokens")
    assert "data.filepath" in refusal(run, text=other, max_steps=12)
    (run / "run.json").unlink()
    assert "data.filepath" in refusal(run, text=other, max_steps=12), "each checkpoint knows it, too"
    assert "already complete" in train(run)


def test_every_changed_setting_is_told_once_with_its_old_value_and_the_new_one(run: Path) -> None:
    out = train(run, max_steps=16, lr=5e-3, weight_decay=0.2, beta2=0.99, grad_clip=0.5, log_interval=2)
    for line in (
        "train.lr 0.01 -> 0.005", "train.weight_decay 0.1 -> 0.2", "train.beta2 0.95 -> 0.99", "train.grad_clip 1.0 -> 0.5",
        "train.max_steps 8 -> 16", "train.log_interval 1 -> 2", "learning rate at step 9: 0.001 as it was, 0.00",
    ):  # fmt: skip
        assert f"   changed  {line}" in out, line
        assert f"changed at this start: {line}" in out, "and in the end's summary"
    assert out.count("-> ") == 14, "and that the text lies elsewhere"
    assert "   changed  " not in train(
        run, max_steps=16, lr=5e-3, weight_decay=0.2, beta2=0.99, grad_clip=0.5, log_interval=2
    )


def test_evaluations_that_measure_something_else_are_not_compared(run: Path) -> None:
    best = json.loads((run / "best.json").read_text())
    out = train(run, max_steps=16, eval_iters=2)
    assert "changed  evaluations from here on measure something else (train.eval_iters): the best is found among" in out
    later = {
        record["step"]: record["eval_loss"] for record in records(run) if record["step"] > 8 and "eval_loss" in record
    }
    first = min(later, key=lambda step: later[step])
    assert f"step {min(later)}: eval loss" in out and ", the best so far" in out
    found = json.loads((run / "best.json").read_text())
    assert (found["step"], found["eval_loss"]) == (first, later[first]) and found != best
    assert json.loads((run / "run.json").read_text())["measured_from"] == 8
    assert "measure something else" not in train(run, max_steps=20, eval_iters=2, keep=1), (
        "which is told once, and stays"
    )
    after = {
        record["step"]: record["eval_loss"] for record in records(run) if record["step"] > 8 and "eval_loss" in record
    }
    assert json.loads((run / "best.json").read_text())["step"] == min(after, key=lambda step: after[step])
    assert min(after, key=lambda step: after[step]) in steps_of(run)
    assert json.loads((run / "run.json").read_text())["measured_from"] == 8


def test_the_best_of_before_stays_until_an_evaluation_compares(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, seen = json.loads((run / "best.json").read_text())["step"], []
    monkeypatch.setattr(RunFolder, "write_best", lambda folder, steps: seen.append(steps))
    train(run, max_steps=16, eval_iters=2, eval_interval=100, keep=1)
    assert len(seen) > 3 and all(best in steps for steps in seen if steps[-1] < 16)


def test_a_checkpoint_under_the_name_of_another_step_is_not_taken_for_it(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "10")
    out = train(run, max_steps=12)
    assert (
        "the checkpoint of step 10 is not used" in out and "found one of step 4" in out and "resumed  at step 8" in out
    )
    assert (run / "checkpoints" / "set-aside-1" / "10").is_dir()


def test_a_start_says_that_it_waits_for_a_store_that_does_not_answer(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opening.find_store

    def find_late(*args: Any) -> Path:
        time.sleep(0.1)
        return found(*args)

    monkeypatch.setattr(opening, "find_store", find_late)
    monkeypatch.setattr(progress, "BEAT", 0.01)
    assert f"looking for the checkpoints of {run}: " in train(run)


def test_settings_are_compared_with_those_of_the_checkpoint_where_config_toml_is_gone(run: Path, whole: Path) -> None:
    (run / "config.toml").unlink()
    assert refusal(run, seed=3).startswith("train.seed: expected 0, with which the run in ")
    out = train(run, lr=5e-3, max_steps=10)
    assert (
        "config.toml is missing: the settings of this start are compared with those that the checkpoint of step 8 tells"
        in out
    )
    assert "changed  train.lr 0.01 -> 0.005" in out and "changed  train.max_steps 8 -> 10" in out
    assert "config.toml is missing" not in train(run, lr=5e-3, max_steps=10), "which it is no more"


def test_a_config_toml_that_was_edited_does_not_say_what_the_run_was(run: Path) -> None:
    config = run / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("seed = 0", "seed = 3").replace("lr = 0.01", "lr = 0.005"))
    assert refusal(run, seed=3).startswith("train.seed: expected 0, with which the run in ")
    out = train(run, lr=5e-3, max_steps=10)
    assert (
        "config.toml was edited after the last start: the settings of this start are compared with those that the "
        "checkpoint of step 8 tells" in out
    )
    assert "changed  train.lr 0.01 -> 0.005" in out and "seed = 0" in config.read_text()
    assert "was edited" not in train(run, lr=5e-3, max_steps=10), "it is written anew"


def test_the_time_of_all_starts_has_what_follows_the_last_record(run: Path) -> None:
    table = json.loads((run / "run.json").read_text())
    assert table["spent"] > json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["run_seconds"]
    (run / "run.json").write_text(json.dumps(table | {"spent": 5000.0}))
    found = re.search(r"over all starts: .* of ([\d,]+) s", train(run, max_steps=10))
    assert found is not None and int(found[1].replace(",", "")) >= 5000
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["run_seconds"] > 5000


def test_records_that_stand_twice_count_once_which_is_told(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines, *lines[2:5]]))
    out = train(run)
    assert "some stand twice" in out and "no records" not in out
    assert (run / "metrics.jsonl").read_text() == "".join(lines)


def test_checkpoints_of_before_tell_no_settings_which_is_told(run: Path) -> None:
    (run / "config.toml").unlink()
    origin = run / "checkpoints" / "8" / "model" / "origin.json"
    table = json.loads(origin.read_text())
    assert table.pop("settings")["train"]["lr"] == 1e-2
    origin.write_text(json.dumps(table))
    write_checksums(origin.parents[1])
    assert "does not tell the settings of the run: that some have changed is not noticed" in train(run)


def test_settings_that_were_emptied_are_refused(run: Path) -> None:
    (run / "config.toml").write_text("")
    line = refusal(run, max_steps=12)
    assert "config.toml: expected the settings of the run, found none" in line and "delete it to go on" in line


@pytest.mark.parametrize("lines", [0, 5])
def test_records_that_are_gone_are_told_and_do_not_hide_the_best(lines: int, run: Path) -> None:
    kept_lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:lines]
    (run / "metrics.jsonl").write_text("".join(kept_lines) + '{"step": 6, "tok')
    before = json.loads((run / "best.json").read_text())
    out = train(run, max_steps=12, lr=10.0, bad_steps="count")
    assert f"metrics.jsonl has no records of steps after {lines}, up to 8, which losses.png lacks from now on" in out
    assert "step 12: eval loss" in out and "the best so far" not in out
    assert json.loads((run / "best.json").read_text())["step"] == before["step"] == 8


def test_records_that_are_rarer_than_checkpoints_are_not_missed(tmp_path: Path) -> None:
    rare = {"max_steps": 6, "log_interval": 4, "eval_interval": 100}
    train(tmp_path / "run", **rare)
    out = train(tmp_path / "run", **rare, resume_step=2)
    assert [record["step"] for record in records(tmp_path / "run")] == [4, 6] and "resumed  at step 2" in out
    assert "no records" not in out


@pytest.mark.parametrize("record", [{"saved": "x"}, {"id": 5}, {"starts": {}}, {"held_lr": "0.1"}])
def test_a_record_of_the_run_with_values_of_other_types_is_refused(record: dict[str, Any], run: Path) -> None:
    table = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(table | record))
    assert f"run.json: {next(iter(record))}: expected " in refusal(run)


def test_a_run_does_not_go_on_from_another_model_than_it_began_with(run: Path, whole: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    train(tuned, max_steps=2, init_from=str(whole))
    line = refusal(tuned, max_steps=4, init_from=str(whole / "checkpoints" / "2"))
    assert f"train.init_from: expected '{whole}', with which the run in " in line and "found another model" in line
    out = train(tuned, max_steps=4, init_from=str(run))
    assert (
        f"changed  train.init_from {whole} -> {run}, which is not read, as the run goes on from its own checkpoint"
        in out
    )


def test_the_vocabulary_of_a_base_is_not_compared_with_one_that_nobody_trained(whole: Path, tmp_path: Path) -> None:
    data = DataArgs(str(write_text(tmp_path)), vocab_size=2000)
    tuned = dataclasses.replace(RUN, save_dir=str(tmp_path / "tuned"), init_from=str(whole), max_steps=2)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        loop.train(Config(MODEL, data, tuned))
        shutil.rmtree(tmp_path / "tuned" / "tokens")
        loop.train(Config(MODEL, data, dataclasses.replace(tuned, max_steps=3)))
    assert "resumed  at step 2" in out.getvalue() and "was asked for" not in out.getvalue()


def test_what_is_asked_for_and_does_not_happen_is_told(run: Path) -> None:
    out = train(run, max_steps=10, keep_every=3, profile_steps="2-4")
    assert (
        "train.keep_every 3 keeps what is saved, which is every 2 steps" in out
        and "every 6 steps are sure to stay" in out
    )
    assert "train.profile_steps 2-4: the run has 8 steps, and no trace is made of those behind it" in out
    assert "keeps what is saved" not in train(run, max_steps=10, keep_every=4)


def test_a_better_loss_of_other_tokens_does_not_hide_those_that_compare() -> None:
    folder = RunFolder("unused")
    folder.records = [{"step": step, "eval_loss": loss} for step, loss in ((4, 1.0), (8, 0.5), (12, 2.0), (16, 1.9))]
    assert folder.best_of([4, 8, 12, 16]) == 8
    folder.measured_from = 8
    assert folder.best_of([4, 8, 12, 16]) == 16 and folder.best_of([4, 8]) == 0
    assert (folder.best() or {})["step"] == 16


def test_a_run_does_not_begin_with_a_model_when_it_resumes(run: Path, whole: Path) -> None:
    line = refusal(run, max_steps=12, init_from=str(whole))
    assert (
        line.startswith("train.init_from: expected none, as the run in ") and "leave it out to resume that run" in line
    )


def test_fewer_steps_than_a_run_has_are_told_as_that(run: Path) -> None:
    out = train(run, max_steps=6)
    assert "changed  train.max_steps 8 -> 6" in out
    assert "Run already complete: it has 8 steps, and 6 are asked for. Raise --train.max-steps to go on" in out
    assert steps_of(run) == [2, 4, 6, 8]
    out = train(run, resume_step=6, max_steps=5)
    assert "Run already complete: it has 6 steps, and 5 are asked for" in out and "step 6: eval loss" in out, (
        "also where an evaluation is owed"
    )


def masked(folder: Path, document_mask: bool = True, tokenizer: str = "", **changes: Any) -> str:
    """What a run with document masks, over documents of a line, prints."""
    data = DataArgs(str(write_text(folder.parent)), 0.9, tokenizer, 280, "\\n", document_mask=document_mask)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        loop.train(Config(MODEL, data, dataclasses.replace(RUN, save_dir=str(folder), **changes)))
    return out.getvalue()


def test_a_run_with_document_masks_goes_on_bit_for_bit_and_a_change_is_told(whole: Path, tmp_path: Path) -> None:
    assert "mask  attention, positions and loss stay inside each document" in masked(tmp_path / "one")
    assert "document_mask = true" in (tmp_path / "one" / "config.toml").read_text()
    assert records(tmp_path / "one") != records(whole)
    masked(tmp_path / "two")
    for step in ("6", "8"):
        shutil.rmtree(tmp_path / "two" / "checkpoints" / step)
    again = masked(tmp_path / "two")
    assert "resumed  at step 4" in again and "   changed  " not in again
    assert_same(tmp_path / "one", tmp_path / "two")
    out = masked(tmp_path / "two", document_mask=False, max_steps=10)
    assert "changed  data.document_mask True -> False" in out and "not comparable" in out


def test_a_tokenizer_that_marks_no_beginning_is_refused_with_document_masks(tmp_path: Path) -> None:
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and the dog ran to the sea"] * 9), model_prefix=str(tmp_path / "t5"),
        vocab_size=290, bos_id=-1, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^data\.document_mask: expected a tokenizer with BOS and EOS.*'</s>' alone"):
        masked(tmp_path / "run", tokenizer=str(tmp_path / "t5.model"))
    assert not (tmp_path / "run").exists()
    masked(tmp_path / "run", False, str(tmp_path / "t5.model"), max_steps=1)


def test_an_unchanged_start_says_nothing_of_changes(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, max_steps=8, save_interval=3, keep=9)
    shutil.rmtree(run / "checkpoints" / "8")
    assert "   changed  " not in train(run, max_steps=8, save_interval=3, keep=9)


def test_more_steps_at_the_rate_that_the_run_stopped_with(run: Path, tmp_path: Path) -> None:
    out = train(run, max_steps=12, hold_lr=True)
    assert "learning rate 0.001, held; train.lr 0.01 and the schedule are not used" in out and "as it was" not in out
    rate = records(run)[7]["lr"]
    assert {record["lr"] for record in records(run)[7:]} == {rate}
    train(run, max_steps=14, hold_lr=True)
    assert {record["lr"] for record in records(run)[7:]} == {rate}, "a later start holds the same rate"
    assert records(run)[-1]["step"] == 14
    with pytest.raises(UserError, match=r"train\.hold_lr: expected a run to resume"):
        train(tmp_path / "new", hold_lr=True)


@pytest.mark.parametrize("item", ["params", "state", "model", "metrics"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(item: str, run: Path, whole: Path) -> None:
    flip(largest(run / "checkpoints" / "8" / item), 1)
    out = train(run)
    assert "warning: the checkpoint of step 8 is not used" in out and f"{item}/" in out and "resumed  at step 6" in out
    assert_same(run, whole)


def test_a_run_whose_checkpoints_are_all_damaged_ends_in_a_line_that_names_them(run: Path) -> None:
    for step in steps_of(run):
        flip(largest(run / "checkpoints" / str(step) / "params"))
    line = refusal(run, max_steps=12)
    assert "2, 4, 6, 8" in line and "params/" in line


def test_damage_is_not_sampled_on(run: Path) -> None:
    flip(largest(run / "checkpoints" / "8" / "params"))
    with pytest.raises(UserError, match=r"8: .*params/.* is damaged"):
        llama_jax.load(str(run / "checkpoints" / "8"))


def test_every_flip_in_a_checkpoint_is_named_or_changes_nothing(run: Path) -> None:
    rng = random.Random(0)
    folder = run / "checkpoints" / "8"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(100):
        path = rng.choice(files)
        before = path.read_bytes()
        if not before:
            continue
        spoilt = bytearray(before)
        spoilt[rng.randrange(len(before))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(spoilt))
        with pytest.raises(UserError) as caught:
            llama_jax.load(str(folder))
        assert path.name in str(caught.value) or path.parent.name in str(caught.value), path
        path.write_bytes(before)
    llama_jax.load(str(folder))


def test_a_run_goes_back_to_an_earlier_step_once(run: Path, whole: Path) -> None:
    out = train(run, resume_step=4, lr=5e-3)
    assert "steps 6, 8 are set aside" in out and "resumed  at step 4" in out
    assert (
        steps_of(run) == [2, 4, 6, 8]
        and records(run)[:4] == records(whole)[:4]
        and records(run)[5] != records(whole)[5]
    )
    aside = run / "checkpoints" / "set-aside-1"
    for x, y in zip(parameters(whole, 6), jax.tree.leaves(llama_jax.load(str(aside / "6")).params), strict=True):
        np.testing.assert_array_equal(x, y)
    assert (run / "metrics-set-aside-1.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    out = train(run, resume_step=4, lr=5e-3, max_steps=10)
    assert "went back to step 4 at an earlier start" in out and "resumed  at step 8" in out
    train(run, lr=5e-3, max_steps=10)
    assert "steps 6, 8, 10 are set aside" in train(run, resume_step=4, lr=5e-3, max_steps=10)


def test_a_step_of_which_there_is_no_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    assert "2, 4, 6, 8" in refusal(run, resume_step=5)
    with pytest.raises(UserError, match=r"train\.resume_step: .*no checkpoints"):
        train(tmp_path / "new", resume_step=5)


def test_a_step_that_was_saved_and_is_gone_is_told(run: Path, whole: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "8")
    assert "step 8 was saved, and its checkpoint is gone" in train(run)
    assert_same(run, whole)


@pytest.mark.parametrize("line", ["", "   ", "not JSON", "[1]", '{"step": "x"}', "null"])
def test_a_line_that_is_no_record_costs_itself_alone(line: str, run: Path, whole: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], line, *lines[3:], '{"step": 9, "tra']))
    out = train(run)
    assert records(run) == records(whole)
    assert ("line 4 is not a record" in out) == bool(line.strip()) and "line 10" not in out


def test_a_run_of_before_there_were_checksums_and_run_json_goes_on(run: Path, whole: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "8")
    (run / "run.json").unlink()
    for folder in (run / "checkpoints").iterdir():
        (folder / "checksums.json").unlink()
        (folder / "model" / "origin.json").unlink()
        table = json.loads((folder / "model" / "model.json").read_text())
        del table["checksums"]
        (folder / "model" / "model.json").write_text(json.dumps(table))
    assert "resumed  at step 6" in train(run)
    assert_same(run, whole, unknown="target_tokens")


def test_a_checkpoint_without_the_table_that_is_written_last_is_not_whole(run: Path, whole: Path) -> None:
    (run / "checkpoints" / "8" / "checksums.json").unlink()
    assert steps_of(run) == [2, 4, 6]
    with pytest.raises(UserError, match=r"8: expected a whole checkpoint, found no checksums\.json"):
        llama_jax.load(str(run / "checkpoints" / "8"))
    out = train(run)
    assert "step 8 was saved, and its checkpoint is not whole; the newest is of step 6" in out
    assert_same(run, whole)
    assert (run / "checkpoints" / "set-aside-1" / "8" / "params").is_dir(), "what was saved once is not deleted"


def test_minutes_save_and_evaluate_where_steps_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", save_minutes=1e-9, eval_minutes=1e-9, save_interval=1000, eval_interval=1000)
    assert steps_of(tmp_path / "run") == list(range(1, 9))
    assert all("eval_loss" in record for record in records(tmp_path / "run"))
    train(tmp_path / "other", save_minutes=0, save_interval=1000, eval_interval=1000)
    assert steps_of(tmp_path / "other") == [8]


def test_the_last_the_best_and_every_so_many_are_kept() -> None:
    steps, losses = range(1, 21), {5: 3.0, 10: 1.0, 15: 2.0}
    assert kept(steps, losses, 3, 0) == {10, 18, 19, 20}
    assert kept(steps, losses, 1, 6) == {6, 10, 12, 18, 20}
    assert kept(steps, {}, 2, 0) == {19, 20}
    assert kept([], {}, 2, 0) == set()


def test_a_run_keeps_what_it_is_asked_to_keep(tmp_path: Path) -> None:
    train(tmp_path / "run", save_interval=1, keep=2, keep_every=3)
    assert set(steps_of(tmp_path / "run")) >= {3, 6, 7, 8} and 1 not in steps_of(tmp_path / "run")


def test_a_failed_save_is_told_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self: CheckpointWriter, step: int) -> None:
        if step == 2:
            raise UserError(f"step {step}: no room")
        original(self, step)

    original = CheckpointWriter._finish
    monkeypatch.setattr(CheckpointWriter, "_finish", finish)
    with pytest.raises(UserError, match="step 2: no room"):
        train(tmp_path / "run", save_interval=1000, max_steps=500, save_minutes=0, eval_interval=2)
    assert records(tmp_path / "run")[-1]["step"] < 500


def test_the_held_out_loss_does_not_depend_on_a_memory_setting(tmp_path: Path) -> None:
    losses = {}
    for parts in (1, 2, 4):
        train(tmp_path / str(parts), gradient_accumulation_steps=parts, max_steps=4)
        losses[parts] = records(tmp_path / str(parts))[-1]["eval_loss"]
    assert losses[2] == pytest.approx(losses[1], rel=1e-6) and losses[4] == pytest.approx(losses[1], rel=1e-6)
