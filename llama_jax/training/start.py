"""Prepares a start: opens the text, settles the settings and makes the state that training begins with."""

import socket
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import jax

from llama_jax.checkpoint import Checkpoint
from llama_jax.config import Config, DataArgs, TrainArgs
from llama_jax.data import Data, Origin, load_data, open_data
from llama_jax.data.batches import steps_per_epoch
from llama_jax.data.document_mask import LOOKED_AT, check_documents, check_marks
from llama_jax.devices.distributed import is_main, main_first
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from llama_jax.training.bad_steps import LossHistory
from llama_jax.training.opening import Opened
from llama_jax.training.settings import changes, rate_text
from llama_jax.training.step import TrainState, init_state, learning_rate, shardings_of, state_shapes


@dataclass(frozen=True)
class Settled:
    """A configuration with everything that the text decides, and the settings that this start changes."""

    config: Config
    steps: int
    held_lr: float | None = None
    changed: tuple[str, ...] = ()


def open_text(args: DataArgs, base: Checkpoint | None, opened: Opened) -> Data:
    """Open the tokens of the run. Process 0 makes them first if needed.

    Raises UserError if the run had other tokens, or if a document mask is asked for and the tokens mark no documents.
    """
    args = args if base is None else _with_tokenizer_of(base, args)
    if args.document_mask and args.tokenizer_model_path:
        check_marks(Tokenizer(args.tokenizer_model_path))  # before a text is encoded, which may take hours
    folder = opened.folder
    tokens = folder.path / "tokens"
    data = main_first(
        lambda: load_data(args, tokens, folder.tokenizer_path, begun=opened.start > 0, began_with=opened.text),
        lambda: open_data(args, tokens, folder.tokenizer_path),
    )
    if args.document_mask:
        check_marks(data.tokenizer)
        check_documents(data.tokens.train[:LOOKED_AT], data.tokenizer.bos_id, data.source)
    return data


def settle(config: Config, data: Data, opened: Opened) -> Settled:
    """Resolve the configuration and compare it with that of the previous start.

    Raises UserError if the run cannot be resumed with it.
    """
    config = _resolve(config, data)
    steps = steps_of_run(config, data)
    if not opened.start:
        if config.train.hold_lr:
            raise UserError("train.hold_lr: expected a run to resume, found a new one; leave it out")
        return Settled(config, steps)
    stored = opened.stored
    if stored is None:
        return Settled(config, steps)
    found = changes(stored, config, opened.folder.path)
    before = steps_of_run(_resolve(stored, data), data)
    held = _held_lr(config.train, stored.train, before, opened)
    lines = [str(change) for change in found]
    if stored.data.document_mask != config.data.document_mask:
        lines.append("losses up to here and from here on are not comparable, since documents are read in another way")
    rate = rate_text(stored, before, config, steps, held, opened.start + 1) if opened.start < steps else ""
    was_held = opened.record.held_lr if stored.train.hold_lr else None
    if rate and (was_held is None or held != was_held):
        lines.append(rate)
    return Settled(config, steps, held, tuple(lines))


def write_start(opened: Opened, settled: Settled, text: Origin) -> None:
    """Write what this start has decided. Nothing else changes the run folder before the first step."""
    folder = opened.folder
    if opened.later and is_main():
        opened.set_aside()
    folder.write_config(settled.config)
    folder.write_metrics()
    begun = {
        "time": datetime.now().astimezone().isoformat(" ", "seconds"),
        "host": socket.gethostname(),
        "step": opened.start,
        "changed": list(settled.changed),
    }
    opened.record = replace(
        opened.record,
        text=text.to_dict(),
        saved=opened.start,
        held_lr=settled.held_lr,
        starts=[*opened.record.starts, begun],
    )
    folder.write_record(opened.record)


def steps_of_run(config: Config, data: Data) -> int:
    """Return the total number of steps of a run."""
    train = config.train
    per_epoch = steps_per_epoch(data.tokens.train, train.batch_size, config.model.max_seq_len)
    return train.max_steps or train.n_epochs * per_epoch


def evaluation_is_missing(opened: Opened, settled: Settled, data: Data) -> bool:
    """Return whether a signal kept the previous start from evaluating the step that this one resumes from."""
    records, args, start = opened.folder.records, settled.config.train, opened.start
    if not is_main() or not start or not records or data.tokens.eval.size < 2:
        return False
    due = start % args.eval_interval == 0 or start >= settled.steps
    return due and records[-1]["step"] == start and "eval_loss" not in records[-1]


def first_state(
    module: Any, optimizer: Any, mesh: jax.sharding.Mesh, seed: int, opened: Opened, base: Checkpoint | None
) -> TrainState:
    """Return the first state, from the checkpoint to resume from, the one to fine-tune, or random parameters."""
    shapes = state_shapes(module, optimizer, mesh)
    if opened.start:
        checkpoint = Checkpoint.find(opened.folder.checkpoints / str(opened.start))
        return TrainState(checkpoint.restore("params", shapes.params), _restore_optimizer(checkpoint, shapes))
    params = None
    if base is not None:
        with base.verified():
            params = base.restore("params", shapes.params)
    return init_state(module, optimizer, mesh, seed, params)


def first_words(config: Config, data: Data) -> str:
    """Return the prompt of samples: the opening of the stories, or the first words of a line of the held-out text."""
    stream = data.tokens.eval if data.tokens.eval.size else data.tokens.train
    text = data.tokenizer.decode(stream[:256].tolist())
    lines = [line.split() for line in text.splitlines()[1:] if line.isprintable()]
    words = next((line for line in lines if len(line) > 4), None) or [w for w in text.split() if w.isprintable()]
    words = words[:4] if config.data.filepath else ["Once", "upon", "a", "time"]
    # Leave half of the context for the completion.
    while words and len(data.tokenizer.encode(" ".join(words))) > config.model.max_seq_len // 2:
        words.pop()
    return " ".join(words)


def _held_lr(now: TrainArgs, before: TrainArgs, steps_before: int, opened: Opened) -> float | None:
    """Return the learning rate to hold, which is that of the last step, or None."""
    if not now.hold_lr:
        return None
    if before.hold_lr and opened.record.held_lr is not None:
        return opened.record.held_lr
    return float(learning_rate(before, steps_before)(opened.start))


def _with_tokenizer_of(source: Checkpoint, args: DataArgs) -> DataArgs:
    """Return data arguments with the tokenizer of a checkpoint. Raises UserError if the user asks for another one."""
    asked = args.tokenizer_model_path
    if asked and Tokenizer(asked).model_bytes != source.tokenizer.model_bytes:
        raise UserError(
            f"data.tokenizer_model_path: expected the tokenizer of {source.folder}, found another in {asked}; leave it out"
        )
    return replace(args, tokenizer_model_path=str(source.tokenizer.model_path))


def _resolve(config: Config, data: Data) -> Config:
    """Return the configuration with all that the data decide. Raises UserError if the vocabulary size differs."""
    size, manifest = data.tokenizer.vocab_size, data.tokens.manifest
    if config.model.vocab_size not in (-1, size):
        raise UserError(
            f"model.vocab_size: expected {size}, the size of the tokenizer, or -1, found {config.model.vocab_size}"
        )
    data_args = replace(config.data, train_size=manifest.train_size, separator=manifest.separator.replace("\\", "\\\\"))
    return replace(config, model=replace(config.model, vocab_size=size), data=data_args)


def _restore_optimizer(checkpoint: Checkpoint, shapes: TrainState) -> Any:
    """Restore the optimizer's state. Checkpoints of earlier versions lack a LossHistory and get an empty one."""
    *inner, history = shapes.opt_state
    if any(name.startswith(f"{len(inner)}/") for name in checkpoint.arrays("state")):
        return checkpoint.restore("state", shapes.opt_state)
    empty = jax.jit(LossHistory.empty, out_shardings=shardings_of(history))()
    return (*checkpoint.restore("state", tuple(inner)), empty)
