"""The texts that a run prints: at its start, at evaluations and at its end."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from llama_jax.build import count_parameters
from llama_jax.checkpoint.adapted import WholeModel
from llama_jax.cli.progress import bytes_text, duration
from llama_jax.config import Config, TrainArgs
from llama_jax.data import AnyData, Data
from llama_jax.data.batch_sizes import BatchSizes, batch_lines, sizes_text
from llama_jax.data.batches import windows_of
from llama_jax.data.chat_summary import chat_rows
from llama_jax.data.mixture import Schedule
from llama_jax.data.opened import MixedData, chats_in, percent
from llama_jax.data.parts import SPLITS
from llama_jax.data.summary import documents_text, held_out_text, remarks, repeats_warning
from llama_jax.devices.compiling import platform_of
from llama_jax.devices.memory import check_memory
from llama_jax.devices.sharding import describe
from llama_jax.foreign.family import constants_of
from llama_jax.model import Llama
from llama_jax.ops.attention import choose_kernel
from llama_jax.programs import typed
from llama_jax.training import expecting
from llama_jax.training.clock import Activity, Clock
from llama_jax.training.eight_bits import products_text
from llama_jax.training.flops import step_flops, update_flops
from llama_jax.training.muon import matrix_sizes
from llama_jax.training.opening import Opened
from llama_jax.training.rates import decay_end, decay_start, warmup_steps
from llama_jax.training.run_folder import RunFolder
from llama_jax.training.start import Settled
from llama_jax.training.tuning import Tuning
from llama_jax.training.widths import widths_text

# Tokens for the sample command that is printed at the end: a whole story.
NEXT_TOKENS = 256


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
    model, train = config.model, config.train
    positions = settled.objective.length(model)
    sizes = BatchSizes.of(train)
    tokens = sizes.rows(steps) * positions
    to_train_on, held_out = (
        sum(text.tokens.manifest.tokens[split] for text in data.sources.values()) for split in SPLITS
    )
    epochs = tokens / to_train_on
    if chats_in(data):  # padding makes a sequence shorter than its positions
        epochs = sizes.rows(steps) / sum(
            windows_of(text.tokens.train, model.max_seq_len) for text in data.sources.values()
        )
    device = jax.devices()[0]
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    rows = [
        (
            "model",
            f"{count_parameters(model):,} parameters: dim {model.dim}, {model.n_layers} layers, {model.n_heads} heads, "
            + ", ".join([f"{model.kv_heads} kv heads", *constants_of(model), f"context {model.max_seq_len}"]),
        ),
        (
            "text",
            f"{data.source}: {to_train_on:,} tokens to train on, {held_out:,} held out, "
            f"vocabulary {data.tokenizer.vocab_size:,}",
        ),
        *([] if tuning is None else tuning.rows(module)),
        *_text_rows(data, settled, model.max_seq_len),
        (
            "training",
            f"{steps:,} steps of {sizes_text(sizes, steps, positions)} tokens ({epochs:.1f} epochs), "
            f"{step_flops(config, tokens, steps) / 1e12:,.1f} TFLOP",
        ),
        *(("batch", text) for text in batch_lines(train, opened.start, steps)),
        *objective_rows(train, opened),
        ("rate", rate_text(train, steps, settled.held_lr)),
        *([] if train.rate_width is None else [("rates", widths_text(train, model.dim))]),
        *([("optimizer", muon_text(config, tokens, steps))] if train.optimizer == "muon" else []),
        (
            "devices",
            f"{len(mesh.devices.flat)} x {device.device_kind}{processes}, mesh: {describe(dict(mesh.shape))}, "
            f"{module.dtype.name}, attention: {module.kernel}",
        ),
        *([("products", products_text(train, module.dtype.name))] if train.products != "float" else []),
        *expecting.rows(settled.expected),
        ("run folder", str(opened.folder.path)),
    ]
    for name, text in rows:
        print(f"{name:>10}  {text}")
    for name, part in data.sources.items():
        of_it = _epochs(part, settled.schedule, name, steps, model.max_seq_len) if name else epochs
        repeats = repeats_warning(
            part.tokens.manifest.tokens["train"], of_it, model.max_seq_len if part.chat is None else 0
        )
        for line in filter(None, [*remarks(part), repeats]):
            print(f"{name}: {line}" if name and not line.startswith(name) else line)
    if data.floor is not None:
        print(f"{'floor':>10}  {data.floor:.3f} bits per byte, the entropy of the stories' grammar")
    for line in mask_lines(config, mesh, module, data, positions) if config.data.document_mask else ():
        print(f"{'mask':>10}  {line}")
    for line in decay_lines(settled, opened):
        print(f"{'decay':>10}  {line}")
    for note in opened.notes:
        print(f"{'note':>10}  {note}")
    if opened.start:
        print(f"{'resumed':>10}  at step {opened.start:,}")
    for change in settled.changed:
        print(f"{'changed':>10}  {change}")


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
    return rows


def _epochs(text: Data, schedule: Schedule | None, name: str, steps: int, length: int) -> float:
    """Return how often the whole run reads a source of a mixture."""
    rows = schedule.rows_before(steps).get(name, 0) if schedule is not None else 0
    return rows / windows_of(text.tokens.train, length)


def epochs_text(data: AnyData, schedule: Schedule | None, length: int, step: int) -> list[str]:
    """Return a line for each source of a mixture that has run out at ``step`` and begins its next epoch."""
    if schedule is None or not isinstance(data, MixedData):
        return []
    before, after = schedule.rows_before(step - 1), schedule.rows_before(step)
    lines = []
    for name, text in data.sources.items():
        windows = windows_of(text.tokens.train, length)
        epoch = after.get(name, 0) // windows
        if epoch > before.get(name, 0) // windows:
            lines.append(
                f"step {step:,}: {name} has been read {epoch:,} time{'s' * (epoch > 1)}, and begins again in another order"
            )
    return lines


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
        return f"learning rate {held:.3g}, held"
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
        text = f"the rate decays in the {steps - start:,} steps from step {start:,} to {steps:,}, {(steps - start) / steps:.0%} of all"
        fits = f"; the {train.decay_fraction:.0%} of train.decay_fraction would end at --train.max-steps {planned}"
        lines.append(text + (fits if planned != steps else ""))
    return lines


def muon_text(config: Config, tokens: int, steps: int) -> str:
    """Describe what Muon updates, and what that costs in steps of this many tokens in all."""
    model = config.model
    share = steps * update_flops(model, config.train) / step_flops(config, tokens, steps)
    numbers = model.n_layers * sum(m * n for m, n in matrix_sizes(model))
    return (
        f"Muon for the {model.n_layers * len(matrix_sizes(model)):,} matrices of the layers ({numbers:,} parameters), momentum "
        f"{config.train.muon_momentum:g}, {share:.1%} of the FLOPs; AdamW for all else"
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


def nothing_to_do_text(settled: Settled) -> str:
    """Return what the start of a finished run prints."""
    steps, step = settled.steps, settled.stable_until
    if step is not None:
        without = ", without --train.decay-from" if settled.config.train.decay_from else ""
        return (
            f"Run already complete: it has its {steps:,} steps. To go on at its stable rate, go back to where the decay began and "
            f"raise the steps (--train.resume-step {step} --train.max-steps {2 * steps}{without}), or choose a new --train.save-dir"
        )
    return f"Run already complete: it has its {steps:,} steps. Raise --train.max-steps to go on, or choose a new --train.save-dir"


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


def printable(text: str) -> str:
    """Return ``text`` with control characters, which a terminal would obey, escaped. Line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def quoted_lines(text: str) -> str:
    """Return a sample for the terminal, with a mark before each line."""
    return "  | " + printable(text).replace("\n", "\n  | ")


def progress_text(record: dict[str, Any], devices: int) -> str:
    """Return loss, speed and memory of a record, and delays of a second or more.

    The most important comes first: a narrow terminal shows only what fits.
    """
    loss = "loss not finite" if record["train_loss"] is None else f"loss {record['train_loss']:.3f}"
    parts = [loss]
    if "reward_margin" in record:
        parts.append(f"margin {record['reward_margin'] or 0.0:.3f}, {record['reward_accuracy'] or 0.0:.0%} right")
    parts += [f"{record['tokens_per_second_per_device']:,.0f} tokens/s" + (" a device" if devices > 1 else "")]
    if record["bad_steps"]:
        parts.append(f"{record['bad_steps']:,} bad")
    parts += [
        f"{what} {record[f'{what}_seconds']:.0f} s" for what in ("data", "saving") if record[f"{what}_seconds"] >= 1
    ]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.0%}")
    if "memory_bytes" in record:
        parts.append(bytes_text(record["memory_bytes"]))
    return ", ".join(parts)


def expected_time_text(seconds: float) -> str:
    """Return a line with the time that the remaining steps will take, without evaluations."""
    return f"{'time':>10}  about {duration(seconds)} to go, evaluations aside"


def evaluation_text(record: dict[str, Any], floor: float | None, best: bool) -> str:
    """Return a line about an evaluation."""
    bits = record["eval_bits_per_byte"]
    text = f"step {record['step']:,}: eval loss {loss_text(record)}"
    if floor is not None and bits is not None:
        text += f" ({bits - floor:+.3f} from the floor)"
    if of_each := [
        f"{key.partition('/')[2]} {loss:.4f}" for key, loss in record.items() if key.startswith("eval_loss/")
    ]:
        text += f" ({', '.join(of_each)})"
    if of_tasks := [
        f"{key.removeprefix('task/')} {value:.3f}" for key, value in record.items() if key.startswith("task/")
    ]:
        text += "; " + ", ".join(of_tasks)
    if "eval_reward_margin" in record:
        text += f", margin {record['eval_reward_margin']:.4f}, {record['eval_reward_accuracy']:.1%} right"
    return text + (", the best so far" if best else "")


def loss_text(record: dict[str, Any]) -> str:
    """Return a record's held-out loss, also in bits per byte if the tokenizer loses no text."""
    bits = record["eval_bits_per_byte"]
    return f"{record['eval_loss']:.4f} nats a {'pair' if 'eval_reward_margin' in record else 'token'}" + (
        "" if bits is None else f", {bits:.3f} bits per byte"
    )


def say(text: str) -> None:
    """Print a line without breaking the progress bar."""
    with tqdm.external_write_mode():
        print(text, flush=True)


def trace_text(first: int, last: int, folder: Path) -> str:
    """Return a line that says where a trace is."""
    return f"trace of steps {first:,} to {last:,}: {folder} (for xprof; the perfetto_trace.json.gz in it for Perfetto)"


def time_text(clock: Clock, total: float, spent: float, record: dict[str, Any]) -> str:
    """Return where the ``total`` seconds went.

    ``spent`` are the seconds of earlier starts. If there are any, the last record gives the share of steps in all
    starts.
    """
    names: dict[str, Activity] = {
        "start": "start", "waiting for data": "data", "evaluation": "evaluation", "saving": "saving", "samples": "sample"
    }  # fmt: skip
    rest = ", ".join(f"{name} {clock.seconds[activity]:.1f} s" for name, activity in names.items())
    text = f"goodput: {clock.seconds['step'] / total:.1%} of {total:,.0f} s were spent in steps; {rest}"
    if spent:
        share = record["run_step_seconds"] / record["run_seconds"]
        text += f"\nover all starts: {share:.1%} of {record['run_seconds']:,.0f} s, not counting repeated steps"
    return text


def speed_text(clock: Clock, records: list[dict[str, Any]]) -> str:
    """Return the mean of the speeds in this start's records."""
    tokens, seconds = clock.recorded
    if not seconds or not records:
        return ""
    return f", {tokens / seconds:,.0f} tokens/s in steps on average"


def bad_steps_text(record: dict[str, Any]) -> str:
    """Return the number of bad steps up to the record."""
    return (
        f"bad steps: {record['bad_steps']:,} of {record['step']:,}, of which {record['skipped_steps']:,} were skipped"
    )


def closing_text(
    folder: RunFolder, step: int, clock: Clock, prompt: str, changed: Sequence[str] = (), talks: bool = False
) -> str:
    """Return the last lines of a run: how it went, where the files are, and what to type next."""
    total = clock.total
    lines = [f"at step {step:,} after {total:,.0f} s" + speed_text(clock, folder.records)]
    if (best := folder.best()) is not None:
        lines[0] += f"; best: step {best['step']:,}, {loss_text(best)}"
    if clock.seconds["step"] and folder.records:
        lines.append(time_text(clock, total, folder.spent, folder.records[-1]))
    if folder.records and folder.records[-1].get("bad_steps"):
        lines.append(bad_steps_text(folder.records[-1]))
    lines += [f"changed at this start: {change}" for change in changed]
    path = folder.path
    lines.append(
        f"checkpoints: {folder.checkpoints}   losses: {path / 'losses.png'}   numbers: {path / 'metrics.jsonl'}"
    )
    if talks:
        lines[-1] += f"   answers: {folder.samples_path}"
    lines.append("now try:")
    asked = "--chat" if talks else shlex.quote(prompt)
    lines.append(f"  {typed('sample')} --ckpt {shlex.quote(str(path))} {asked} --max-new-tokens {NEXT_TOKENS}")
    return "\n".join(lines)
