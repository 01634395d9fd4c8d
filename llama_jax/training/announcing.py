"""Says at the start of a run what it will do, with which text, and at what cost."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import jax

from llama_jax.build import count_parameters
from llama_jax.checkpoint.adapted import WholeModel
from llama_jax.cli.progress import bytes_text
from llama_jax.config import Config, DataArgs, TrainArgs
from llama_jax.data import AnyData, Data
from llama_jax.data.batch_sizes import BatchSizes, batch_lines, sizes_text
from llama_jax.data.batches import windows_of
from llama_jax.data.chat_summary import chat_rows
from llama_jax.data.mixture import Schedule
from llama_jax.data.opened import MixedData, chats_in, percent
from llama_jax.data.summary import documents_text, held_out_text, remarks, repeats_warning
from llama_jax.devices.compiling import platform_of
from llama_jax.devices.memory import check_memory
from llama_jax.devices.sharding import describe
from llama_jax.foreign.family import constants_of
from llama_jax.model import Llama
from llama_jax.ops.attention import choose_kernel
from llama_jax.training import expecting
from llama_jax.training.eight_bits import products_text
from llama_jax.training.flops import step_flops, update_flops
from llama_jax.training.muon import matrix_sizes
from llama_jax.training.opening import Opened
from llama_jax.training.rates import decay_end, decay_start, warmup_steps
from llama_jax.training.start import Settled
from llama_jax.training.tuning import Tuning
from llama_jax.training.widths import widths_text


def announce(
    settled: Settled,
    data: AnyData,
    mesh: jax.sharding.Mesh,
    module: Llama,
    opened: Opened,
    tuning: Tuning | None = None,
) -> None:
    """Print what the run will do."""
    config, steps = settled.config, settled.steps
    length, positions = config.model.max_seq_len, settled.objective.length(config.model)
    epochs = _epochs_of_all(settled, data)
    rows = [
        *_model_rows(config, data),
        *([] if tuning is None else tuning.rows(module)),
        *_text_rows(data, settled, length),
        *_training_rows(settled, opened, epochs),
        *_device_rows(config.train, mesh, module),
        *expecting.rows(settled.expected),
        ("run folder", str(opened.folder.path)),
    ]
    _tell(rows)
    for name, part in data.sources.items():
        of_it = _epochs(part, settled.schedule, name, steps, length) if name else epochs
        repeats = repeats_warning(part.tokens.manifest.tokens["train"], of_it, length if part.chat is None else 0)
        for line in filter(None, [*remarks(part), repeats]):
            print(f"{name}: {line}" if name and not line.startswith(name) else line)
    masked = config.data.document_mask
    lines = [
        *(
            []
            if data.floor is None
            else [("floor", f"{data.floor:.3f} bits per byte, the entropy of the stories' grammar")]
        ),
        *(("mask", line) for line in (mask_lines(config, mesh, module, data, positions) if masked else ())),
        *(("decay", line) for line in decay_lines(settled, opened)),
        *(("note", note) for note in opened.notes),
        *([("resumed", f"at step {opened.start:,}")] if opened.start else []),
        *(("changed", change) for change in settled.changed),
    ]
    _tell(lines)


def _tell(rows: Iterable[tuple[str, str]]) -> None:
    for name, text in rows:
        print(f"{name:>10}  {text}")


def _epochs_of_all(settled: Settled, data: AnyData) -> float:
    """Return how often the run reads all its text."""
    model, rows = settled.config.model, BatchSizes.of(settled.config.train).rows(settled.steps)
    if chats_in(data):  # padding makes a sequence shorter than its positions
        return rows / sum(windows_of(text.tokens.train, model.max_seq_len) for text in data.sources.values())
    return rows * settled.objective.length(model) / _tokens_of(data, "train")


def _tokens_of(data: AnyData, split: str) -> int:
    return sum(text.tokens.manifest.tokens[split] for text in data.sources.values())


def _model_rows(config: Config, data: AnyData) -> list[tuple[str, str]]:
    """Return what is said of the model, and of the text as a whole."""
    model = config.model
    shape = f"dim {model.dim}, {model.n_layers} layers, {model.n_heads} heads"
    more = [f"{model.kv_heads} kv heads", *constants_of(model), f"context {model.max_seq_len}"]
    return [
        ("model", f"{count_parameters(model):,} parameters: {', '.join([shape, *more])}"),
        (
            "text",
            f"{data.source}: {_tokens_of(data, 'train'):,} tokens to train on, {_tokens_of(data, 'eval'):,} held out, "
            f"vocabulary {data.tokenizer.vocab_size:,}",
        ),
    ]


def _training_rows(settled: Settled, opened: Opened, epochs: float) -> list[tuple[str, str]]:
    """Return what is said of the steps: how many, of how much, for which objective, at which rate."""
    config, steps = settled.config, settled.steps
    train, positions, sizes = config.train, settled.objective.length(config.model), BatchSizes.of(config.train)
    tokens = sizes.rows(steps) * positions
    return [
        (
            "training",
            f"{steps:,} steps of {sizes_text(sizes, steps, positions)} tokens ({epochs:.1f} epochs), "
            f"{step_flops(config, tokens, steps) / 1e12:,.1f} TFLOP",
        ),
        *(("batch", text) for text in batch_lines(train, opened.start, steps)),
        *objective_rows(train, opened),
        ("rate", rate_text(train, steps, settled.held_lr)),
        *([] if train.rate_width is None else [("rates", widths_text(train, config.model.dim))]),
        *([] if train.optimizer == "adamw" else [("optimizer", optimizer_text(config, tokens, steps))]),
    ]


def _device_rows(train: TrainArgs, mesh: jax.sharding.Mesh, module: Llama) -> list[tuple[str, str]]:
    """Return what is said of the devices, and of what they compute with."""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return [
        (
            "devices",
            f"{mesh.devices.size} x {jax.devices()[0].device_kind}{processes}, mesh: {describe(dict(mesh.shape))}, "
            f"{module.dtype.name}, attention: {module.kernel}",
        ),
        *([("products", products_text(train, module.dtype.name))] if train.products != "float" else []),
    ]


def _text_rows(data: AnyData, settled: Settled, length: int) -> list[tuple[str, str]]:
    """Return what is said of the documents of a text, or of each source of a mixture."""
    rows = []
    for i, (name, text) in enumerate(data.sources.items()):
        manifest = text.tokens.manifest
        if isinstance(data, MixedData):
            epochs = _epochs(text, settled.schedule, name, settled.steps, length)
            share = f"{percent(data.shares[name])} of the sequences"
            rows.append(
                (f"source {i + 1}", f"{name}: {share}, {epochs:.1f} epochs of {manifest.tokens['train']:,} tokens")
            )
        if text.chat is None:
            rows += [("documents", documents_text(manifest)), ("held out", held_out_text(manifest))]
        else:
            rows += chat_rows(text, settled.config, length)
    return [*rows, *_of_text_alone(settled.config, data), *_of_records_alone(settled.config, data)]


def _of_text_alone(config: Config, data: AnyData) -> list[tuple[str, str]]:
    """Return what is said of the loss of a text where a person may mean that of conversations."""
    args, usual = config.data, DataArgs()
    unused = [name for name in ("chat_template", "loss_on", "too_long") if getattr(args, name) != getattr(usual, name)]
    if chats_in(data) or not (unused or config.train.init_from):
        return []
    more = f"; {', '.join(f'data.{name}' for name in unused)}: not used" if unused else ""
    return [("loss", f"on every token, as the data are text, not conversations{more}")]


def _of_records_alone(config: Config, data: AnyData) -> list[tuple[str, str]]:
    """Return what is said of a setting of records where no text has any."""
    if config.data.bad_records == DataArgs.bad_records or chats_in(data):
        return []
    if any(text.tokens.manifest.text_field for text in data.sources.values()):
        return []
    return [("records", f"there are none: data.bad_records {config.data.bad_records} is not used")]


def _epochs(text: Data, schedule: Schedule | None, name: str, steps: int, length: int) -> float:
    """Return how often the whole run reads a source of a mixture."""
    rows = schedule.rows_before(steps).get(name, 0) if schedule is not None else 0
    return rows / windows_of(text.tokens.train, length)


def objective_rows(train: TrainArgs, opened: Opened) -> list[tuple[str, str]]:
    """Return what a run prints about what it minimizes, if that is not the cross entropy of tokens."""
    if train.objective == "next-token":
        return []
    smoothing = f", label smoothing {train.dpo_label_smoothing:g}" if train.dpo_label_smoothing else ""
    return [
        (
            "objective",
            f"DPO with beta {train.dpo_beta:g}{smoothing}; the loss is a mean over pairs, log 2 at the start",
        ),
        (
            "reference",
            f"{train.init_from}, as the run began with it: its log-likelihoods are computed once, before the first step, and kept in "
            f"{opened.folder.path / 'reference'}; no second model is held",
        ),
    ]


def mask_lines(config: Config, mesh: jax.sharding.Mesh, module: Llama, data: AnyData, positions: int) -> list[str]:
    """Say what the document mask does, and what it means for the kernel of attention."""
    model, train = config.model, config.train
    lines = ["attention and positions stay inside each conversation"] if chats_in(data) else []
    if len(chats_in(data)) < len(data.sources):
        lines += [
            "attention, positions and loss stay inside each document; one that a sequence's start cuts begins again there",
            "losses, of training and held out, are means over the tokens that follow another of their document",
        ]
    platform, shards = platform_of(mesh.devices.flat[0]), mesh.shape["sequence"]
    without = choose_kernel(train.attention, platform, model, module.dtype, shards)
    if without != module.kernel:
        lines.append(f"attention is {module.kernel}: {without} takes no mask over an odd number of positions")
    if module.kernel == "cudnn":
        rows = train.batch_size // train.gradient_accumulation_steps // (mesh.shape["data"] * mesh.shape["fsdp"])
        size = bytes_text(rows * positions**2 * module.dtype.itemsize)
        lines.append(f"cudnn reads the mask from memory: {size} a device, and as much again in the backward pass")
    return lines


def rate_text(train: TrainArgs, steps: int, held: float | None) -> str:
    """Describe the learning rate over the run's steps."""
    if held is not None:
        return f"learning rate {held:.3g}, held; train.lr {train.lr:g} and the schedule are not used"
    warmup, start = warmup_steps(train, steps), decay_start(train, steps)
    cut = f", not {train.warmup_steps:,}, as the run is short" if warmup != train.warmup_steps else ""
    form = "a cosine" if train.schedule == "cosine" else "a line"
    stable = f" until step {start:,}" if train.schedule == "wsd" and start > warmup else ""
    end = f", then {form} to {train.lr * train.min_lr_ratio:g}" + (f" at step {steps:,}" if form == "a line" else "")
    return f"learning rate {train.lr:g} after a warm-up of {warmup:,} steps{cut}{stable}{end}"


def decay_lines(settled: Settled, opened: Opened) -> list[str]:
    """Say where the rate of wsd begins to decay, over how many steps, and how to come back to there."""
    train, steps, start = settled.config.train, settled.steps, settled.stable_until
    if start is None:
        return []
    lines = []
    if opened.start <= start or (opened.folder.checkpoints / str(start)).is_dir():
        lines = [
            f"the decay begins at step {start:,}, whose checkpoint is kept: --train.decay-from {start} continues from it"
        ]
    if train.decay_from:
        planned = decay_end(replace(train, max_steps=None)) if train.decay_fraction < 1 else steps
        length = "1 step" if steps - start == 1 else f"{steps - start:,} steps"
        text = f"the rate decays in the {length} from step {start:,} to {steps:,}, {(steps - start) / steps:.0%} of all"
        fits = f"; the {train.decay_fraction:.0%} of train.decay_fraction would end at --train.max-steps {planned}"
        lines.append(text + (fits if planned != steps else ""))
    return lines


def optimizer_text(config: Config, tokens: int, steps: int) -> str:
    """Describe what Muon or Adafactor updates, which settings are not theirs, and the cost in steps of ``tokens``."""
    model, train = config.model, config.train
    if train.optimizer == "adafactor":
        return "Adafactor: no first moment, and means over rows and columns of the second; train.beta1, train.beta2 and train.eps are not used"
    share = steps * update_flops(model, train) / step_flops(config, tokens, steps)
    numbers = model.n_layers * sum(m * n for m, n in matrix_sizes(model))
    looks = "; train.nesterov is of this AdamW, as Muon always looks ahead" if train.nesterov else ""
    return (
        f"Muon for the {model.n_layers * len(matrix_sizes(model)):,} matrices of the layers ({numbers:,} parameters), momentum "
        f"{train.muon_momentum:g}, {share:.1%} of the FLOPs; AdamW for all else{looks}"
    )


def first_state_text(opened: Opened, base: WholeModel | None) -> str:
    """Return a line about what happens before the first step: parameters are read, or made."""
    if opened.start:
        return f"reading the checkpoint of step {opened.start:,}"
    return "making random parameters" if base is None else f"reading {base.folder}"


def decay_begins_text(settled: Settled, store: Path) -> str:
    """Return a line for the step at which the rate of wsd begins to decay, after its checkpoint is saved."""
    step = settled.stable_until
    return (
        f"step {step:,}: the rate decays from here to step {settled.steps:,}; to decay again from here (--train.decay-from {step}), or "
        f"to go on at the stable rate, {store / str(step)} is kept"
    )


def nothing_to_do_text(settled: Settled, store: Path, start: int) -> str:
    """Return what the start of a finished run prints, whose checkpoints are in ``store``, the newest of ``start``."""
    steps, step = settled.steps, settled.stable_until
    has = f"it has its {steps:,} steps" if start == steps else f"it has {start:,} steps, and {steps:,} are asked for"
    if step is not None and (store / str(step)).is_dir():
        without = ", without --train.decay-from" if settled.config.train.decay_from else ""
        return (
            f"Run already complete: {has}. To go on at its stable rate, go back to where the decay began and "
            f"raise the steps (--train.resume-step {step} --train.max-steps {2 * steps}{without}), or choose a new --train.save-dir"
        )
    return f"Run already complete: {has}. Raise --train.max-steps to go on, or choose a new --train.save-dir"


def announce_cost(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh, seconds: float, programs: int = 1) -> None:
    """Print what the largest compiled step needs, and how long compiling all took.

    Raises UserError if the devices have less memory.
    """
    analysis = compiled.memory_analysis()
    if analysis is not None:
        need = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        what = "the step" if programs == 1 else f"{programs} sizes of the step"
        print(f"{'memory':>10}  {need / 1e6:,.0f} MB a device; {what} compiled in {seconds:.1f} s")
        hint = "make train.batch_size smaller, or train.gradient_accumulation_steps larger"
        check_memory(need, mesh.local_devices, "the step needs", hint)
