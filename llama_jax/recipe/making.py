"""Makes a recipe: counts the text, measures or plans the speed, chooses, and says each of them in a line."""

import dataclasses
import math
import time
from dataclasses import replace

import jax

from llama_jax.build import count_parameters
from llama_jax.cli.progress import bytes_text, duration
from llama_jax.config import Config, ModelArgs
from llama_jax.devices.absent_tpu import skip_absent_tpu
from llama_jax.devices.compiling import check_devices
from llama_jax.devices.distributed import processes_of
from llama_jax.devices.memory import memory_of
from llama_jax.devices.sharding import make_mesh
from llama_jax.errors import UserError
from llama_jax.expected_args import ExpectedArgs
from llama_jax.recipe.choose import Budget, Choice, Task, all_shapes, bytes_within, choose, parameters_of, with_curve
from llama_jax.recipe.laws import LAWS
from llama_jax.recipe.speed import Speed, guess, in_parts, measure, planned
from llama_jax.recipe.text import Counted, count_text
from llama_jax.training.account import state_bytes
from llama_jax.training.announcing import rate_text

# Of the minutes, these seconds and this share of the rest are for the start, evaluations, checkpoints and samples.
START_SECONDS, OTHER_SHARE = 15.0, 0.05
# This share of the minutes is for steps in any case, of a budget that is too short for the start.
LEAST_SHARE = 0.3
# The beginnings of settings that the laws take into account, or that change no loss. Of any other one of the person's, the
# laws know nothing: their runs had the recipe's own.
TAKEN_INTO_ACCOUNT = (
    "model.dim", "model.n_layers", "model.ffn_dim_multiplier", "model.multiple_of", "data.", "mesh.", "distributed.",
    "train.minutes", "train.save_", "train.checkpoint_dir", "train.seed", "train.tensorboard", "train.keep",
    "train.watchdog_seconds", "train.profile_steps", "train.remat", "train.attention", "train.log_interval",
    "train.gradient_accumulation_steps", "train.eval_",
)  # fmt: skip
# Settings of the person that other lines tell.
TOLD = ("data.filepath", "train.minutes", "train.save_dir")
# The share of the memory that parameters, gradients and the optimizer's state may take beside activations.
STATE_SHARE = 0.6
# A context below this, in tokens, is told with its reason.
SHORT = 256
# Texts of a lower level than this, in bits per byte, are repetitions.
LEAST_LEVEL = 0.1
# The speed is measured again if the model has become so many times wider or narrower.
AGAIN = 1.3
Rows = list[tuple[str, str]]


def make_recipe(
    base: Config, given: frozenset[str], budget: Budget, topology: str = "", began: float | None = None
) -> tuple[Choice, Rows]:
    """Return the settings for a budget, and the lines that say how they were found.

    Arguments:
        base: the settings of the person, or defaults.
        given: the names of those that the person gave ("train.lr"). They are kept.
        budget: what the run may take. Its unit is "minutes" if the speed decides.
        topology: the slice to plan for. Empty: this machine.
        began: when the command began, by ``time.perf_counter``, if the run is a part of it and its minutes are those of
            the whole command. None: the run is another command.

    Raises UserError if the text cannot be counted, or if the budget is too small.
    """
    _check(base, given)
    note = "" if topology else skip_absent_tpu("measuring")
    if not topology:
        check_devices()
    rows = _rows_of(base, topology)
    timed = budget.unit == "minutes"
    rough = replace(budget, unit="flops", amount=60 * budget.amount * _guess(topology)) if timed else budget
    text = count_text(base.data, "data.vocab_size" in given, bytes_within(rough))
    here = timed and not topology
    task = Task(base, given, text, rows, most_parameters=_most_parameters(base) if here else math.inf)
    found: Speed | None = None
    choice = choose(task, rough)
    if timed or topology:
        found, choice = _timed(task, budget, choice, topology, began)
    choice = with_curve(task, choice)
    choice.config.check()
    return choice, [*([("", note)] if note else []), *_lines(task, budget, choice, found, _since(began))]


def _guess(topology: str) -> float:
    if not topology:
        return guess()
    from llama_jax.plan.topology import Topology

    where = Topology.parse(topology)
    return 0.4 * where.chip.peak_flops * where.device_count


def _timed(task: Task, budget: Budget, choice: Choice, topology: str, began: float | None) -> tuple[Speed, Choice]:
    """Measure or plan the speed of the chosen shape, and choose again with it, twice if the shape changes much."""
    for again in (False, True):
        config = _sized(choice.config, task.text)
        if topology:
            speed, config = planned(config, topology)
        else:
            if "train.gradient_accumulation_steps" not in task.given:
                config = in_parts(config)
            speed = measure(config)
        parts = config.train.gradient_accumulation_steps
        base = replace(task.base, train=replace(task.base.train, gradient_accumulation_steps=parts))
        task = replace(task, base=base)
        if budget.unit != "minutes":
            return speed, choose(task, budget)
        seconds = seconds_of_steps(budget.amount, speed, _since(began))
        before, choice = choice, choose(task, replace(budget, unit="flops", amount=seconds * speed.flops_per_second))
        wider = choice.config.model.dim / before.config.model.dim
        if again or 1 / AGAIN <= wider <= AGAIN:
            break
    return speed, choice


def _since(began: float | None) -> float:
    return 0.0 if began is None else time.perf_counter() - began


def seconds_of_steps(minutes: float, speed: Speed, spent: float = 0.0) -> float:
    """Return the seconds of a run of some minutes in which it takes steps. ``spent``: seconds that are over."""
    left = 60 * minutes - spent - START_SECONDS - speed.compile_seconds
    return max(LEAST_SHARE * 60 * minutes, (1 - OTHER_SHARE) * left)


def _most_parameters(base: Config) -> float:
    """Return how many parameters fit into the memory of these devices, with gradients, moments and activations."""
    mesh = make_mesh(base.mesh)
    probe = ModelArgs(dim=64, n_layers=1, n_heads=1, vocab_size=64)
    each = sum(state_bytes(probe, base.train).values()) / count_parameters(probe)
    return STATE_SHARE * memory_of(mesh.local_devices) * mesh.shape["fsdp"] * mesh.shape["tensor"] / each


def _sized(config: Config, text: Counted) -> Config:
    return replace(config, model=replace(config.model, vocab_size=text.vocab_size))


def _check(base: Config, given: frozenset[str]) -> None:
    """Raise UserError on settings that contradict a recipe: it trains a new model on a text, and decides how long."""
    for part in (base.data, base.train, base.mesh, base.distributed, base.lora, base.expected):
        part.check()  # the model's settings are checked with those that are chosen beside them
    for name in ("train.max_steps", "train.n_epochs"):
        if name in given:
            section, field = name.split(".")
            raise UserError(
                f"{name}: expected none beside a recipe, which decides how long to train, found "
                f"{getattr(getattr(base, section), field)}; leave it out"
            )
    if base.expected != ExpectedArgs():
        raise UserError(
            "expected.tokens: expected none beside a recipe, which writes them, found some; leave [expected] out"
        )
    if base.train.rate_width is not None and "train.lr" not in given:
        raise UserError(
            "train.rate_width: expected train.lr beside it, since a recipe's own rate is for the width that it chooses, found "
            f"{base.train.rate_width} alone; give the train.lr of that width, or leave it out"
        )
    if base.train.batch_start:
        raise UserError(
            f"train.batch_start: expected none beside a recipe, whose laws are of batches of one size, found {base.train.batch_start}; "
            "leave it out"
        )
    for name in ("hold_lr", "resume_step"):
        if found := getattr(base.train, name):
            raise UserError(
                f"train.{name}: expected none beside a recipe, which is for a run that has not begun, found {found}; leave it out, and "
                "give it to train"
            )
    for holds, name, found in (
        (base.train.init_from, "train.init_from", base.train.init_from),
        (base.lora.rank, "lora.rank", base.lora.rank),
        (base.train.objective != "next-token", "train.objective", base.train.objective),
        (base.train.decay_run or base.train.decay_from, "train.decay_from", base.train.decay_from),
        (base.model.vocab_size != -1, "model.vocab_size", base.model.vocab_size),
    ):
        if holds:
            raise UserError(
                f"{name}: expected none beside a recipe, which is for new models, found {found}; leave it out"
            )


def _rows_of(base: Config, topology: str) -> int:
    """Return how many devices share a batch."""
    if topology:
        from llama_jax.plan.topology import Topology

        devices = Topology.parse(topology).device_count
    else:
        if (count := processes_of(base.distributed)) > 1:
            raise UserError(
                f"minutes: expected one process, whose speed is measured, found a job of {count}; make a recipe for the slice with "
                "--topology, or for --flops, and train by it"
            )
        devices = jax.device_count()
    mesh = base.mesh
    known = [size for size in dataclasses.astuple(mesh) if size != -1]
    left = devices
    for size in known:
        left //= size
    shares = [left if size == -1 else size for size in (mesh.data, mesh.fsdp)]
    return max(1, shares[0]) * max(1, shares[1])


def _time_rows(budget: Budget, choice: Choice, speed: Speed, spent: float) -> Rows:
    """Return what is said of the speed and of the time that a run takes. ``spent``: seconds that are over."""
    steps = choice.flops / speed.flops_per_second
    rows = [("speed", f"{_number(speed.flops_per_second)}FLOP/s, {speed.how}")]
    if budget.unit != "minutes":
        return [*rows, ("time", f"about {duration(steps)} of steps")]
    over = f"{duration(spent)} were spent up to here, and " if spent else ""
    rest = f"{over}the rest of {budget.name} is for the start, evaluations and checkpoints"
    rows.append(("time", f"about {duration(steps)} of steps; {rest}"))
    start = spent + START_SECONDS + speed.compile_seconds
    whole = start + steps / (1 - OTHER_SHARE)
    if whole > 60 * budget.amount + 1:
        rows.append((
            "",
            f"warning: this will take longer than {budget.name}, about {duration(whole)} in all, as start, compilation and samples alone take "
            f"about {duration(start)}; a few minutes are the least that makes sense",
        ))  # fmt: skip
    return rows


def _lines(task: Task, budget: Budget, choice: Choice, speed: Speed | None, spent: float) -> Rows:
    """Return what was counted, measured and decided, and why. ``spent``: seconds of the budget that are over."""
    text, config = task.text, choice.config
    model, train = config.model, config.train
    rows = [
        (
            "text",
            f"{text.source}: {bytes_text(text.train_bytes)} to train on; a sample of {bytes_text(text.sampled)} was read",
        )
    ]
    rows += [("", note) for note in text.notes]
    rows.append((
        "level",
        f"{LAWS.level(text.level):.2f} bits per byte without a model: {text.level.counted:.2f} by counts of what follows 5 bytes, "
        f"{text.level.compressed:.2f} by LZMA; texts differ in this most",
    ))  # fmt: skip
    made = "trained on it" if text.trains else "of the given tokenizer"
    rows.append((
        "vocabulary",
        f"{text.vocab_size:,} tokens, {made}: {text.bytes_per_token:.2f} bytes a token, about {text.train_tokens:,.0f} tokens to train on",
    ))  # fmt: skip
    if speed is not None:
        rows += _time_rows(budget, choice, speed, spent)
    why = "a larger one would see too little text in this budget, a smaller one learn less from it"
    larger = [each for each in all_shapes(task) if parameters_of(each, text.vocab_size) > choice.parameters]
    if larger and not any(map(task.fits, larger)):
        why = "a larger one would not fit into this machine's memory"
    rows.append((
        "model",
        f"{choice.parameters:,} parameters: dim {model.dim}, {model.n_layers} layers, {model.n_heads} heads, context {model.max_seq_len}; {why}",
    ))  # fmt: skip
    if "model.max_seq_len" not in task.given and model.max_seq_len < SHORT:
        rows.append(
            (
                "",
                f"a prompt and its answer have {model.max_seq_len} tokens at most: so short a run learns more from many short sequences than "
                "from a few long ones; --model.max-seq-len 256 for longer answers",
            )
        )
    rows.append((
        "training",
        f"{choice.steps:,} steps of {train.batch_size} x {model.max_seq_len} tokens, {choice.tokens:,} in all, {choice.epochs:.1f} epochs, "
        f"{_number(choice.flops)}FLOP",
    ))  # fmt: skip
    if choice.unused > 0.02:
        rows.append(("", _unused_text(budget, choice)))
    rows.append(("rate", f"{rate_text(train, choice.steps, None)}; optimizer {train.optimizer}"))
    kept = sorted(name for name in task.given if name not in TOLD)
    if kept:
        rows.append(("kept", f"as you gave them: {', '.join(f'{name} {_value(config, name)}' for name in kept)}"))
    outside = not task.laws.least_flops <= choice.flops <= task.laws.most_flops
    far = "; outside of the FLOPs of their runs, so wider" if outside else ""
    rows.append((
        "expected",
        f"{choice.expected:.3f} bits per byte on the held-out text, in four of five cases {choice.low:.3f} to {choice.high:.3f}, by laws that were fitted on {task.laws.texts} texts{far}",
    ))  # fmt: skip
    unknown = [name for name in kept if not name.startswith(TAKEN_INTO_ACCOUNT)]
    if unknown:
        rows.append((
            "",
            f"this is for a recipe's own settings: the laws know nothing of {', '.join(unknown)}, and a run with what you gave may end "
            "elsewhere",
        ))  # fmt: skip
    if LAWS.level(text.level) < LEAST_LEVEL:
        rows.append(
            (
                "",
                "the held-out text repeats what stands before it: there is nothing to learn, and the laws know no such text",
            )
        )
    return rows


def _unused_text(budget: Budget, choice: Choice) -> str:
    """Return what is said of a budget that is larger than helps the text."""
    why = "by the laws more epochs, or a larger model, would learn it by heart; give more text"
    if budget.unit == "parameters":
        as_good = choice.parameters * (1 - choice.unused)
        return f"so many parameters do not help this text: {as_good:,.0f} are enough, since {why}"
    return f"more {budget.unit} do not help this text: {choice.unused:.0%} of the budget is left, since {why}"


def _number(value: float) -> str:
    """Return a number of FLOPs with a prefix: "16.3 T"."""
    power = min(5, max(0, math.floor(math.log10(max(1.0, value)) / 3)))
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}"


def _value(config: Config, name: str) -> object:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)


def table(rows: Rows) -> str:
    """Return rows of a name and a text as lines."""
    return "\n".join(f"{name:>10}  {text}" for name, text in rows)
