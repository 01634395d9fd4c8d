"""Training, from a configuration to a run folder: read ``train`` top to bottom."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from llama_jax.checkpoint import Checkpoint, CheckpointWriter, steps_of
from llama_jax.config import Config, SampleArgs
from llama_jax.data import Data, load_data
from llama_jax.data.batches import Batch, eval_batches, steps_per_epoch, train_batches
from llama_jax.errors import UserError
from llama_jax.generation import Model
from llama_jax.runtime import keep_freed_memory, make_model, use_compilation_cache
from llama_jax.sharding import batch_sharding, check_divisible, make_mesh, on_mesh
from llama_jax.training import report
from llama_jax.training.flops import peak_flops, train_flops_per_token
from llama_jax.training.plot import plot_losses
from llama_jax.training.run_folder import RunFolder
from llama_jax.training.step import (
    StepMetrics,
    TrainState,
    compile_train_step,
    eval_step,
    init_state,
    learning_rate,
    make_optimizer,
    state_shapes,
)

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


def train(config: Config) -> RunFolder:
    """Train as configured, or go on where the run in train.save_dir stopped; returns its folder.

    Raises UserError on what the user can put right, a non-finite loss included.
    """
    config.check()
    keep_freed_memory()
    use_compilation_cache()
    folder = RunFolder(config.train.save_dir)
    folder.create()
    folder.check_config(config)
    mesh = make_mesh(config.mesh)
    source = Checkpoint.find(config.train.init_from) if config.train.init_from else None
    data_args = config.data
    if source is not None:
        data_args = replace(data_args, tokenizer_model_path=str(source.folder / "model" / "tokenizer.model"))
    data = load_data(data_args, folder.path / "tokens", folder.tokenizer_path)
    config = _resolve(config, data)
    check_divisible(mesh, config.model, config.train)
    folder.check_config(config)

    module = make_model(config.model, config.train.compute_dtype, config.train.remat)
    steps = config.train.max_steps or config.train.n_epochs * steps_per_epoch(
        data.tokens.train, config.train.batch_size, config.model.max_seq_len
    )
    optimizer = make_optimizer(config.train, steps)
    saved = steps_of(folder.path)
    start = saved[-1] if saved else 0
    report.announce(config, data, mesh, jnp.dtype(module.dtype).name, steps, start, folder.path)
    folder.write_config(config)
    folder.resume_metrics(start)
    folder.write_best(saved)
    run = Run(config, folder, data, mesh, module, steps, CheckpointWriter(folder.path), _prompt(config, data))
    if start >= steps:
        print(f"the run has its {steps:,} steps; --train.max-steps goes on, another --train.save-dir begins anew")
        _finish(run, start, 0.0)
        return folder

    state = _first_state(run, optimizer, start, source)
    began = time.perf_counter()
    compiled = compile_train_step(module, optimizer, mesh, config.train.gradient_accumulation_steps, _batch_shapes(run))
    report.announce_cost(compiled, time.perf_counter() - began)
    began = time.perf_counter()
    end = _loop(run, compiled, state, start)
    _finish(run, end, time.perf_counter() - began)
    return folder


def _loop(run: Run, compiled: jax.stages.Compiled, state: TrainState, start: int) -> int:
    """Steps, with their records, evaluations and checkpoints; returns the last. Ends early, saved, on Ctrl-C and SIGTERM."""
    args = run.config.train
    batches = train_batches(
        run.data.tokens.train, args.batch_size, run.config.model.max_seq_len, args.seed, start, run.steps
    )
    sharding = batch_sharding(run.mesh)
    clock = _Clock(run, start)
    pending: list[StepMetrics] = []
    saved_at, announced = start, False
    with (
        _stop_signals() as stopped,
        tqdm(total=run.steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05) as bar,
    ):
        for step, batch in zip(range(start + 1, run.steps + 1), batches, strict=False):
            state, metrics = compiled(state, jax.device_put(batch, sharding))
            pending.append(metrics)
            bar.update()
            last = step == run.steps
            evaluating = run.data.tokens.eval.size > 1 and (step % args.eval_interval == 0 or last)
            saving = step % args.save_interval == 0 or last or bool(stopped)
            if evaluating or saving or step % args.log_interval == 0:
                record = clock.record(step, _checked(run, pending, step, saved_at))
                bar.set_postfix_str(f"loss {record['train_loss']:.3f}, {clock.tokens_per_second:,.0f} tokens/s")
                pending.clear()
                if not announced:
                    announced = True
                    report.say(report.expected_time_text(run.steps - step, record["step_seconds"]))
                improved = False
                if evaluating:
                    improved = _evaluate(run, state, record)
                if evaluating or last or step % args.log_interval == 0:
                    run.folder.log(record)
                if saving or improved:
                    _save(run, state, step, record.get("eval_loss"))
                    saved_at = step
                if evaluating:
                    _draw(run, sample=state.params)
                clock.restart(step)
            if stopped:
                break
    run.writer.wait()
    run.folder.write_best(steps_of(run.folder.path))
    if stopped:
        print(f"stopped by {stopped[0]} at step {step:,}, saved; the same command goes on from here")
    return step


def _checked(run: Run, pending: list[StepMetrics], step: int, saved_at: int) -> StepMetrics:
    """The newest metrics, on the host. Raises UserError where a loss since the last look was not finite."""
    losses = jax.device_get([m.loss for m in pending])
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            bad = step - len(losses) + 1 + i
            run.writer.wait()
            raise UserError(
                f"train: expected a finite loss, found {loss} at step {bad:,}; the last checkpoint is of step {saved_at:,}. "
                "Try a lower --train.lr or more --train.warmup-steps"
            )
    return pending[-1]


class _Clock:
    """Makes the records of metrics.jsonl: steps, tokens, and what they took since the last record."""

    def __init__(self, run: Run, start: int):
        self._run, self._schedule = run, learning_rate(run.config.train, run.steps)
        self._tokens = run.config.train.batch_size * run.config.model.max_seq_len
        devices = list(run.mesh.devices.flat)
        peak = peak_flops(devices[0])
        self._peak = None if peak is None else peak * len(devices) / train_flops_per_token(run.config.model)
        self.tokens_per_second = 0.0
        self.restart(start)

    def restart(self, step: int) -> None:
        """Time runs from here."""
        self._step, self._since = step, time.perf_counter()

    def record(self, step: int, metrics: StepMetrics) -> dict[str, Any]:
        """The record of ``step``."""
        seconds = (time.perf_counter() - self._since) / (step - self._step)
        self.tokens_per_second = self._tokens / seconds
        record = {
            "step": step,
            "tokens": step * self._tokens,
            "train_loss": float(metrics.loss),
            "lr": float(self._schedule(step)),
            "grad_norm": float(metrics.grad_norm),
            "step_seconds": seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        if self._peak is not None:
            record["mfu"] = self.tokens_per_second / self._peak
        return record


def _evaluate(run: Run, state: TrainState, record: dict[str, Any]) -> bool:
    """Add the held-out loss to the record; whether it is the best so far."""
    args = run.config.train
    total = weight = 0.0
    with on_mesh(run.mesh):
        rows = args.batch_size // args.gradient_accumulation_steps
        for batch in eval_batches(run.data.tokens.eval, rows, run.config.model.max_seq_len, args.eval_iters):
            sums = eval_step(run.module, state.params, jax.device_put(batch, batch_sharding(run.mesh)))
            total, weight = total + float(sums[0]), weight + float(sums[1])
    record["eval_loss"] = total / weight
    record["eval_bits_per_byte"] = total / weight / math.log(2) / run.data.tokens.eval_bytes_per_token
    best = run.folder.best()
    improved = best is None or record["eval_loss"] < best["eval_loss"]
    report.say(report.evaluation_text(record, run.data.floor, improved))
    return improved


def _save(run: Run, state: TrainState, step: int, eval_loss: float | None) -> None:
    run.writer.save(step, state.params, state.opt_state, run.config.model, run.data.tokenizer, eval_loss)
    run.folder.write_best(steps_of(run.folder.path))


def _draw(run: Run, sample: Any) -> None:
    """Show a sample of the model, and draw the losses if the plot is old."""
    model = Model(run.config.model, sample, run.data.tokenizer, run.module)
    args = SampleArgs(temperature=0.7, max_new_tokens=SAMPLE_TOKENS, seed=run.config.train.seed)
    with on_mesh(run.mesh):
        (completion,) = model.generate([run.prompt], args)
    report.say("  | " + (run.prompt + completion.text).replace("\n", "\n  | "))
    plot = run.folder.plot_path
    if not plot.exists() or time.time() - plot.stat().st_mtime > PLOT_SECONDS:
        plot_losses(plot, run.folder.records, str(run.folder.path), run.data.floor)


def _finish(run: Run, step: int, seconds: float) -> None:
    run.writer.close()
    plot_losses(run.folder.plot_path, run.folder.records, str(run.folder.path), run.data.floor)
    print(report.closing_text(run.folder.path, step, seconds, run.folder.best(), run.prompt))


def _resolve(config: Config, data: Data) -> Config:
    """The configuration with the vocabulary's size in it. Raises UserError where another one was asked for."""
    size = data.tokenizer.vocab_size
    if config.model.vocab_size not in (-1, size):
        raise UserError(
            f"model.vocab_size: expected {size}, as the tokenizer has, or -1, found {config.model.vocab_size}"
        )
    return replace(config, model=replace(config.model, vocab_size=size))


def _first_state(run: Run, optimizer: Any, start: int, source: Checkpoint | None) -> TrainState:
    """The state to begin with: the run's newest checkpoint, the checkpoint to fine-tune, or a random one."""
    shapes = state_shapes(run.module, optimizer, run.mesh)
    if start:
        checkpoint = Checkpoint.find(run.folder.path / "checkpoints" / str(start))
        return TrainState(checkpoint.restore("params", shapes.params), checkpoint.restore("state", shapes.opt_state))
    params = None
    if source is not None:
        params = source.restore("params", shapes.params)
    return init_state(run.module, optimizer, run.mesh, run.config.train.seed, params)


def _batch_shapes(run: Run) -> Batch:
    shape = (run.config.train.batch_size, run.config.model.max_seq_len)
    sharding = batch_sharding(run.mesh)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    return Batch(ids, ids, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding))  # type: ignore[arg-type]


def _prompt(config: Config, data: Data) -> str:
    """How samples begin: as the stories do, or with the first words of the held-out text."""
    if not config.data.filepath:
        return "Once upon a time"
    stream = data.tokens.eval if data.tokens.eval.size else data.tokens.train
    ids = [i for i in np.asarray(stream[:64]).tolist() if i not in (data.tokenizer.bos_id, data.tokenizer.eos_id)]
    lines = [line.strip() for line in data.tokenizer.decode(ids).splitlines() if line.strip()]
    line = lines[1] if len(lines) > 2 else lines[0] if lines else ""
    return " ".join(line.split()[:4])[: config.model.max_seq_len // 4]


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """Collects the name of SIGINT or SIGTERM when one comes; a second one acts as it would without us."""
    received: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
