"""Takes the steps of a run. Each may be followed by a record, an evaluation, a checkpoint and a sample."""

import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax

from llama_jax.cli.progress import Progress, print_above
from llama_jax.cli.stopping import NAMES
from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.data.batches import OwnRows, train_batches
from llama_jax.devices.distributed import is_main
from llama_jax.devices.sharding import batch_sharding
from llama_jax.errors import UserError
from llama_jax.storage.locations import real_name
from llama_jax.training import announcing, log, samples
from llama_jax.training.bad_steps import judge
from llama_jax.training.clock import Recorder
from llama_jax.training.evaluating import evaluate, is_best
from llama_jax.training.opening import RECORD, SETTINGS, STEP, TARGETS
from llama_jax.training.profile import Profile
from llama_jax.training.run import Run
from llama_jax.training.step import StepMetrics, TrainState
from llama_jax.training.watchdog import Watchdog


def take_steps(run: Run, programs: dict[int, jax.stages.Compiled], state: TrainState, start: int) -> tuple[int, int]:
    """Take the steps after ``start``. ``programs`` has the compiled step for each batch size.

    Return the last step, and the signal that ended the run early, after saving, or 0. Raises UserError if a step is
    bad, if a batch cannot be read, or if a checkpoint cannot be written.
    """
    args, folder = run.config.train, run.folder.path
    sizes = BatchSizes.of(args)
    own = {size: OwnRows(batch_sharding(run.mesh), size, run.positions) for size in programs}
    unread: list[UserError] = []
    readable = _readable(run.masked(_batches(run, sizes, own, start)), unread)
    step, stop = start, 0
    with (
        Progress("step", run.steps, "step", start, shown=is_main()) as progress,
        Profile(args.profile_range, folder / "profile", run.clock) as profile,
        run.clock.steps(start),
        Watchdog(run.clock, args.watchdog_seconds, folder),
    ):
        after = _After(run, progress, sizes, saved_at=start)
        run.signals.set_mode("note")
        for step, batch in zip(range(start + 1, run.steps + 1), run.clock.waiting_for("data", readable), strict=False):
            with profile.step(step, before=after.pending):
                size = sizes.size_of(step)
                state, metrics = programs[size](state, own[size].assemble(batch), *run.frozen)
            run.clock.dispatched(step, metrics.loss)
            after.pending.append(metrics)
            profile.stop_after(step, metrics)
            due = _due(run, step)
            _note_saved(run)
            stop = after.do(due, state, step) if due.anything else 0
            for line in log.epochs_text(run.data, run.settled.schedule, run.config.model.max_seq_len, step):
                print_above(line)
            progress.update()
            if stop:
                break
        if unread and after.saved_at < step and jax.process_count() == 1:
            after.fetch()
            after.save(state, step)
        with run.clock.spent_on("saving"), progress.busy("saving"):
            run.writer.wait()
    _note_saved(run)
    if unread:
        raise unread[0]
    if stop and step == run.steps and (run.evaluate is None or "eval_loss" in run.folder.records[-1]):
        stop = 0  # the signal came too late to end the run early
    if stop:
        print(f"stopped by {NAMES[stop]} at step {step:,}, saved; rerun the same command to resume")  # type: ignore[index]
    return step, stop


@dataclass(frozen=True)
class _Due:
    """It says what follows a step."""

    record: bool
    evaluation: bool
    checkpoint: bool
    decay: bool  # the rate of wsd decays from here
    stop: int  # the signal that arrived, or 0

    @property
    def anything(self) -> bool:
        """Whether the host waits for the step at all."""
        return self.record or self.evaluation or self.checkpoint


def _due(run: Run, step: int) -> _Due:
    """Return what follows ``step``, by its number, by time, and by signals. All processes agree on it."""
    args, last = run.config.train, step == run.steps
    stop, save_by_time, evaluate_by_time = run.consensus(
        run.signals.received, run.timer.save_is_due(), run.timer.evaluation_is_due()
    )
    evaluated = run.evaluate is not None
    by_number = evaluated and (last or step % args.eval_interval == 0)
    decay = step == run.settled.stable_until
    return _Due(
        record=by_number or last or step % args.log_interval == 0,
        evaluation=(by_number or (evaluated and bool(evaluate_by_time))) and not stop,
        checkpoint=last or decay or step % args.save_interval == 0 or bool(stop or save_by_time),
        decay=decay,
        stop=stop,
    )


@dataclass
class _After:
    """It does what is due after steps, and remembers what that needs."""

    run: Run
    progress: Progress
    sizes: BatchSizes
    saved_at: int
    pending: list[StepMetrics] = field(default_factory=list)  # of steps that the host has not waited for
    announced: bool = False  # the time that the run will take

    def __post_init__(self) -> None:
        run = self.run
        self._recorder = Recorder(
            run.config, run.mesh, run.steps, self.saved_at, run.clock, run.folder.spent, run.folder.spent_in_steps,
            run.settled.held_lr, run.positions,
        )  # fmt: skip

    def do(self, due: _Due, state: TrainState, step: int) -> int:
        """Do what is due after ``step``. Return the signal that ends the run early, or 0."""
        run, stop = self.run, due.stop
        values: dict[str, Any] = {}
        record = self._record(step)
        if due.evaluation:
            with run.clock.spent_on("evaluation"), self.progress.busy(f"evaluating step {step:,}"):
                values, stop = evaluate(run, state, step, self.saved_at)
        record |= values
        improved = bool(values) and is_best(run, record)
        if due.evaluation or due.record:
            run.folder.log(record)
        if due.checkpoint or improved or stop:
            self.save(state, step, record.get("eval_loss"))
        if due.decay and not stop:
            print_above(announcing.decay_begins_text(run.settled, run.folder.checkpoints))
        if due.evaluation and not stop:
            with run.clock.spent_on("sample"), self.progress.busy("making a sample"):
                stop = samples.show(run, run.whole(state.params), step)
            if stop and self.saved_at < step:
                self.save(state, step, record.get("eval_loss"))
        return stop

    def _record(self, step: int) -> dict[str, Any]:
        """Wait for the steps up to ``step``, judge them and return the record of the last one."""
        run = self.run
        found = self.fetch()
        for line in judge(run.config.train, found, step - len(found) + 1, self.saved_at, run.best_saved()):
            print_above(line)
        record = self._recorder.record(step, found[-1])
        record |= {} if run.opened.targets is None else {TARGETS: run.opened.targets}
        left = (self.sizes.rows(run.steps) - self.sizes.rows(step)) * run.positions / record["tokens_per_second"]
        self.progress.note(log.progress_text(record, run.mesh.devices.size), left / max(1, run.steps - step))
        if not self.announced:
            self.announced = True
            print_above(log.expected_time_text(left))
        return record

    def fetch(self) -> list[StepMetrics]:
        """Return the results of the steps that are pending, on the host. Count the tokens of their losses."""
        found: list[StepMetrics] = jax.device_get(self.pending)
        self.pending.clear()
        if self.run.opened.targets is not None:
            self.run.opened.targets += sum(int(each.targets) for each in found)
        return found

    def save(self, state: TrainState, step: int, eval_loss: float | None = None) -> None:
        """Save ``step``. Its files are written while training goes on."""
        with self.run.clock.spent_on("saving"), self.progress.busy(f"saving step {step:,}"):
            _save(self.run, state, step, eval_loss)
        self.saved_at = step


def _batches(run: Run, sizes: BatchSizes, own: dict[int, OwnRows], start: int) -> Iterator[Any]:
    """Yield this process's rows of the batches after step ``start``."""
    stages = sizes.between(start, run.steps)
    for stage, end in zip(stages, [*(stage.step for stage in stages[1:]), run.steps], strict=True):
        yield from train_batches(
            run.data.rows(run.settled.schedule), stage.size, run.config.model.max_seq_len, run.config.train.seed,
            stage.step, end, own[stage.size].rows, run.bos_id, stage.row,
        )  # fmt: skip


def _readable(batches: Iterable[Any], unread: list[UserError]) -> Iterator[Any]:
    """Yield batches up to one that cannot be read.

    Put its error into ``unread``, to be raised after the run is saved.
    """
    try:
        yield from batches
    except UserError as error:
        unread.append(error)


def _save(run: Run, state: TrainState, step: int, eval_loss: float | None) -> None:
    run.opened.check_owned()
    origin = {
        "run": run.opened.record.id,
        STEP: step,
        "folder": str(run.folder.path.absolute()),
        "store": real_name(run.folder.checkpoints),
        "host": socket.gethostname(),
        "text": run.opened.record.text,
        SETTINGS: asdict(run.config),
        RECORD: run.opened.record.kept,
        "optimizer": run.config.train.optimizer,
        "products": run.config.train.products,
    } | ({} if run.opened.targets is None else {TARGETS: run.opened.targets})
    record = None if run.tuning is None else run.tuning.record
    run.writer.save(
        step, state.params, state.opt_state, run.config.model, run.data.tokenizer, eval_loss, origin, record
    )
    run.timer.saved = time.monotonic()
    run.consensus.forget()


def _note_saved(run: Run) -> None:
    """Write to run.json and best.json which checkpoints are complete. Raises UserError if a save failed."""
    run.writer.check()
    steps = run.writer.steps
    if is_main() and steps and steps[-1] != run.opened.record.saved:
        run.opened.record = replace(run.opened.record, saved=steps[-1])
        run.folder.write_record(run.opened.record)
        run.folder.write_best(steps)
