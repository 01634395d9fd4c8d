"""A run of wsd is continued at its stable rate, and decayed from any step of its stable phase, here or in another folder."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llama_jax.checkpoint import steps_of
from llama_jax.errors import UserError
from llama_jax.recipe.one_step import read_with_recipe
from llama_jax.training import loop, start
from llama_jax.training.command import read_command
from tests import processes
from tests.training.test_resuming import assert_same, content, records, refusal, train, undrawn  # noqa: F401

# Eight steps, of which the last two decay: the stable phase ends at step 6.
WSD: dict[str, Any] = {"schedule": "wsd", "decay_fraction": 0.25}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, **WSD)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def forget(run: Path, *steps: int) -> None:
    """Lose checkpoints, as if the run had been killed before them."""
    for step in steps:
        shutil.rmtree(run / "checkpoints" / str(step))


def test_a_finished_run_goes_on_from_before_its_decay_as_one_that_was_planned_longer(run: Path, tmp_path: Path) -> None:
    line = refusal(run, **WSD, max_steps=16)
    assert line.startswith("train.max_steps: expected 8, as the rate has decayed since step 6, to end at step 8")
    assert "found 16" in line and "--train.resume-step 6" in line and "--train.hold-lr" in line
    assert "--train.resume-step 6" in train(run, **WSD), "and so says the start of a finished run"
    out = train(run, **WSD, max_steps=16, resume_step=6)
    assert "step 8 is set aside" in out and "the decay begins at step 12, whose checkpoint is kept" in out
    assert "learning rate at step 7: 0.0055 as it was, 0.01 now" in out
    train(tmp_path / "longer", **WSD, max_steps=16)
    assert_same(run, tmp_path / "longer", 16)
    assert "already complete" in train(run, **WSD, max_steps=16, resume_step=6), "the same command, once more"


def test_a_run_that_is_stopped_in_its_stable_phase_may_be_made_longer(run: Path, tmp_path: Path) -> None:
    forget(run, 6, 8)
    out = train(run, **WSD, max_steps=16)
    assert "resumed  at step 4" in out and "as it was" not in out, "the rate of the next step is the same"
    train(tmp_path / "longer", **WSD, max_steps=16)
    assert_same(run, tmp_path / "longer", 16)


def test_a_run_goes_on_inside_its_decay_bit_for_bit(tmp_path: Path) -> None:
    half = WSD | {"decay_fraction": 0.5}
    train(tmp_path / "one", **half)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    forget(tmp_path / "two", 8)
    assert "resumed  at step 6" in train(tmp_path / "two", **half)
    assert_same(tmp_path / "one", tmp_path / "two")
    forget(tmp_path / "two", 8)
    line = refusal(tmp_path / "two", **WSD)
    assert line.startswith("train.decay_fraction: expected 0.5") and "--train.resume-step 4" in line
    assert "held" in train(tmp_path / "two", **half, max_steps=9, hold_lr=True), "held, any step may follow"


def test_the_checkpoint_at_which_the_decay_begins_is_saved_and_kept(tmp_path: Path) -> None:
    out = train(tmp_path / "run", **WSD, max_steps=12, save_interval=10, keep=1, eval_interval=100)
    assert "the decay begins at step 9, whose checkpoint is kept: --train.decay-from 9 continues from it" in out
    assert steps_of(tmp_path / "run") == [9, 12]
    out = train(tmp_path / "short", **WSD | {"warmup_steps": 100})
    assert "not 100, as the run is short" in out and "decay-from" not in out, "there is no stable phase"


def test_a_decay_in_another_folder_is_that_of_the_run_itself_which_stays_as_it_is(run: Path, tmp_path: Path) -> None:
    before = content(run)
    into: dict[str, Any] = WSD | {"decay_run": str(run), "decay_from": 4, "max_steps": 10}
    out = train(tmp_path / "branch", **into)
    assert content(run) == before
    assert (
        f"the run in {run}, which stays as it is, is continued here from step 4" in out and "resumed  at step 4" in out
    )
    assert "the rate decays in the 6 steps from step 4 to 10, 60% of all" in out
    assert "the 25% of train.decay_fraction would end at --train.max-steps 5" in out
    planned = WSD | {"decay_fraction": 0.6, "max_steps": 10}
    train(tmp_path / "planned", **planned)
    assert_same(tmp_path / "branch", tmp_path / "planned", 10)
    shutil.copytree(tmp_path / "branch", tmp_path / "killed")
    forget(tmp_path / "branch", 8, 10)
    assert "resumed  at step 6" in train(tmp_path / "branch", **into), "the same command goes on"
    assert_same(tmp_path / "branch", tmp_path / "planned", 10)
    out = train(run, **WSD, decay_from=4, max_steps=10)
    assert "steps 6, 8 are set aside" in out
    assert_same(run, tmp_path / "branch", 10)
    forget(run, 8, 10)
    out = train(run, **WSD, decay_from=4, max_steps=10)
    assert "decays from step 4 on since an earlier start" in out and "resumed  at step 6" in out
    assert_same(run, tmp_path / "branch", 10)


def test_what_a_run_cannot_change_is_refused_where_it_is_continued_before_its_text_is_read(
    run: Path, tmp_path: Path
) -> None:
    found = rf"train\.batch_size: expected 4, with which the run in {run} began, found 8; leave it out, as a run that is continued"
    with pytest.raises(UserError, match=found):
        train(tmp_path / "branch", **WSD, decay_run=str(run), decay_from=4, batch_size=8)
    assert not (tmp_path / "branch" / "tokens").exists()


def test_settings_that_were_edited_in_the_run_to_decay_are_told(run: Path, tmp_path: Path) -> None:
    config = run / "config.toml"
    config.write_text(config.read_text().replace("seed = 0", "seed = 3"))
    with pytest.raises(UserError, match=rf"train\.seed: expected 0, with which the run in {run} began, found 3"):
        train(tmp_path / "refused", **WSD, decay_run=str(run), decay_from=4, seed=3)
    out = train(tmp_path / "branch", **WSD, decay_run=str(run), decay_from=4)
    assert f"warning: {config} was edited after the last start" in out


def test_a_decay_takes_its_share_of_all_steps_if_nothing_says_where_it_ends(run: Path, tmp_path: Path) -> None:
    train(tmp_path / "branch", **WSD, decay_run=str(run), decay_from=6, max_steps=None)
    assert_same(tmp_path / "branch", run, 8)


def test_a_finished_run_names_no_checkpoint_to_go_back_to_that_it_does_not_have(run: Path) -> None:
    """It has held its rate where the schedule would have decayed it."""
    train(run, **WSD, max_steps=15, hold_lr=True)
    out = train(run, **WSD, max_steps=15)
    assert 11 not in steps_of(run)
    assert "already complete" in out and "--train.resume-step" not in out


def test_a_run_of_so_many_minutes_decays_in_another_folder_without_them(tmp_path: Path) -> None:
    train(tmp_path / "run", **WSD, minutes=3.0)
    argv = ["--train.decay-run", str(tmp_path / "run"), "--train.decay-from", "6", "--train.save-dir", "branch"]
    config, _ = read_with_recipe(argv)
    assert (config.train.minutes, config.train.max_steps, config.train.schedule) == (None, None, "wsd")
    train(tmp_path / "branch", **WSD, decay_run=str(tmp_path / "run"), decay_from=6, max_steps=None)
    assert_same(tmp_path / "branch", tmp_path / "run", 8)


def test_a_decay_that_was_stopped_goes_on_as_it_began_whatever_has_become_of_the_run(run: Path, tmp_path: Path) -> None:
    def decay(folder: str) -> str:
        flags = {"decay-run": run, "decay-from": 4, "max-steps": 8, "save-dir": tmp_path / folder}
        argv = [f"--train.{name}={value}" for name, value in flags.items()]
        config, notes = read_command(argv)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            loop.train(config, notes=notes)
        return out.getvalue()

    assert f"settings of {run / 'config.toml'}, but for where it ends" in decay("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    forget(tmp_path / "stopped", 6, 8)
    train(run, **WSD, max_steps=10, resume_step=6, weight_decay=0.5, eval_iters=2)
    assert "changed  " not in decay("stopped")
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    shutil.rmtree(run)
    forget(tmp_path / "stopped", 6, 8)
    decay("stopped")
    assert_same(tmp_path / "stopped", tmp_path / "whole")


def test_a_copy_that_is_cut_short_is_begun_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise UserError("the disk is full")

    into: dict[str, Any] = WSD | {"decay_run": str(run), "decay_from": 4}
    with monkeypatch.context() as patch:
        patch.setattr(start, "copy_checkpoint", full)
        with pytest.raises(UserError, match="the disk is full"):
            train(tmp_path / "branch", **into)
    assert steps_of(tmp_path / "branch") == []
    train(tmp_path / "branch", **into)
    train(tmp_path / "other", **into)
    assert_same(tmp_path / "branch", tmp_path / "other")


def test_decays_that_cannot_be_are_refused_in_a_line_that_says_what_can(run: Path, tmp_path: Path) -> None:
    for changes, words in (
        ({"decay_from": 8, "max_steps": 10}, ("a step up to 6", "found 8", "--train.decay-from 6")),
        ({"decay_from": 5}, ("a step of the stable phase with a checkpoint", "(2, 4, 6)", "found 5")),
        ({"schedule": "cosine", "decay_fraction": 0.2}, ("train.schedule: expected 'wsd'", "found 'cosine'; give the same value")),
        ({"decay_from": 4, "decay_run": str(run)}, ("train.save_dir: expected a new folder", "leave --train.decay-run out")),
        ({"decay_from": 4, "decay_run": "nothing"}, ("train.save_dir: expected a new folder",)),
    ):  # fmt: skip
        line = refusal(run, **WSD | changes)
        assert all(word in line for word in words), line
    for changes, words in (
        ({"decay_run": "nothing"}, ("train.decay_run: expected a run folder", "nothing")),
        ({"decay_run": str(run), "decay_from": 5}, ("(2, 4, 6)",)),
        ({}, ("train.decay_from: expected a step with a checkpoint", "--train.decay-run")),
    ):
        with pytest.raises(UserError) as caught:
            train(tmp_path / "new", **WSD | {"decay_from": 4} | changes)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "new").exists(), "nothing is left of a start that is refused"


def test_a_run_of_another_schedule_does_not_decay(tmp_path: Path) -> None:
    train(tmp_path / "cosine")
    for folder in (tmp_path / "cosine", tmp_path / "new"):
        of = {} if folder.name == "cosine" else {"decay_run": str(tmp_path / "cosine")}
        with pytest.raises(UserError, match=r"train\.decay_from: expected a run with train\.schedule wsd.*cosine"):
            train(folder, **WSD, decay_from=4, max_steps=9, **of)
    assert records(tmp_path / "cosine")[-1]["step"] == 8
    assert "held" in train(tmp_path / "cosine", max_steps=9, hold_lr=True)


def test_a_plan_whose_decay_would_have_begun_already_says_how_to_decay_from_here(run: Path) -> None:
    forget(run, 8)
    line = refusal(run, **WSD, max_steps=7)
    assert "found one from step 5 to 7" in line and "--train.decay-from 6" in line and "--train.resume-step 4" in line
    train(run, **WSD, max_steps=7, decay_from=6)
    assert [record["lr"] for record in records(run)][4:] == pytest.approx([1e-2, 1e-2, 1e-3])


@pytest.mark.slow
def test_two_processes_decay_and_hold_at_the_rates_of_one(tmp_path: Path) -> None:
    """Each goes on from a copy of one stable run: it decays it in another folder, twice, and holds the rate of its last step."""

    def flags(folder: Path, **changes: object) -> list[str]:
        return processes.flags(train__schedule="wsd", train__save_dir=folder, **changes)

    def job(count: int, *runs: list[str]) -> None:
        argv = ["-m", "tests.devices.test_distributed", json.dumps(runs)]
        for ended in processes.end(processes.start(argv, count, 2 // count)):
            assert ended.status == 0, ended.err[-3000:]

    job(1, flags(tmp_path / "stable", train__max_steps=10))
    losses = []
    for count in (1, 2):
        shutil.copytree(tmp_path / "stable", stable := tmp_path / f"stable {count}")
        into = {"train__decay_run": stable, "train__decay_from": 8, "mesh__data": 2, "train__save_interval": 2}
        branch, held = tmp_path / f"branch {count}", {"train__max_steps": 14, "train__hold_lr": True, "mesh__data": 2}
        decay, hold = flags(branch, **into, train__max_steps=12), [*flags(stable, **held)]
        job(count, decay)
        forget(branch, 12)
        job(count, decay, [flag if flag != "--train.hold_lr=True" else "--train.hold-lr" for flag in hold])
        losses.append([record["train_loss"] for folder in (branch, stable) for record in records(folder)])
    assert len(losses[0]) == 12 + 14 and losses[0] == pytest.approx(losses[1], rel=1e-4)
