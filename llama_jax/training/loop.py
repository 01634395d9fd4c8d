"""Training, from a configuration to a run folder. Read ``train`` from top to bottom."""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from llama_jax.build import make_model
from llama_jax.checkpoint.adapted import WholeModel
from llama_jax.cli.progress import working
from llama_jax.cli.stopping import StopSignals, output_may_vanish, status_of
from llama_jax.config import Config, TrainArgs
from llama_jax.data.batch_sizes import BatchSizes, with_size
from llama_jax.devices.absent_tpu import skip_absent_tpu
from llama_jax.devices.compiling import check_devices, check_jax_settings, platform_of, use_compilation_cache
from llama_jax.devices.distributed import (
    Consensus,
    from_main,
    is_main,
    lost_processes_told,
    only_main_prints,
    start_job,
)
from llama_jax.devices.memory import keep_freed_memory, return_freed_memory
from llama_jax.devices.sharding import check_divisible, make_mesh
from llama_jax.errors import UserError
from llama_jax.evaluate.tasks import Task, unread
from llama_jax.ops.remat import told_of
from llama_jax.training import eight_bits, log, reference, samples
from llama_jax.training.announcing import announce, announce_cost, first_state_text, nothing_to_do_text
from llama_jax.training.answers import questions_of
from llama_jax.training.clock import Clock
from llama_jax.training.evaluating import make_up_evaluation
from llama_jax.training.needs import announce_needs
from llama_jax.training.opening import Opened, base_of, opening
from llama_jax.training.profile import check_profiler
from llama_jax.training.run import Run, Timer
from llama_jax.training.run_folder import RunFolder
from llama_jax.training.saving import CheckpointWriter, keep_every_note
from llama_jax.training.settings import check_alike
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
    TrainState,
    batch_shapes,
    compile_eval_step,
    compile_train_step,
    make_optimizer,
)
from llama_jax.training.steps import take_steps
from llama_jax.training.tasks import changed_tasks, digests_of, encode_tasks, read_on_main, remarks_on
from llama_jax.training.tensorboard import check_installed
from llama_jax.training.tuning import Tuning, check_arguments, check_has_base


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
        check_jax_settings()
        start_job(config.distributed)
        check_devices()
        stack.enter_context(lost_processes_told())
        only_main_prints()
        check_alike(config)
        tasks = read_on_main(config.train.eval_tasks)
        opened = stack.enter_context(opening(config.train))
        opened.notes[:0] = [*notes, *unread(config.train.eval_tasks)]
        signals.before_leaving += [held.release for held in opened.owners]
        stopped = _train(config, clock, opened, signals, tasks)
    if stopped:
        sys.exit(status_of(stopped))
    return opened.folder


def _train(config: Config, clock: Clock, opened: Opened, signals: StopSignals, tasks: Sequence[Task]) -> int:
    """Train the opened run. Return the signal that ended it early, after saving, or 0."""
    mesh = make_mesh(config.mesh)
    device = mesh.devices.flat[0]
    said = eight_bits.check_units(config.train.products, device), told_of(config.train.remat, platform_of(device))
    opened.notes += filter(None, said)
    if known := config.model.vocab_size != -1 and not config.lora.rank:
        announce_needs(config, mesh)
    base = base_of(config.train, config.lora) if config.train.init_from and not opened.start else None
    opened.notes += [] if base is None else check_arguments(base, config.model, config.lora.rank > 0)
    tuning = Tuning.of(config, opened, base) if config.lora.rank and base is not None else None
    data = open_text(config, base, opened)
    settled = settle(config, data, opened)
    config, train = settled.config, settled.config.train
    check_divisible(mesh, config.model, train)
    opened.notes += filter(None, [_check_profile_steps(train, settled.steps, opened.start), keep_every_note(train)])

    if config.lora.rank and tuning is None:
        tuning = Tuning.of(config, opened, None)
    mask = config.data.document_mask
    module = make_model(config.model, train.compute_dtype, train.remat, train.attention, mesh, document_mask=mask)
    if tuning is not None:
        module = tuning.adapting.suited(module)
    optimizer = make_optimizer(train, settled.steps, settled.held_lr)
    if not known:
        announce_needs(config, mesh, None if tuning is None else tuning.adapting.bytes_of_state(module))
    chat = chat_of(opened, base, data)
    encoded = encode_tasks(tasks, config.model, data, module, chat)
    digests = digests_of(tasks)
    opened.notes += [
        *remarks_on(encoded, config.model.max_seq_len),
        *changed_tasks(tasks, digests, opened.record.tasks),
    ]
    opened.record = replace(opened.record, tasks=opened.record.tasks | digests)
    announce(settled, data, mesh, module, opened, tuning)
    write_start(opened, settled, data.record(), base)
    folder = opened.folder
    if train.tensorboard and is_main():
        folder.write_events(opened.start)
    prompt, consensus, timer = first_words(config, data), Consensus(3), Timer(train)
    writer = CheckpointWriter(
        folder.checkpoints, train.keep, train.keep_every, chat, settled.stable_until, folder.measured_from
    )
    with writer, contextlib.closing(folder):
        folder.write_best(writer.steps)
        questions = questions_of(data, train.seed, config.model.max_seq_len)
        run = Run(
            config, folder, opened, settled, data, mesh, module, writer, prompt, clock, signals, consensus, timer,
            tasks=encoded, tuning=tuning, chat=chat, questions=questions,
        )  # fmt: skip
        return _go_on(run, optimizer, base)


def _go_on(run: Run, optimizer: Any, base: WholeModel | None) -> int:
    """Make or read the state, compile the programs, and take the steps that are left.

    Return the signal that ended the run early, after saving, or 0.
    """
    opened, settled, start = run.opened, run.settled, run.opened.start
    owed = bool(from_main(evaluation_is_missing(opened, settled, run.data)))
    if start > settled.steps or (start == settled.steps and not owed):
        print(nothing_to_do_text(settled, opened.folder.checkpoints, start))
    if start >= settled.steps and not owed:
        _finish(run, start)
        return 0
    with working(first_state_text(opened, base), shown=is_main()):
        state = first_state(run.module, optimizer, run.mesh, run.config.train.seed, opened, base, run.tuning)
    if run.tuning is not None:
        with working(f"reading {run.tuning.base.folder}", shown=is_main()):
            run.frozen = (run.tuning.load_base(run.module, run.mesh),)
    if run.config.train.objective == "dpo":
        _know_reference(run, optimizer, state, base)
    programs = _compiled(run, optimizer, start)
    if owed:
        make_up_evaluation(run, state, start)
    return_freed_memory()  # What compiling and reading took is more than a small model's step takes.
    end, stopped = take_steps(run, programs, state, start)
    run.signals.set_mode("ignore")
    _finish(run, end)
    return stopped


def _compiled(run: Run, optimizer: Any, start: int) -> dict[int, jax.stages.Compiled]:
    """Return the compiled step for each batch size after step ``start``, and say what the largest costs.

    Compile the run's evaluation too.
    """
    train, model, mask = run.config.train, run.config.model, run.config.data.document_mask
    adapting = None if run.tuning is None else run.tuning.adapting
    programs, began = {}, time.perf_counter()
    for stage in BatchSizes.of(train).between(start, run.steps):
        sized = with_size(train, stage.size)
        batch = batch_shapes(sized, model, run.mesh, mask, run.settled.objective)
        with working("compiling the training step", shown=is_main()):
            programs[stage.size] = compile_train_step(
                run.module, optimizer, run.mesh, sized.gradient_accumulation_steps, batch, adapting,
                run.settled.objective, eight_bits.asked(train),
            )  # fmt: skip
    announce_cost(programs[max(programs)], run.mesh, time.perf_counter() - began, len(programs))
    if evaluated(run.data):
        with working("compiling the evaluation", shown=is_main()):
            run.evaluate = compile_eval_step(run.module, run.mesh, train, model, mask, adapting, run.settled.objective)
    return programs


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


def _finish(run: Run, step: int) -> None:
    with run.clock.spent_on("sample"):
        samples.draw_losses(run)
    context, changed, talks = run.config.model.max_seq_len, run.settled.changed, bool(run.questions)
    print(log.closing_text(run.folder, step, run.clock, run.prompt, context, changed, talks))
    run.opened.record = replace(run.opened.record, spent=run.folder.spent + run.clock.total)
    run.folder.write_record(run.opened.record)


def _check_profile_steps(args: TrainArgs, steps: int, start: int) -> str:
    """Return a line if the run has the steps to profile behind it, or "".

    Raises UserError if it ends before them.
    """
    if args.profile_range and args.profile_range[0] > steps:
        raise UserError(
            f"train.profile_steps: expected steps of the run, which has {steps:,}, found {args.profile_steps}; choose others"
        )
    if args.profile_range and args.profile_range[-1] <= start:
        return f"train.profile_steps {args.profile_steps}: the run has {start:,} steps, and no trace is made of those behind it"
    return ""
