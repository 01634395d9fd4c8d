"""Opens a run: reads what is in its folder once, and decides once whether to begin or where to resume.

A start is refused if another process writes to the folder, if saved checkpoints cannot be found, or if they belong to
another run. Otherwise it begins a run, or resumes from the newest checkpoint whose files are intact.
"""

import contextlib
import dataclasses
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from llama_jax.checkpoint import DAMAGED, Checkpoint, losses_of, steps_in
from llama_jax.checkpoint.adapted import WholeModel
from llama_jax.cli.progress import working
from llama_jax.config import Config, ModelArgs, TrainArgs, from_dict
from llama_jax.convert.once import model_arguments, open_model
from llama_jax.data import Origin
from llama_jax.data.opened import origins
from llama_jax.devices.distributed import from_main, on_main
from llama_jax.errors import UserError
from llama_jax.lora_args import LoraArgs
from llama_jax.programs import typed
from llama_jax.storage.checksums import verify
from llama_jax.storage.files import remove_leftovers, write_atomically
from llama_jax.storage.locations import (
    absolute,
    check_writable,
    children,
    is_remote,
    user_errors,
)
from llama_jax.storage.owner import Owner, owning
from llama_jax.training.decaying import (
    check_can_decay,
    check_is_continuation,
    move_checkpoint,
    run_to_continue,
    without_minutes,
)
from llama_jax.training.run_folder import RunFolder, RunRecord
from llama_jax.training.settings import check_made_by
from llama_jax.training.store import (
    ELSEWHERE,
    check_in_sight,
    check_is_ours,
    find_store,
    lies_within,
    numbered_in,
    origin_of,
    point_to,
)

# What a checkpoint says of the tokens that counted in the loss of its run.
TARGETS = "target_tokens"
# What it says of the settings that its run had.
SETTINGS = "settings"
# The step at which it was saved.
STEP = "step"
# What it says of the run's record.
RECORD = "record"
IN_USE = "wait until it ends, stop it, or choose another --train.save-dir"


@dataclass
class Opened:
    """A run that this job owns. Process 0 has read all of it; the other processes know only the folder and the step."""

    folder: RunFolder
    start: int = 0
    """The step to resume from. 0: a new run."""
    record: RunRecord = RunRecord()
    stored: Config | None = None
    """The settings of the previous start."""
    texts: dict[str, Origin] | None = None
    """The texts that the run has been trained on so far, by the names of a mixture's sources. A single one has none."""
    targets: int | None = None
    """The tokens that counted in the loss until then. None: unknown, as in checkpoints of earlier versions."""
    later: list[int] = field(default_factory=list)
    """Steps after ``start`` whose checkpoints are to be set aside."""
    notes: list[str] = field(default_factory=list)
    """Decisions to print for the person who started the run."""
    owners: list[Owner] = field(default_factory=list)
    source: RunFolder | None = None
    """The run that begins to be continued here (train.decay_run). Its checkpoint of ``start`` is to be copied."""

    @property
    def checkpoint(self) -> Path:
        """The checkpoint to resume from, of a run that has begun."""
        return (self.source or self.folder).checkpoints / str(self.start)

    def aside(self, store: Path) -> tuple[Path, Path]:
        """Return an unused folder for checkpoints that are set aside, and a file for their records."""
        number = 1
        while (store / f"set-aside-{number}").exists():
            number += 1
        return store / f"set-aside-{number}", self.folder.path / f"metrics-set-aside-{number}.jsonl"

    def set_aside(self) -> None:
        """Move the checkpoints of ``later`` away, with a copy of all records. Process 0 calls this."""
        store = self.folder.checkpoints
        aside, records = self.aside(store)
        with user_errors(store, "write"):
            aside.mkdir(parents=True)
            for step in reversed(self.later):
                move_checkpoint(store, aside, step)
        if self.folder.metrics_path.exists():
            write_atomically(records, self.folder.metrics_path.read_bytes())

    def check_owned(self) -> None:
        """Raise UserError if another process has taken over the run."""
        for held in self.owners:
            held.check()


@contextlib.contextmanager
def opening(train: TrainArgs) -> Iterator[Opened]:
    """Own the run in ``train.save_dir`` for the block, and decide where it resumes.

    All processes call this. Raises UserError on all of them if the run cannot be opened.
    """
    run = Opened(RunFolder(train.save_dir))
    with contextlib.ExitStack() as stack:
        run.start = on_main(lambda: _open(run, train, stack))
        if train.decay_run and from_main(run.source is not None):
            run.source = RunFolder(train.decay_run)
        _check_shared(run)
        yield run


def starting_model(train: TrainArgs, lora: LoraArgs = LoraArgs()) -> ModelArgs:
    """Return the model arguments of a run with ``init_from``: those it began with, else those of the checkpoint.

    Raises UserError if there is no such checkpoint.
    """
    folder = RunFolder(train.save_dir)
    begun = children(folder.checkpoints) or folder.read_record().saved
    stored = settings_before(folder, train.checkpoint_dir) if begun else None
    # JAX must not start before the processes of a job have met, so that nothing is converted here.
    return model_arguments(train.init_from) if stored is None else stored.model


def settings_before(folder: RunFolder, store: str = "") -> Config | None:
    """Return the settings of the previous start, by the newest checkpoint where config.toml is missing.

    store: train.checkpoint_dir. None: there are none, or a checkpoint of an earlier version does not tell them.
    """
    if (stored := folder.stored_config()) is not None:
        return stored
    place = find_store(folder, folder.read_record(), store)
    return _settings_in(origin_of(place / str(steps[-1]))) if (steps := steps_in(place)) else None


def _settings_in(origin: dict[str, Any]) -> Config | None:
    """Return the settings that a checkpoint tells. Those of earlier versions tell none."""
    with contextlib.suppress(KeyError, UserError):
        return from_dict(Config, origin[SETTINGS], SETTINGS)
    return None


def base_of(train: TrainArgs, lora: LoraArgs = LoraArgs()) -> WholeModel:
    """Return the checkpoint of ``init_from``, which adapters may continue. Raises UserError if it cannot be trained."""
    found = open_model(train.init_from, remedy="put the base back, or fine-tune another checkpoint")
    if not lora.rank:
        if found.lora is not None:
            raise UserError(
                f"train.init_from: expected a whole model, to train without adapters, found an adapter in {found.folder}; "
                f"train it further with {found.lora.flags}, or merge it first: "
                f"{typed('convert')} --input {train.init_from} --output merged"
            )
        if found.base.weights != "auto":
            raise UserError(
                f"train.init_from: expected a checkpoint that is not quantized, found {found.base.weights} in "
                f"{found.folder}; take the one that it was made from, or train an adapter: --lora.rank 16"
            )
    return found


def _open(run: Opened, train: TrainArgs, stack: contextlib.ExitStack) -> int:
    """Fill in ``run`` on process 0. Return the step to resume from."""
    folder = run.folder
    if (folder.path / "model" / "model.json").exists() and not folder.record_path.exists():
        raise UserError(
            f"train.save_dir: expected a run folder or a new one, found a model in {folder.path}; {ELSEWHERE}"
        )
    if not folder.path.exists():
        stack.callback(_remove_empty, folder.path)
    folder.make()
    run.owners.append(stack.enter_context(owning(folder.path, "train.save_dir", IN_USE)))
    for place in (folder.path, folder.path / "tokens"):
        if place.is_dir():
            remove_leftovers(place)
    run.record, run.stored = folder.read_record(), folder.stored_config()
    with working(f"looking for the checkpoints of {folder.path}"):  # storage that does not answer is asked for minutes
        store = find_store(folder, run.record, train.checkpoint_dir)
        if is_remote(store):
            check_writable(store, "train.checkpoint_dir")
    outside = not lies_within(store, folder.path)
    if outside and not is_remote(store) and steps_in(store):
        run.owners.append(stack.enter_context(owning(store, "train.checkpoint_dir", IN_USE)))
    steps = steps_in(store)
    run.notes += filter(None, [check_in_sight(folder, run.record, store, steps)])
    if steps and not folder.record_path.exists():
        _restore_record(run, store, steps[-1])
    if steps:
        run.notes += filter(None, [check_is_ours(folder, run.record, store, steps)])
    if train.decay_run:
        check_is_continuation(folder, run.stored, train, steps)
    if outside and len(run.owners) == 1:
        if not is_remote(store):
            store.mkdir(parents=True, exist_ok=True)
        run.owners.append(stack.enter_context(owning(store, "train.checkpoint_dir", IN_USE)))
    if train.decay_run and not steps:
        start = _continue(run, train)
    else:
        start = _start(run, store, steps, train)
        run.notes += folder.read_metrics(start)
    place = store if run.source is None else run.source.checkpoints
    origin = origin_of(place / str(start)) if start else {}
    if start and run.stored is None:
        run.stored = _settings_of(run, origin, start, "is missing")
        check_made_by(origin, train, start)
    elif start and (run.source or folder).edited(run.record):
        run.stored = _settings_of(run, origin, start, "was edited after the last start")
    if start:
        interval = start if run.stored is None else run.stored.train.log_interval
        unrecorded = [step for step in steps_in(place) if folder.recorded < step <= start]
        run.notes += filter(None, [folder.lacks_records(start, interval, losses_of(place, unrecorded))])
    folder.spent = max(folder.spent, run.record.spent)
    run.targets = origin.get(TARGETS) if start else 0
    run.texts = _texts(run, run.record.text or origin.get("text"))
    known = run.record.id or origin.get("run") or uuid.uuid4().hex
    run.record = dataclasses.replace(run.record, id=known, store=str(absolute(store)) if outside else "")
    if outside:
        point_to(folder, store)
    return start


def _remove_empty(folder: Path) -> None:
    """Remove a run folder that a refused start created and left empty."""
    for place in (folder / "tokens", folder):
        with contextlib.suppress(OSError):
            place.rmdir()


def _settings_of(run: Opened, origin: dict[str, Any], start: int, what: str) -> Config | None:
    """Return the settings that the checkpoint of ``start`` tells, in place of a config.toml that is missing or edited.

    A note says so, and ``what`` became of the file. Checkpoints of earlier versions tell none: nothing changes then.
    """
    missing = f"warning: {(run.source or run.folder).config_path} {what}"
    found = _settings_in(origin)
    if found is None:
        run.notes.append(
            f"{missing}, and the checkpoint of step {start:,} does not tell the settings of the run: "
            "that some have changed is not noticed"
        )
        return run.stored
    run.notes.append(
        f"{missing}: the settings of this start are compared with those that the checkpoint of step {start:,} tells"
    )
    return found if run.source is None else without_minutes(found)


def _restore_record(run: Opened, store: Path, step: int) -> None:
    """Take the record that the newest checkpoint tells, in place of a run.json that is missing. A note says so.

    Runs of the first versions had no such file. Checkpoints of later ones do not tell all of it.
    """
    origin = origin_of(store / str(step))
    if "run" not in origin:
        return
    try:
        run.record = RunRecord.of(origin[RECORD], RECORD)
        which = f"it is made of what the checkpoint of step {step:,} tells"
    except (KeyError, AttributeError, UserError):
        which = (
            f"the checkpoint of step {step:,} tells the run's text alone: that the weights of a mixture, a held learning rate or the model "
            "that it began with were others is not noticed"
        )
    run.notes.append(f"warning: {run.folder.record_path} is missing: {which}")


def _texts(run: Opened, table: dict[str, Any] | None) -> dict[str, Origin] | None:
    """Return a record's description of the training texts. Raises UserError if it is damaged."""
    try:
        return None if table is None else origins(table)
    except (TypeError, KeyError, AttributeError):
        raise UserError(
            f"{run.folder.record_path}: expected a description of the training text under text, found something else; restore "
            f"the file from a copy, or {ELSEWHERE}"
        ) from None


def _continue(run: Opened, train: TrainArgs) -> int:
    """Return the step from which the run in decay_run is continued here. Its checkpoint is intact."""
    run.source, run.record, run.stored = run_to_continue(train, run.folder)
    step = _newest_whole(run, run.source.checkpoints, [train.decay_from])
    run.notes += run.source.read_metrics(step)
    run.folder.records = run.source.records
    if run.folder.records:
        last = run.folder.records[-1]
        run.folder.spent, run.folder.spent_in_steps = last.get("run_seconds", 0.0), last.get("run_step_seconds", 0.0)
    run.notes.append(
        f"the run in {run.source.path}, which stays as it is, is continued here from step {step:,}, whose checkpoint is copied"
    )
    return step


def _start(run: Opened, store: Path, steps: list[int], train: TrainArgs) -> int:
    """Return the step to resume from, or 0 for a new run. Note which later steps are to be set aside."""
    for name, asked in (("resume_step", train.resume_step), ("decay_from", train.decay_from)):
        if not steps and asked:
            other = ", or name the run to continue here with --train.decay-run" if name == "decay_from" else ""
            raise UserError(
                f"train.{name}: expected a step with a checkpoint in {run.folder.path}, found {asked:,} and no checkpoints; "
                f"leave it out{other}"
            )
    if not steps:
        if train.hold_lr:
            raise UserError("train.hold_lr: expected a run to resume, found a new one; leave it out")
        if run.folder.metrics_path.exists() and run.folder.metrics_path.stat().st_size:
            run.notes.append("the previous start saved no checkpoint, so the run starts again from step 0")
        return 0
    start = _newest_whole(run, store, _candidates(run, store, steps, train))
    # One that is not whole though it was saved has been damaged: a save that was cut off is deleted, this is not.
    run.later = [step for step in numbered_in(store) if step > start and (step in steps or step <= run.record.saved)]
    if run.later:
        what = f"step {run.later[0]:,} is" if len(run.later) == 1 else f"steps {', '.join(map(str, run.later))} are"
        aside, records = run.aside(store)
        run.notes.append(
            f"{what} set aside in {aside}, with all records in {records}; delete both when you no longer need them"
        )
    return start


def _candidates(run: Opened, store: Path, steps: list[int], train: TrainArgs) -> list[int]:
    """Return the steps to try to resume from, the last one first."""
    asked, step = train.resume_step, train.decay_from
    decays = run.stored is not None and run.stored.train.decay_from == step
    if step and not decays:
        check_can_decay(step, run.folder, run.record, run.stored, steps)
    again = asked and asked == run.record.went_back_to
    run.record = dataclasses.replace(run.record, went_back_to=asked)
    if not asked:
        if step and decays and steps[-1] > step:
            run.notes.append(
                f"the rate decays from step {step:,} on since an earlier start, so that the run resumes from its newest step; "
                f"--train.resume-step {step} goes back to where it begins"
            )
        return [step] if step and not decays else steps
    if again:
        # A scheduler repeats the same command, which must not discard the steps taken since.
        run.notes.append(
            f"the run went back to step {asked:,} at an earlier start, so it resumes from its newest step; to go back again, "
            "start it once without --train.resume-step first"
        )
        return steps
    if asked not in steps:
        raise UserError(
            f"train.resume_step: expected a step with a checkpoint in {store} ({', '.join(map(str, steps))}), found {asked:,}; "
            "choose one of these"
        )
    return [asked]


def _newest_whole(run: Opened, store: Path, steps: list[int]) -> int:
    """Return the newest of ``steps`` whose files are intact. Raises UserError if there is none."""
    for step in reversed(steps):
        try:
            with working(f"verifying the checkpoint of step {step:,}"):
                verify(store / str(step), DAMAGED)
            Checkpoint.find(store / str(step))
            if (own := origin_of(store / str(step)).get(STEP, step)) != step:
                raise UserError(f"{store / str(step)}: expected the checkpoint of that step, found one of step {own:,}")
            return step
        except UserError as error:
            run.notes.append(f"warning: the checkpoint of step {step:,} is not used: {error}")
    raise UserError(
        f"{store}: expected an intact checkpoint, found none among the steps {', '.join(map(str, steps))}: "
        f"{run.notes[-1].partition(': ')[2]}"
    )


def _check_shared(run: Opened) -> None:
    """Raise UserError if a process does not see the run folder or the checkpoint to resume from."""
    needed = run.checkpoint if run.start else run.folder.path
    if not needed.is_dir():
        raise UserError(
            f"train.save_dir: expected a folder on a disk that all processes share, found that process {jax.process_index()} "
            f"does not see {needed}; {ELSEWHERE}"
        )
