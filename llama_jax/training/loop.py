"""Training, from a configuration to a run folder: read ``train`` top to bottom."""

import contextlib
import math
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import jax

from llama_jax.checkpoint import Checkpoint, CheckpointWriter, steps_of
from llama_jax.config import Config, DataArgs, SampleArgs, TrainArgs
from llama_jax.data import Data, load_data, open_data
from llama_jax.data.batches import OwnRows, eval_batches, steps_per_epoch, train_batches
from llama_jax.distributed import PREEMPTED, StopSignals, from_main, is_main, lost_processes_told, main_first, start_job
from llama_jax.errors import UserError
from llama_jax.generation import Model
from llama_jax.progress import Progress
from llama_jax.runtime import keep_freed_memory, make_model, use_compilation_cache
from llama_jax.sharding import batch_sharding, check_divisible, make_mesh, on_mesh
from llama_jax.tokenizer import Tokenizer
from llama_jax.training import report
from llama_jax.training.bad_steps import LossHistory, judge, raise_not_finite
from llama_jax.training.clock import Clock, Recorder
from llama_jax.training.plot import plot_losses
from llama_jax.training.profile import Profile, check_profiler
from llama_jax.training.run_folder import RunFolder, base_of
from llama_jax.training.step import (
    StepMetrics,
    TrainState,
    batch_shapes,
    compile_train_step,
    eval_step,
    init_state,
    make_optimizer,
    shardings_of,
    state_shapes,
)
from llama_jax.training.tensorboard import check_installed
from llama_jax.training.watchdog import Watchdog

SAMPLE_TOKENS = 48
# losses.png is drawn again at an evaluation when it is older than this many seconds.
PLOT_SECONDS = 30


@dataclass
class Run:
    """What stays the same over a run's steps."""

    config: Config
    folder: RunFolder
    data: Data
    mesh: jax.sharding.Mesh
    module: Any
    steps: int
    writer: CheckpointWriter
    prompt: str
    clock: Clock


def train(config: Config) -> RunFolder:
    """Train as configured, or go on where the run in train.save_dir stopped; returns its folder.

    All processes of a job call this. Raises UserError on what the user can put right, a non-finite loss included, and
    SystemExit, with the status PREEMPTED, where SIGTERM ended the run early, saved.
    """
    clock = Clock()
    config.check()
    keep_freed_memory()
    use_compilation_cache()
    if config.train.tensorboard:
        check_installed()
    if config.train.profile_steps:
        check_profiler()
    start_job(config.distributed)
    with lost_processes_told():
        return _train(config, clock)


def _train(config: Config, clock: Clock) -> RunFolder:
    folder = RunFolder(config.train.save_dir)
    folder.create(config.train.checkpoint_dir)
    saved = steps_of(folder.path)
    start = from_main(saved[-1] if saved else 0)
    folder.check_shared(start)
    mesh = make_mesh(config.mesh)
    source = base_of(config.train) if config.train.init_from and not start else None
    data_args = config.data if source is None else _with_tokenizer_of(source, config.data)
    tokens = folder.path / "tokens"
    data = main_first(
        lambda: load_data(data_args, tokens, folder.tokenizer_path, begun=start > 0),
        lambda: open_data(data_args, tokens, folder.tokenizer_path),
    )
    config = _resolve(config, data)
    check_divisible(mesh, config.model, config.train)
    if start:
        folder.check_config(config)

    module = make_model(config.model, config.train.compute_dtype, config.train.remat, config.train.attention, mesh)
    steps = config.train.max_steps or config.train.n_epochs * steps_per_epoch(
        data.tokens.train, config.train.batch_size, config.model.max_seq_len
    )
    _check_profile_steps(config.train, steps)
    optimizer = make_optimizer(config.train, steps)
    report.announce(config, data, mesh, module, steps, start, folder.path)
    report.check_state_fits(config.model, mesh)
    folder.write_config(config)
    folder.resume_metrics(start)
    if config.train.tensorboard and is_main():
        folder.write_events(start)
    folder.write_best(saved)
    with CheckpointWriter(folder.path) as writer, contextlib.closing(folder):
        run = Run(config, folder, data, mesh, module, steps, writer, _prompt(config, data), clock)
        if start >= steps:
            print(f"the run has its {steps:,} steps; --train.max-steps goes on, another --train.save-dir begins anew")
            _finish(run, start)
            return folder
        state = _first_state(run, optimizer, start, source)
        began = time.perf_counter()
        accumulation = config.train.gradient_accumulation_steps
        compiled = compile_train_step(
            module, optimizer, mesh, accumulation, batch_shapes(config.train, config.model, mesh)
        )
        report.announce_cost(compiled, mesh, time.perf_counter() - began)
        end, stopped = _loop(run, compiled, state, start)
        _finish(run, end)
    if stopped == "SIGTERM":
        sys.exit(PREEMPTED)
    return folder


def _loop(run: Run, compiled: jax.stages.Compiled, state: TrainState, start: int) -> tuple[int, str]:
    """Steps, with their records, evaluations and checkpoints; returns the last, and the signal that ended it early, saved."""
    args, clock, folder = run.config.train, run.clock, run.folder.path
    length = run.config.model.max_seq_len
    own = OwnRows(batch_sharding(run.mesh), args.batch_size, length)
    batches = train_batches(run.data.tokens.train, args.batch_size, length, args.seed, start, run.steps, own.rows)
    recorder = Recorder(run.config, run.mesh, run.steps, start, clock, run.folder.spent, run.folder.spent_well)
    pending: list[StepMetrics] = []
    saved_at, announced, stopped = start, False, ""
    with (
        StopSignals() as signals,
        Progress("step", run.steps, "step", start, shown=is_main()) as progress,
        Profile(args.profile_range, folder / "profile", clock) as profile,
        clock.steps(start),
        Watchdog(clock, args.watchdog_seconds, folder),
    ):
        for step, batch in zip(range(start + 1, run.steps + 1), clock.waiting_for("data", batches), strict=False):
            with profile.step(step, before=pending):
                state, metrics = compiled(state, own.assemble(batch))
            clock.dispatched(step, metrics.loss)
            pending.append(metrics)
            profile.stop_after(step, metrics)
            last, stopped = step == run.steps, signals.agreed()
            evaluating = run.data.tokens.eval.size > 1 and (step % args.eval_interval == 0 or last)
            saving = step % args.save_interval == 0 or last or bool(stopped)
            if evaluating or saving or step % args.log_interval == 0:
                found = jax.device_get(pending)
                pending.clear()
                for line in judge(args, found, step - len(found) + 1, saved_at):
                    report.say(line)
                record = recorder.record(step, found[-1])
                progress.note(report.progress_text(record, run.mesh.devices.size))
                if not announced:
                    announced = True
                    report.say(report.expected_time_text(run.steps - step, record["step_seconds"]))
                improved = False
                if evaluating:
                    with clock.spent_on("evaluation"):
                        improved = _evaluate(run, state, record, saved_at)
                if evaluating or last or step % args.log_interval == 0:
                    run.folder.log(record)
                if saving or improved:
                    with clock.spent_on("saving"):
                        _save(run, state, step, record.get("eval_loss"))
                    saved_at = step
                if evaluating:
                    with clock.spent_on("sample"):
                        _draw(run, sample=state.params)
            progress.update()
            if stopped:
                break
        with clock.spent_on("saving"):
            run.writer.wait()
    run.folder.write_best(steps_of(run.folder.path))
    if last:
        stopped = ""  # the signal came too late to end it early
    if stopped:
        print(f"stopped by {stopped} at step {step:,}, saved; the same command goes on from here")
    return step, stopped


def _evaluate(run: Run, state: TrainState, record: dict[str, Any], saved_at: int) -> bool:
    """Add the held-out loss to the record; whether it is the best so far. Raises UserError where it is not finite."""
    args = run.config.train
    total = weight = 0.0
    with on_mesh(run.mesh):
        rows, length = args.batch_size // args.gradient_accumulation_steps, run.config.model.max_seq_len
        own = OwnRows(batch_sharding(run.mesh), rows, length)
        batches = eval_batches(run.data.tokens.eval, rows, length, args.eval_iters, own.rows)
        for batch in run.clock.waiting_for("evaluation", batches):  # so that each batch is a sign of life
            sums = eval_step(run.module, state.params, own.assemble(batch))
            total, weight = total + float(sums[0]), weight + float(sums[1])
    if not math.isfinite(total):
        raise_not_finite("held-out loss", total / weight, record["step"], saved_at)
    record["eval_loss"] = total / weight
    record["eval_bits_per_byte"] = run.data.tokens.bits_per_byte(total / weight)
    best = run.folder.best()
    # All save, or none: a shared disk may show the others an older metrics.jsonl.
    improved = bool(from_main(best is None or record["eval_loss"] < best["eval_loss"]))
    report.say(report.evaluation_text(record, run.data.floor, improved))
    return improved


def _save(run: Run, state: TrainState, step: int, eval_loss: float | None) -> None:
    run.writer.save(step, state.params, state.opt_state, run.config.model, run.data.tokenizer, eval_loss)
    run.folder.write_best(steps_of(run.folder.path))


def _draw(run: Run, sample: Any) -> None:
    """Show a sample of the model, and draw the losses if the plot is old. Training goes on where that fails."""
    try:
        if run.config.model.max_seq_len > 1:
            model = Model(run.config.model, sample, run.data.tokenizer, run.module)
            args = SampleArgs(temperature=0.7, max_new_tokens=SAMPLE_TOKENS, seed=run.config.train.seed)
            with on_mesh(run.mesh):
                (completion,) = model.generate([run.prompt], args)
            report.say("  | " + report.printable(run.prompt + completion.text).replace("\n", "\n  | "))
        plot = run.folder.plot_path
        if not plot.exists() or time.time() - plot.stat().st_mtime > PLOT_SECONDS:
            _plot(run)
    except (UserError, OSError) as error:
        report.say(f"no sample or plot: {error}")


def _plot(run: Run) -> None:
    if is_main():
        plot_losses(run.folder.plot_path, run.folder.records, str(run.folder.path), run.data.floor)


def _finish(run: Run, step: int) -> None:
    run.writer.wait()
    with run.clock.spent_on("sample"):
        _plot(run)
    print(report.closing_text(run.folder, step, run.clock, run.prompt))


def _with_tokenizer_of(source: Checkpoint, args: DataArgs) -> DataArgs:
    """Data arguments with the tokenizer of a checkpoint. Raises UserError where another one is asked for."""
    asked = args.tokenizer_model_path
    if asked and Tokenizer(asked).model_bytes != source.tokenizer.model_bytes:
        raise UserError(
            f"data.tokenizer_model_path: expected the tokenizer of {source.folder}, found another in {asked}; leave it out"
        )
    return replace(args, tokenizer_model_path=str(source.tokenizer.model_path))


def _check_profile_steps(args: TrainArgs, steps: int) -> None:
    """Raise UserError where the run ends before the steps that are to be traced."""
    if args.profile_range and args.profile_range[0] > steps:
        raise UserError(
            f"train.profile_steps: expected steps of the run, which has {steps:,}, found {args.profile_steps}; choose others"
        )


def _resolve(config: Config, data: Data) -> Config:
    """The configuration with all that the data decide. Raises UserError where another vocabulary was asked for."""
    size, manifest = data.tokenizer.vocab_size, data.tokens.manifest
    if config.model.vocab_size not in (-1, size):
        raise UserError(
            f"model.vocab_size: expected {size}, as the tokenizer has, or -1, found {config.model.vocab_size}"
        )
    data_args = replace(config.data, train_size=manifest.train_size, separator=manifest.separator.replace("\\", "\\\\"))
    return replace(config, model=replace(config.model, vocab_size=size), data=data_args)


def _first_state(run: Run, optimizer: Any, start: int, source: Checkpoint | None) -> TrainState:
    """The state to begin with: the run's newest checkpoint, the checkpoint to fine-tune, or a random one."""
    shapes = state_shapes(run.module, optimizer, run.mesh)
    if start:
        checkpoint = Checkpoint.find(run.folder.checkpoints / str(start))
        return TrainState(checkpoint.restore("params", shapes.params), _restore_optimizer(run, checkpoint, shapes))
    params = None
    if source is not None:
        params = source.restore("params", shapes.params)
    return init_state(run.module, optimizer, run.mesh, run.config.train.seed, params)


def _restore_optimizer(run: Run, checkpoint: Checkpoint, shapes: TrainState) -> Any:
    """The optimizer's state; checkpoints of before losses were remembered go on with an empty LossHistory."""
    *inner, history = shapes.opt_state
    if any(name.startswith(f"{len(inner)}/") for name in checkpoint.arrays("state")):
        return checkpoint.restore("state", shapes.opt_state)
    empty = jax.jit(LossHistory.empty, out_shardings=shardings_of(history))()
    return (*checkpoint.restore("state", tuple(inner)), empty)


def _prompt(config: Config, data: Data) -> str:
    """How samples begin: as the stories do, or with the first whole words of a line of the held-out text."""
    stream = data.tokens.eval if data.tokens.eval.size else data.tokens.train
    lines = data.tokenizer.decode(stream[:256].tolist()).splitlines()[1:] or [""]
    words = next((line.split() for line in lines if line.isprintable() and len(line.split()) > 4), [])
    words = words[:4] if config.data.filepath else ["Once", "upon", "a", "time"]
    # Half of the context is left to go on in.
    while words and len(data.tokenizer.encode(" ".join(words))) > config.model.max_seq_len // 2:
        words.pop()
    return " ".join(words)
