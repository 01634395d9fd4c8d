"""Continues a run of wsd: where its rate may decay from, and what may not change once it has decayed."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from llama_jax.checkpoint import steps_in
from llama_jax.cli.progress import working
from llama_jax.compat.orbax_internals import COMMITTED, TEMPORARY
from llama_jax.config import Config, TrainArgs
from llama_jax.errors import UserError
from llama_jax.storage.locations import children, is_remote, real_name, user_errors
from llama_jax.tokenizer import is_kept, keep_tokenizer, kept_tokenizer
from llama_jax.training.rates import decay_start
from llama_jax.training.run_folder import RunFolder, RunRecord
from llama_jax.training.saving import delete_step

# Settings that move the decay, the one that most likely explains it first.
MOVERS = ("decay_from", "max_steps", "n_epochs", "decay_fraction", "warmup_steps")


def check_can_decay(step: int, folder: RunFolder, record: RunRecord, stored: Config | None, saved: list[int]) -> None:
    """Raise UserError unless ``step`` is in the stable phase of the run in ``folder`` and has a checkpoint.

    ``record`` and ``stored`` are what the run's last start left; ``saved`` are the steps of its checkpoints.
    """
    if stored is not None and (stored.train.schedule != "wsd" or stored.train.hold_lr):
        found = "held" if stored.train.hold_lr else stored.train.schedule
        raise UserError(
            f"train.decay_from: expected a run with train.schedule wsd, found the rate of the run in {folder.path} to be "
            f"{found}; leave it out, or begin a run with --train.schedule wsd in another --train.save-dir"
        )
    if record.stable_until is not None and step > record.stable_until:
        raise UserError(
            f"train.decay_from: expected a step up to {record.stable_until:,}, at which the rate of the run in {folder.path} "
            f"begins to decay, found {step:,}; --train.decay-from {record.stable_until} decays from there again"
        )
    if step not in saved:
        stable = [each for each in saved if record.stable_until is None or each <= record.stable_until]
        raise UserError(
            f"train.decay_from: expected a step of the stable phase with a checkpoint in {folder.checkpoints} "
            f"({', '.join(map(str, stable)) or 'there is none'}), found {step:,}; choose one of these"
        )


def check_decay(stored: Config, before: int, now: Config, steps: int, start: int, store: Path) -> None:
    """Raise UserError if a run of wsd would go on from ``start`` by another decay than the one it has begun.

    ``before`` and ``steps`` are the numbers of steps that the previous start and this one plan. ``store`` holds the
    checkpoints. Where the rate is held, any step may follow.
    """
    old, new = (decay_start(stored.train, before), before), (decay_start(now.train, steps), steps)
    stable = min(old[0], new[0])
    if now.train.schedule != "wsd" or now.train.hold_lr or stored.train.hold_lr or old == new or start <= stable:
        return
    name = next((name for name in MOVERS if getattr(stored.train, name) != getattr(now.train, name)), "max_steps")
    was, is_now = (getattr(config.train, name) for config in (stored, now))
    before_it = [step for step in steps_in(store) if now.train.warmup_steps <= step <= stable]
    back = "no checkpoint is from before it"
    if before_it:
        back = f"--train.resume-step {before_it[-1]} goes back to before it and sets the later checkpoints aside"
    if start > old[0]:
        raise UserError(
            f"train.{name}: expected {was}, as the rate has decayed since step {old[0]:,}, to end at step {before:,}, and the run is at "
            f"step {start:,}, found {is_now}; {back}; --train.hold-lr goes on at the rate of step {start:,}"
        )
    raise UserError(
        f"train.{name}: expected a decay from step {start:,}, where the run is, or later, found one from step {new[0]:,} to {steps:,}; "
        f"--train.decay-from {start} decays from here on; {back}"
    )


def check_is_continuation(run: RunFolder, stored: Config | None, train: TrainArgs, steps: list[int]) -> None:
    """Raise UserError if save_dir has a run that is not the continuation of the one in decay_run."""
    if stored is None and not steps:
        return
    of = "" if stored is None else stored.train.decay_run
    if not of or real_name(Path(of)) != real_name(Path(train.decay_run)):
        raise UserError(
            f"train.save_dir: expected a new folder, in which the run in {train.decay_run} is continued, found a run of its own in "
            f"{run.path}; choose another --train.save-dir, or leave --train.decay-run out to decay that run itself"
        )


def run_to_continue(train: TrainArgs, folder: RunFolder) -> tuple[RunFolder, RunRecord, Config | None]:
    """Return the run in decay_run, its record and its settings, but for its minutes; ``folder`` gets its tokenizer.

    Raises UserError if there is no such run, or none that can decay from decay_from.
    """
    source = RunFolder(train.decay_run)
    if not source.record_path.exists():
        raise UserError(
            f"train.decay_run: expected a run folder, with {source.record_path.name}, found none in {train.decay_run}; name the "
            "--train.save-dir of the run to continue"
        )
    record, stored = source.read_record(), source.stored_config()
    check_can_decay(train.decay_from, source, record, stored, steps_in(source.checkpoints))
    if is_kept(source.tokenizer_path):
        keep_tokenizer(kept_tokenizer(source.tokenizer_path), folder.tokenizer_path)
    stored = None if stored is None else without_minutes(stored)
    return source, dataclasses.replace(record, store="", saved=0, went_back_to=0, spent=0.0), stored


def without_minutes(config: Config) -> Config:
    """Return settings without the minutes, which are those of a whole run, and which a recipe has chosen."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, minutes=None))


def copy_checkpoint(source: Path, store: Path, step: int) -> None:
    """Copy the checkpoint of ``step`` from one folder of steps into another, whole or not at all."""
    there, made = store / str(step), store / f"{step}{TEMPORARY}-copied"
    with user_errors(store, "write"):
        store.mkdir(parents=True, exist_ok=True)
        if not is_remote(store) and not is_remote(source):
            shutil.rmtree(made, ignore_errors=True)
            shutil.copytree(source / str(step), made)
            made.rename(there)
            return
        # Object storage cannot rename. There a checkpoint counts once its marker is written, which is the last thing.
        for path in _files(source / str(step)):
            inside = str(path.relative_to(source / str(step)))
            if inside != COMMITTED:  # each of its parts has such a marker, too, which counts among its files
                target = epath.Path(there) / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        if (epath.Path(source) / str(step) / COMMITTED).exists():
            (epath.Path(there) / COMMITTED).write_text("")


def move_checkpoint(source: Path, store: Path, step: int) -> None:
    """Move the checkpoint of ``step``, whole or not, into another folder of steps of the same disk or bucket."""
    if not is_remote(source):
        (source / str(step)).rename(store / str(step))
        return
    with working(f"moving {source / str(step)} to {store}"):
        copy_checkpoint(source, store, step)
    delete_step(source / str(step))


def _files(folder: Path) -> Iterator[Path]:
    for path in children(folder):
        yield from _files(path) if path.is_dir() else [path]
