"""Prepares a start: opens the text, settles the settings and makes the state that training begins with."""

import json
import socket
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.chat.formats import ChatSetup
from llama_jax.checkpoint import Checkpoint
from llama_jax.checkpoint.adapted import WholeModel
from llama_jax.checkpoint.identity import digest_of_parameters
from llama_jax.cli.progress import working
from llama_jax.config import Config, DataArgs, TrainArgs
from llama_jax.data import AnyData, Data, Talking, load_data, open_data
from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.data.batches import windows_of
from llama_jax.data.conversations import Pairs
from llama_jax.data.document_mask import LOOKED_AT, check_documents, check_marks
from llama_jax.data.mixture import Schedule, renamed
from llama_jax.data.opened import chat_format_of, chats_in, other_names, with_earlier
from llama_jax.data.tokens import TokenSet
from llama_jax.data.tuning_set import kept_setup
from llama_jax.devices.distributed import is_main, main_first, on_main, text_from_main
from llama_jax.errors import UserError
from llama_jax.expected_args import ExpectedArgs
from llama_jax.tokenizer import Tokenizer
from llama_jax.training.answers import keep_until
from llama_jax.training.bad_steps import LossHistory
from llama_jax.training.decaying import check_decay, copy_checkpoint
from llama_jax.training.expecting import expected_of
from llama_jax.training.objective import NextToken, Objective, make_objective
from llama_jax.training.opening import Opened
from llama_jax.training.rates import decay_end, learning_rate, stable_until
from llama_jax.training.settings import MEASURES, changes, check_fixed, rate_text
from llama_jax.training.step import TrainState, init_state, shardings_of, state_shapes
from llama_jax.training.tuning import Tuning


@dataclass(frozen=True)
class Settled:
    """A configuration with everything that the text decides, and the settings that this start changes."""

    config: Config
    steps: int
    held_lr: float | None = None
    changed: tuple[str, ...] = ()
    stable_until: int | None = None
    """The step at which the rate of wsd begins to decay, whose checkpoint is kept. None: there is none."""
    schedule: Schedule | None = None
    """The rows of a mixture's sources. None: a single text."""
    objective: Objective = NextToken()
    """The objective of training, which knows the positions of its rows."""
    expected: ExpectedArgs = ExpectedArgs()
    """The held-out loss to expect. It is empty if nothing is expected of such a run."""


def open_text(config: Config, base: WholeModel | None, opened: Opened) -> AnyData:
    """Open the tokens of the run. Process 0 makes them first if needed.

    Raises UserError if the run had other tokens, or if a document mask is asked for and the tokens mark no documents.
    """
    args = config.data if base is None else _with_tokenizer_of(base, config.data)
    if args.document_mask and args.tokenizer_model_path:
        check_marks(Tokenizer(args.tokenizer_model_path))  # before a text is encoded, which may take hours
    folder, preferences = opened.folder, config.train.objective == "dpo"
    if opened.start and opened.stored is not None:  # before a text is encoded, which may take hours
        check_fixed(opened.stored, config, (opened.source or folder).path, opened.source is not None)
    tokens = folder.path / "tokens"
    source = "the model" if base is None else config.train.init_from or str(base.folder)
    talking = Talking(_chat_before(opened, base), source, config.model.max_seq_len, preferences)
    data = main_first(
        lambda: load_data(
            args, tokens, folder.tokenizer_path, begun=opened.start > 0, began_with=opened.texts, talking=talking
        ),
        lambda: open_data(args, tokens, folder.tokenizer_path, talking),
    )
    chats = chats_in(data)
    if (args.document_mask or chats) and len(chats) < len(data.sources):
        check_marks(data.tokenizer)
        for text in data.sources.values():
            if text.chat is not None:
                continue
            assert isinstance(text.tokens, TokenSet)
            check_documents(text.tokens.train[:LOOKED_AT], data.tokenizer.bos_id, text.source)
    return data


def _chat_before(opened: Opened, base: WholeModel | None) -> ChatSetup:
    """Return the chat template and end tokens of the checkpoint that the run began with, or resumes from."""
    if opened.start:
        return Checkpoint.find(opened.checkpoint).chat
    return ChatSetup(has_none=True) if base is None else base.chat


def settle(config: Config, data: AnyData, opened: Opened) -> Settled:
    """Resolve the configuration and compare it with that of the previous start.

    Raises UserError if the run cannot be resumed with it.
    """
    config = _resolve(config, data)
    config.check()
    if config.train.minutes is not None and config.train.max_steps is None:
        raise UserError(
            "train.minutes: expected steps that were chosen for them, found none, as only the command train chooses; give "
            "train.max_steps, or start the command"
        )
    steps, objective = steps_of_run(config, data), objective_of(config, data)
    expected, note = expected_of(config, BatchSizes.of(config.train).rows(steps) * objective.length(config.model))
    opened.notes += [note] * bool(note)
    settled = Settled(
        config,
        steps,
        stable_until=None if config.train.hold_lr else stable_until(config.train, steps),
        schedule=_schedule(config, data, opened),
        objective=objective,
        expected=expected,
    )
    if opened.start and opened.stored is not None:
        settled = _compared(settled, opened.stored, data, opened)
    # The other processes do not know the previous start, and their steps have the same rates.
    return replace(settled, held_lr=json.loads(text_from_main(json.dumps(settled.held_lr))))


def _compared(settled: Settled, stored: Config, data: AnyData, opened: Opened) -> Settled:
    """Return what is settled with all that follows from the settings of the previous start, ``stored``.

    Raises UserError if the run cannot be resumed with it.
    """
    config, steps = settled.config, settled.steps
    if config.data.mixture:  # a source under another name is the same one
        known = renamed([{"weights": stored.data.mixture}], other_names(data, opened.texts or {}))
        stored = replace(stored, data=replace(stored.data, mixture=known[0]["weights"]))
    found = changes(stored, config, opened.folder.path, opened.record.began_with)
    before = steps_of_run(_resolve(stored, data), data)
    check_decay(stored, before, config, steps, opened.start, opened.checkpoint.parent)
    held = _held_lr(config.train, stored.train, before, opened)
    lines = [str(change) for change in found]
    opened.folder.measured_from = min(opened.record.measured_from, opened.start)
    measures = sorted(change.name for change in found if change.name in MEASURES)
    if measures and evaluated(data):
        opened.folder.measured_from = opened.start
    if stored.data.document_mask != config.data.document_mask:
        lines.append("losses up to here and from here on are not comparable, since documents are read in another way")
    if any(getattr(stored.train, name) != getattr(config.train, name) for name in ("dpo_beta", "dpo_label_smoothing")):
        lines.append(
            "losses and margins up to here and from here on are not comparable, since DPO scales them otherwise"
        )
    if stored.data.mixture != config.data.mixture and config.data.mixture:
        lines.append(
            "held-out losses are means by the weights, so that those up to here and from here on are not comparable"
        )
    if measures and evaluated(data):
        lines.append(
            f"evaluations from here on measure something else ({', '.join(measures)}): the best is found among them alone, and "
            "best.json stays until there is one"
        )
    rate = rate_text(stored, before, config, steps, held, opened.start + 1) if opened.start < steps else ""
    was_held = opened.record.held_lr if stored.train.hold_lr else None
    if rate and (was_held is None or held != was_held):
        lines.append(rate)
    return replace(settled, held_lr=held, changed=tuple(lines))


def objective_of(config: Config, data: AnyData) -> Objective:
    """Return the objective of a run."""
    streams = [stream for text in data.sources.values() for stream in (text.tokens.train, text.tokens.eval)]
    pairs = [stream.most_pairs(config.model.max_seq_len) for stream in streams if isinstance(stream, Pairs)]
    return make_objective(config, max(pairs, default=1))


def _schedule(config: Config, data: AnyData, opened: Opened) -> Schedule | None:
    """Return the schedule of a mixture, in which what earlier starts have read stays as it was. None: a single text."""
    weights = config.data.mixture
    if not weights:
        return None
    names = other_names(data, opened.texts or {})
    opened.notes += [f"{name} has the text of {old}, and is read on where that was" for name, old in names.items()]
    known = json.loads(text_from_main(json.dumps(renamed(opened.record.mixture, names))))
    return Schedule.of(known, weights, opened.start, BatchSizes.of(config.train))


def write_start(opened: Opened, settled: Settled, text: dict[str, Any], base: WholeModel | None = None) -> None:
    """Write what this start has decided. Nothing else changes the run folder before the first step.

    base: the model that the run begins with. None: it resumes, or begins without one.
    """
    folder, is_copied = opened.folder, opened.source is not None
    if opened.later and is_main():
        opened.set_aside()
    written = folder.write_config(settled.config)
    folder.write_metrics()
    if is_main():
        keep_until(folder.samples_path, opened.start)
    begun = {
        "time": datetime.now().astimezone().isoformat(" ", "seconds"),
        "host": socket.gethostname(),
        "step": opened.start,
        "changed": list(settled.changed),
    }
    schedule = settled.schedule
    opened.record = replace(
        opened.record,
        text=with_earlier(text, opened.texts or {}, schedule.names) if schedule is not None else text,
        mixture=schedule.to_list() if schedule is not None else [],
        saved=0 if is_copied else opened.start,
        held_lr=settled.held_lr,
        measured_from=folder.measured_from,
        stable_until=settled.stable_until,
        began_with=opened.record.began_with if base is None else digest_of_parameters(base.folder),
        config=written,
        starts=[*opened.record.starts, begun],
    )
    folder.write_record(opened.record)
    if is_copied:
        _copy_checkpoint(opened)


def _copy_checkpoint(opened: Opened) -> None:
    """Copy the checkpoint of the run that is continued here, as the last thing: without it, this start begins again."""

    def copy() -> int:
        with working(f"copying {opened.checkpoint}"):
            copy_checkpoint(opened.checkpoint.parent, opened.folder.checkpoints, opened.start)
        return 0

    on_main(copy)
    opened.source = None
    opened.record = replace(opened.record, saved=opened.start)
    opened.folder.write_record(opened.record)


def steps_of_run(config: Config, data: AnyData) -> int:
    """Return the total number of steps of a run. An epoch of a mixture has as many rows as all sources together."""
    train, length = config.train, config.model.max_seq_len
    rows = sum(windows_of(text.tokens.train, length) for text in data.sources.values())
    given = decay_end(train) if train.decay_from else train.max_steps
    return given or BatchSizes.of(train).steps(train.n_epochs * rows)


def evaluation_is_missing(opened: Opened, settled: Settled, data: AnyData) -> bool:
    """Return whether a signal kept the previous start from evaluating the step that this one resumes from."""
    records, args, start = opened.folder.records, settled.config.train, opened.start
    if not is_main() or not start or not records or not evaluated(data):
        return False
    due = start % args.eval_interval == 0 or start >= settled.steps
    return due and records[-1]["step"] == start and "eval_loss" not in records[-1]


def evaluated(data: AnyData) -> list[str]:
    """Return the names of the texts with held-out tokens to predict."""
    return [name for name, text in data.sources.items() if text.tokens.eval.size > 1]


def first_state(
    module: Any,
    optimizer: Any,
    mesh: jax.sharding.Mesh,
    seed: int,
    opened: Opened,
    base: WholeModel | None,
    tuning: Tuning | None = None,
) -> TrainState:
    """Return the first state: the checkpoint to resume from, the one to fine-tune, or random parameters or adapters."""
    adapting = () if tuning is None else (tuning.adapting,)
    shapes = state_shapes(module, optimizer, mesh, *adapting)
    if opened.start:
        checkpoint = Checkpoint.find(opened.checkpoint)
        return TrainState(checkpoint.restore("params", shapes.params), _restore_optimizer(checkpoint, shapes))
    params = None if base is None else _params_of(base, tuning, shapes)
    return init_state(module, optimizer, mesh, seed, params, *adapting)


def _params_of(base: WholeModel, tuning: Tuning | None, shapes: TrainState) -> Any:
    """Return the parameters that a run which begins with ``base`` changes. None: those of new adapters."""
    source = base.base if tuning is None else base.adapter
    if source is None:
        return None
    with source.verified():
        return source.restore("params", shapes.params)


def params_before(module: Any, optimizer: Any, mesh: jax.sharding.Mesh, base: WholeModel, tuning: Tuning | None) -> Any:
    """Return the parameters that a run began with, out of ``base``. New adapters are zero: they change nothing."""
    shapes = state_shapes(module, optimizer, mesh, *(() if tuning is None else (tuning.adapting,)))
    params = _params_of(base, tuning, shapes)
    if params is not None:
        return params
    zeros = jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes.params),
        out_shardings=shardings_of(shapes.params),
    )
    return zeros()


def chat_of(opened: Opened, base: WholeModel | None, data: AnyData) -> ChatSetup:
    """Return the chat template and end tokens of the run: those of its conversations, or of where it began."""
    before, chat = _chat_before(opened, base), chat_format_of(data)
    return before if chat is None else kept_setup(before, chat)


def first_words(config: Config, data: AnyData) -> str:
    """Return the prompt of samples: the opening of the stories, or the first words of a line of the held-out text."""
    tokens = [text.tokens for text in data.sources.values() if isinstance(text.tokens, TokenSet)]
    if not tokens:  # conversations, of which questions are asked instead (answers.py)
        return ""
    stream = next((each.eval for each in tokens if each.eval.size), tokens[0].train)
    text = data.tokenizer.decode(stream[:256].tolist())
    lines = [line.split() for line in text.splitlines()[1:] if line.isprintable()]
    words = next((line for line in lines if len(line) > 4), None) or [w for w in text.split() if w.isprintable()]
    words = words[:4] if config.data.filepath or config.data.mixture else ["Once", "upon", "a", "time"]
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


def _with_tokenizer_of(source: WholeModel, args: DataArgs) -> DataArgs:
    """Return data arguments with the tokenizer of a checkpoint. Raises UserError if the user asks for another one."""
    asked = args.tokenizer_model_path
    if asked and Tokenizer(asked).digest != source.tokenizer.digest:
        raise UserError(
            f"data.tokenizer_model_path: expected the tokenizer of {source.folder}, found another in {asked}; leave it out"
        )
    return replace(args, tokenizer_model_path=str(source.tokenizer.place))


def _resolve(config: Config, data: AnyData) -> Config:
    """Return the configuration with all that the data decide. Raises UserError if the vocabulary size differs."""
    size = data.tokenizer.vocab_size
    if config.train.init_from and config.model.vocab_size != -1:
        _check_rows(size := config.model.vocab_size, data)
    elif config.model.vocab_size not in (-1, size):
        raise UserError(
            f"model.vocab_size: expected {size}, the size of the tokenizer, or -1, found {config.model.vocab_size}"
        )
    data_args = config.data
    if chats_in(data):  # conversations are packed, each by itself
        data_args = replace(data_args, document_mask=True)
    if isinstance(data, Data):
        manifest = data.tokens.manifest
        separator = manifest.separator.replace("\\", "\\\\")
        data_args = replace(data_args, train_size=manifest.train_size, separator=separator)
    return replace(config, model=replace(config.model, vocab_size=size), data=data_args)


def _check_rows(rows: int, data: AnyData) -> None:
    """Raise UserError if a token of the data has no row in a model of ``rows`` embeddings. It may have more rows."""
    data.tokenizer.within(rows)
    for text in data.sources.values():
        if (largest := max(text.tokens.manifest.largest_id.values(), default=0)) >= rows:
            raise UserError(
                f"{text.source}: expected tokens with a row in the model, which has {rows:,}, found id {largest:,}; prepare the text "
                "with the tokenizer of the model's checkpoint"
            )


def _restore_optimizer(checkpoint: Checkpoint, shapes: TrainState) -> Any:
    """Restore the optimizer's state. Checkpoints of earlier versions lack a LossHistory and get an empty one."""
    *inner, history = shapes.opt_state
    if any(name.startswith(f"{len(inner)}/") for name in checkpoint.arrays("state")):
        return checkpoint.restore("state", shapes.opt_state)
    empty = jax.jit(LossHistory.empty, out_shardings=shardings_of(history))()
    return (*checkpoint.restore("state", tuple(inner)), empty)
