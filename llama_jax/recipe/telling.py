"""Says what a recipe counted, measured and decided, and why."""

import math

from llama_jax.cli.progress import bytes_text, duration
from llama_jax.recipe.choose import Budget, Choice, Task, all_shapes, parameters_of
from llama_jax.recipe.laws import LAWS
from llama_jax.recipe.speed import OTHER_SHARE, START_SECONDS, Speed
from llama_jax.recipe.text import Counted
from llama_jax.training.announcing import rate_text
from llama_jax.training.deciding import get

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
# A context below this, in tokens, is told with its reason.
SHORT = 256
# Texts of a lower level than this, in bits per byte, are repetitions.
LEAST_LEVEL = 0.1
Rows = list[tuple[str, str]]


def lines_of(task: Task, budget: Budget, choice: Choice, speed: Speed | None, spent: float) -> Rows:
    """Return what was counted, measured and decided, and why, as names and texts.

    ``spent`` is the seconds of the budget that are over.
    """
    return [
        *_text_rows(task.text),
        *([] if speed is None else _time_rows(budget, choice, speed, spent)),
        *_model_rows(task, choice),
        *_training_rows(budget, choice),
        *_expected_rows(task, choice),
    ]


def _text_rows(text: Counted) -> Rows:
    made = "trained on it" if text.trains else "of the given tokenizer"
    return [
        (
            "text",
            f"{text.source}: {bytes_text(text.train_bytes)} to train on; a sample of {bytes_text(text.sampled)} was read",
        ),
        *[("", note) for note in text.notes],
        (
            "level",
            f"{LAWS.level(text.level):.2f} bits per byte without a model: {text.level.counted:.2f} by counts of what follows "
            f"5 bytes, {text.level.compressed:.2f} by LZMA; texts differ in this most",
        ),
        (
            "vocabulary",
            f"{text.vocab_size:,} tokens, {made}: {text.bytes_per_token:.2f} bytes a token, about {text.train_tokens:,.0f} "
            "tokens to train on",
        ),
    ]


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


def _model_rows(task: Task, choice: Choice) -> Rows:
    model = choice.config.model
    why = "a larger one would see too little text in this budget, a smaller one learn less from it"
    larger = [each for each in all_shapes(task) if parameters_of(each, task.text.vocab_size) > choice.parameters]
    if larger and not any(map(task.fits, larger)):
        why = "a larger one would not fit into this machine's memory"
    shape = f"dim {model.dim}, {model.n_layers} layers, {model.n_heads} heads, context {model.max_seq_len}"
    rows = [("model", f"{choice.parameters:,} parameters: {shape}; {why}")]
    if "model.max_seq_len" not in task.given and model.max_seq_len < SHORT:
        rows.append((
            "",
            f"a prompt and its answer have {model.max_seq_len} tokens at most: so short a run learns more from many short sequences than "
            "from a few long ones; --model.max-seq-len 256 for longer answers",
        ))  # fmt: skip
    return rows


def _training_rows(budget: Budget, choice: Choice) -> Rows:
    train = choice.config.train
    batch = f"{train.batch_size} x {choice.config.model.max_seq_len}"
    return [
        (
            "training",
            f"{choice.steps:,} steps of {batch} tokens, {choice.tokens:,} in all, {choice.epochs:.1f} epochs, "
            f"{_number(choice.flops)}FLOP",
        ),
        *([("", _unused_text(budget, choice))] if choice.unused > 0.02 else []),
        ("rate", f"{rate_text(train, choice.steps, None)}; optimizer {train.optimizer}"),
    ]


def _expected_rows(task: Task, choice: Choice) -> Rows:
    """Return what the person gave and is kept, the loss to expect, and what the laws know nothing of."""
    kept = sorted(name for name in task.given if name not in TOLD)
    values = ", ".join(f"{name} {get(choice.config, name)}" for name in kept)
    rows = [("kept", f"as you gave them: {values}")] if kept else []
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
    if LAWS.level(task.text.level) < LEAST_LEVEL:
        rows.append((
            "",
            "the held-out text repeats what stands before it: there is nothing to learn, and the laws know no such text",
        ))  # fmt: skip
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


def table(rows: Rows) -> str:
    """Return rows of a name and a text as lines."""
    return "\n".join(f"{name:>10}  {text}" for name, text in rows)
