"""Training, from a configuration to a run folder. Read ``train`` from top to bottom."""

import contextlib
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax

from llama_jax.build import make_model
from llama_jax.checkpoint.adapted import WholeModel
from llama_jax.cli.progress import Progress, working
from llama_jax.cli.stopping import NAMES, StopSignals, output_may_vanish, status_of
from llama_jax.config import Config, SampleArgs, TrainArgs
from llama_jax.data.batch_sizes import BatchSizes, with_size
from llama_jax.data.batches import OwnRows, train_batches
from llama_jax.data.opened import chat_format_of
from llama_jax.devices.absent_tpu import skip_absent_tpu
from llama_jax.devices.compiling import use_compilation_cache
from llama_jax.devices.distributed import (
    Consensus,
    from_main,
    is_main,
    lost_processes_told,
    only_main_prints,
    start_job,
)
from llama_jax.devices.memory import keep_freed_memory, return_freed_memory
from llama_jax.devices.sharding import batch_sharding, check_divisible, make_mesh, on_mesh
from llama_jax.errors import UserError
from llama_jax.evaluate.tasks import Task
from llama_jax.generation import Model
from llama_jax.storage.locations import real_name
from llama_jax.training import eight_bits, log, reference
from llama_jax.training.answers import answer, append, questions_of
from llama_jax.training.bad_steps import judge
from llama_jax.training.clock import Clock, Recorder
from llama_jax.training.evaluating import evaluate, is_best, make_up_evaluation
from llama_jax.training.needs import announce_needs
from llama_jax.training.opening import TARGETS, Opened, base_of, opening
from llama_jax.training.plot import plot_losses
from llama_jax.training.profile import Profile, check_profiler
from llama_jax.training.run import Run, Timer
from llama_jax.training.run_folder import RunFolder
from llama_jax.training.saving import CheckpointWriter
from llama_jax.training.start import (
    chat_of,
    evaluated,
    evaluation_is_missing,
    first_state,
    first_words,
    open_text,
    params_before,
    settle,
    write_start,
)
from llama_jax.training.step import (
    StepMetrics,
    TrainState,
    batch_shapes,
    compile_eval_step,
    compile_train_step,
    make_optimizer,
)
from llama_jax.training.tasks import encode_tasks, read_on_main
from llama_jax.training.tensorboard import check_installed
from llama_jax.training.tuning import Tuning, check_has_base
from llama_jax.training.watchdog import Watchdog

SAMPLE_TOKENS = 48
# At an evaluation, losses.png is drawn again if it is older than this many seconds.
PLOT_SECONDS = 30


class StopAsked(Exception):
    """A signal arrived while a sample was generated."""


def train(config: Config, signals: StopSignals | None = None, notes: Sequence[str] = ()) -> RunFolder:
    """Train as configured, or resume the run in train.save_dir. Return its folder.

    All processes of a job call this.

    Arguments:
        config: the configuration.
        signals: signals that are already being noted. None: note them from here on.
        notes: earlier decisions, to print with those made here.

    Raises UserError on errors that the user can fix, including a loss that is not finite. Raises SystemExit with status
    STOPPED or INTERRUPTED if a signal ended the run early, after saving.
    """
    clock = Clock()
    config.check()
    check_has_base(config)
    with contextlib.ExitStack() as stack:
        signals = signals or stack.enter_context(StopSignals())
        stack.enter_context(output_may_vanish())
        keep_freed_memory()
        use_compilation_cache()
        notes = [*notes, *filter(None, [skip_absent_tpu("training")])]
        if config.train.tensorboard:
            check_installed()
        if config.train.profile_steps:
            check_profiler()
        start_job(config.distributed)
        stack.enter_context(lost_processes_told())
        only_main_prints()
        tasks = read_on_main(config.train.eval_tasks)
        opened = stack.enter_context(opening(config.train))
        opened.notes[:0] = notes
        signals.before_leaving += [held.release for held in opened.owners]
        stopped = _train(config, clock, opened, signals, tasks)
    if stopped:
        sys.exit(status_of(stopped))
    return opened.folder


def _train(config: Config, clock: Clock, opened: Opened, signals: StopSignals, tasks: Sequence[Task]) -> int:
    """Train the opened run. Return the signal that ended it early, after saving, or 0."""
    folder, start = opened.folder, opened.start
    mesh = make_mesh(config.mesh)
    opened.notes += filter(None, [eight_bits.check_units(config.train.products, mesh.devices.flat[0])])
    if known := config.model.vocab_size != -1 and not config.lora.rank:
        announce_needs(config, mesh)
    base = base_of(config.train, config.lora) if config.train.init_from and not start else None
    tuning = Tuning.of(config, opened, base) if config.lora.rank and base is not None else None
    data = open_text(config, base, opened)
    settled = settle(config, data, opened)
    config = settled.config
    check_divisible(mesh, config.model, config.train)
    _check_profile_steps(config.train, settled.steps)

    train, mask = config.train, config.data.document_mask
    if config.lora.rank and tuning is None:
        tuning = Tuning.of(config, opened, None)
    adapting = None if tuning is None else tuning.adapting
    module = make_model(config.model, train.compute_dtype, train.remat, train.attention, mesh, document_mask=mask)
    if tuning is not None:
        module = tuning.adapting.suited(module)
    optimizer = make_optimizer(config.train, settled.steps, settled.held_lr)
    if not known:
        announce_needs(config, mesh, None if tuning is None else tuning.adapting.bytes_of_state(module))
    chat = chat_of(opened, base, data)
    encoded = encode_tasks(tasks, config.model, data, module, chat)
    log.announce(settled, data, mesh, module, opened, tuning)
    write_start(opened, settled, data.record())
    if config.train.tensorboard and is_main():
        folder.write_events(start)
    prompt, consensus, timer = first_words(config, data), Consensus(3), Timer(config.train)
    writer = CheckpointWriter(
        folder.checkpoints, config.train.keep, config.train.keep_every, chat, settled.stable_until
    )
    with writer, contextlib.closing(folder):
        run = Run(
            config, folder, opened, settled, data, mesh, module, writer, prompt, clock, signals, consensus, timer,
            tasks=encoded, tuning=tuning, chat=chat, questions=questions_of(data, train.seed, config.model.max_seq_len),
        )  # fmt: skip
        folder.write_best(writer.steps)
        owed = bool(from_main(evaluation_is_missing(opened, settled, data)))
        if start >= settled.steps and not owed:
            print(log.nothing_to_do_text(settled))
            _finish(run, start)
            return 0
        with working(log.first_state_text(opened, base), shown=is_main()):
            state = first_state(module, optimizer, mesh, config.train.seed, opened, base, tuning)
        if tuning is not None:
            with working(f"reading {tuning.base.folder}", shown=is_main()):
                run.frozen = (tuning.load_base(module, mesh),)
        began = time.perf_counter()
        if config.train.objective == "dpo":
            _know_reference(run, optimizer, state, base)
        programs = {}
        for stage in BatchSizes.of(config.train).between(start, settled.steps):
            sized = with_size(config.train, stage.size)
            batch = batch_shapes(sized, config.model, mesh, mask, settled.objective)
            with working("compiling the training step", shown=is_main()):
                programs[stage.size] = compile_train_step(
                    module, optimizer, mesh, sized.gradient_accumulation_steps, batch, adapting, settled.objective,
                    eight_bits.asked(config.train),
                )  # fmt: skip
        log.announce_cost(programs[max(programs)], mesh, time.perf_counter() - began, len(programs))
        if evaluated(data):
            with working("compiling the evaluation", shown=is_main()):
                run.evaluate = compile_eval_step(
                    module, mesh, config.train, config.model, mask, adapting, settled.objective
                )
        if owed:
            make_up_evaluation(run, state, start)
        return_freed_memory()  # What compiling and reading took is more than a small model's step takes.
        end, stopped = _loop(run, programs, state, start)
        signals.set_mode("ignore")
        _finish(run, end)
    return stopped


def _know_reference(run: Run, optimizer: Any, state: TrainState, base: WholeModel | None) -> None:
    """Read the log-likelihoods of the model that the run began with, and compute those that are missing.

    ``state`` is the first one if the run begins, with ``base``. If it resumes, that model is read again if needed.
    """
    parts = reference.parts_of(run.config, run.settled, run.data, run.folder.path)
    if not reference.prepare(run, parts, base):
        return
    params = state.params
    if run.opened.start:
        base = base_of(run.config.train, run.config.lora)
        reference.check_reference(run, base)
        with working(f"reading {base.folder}", shown=is_main()):
            params = params_before(run.module, optimizer, run.mesh, base, run.tuning)
    reference.compute(run, parts, params)


def _loop(run: Run, programs: dict[int, jax.stages.Compiled], state: TrainState, start: int) -> tuple[int, int]:
    """Take the steps, with their records, evaluations and checkpoints. ``programs`` has the step for each batch size.

    Return the last step, and the signal that ended the loop early, after saving, or 0.
    """
    args, clock, folder = run.config.train, run.clock, run.folder.path
    length = run.config.model.max_seq_len
    sizes = BatchSizes.of(args)
    own = {size: OwnRows(batch_sharding(run.mesh), size, run.positions) for size in programs}
    unread: list[UserError] = []
    readable = _readable(run.masked(_batches(run, sizes, own, start)), unread)
    recorder = Recorder(
        run.config, run.mesh, run.steps, start, clock, run.folder.spent, run.folder.spent_in_steps, run.settled.held_lr,
        run.positions,
    )  # fmt: skip
    pending: list[StepMetrics] = []
    saved_at, announced, stop, step = start, False, 0, start
    with (
        Progress("step", run.steps, "step", start, shown=is_main()) as progress,
        Profile(args.profile_range, folder / "profile", clock) as profile,
        clock.steps(start),
        Watchdog(clock, args.watchdog_seconds, folder),
    ):
        run.signals.set_mode("note")
        for step, batch in zip(range(start + 1, run.steps + 1), clock.waiting_for("data", readable), strict=False):
            with profile.step(step, before=pending):
                size = sizes.size_of(step)
                state, metrics = programs[size](state, own[size].assemble(batch), *run.frozen)
            clock.dispatched(step, metrics.loss)
            pending.append(metrics)
            profile.stop_after(step, metrics)
            last = step == run.steps
            stop, save_due, evaluation_due = run.consensus(
                run.signals.received, run.timer.save_is_due(), run.timer.evaluation_is_due()
            )
            _note_saved(run)
            on_time = run.evaluate is not None and (step % args.eval_interval == 0 or last)
            evaluating = run.evaluate is not None and (on_time or bool(evaluation_due)) and not stop
            decays = step == run.settled.stable_until
            saving = step % args.save_interval == 0 or last or decays or bool(stop or save_due)
            logging = on_time or last or step % args.log_interval == 0
            if evaluating or saving or logging:
                found = _fetched(run, pending)
                for line in judge(args, found, step - len(found) + 1, saved_at, run.best_saved()):
                    log.say(line)
                record = recorder.record(step, found[-1])
                record |= {} if run.opened.targets is None else {TARGETS: run.opened.targets}
                left = (sizes.rows(run.steps) - sizes.rows(step)) * run.positions / record["tokens_per_second"]
                progress.note(log.progress_text(record, run.mesh.devices.size), left / max(1, run.steps - step))
                if not announced:
                    announced = True
                    log.say(log.expected_time_text(left))
                improved = False
                if evaluating:
                    with clock.spent_on("evaluation"), progress.busy(f"evaluating step {step:,}"):
                        values, stop = evaluate(run, state, step, saved_at)
                    record |= values
                    improved = bool(values) and is_best(run, record)
                if evaluating or logging:
                    run.folder.log(record)
                if saving or improved or stop:
                    with clock.spent_on("saving"), progress.busy(f"saving step {step:,}"):
                        _save(run, state, step, record.get("eval_loss"))
                    saved_at = step
                if decays and not stop:
                    log.say(log.decay_begins_text(run.settled, run.folder.checkpoints))
                if evaluating and not stop:
                    with clock.spent_on("sample"), progress.busy("making a sample"):
                        stop = _draw(run, run.whole(state.params), step)
                    if stop and saved_at < step:
                        with clock.spent_on("saving"):
                            _save(run, state, step, record.get("eval_loss"))
            for line in log.epochs_text(run.data, run.settled.schedule, length, step):
                log.say(line)
            progress.update()
            if stop:
                break
        if unread and saved_at < step and jax.process_count() == 1:
            with clock.spent_on("saving"):
                _fetched(run, pending)
                _save(run, state, step, None)
        with clock.spent_on("saving"), progress.busy("saving"):
            run.writer.wait()
    _note_saved(run)
    if unread:
        raise unread[0]
    if stop and step == run.steps and (run.evaluate is None or "eval_loss" in run.folder.records[-1]):
        stop = 0  # the signal came too late to end the run early
    if stop:
        print(f"stopped by {NAMES[stop]} at step {step:,}, saved; rerun the same command to resume")  # type: ignore[index]
    return step, stop


def _batches(run: Run, sizes: BatchSizes, own: dict[int, OwnRows], start: int) -> Iterator[Any]:
    """Yield this process's rows of the batches after step ``start``."""
    stages = sizes.between(start, run.steps)
    for stage, end in zip(stages, [*(stage.step for stage in stages[1:]), run.steps], strict=True):
        yield from train_batches(
            run.data.rows(run.settled.schedule), stage.size, run.config.model.max_seq_len, run.config.train.seed,
            stage.step, end, own[stage.size].rows, run.bos_id, stage.row,
        )  # fmt: skip


def _fetched(run: Run, pending: list[StepMetrics]) -> list[StepMetrics]:
    """Return the results of steps on the host, of which ``pending`` is emptied. Count the tokens of their losses."""
    found: list[StepMetrics] = jax.device_get(pending)
    pending.clear()
    if run.opened.targets is not None:
        run.opened.targets += sum(int(each.targets) for each in found)
    return found


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
        "folder": str(run.folder.path.absolute()),
        "store": real_name(run.folder.checkpoints),
        "host": socket.gethostname(),
        "text": run.opened.record.text,
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


def _draw(run: Run, sample: Any, step: int) -> int:
    """Print a sample of the model, and draw the losses if the plot is old. If that fails, training continues.

    Of a model that is tuned on conversations, the samples are answers; one is printed, all are in samples.jsonl.

    Return the signal that arrived meanwhile, or 0.
    """
    stop = 0

    def heed(_: object) -> None:
        nonlocal stop
        if stop := run.stop_asked():
            raise StopAsked

    try:
        if run.config.model.max_seq_len > 1:
            model = Model(run.config.model, sample, run.data.tokenizer, run.module)
            chat = chat_format_of(run.data)
            with on_mesh(run.mesh):
                if chat is not None and run.questions:
                    given = answer(model, run.questions, run.chat, chat, heed)
                    _tell_answers(run, step, given)
                elif run.prompt:
                    args = SampleArgs(temperature=0.7, max_new_tokens=SAMPLE_TOKENS, seed=run.config.train.seed)
                    (completion,) = model.generate([run.prompt], args, heed)
                    log.say(log.quoted_lines(run.prompt + completion.text))
        plot = run.folder.plot_path
        if not plot.exists() or time.time() - plot.stat().st_mtime > PLOT_SECONDS:
            _plot(run)
    except StopAsked:
        pass
    except (UserError, OSError) as error:
        log.say(f"no sample or plot: {error}")
    return stop


def _tell_answers(run: Run, step: int, given: Sequence[str]) -> None:
    """Print the first answer, and add all to samples.jsonl."""
    log.say(log.quoted_lines(f"{run.questions[0].text}[[{given[0]}]]"))
    if is_main():
        append(run.folder.samples_path, step, run.questions, given)


def _plot(run: Run) -> None:
    if is_main():
        plot_losses(
            run.folder.plot_path, run.folder.records, str(run.folder.path), run.data.floor, run.settled.expected
        )


def _finish(run: Run, step: int) -> None:
    with run.clock.spent_on("sample"):
        _plot(run)
    print(log.closing_text(run.folder, step, run.clock, run.prompt, run.settled.changed, bool(run.questions)))


def _check_profile_steps(args: TrainArgs, steps: int) -> None:
    """Raise UserError if the run ends before the steps to profile."""
    if args.profile_range and args.profile_range[0] > steps:
        raise UserError(
            f"train.profile_steps: expected steps of the run, which has {steps:,}, found {args.profile_steps}; choose others"
        )
