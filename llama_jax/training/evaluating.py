"""Evaluations during training, on the held-out part of each source."""

import math
import time
from typing import Any

from llama_jax.cli.progress import print_above, working
from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.data.batches import OwnRows, eval_batches
from llama_jax.data.conversations import Stream
from llama_jax.devices.distributed import from_main, is_main
from llama_jax.devices.sharding import batch_sharding, on_mesh
from llama_jax.training import log
from llama_jax.training.bad_steps import raise_not_finite
from llama_jax.training.expecting import leaving_text, values_at
from llama_jax.training.run import Run
from llama_jax.training.start import evaluated
from llama_jax.training.step import TrainState
from llama_jax.training.tasks import task_scores


def evaluate(run: Run, state: TrainState, step: int, saved_at: int) -> tuple[dict[str, Any], int]:
    """Return the held-out loss and the scores of tasks as values for a record, or none and the signal that arrived.

    Raises UserError if the loss is not finite.
    """
    losses: dict[str, float] = {}
    rewards: dict[str, dict[str, float]] = {name: {} for name in run.settled.objective.rewards}
    for name in evaluated(run.data):
        (loss, *means), stop = _means_of(run, state, run.data.sources[name].tokens.eval)
        if stop:
            return {}, stop
        if not math.isfinite(loss):
            what = "held-out loss" + (f" of {name}" if name else "")
            raise_not_finite(what, loss, step, saved_at, run.best_saved())
        losses[name] = loss
        for of_source, mean in zip(rewards.values(), means, strict=True):
            of_source[name] = mean
    of_tasks, stop = task_scores(run, state.params)
    if stop:
        return {}, stop
    run.timer.evaluated = time.monotonic()
    run.consensus.forget()
    loss, bits = run.data.combine(losses, run.config.data.document_mask)
    of_each = {f"eval_loss/{name}": loss for name, loss in losses.items() if name}
    of_pairs = {
        f"eval_{name}": run.data.combine(means, run.config.data.document_mask)[0] for name, means in rewards.items()
    }
    tokens = BatchSizes.of(run.config.train).rows(step) * run.positions
    expected = values_at(run.settled.expected, tokens) if bits is not None else {}
    return {"eval_loss": loss, "eval_bits_per_byte": bits, **expected, **of_pairs, **of_each, **of_tasks}, 0


def _means_of(run: Run, state: TrainState, stream: Stream) -> tuple[list[float], int]:
    """Return the loss of a held-out stream in nats a token, or a pair, with the mean rewards of preferences.

    The second result is the signal that arrived meanwhile, or 0.
    """
    args, length = run.config.train, run.config.model.max_seq_len
    totals = [0.0] * (1 + len(run.settled.objective.rewards))
    weight = 0.0
    assert run.evaluate is not None
    with on_mesh(run.mesh):
        rows = args.batch_size // args.gradient_accumulation_steps
        own = OwnRows(batch_sharding(run.mesh), rows, run.positions)
        batches = eval_batches(stream, rows, length, args.eval_iters, own.rows)
        for batch in run.clock.waiting_for("evaluation", run.masked(batches)):  # tells the watchdog of each batch
            sums = run.evaluate(state.params, own.assemble(batch), *run.frozen)
            loss, count, *rewards = map(float, sums)
            totals = [total + value for total, value in zip(totals, (loss, *rewards), strict=True)]
            weight += count
            if stop := run.stop_asked():
                return totals, stop
    return [total / weight for total in totals], 0


def is_best(run: Run, record: dict[str, Any]) -> bool:
    """Print an evaluation, and whether it leaves what is expected. Return whether it is the best so far."""
    best = run.folder.best()
    # Process 0 decides for all, since only it knows the records of earlier starts.
    improved = bool(from_main(best is None or record["eval_loss"] < best["eval_loss"]))
    print_above(log.evaluation_text(record, run.data.floor, improved))
    if leaving := leaving_text(run.folder.records, record):
        print_above(leaving)
    return improved


def make_up_evaluation(run: Run, state: TrainState, step: int) -> None:
    """Evaluate the step that the run resumes from, because a signal kept the previous start from it."""
    with run.clock.spent_on("evaluation"), working(f"evaluating step {step:,}", shown=is_main()):
        values, stop = evaluate(run, state, step, step)
    if stop:
        return
    if is_main():
        record = run.folder.records[-1] | values
        is_best(run, record)
        run.folder.add_to_last(values)
        run.writer.add_loss(step, values["eval_loss"])
        run.folder.write_best(run.writer.steps)
    else:
        is_best(run, {"step": step} | values)
