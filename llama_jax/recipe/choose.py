"""Chooses the settings of a run for a text and a budget. Everything here is a pure function of numbers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from llama_jax.config import Config, ModelArgs
from llama_jax.errors import UserError
from llama_jax.expected_args import Expected, ExpectedArgs
from llama_jax.recipe.laws import LAWS, Laws
from llama_jax.recipe.text import Counted
from llama_jax.training.flops import train_flops_per_token, update_flops
from llama_jax.training.rates import learning_rate

# Widths to choose from. The shapes between 128 and 256 are those that runs on CPUs were tuned with.
WIDTHS = (
    32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 4096,
    5120, 6144, 8192,
)  # fmt: skip
# A run may end after so many epochs, before its budget does, if it would learn its text by heart.
ENDS = tuple(0.25 * 1.1**i for i in range(80))
# A model of --parameters has this factor more or fewer, at most.
NEAR = 1.5
# More of a budget is used only if it is worth this share of the loss.
WORTH_IT = 1e-3
# What a recipe decides, unless the person gave it.
MODEL = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "max_seq_len")
TRAIN = (
    "schedule", "min_lr_ratio", "lr", "weight_decay", "warmup_steps", "max_steps", "batch_size", "gradient_accumulation_steps",
    "eval_interval", "eval_iters", "save_interval", "log_interval",
)  # fmt: skip
DECIDED = (
    *(f"model.{name}" for name in MODEL),
    "data.vocab_size",
    *(f"train.{name}" for name in TRAIN),
    *(f"expected.{field.name}" for field in fields(ExpectedArgs)),
)
# The shares of a run at which its recipe says what to expect. The recorded runs were evaluated first after a quarter; a
# fifth leaves room for the rounding of a quarter to whole steps. Nothing is known of what comes before.
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# The shortest context, in tokens, but for the smallest texts.
SHORTEST = 64
# Small models read their text several times, and decay more for it.
WEIGHT_DECAY = 0.5
# The share of the time that evaluations may take, and their number.
EVAL_SHARE, EVALUATIONS = 0.05, 4

Unit = Literal["minutes", "flops", "tokens", "parameters"]


@dataclass(frozen=True)
class Budget:
    """The limit of a run: FLOPs, tokens, minutes, which a speed turns into FLOPs, or the parameters of its model."""

    unit: Unit
    amount: float
    name: str
    """The words that the person typed, such as --minutes 30."""


@dataclass(frozen=True)
class Choice:
    """The settings of a run, and what to expect of it."""

    config: Config
    parameters: int
    tokens: int
    flops: float
    epochs: float
    expected: float
    low: float
    high: float
    unused: float = 0.0
    """The share of the budget that would not help this text. Of --parameters, that of the model."""

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.config.train.max_steps or 0


@dataclass(frozen=True)
class Task:
    """All that a choice depends on.

    ``given``: the fields that the person gave, which are kept. ``rows``: the batch is a multiple of it.
    ``most_parameters``: as many as fit into the memory of this machine, if it is the one that trains.
    """

    base: Config
    given: frozenset[str]
    text: Counted
    rows: int = 1
    laws: Laws = LAWS
    most_parameters: float = math.inf

    def fits(self, model: ModelArgs) -> bool:
        """Return whether a model is small enough for the memory."""
        return parameters_of(model, self.text.vocab_size) <= self.most_parameters


def choose(task: Task, budget: Budget) -> Choice:
    """Return the settings for a budget.

    Raises UserError if it is too small for a step of the smallest model, or if no shape has what was given.
    """
    if next(all_shapes(task), None) is None:
        given = ", ".join(sorted(name for name in task.given if name.startswith("model.")))
        raise UserError(
            f"model.n_heads: expected a divisor of the width with heads of an even size, found none; change {given}"
        )
    if next(shapes(task), None) is None:
        raise UserError(
            f"memory: expected a model of up to {task.most_parameters:,.0f} parameters, whose training fits into this machine's memory, found "
            "that the given shape has more; give a smaller one, or make a recipe for --topology or --flops"
        )
    if budget.unit == "flops":
        return _for_flops(task, budget.amount, budget)
    if budget.unit == "tokens":
        return _for_tokens(task, budget)
    return _for_parameters(task, budget)


def _for_tokens(task: Task, budget: Budget) -> Choice:
    """Return the best choice that reads so many tokens, or fewer if more do not help the text."""
    rough = _where(task, budget, lambda choice: choice.tokens)
    smaller = [each for each in shapes(task) if parameters_of(each, task.text.vocab_size) <= rough.parameters]
    best: tuple[float, ModelArgs, float] | None = None
    for model in smaller:
        model = in_context(task, model, budget.amount)
        step = _batch(task, model, budget.amount) * model.max_seq_len
        if step > budget.amount:
            continue
        loss, tokens = _length(task, model, budget.amount)
        if best is None or loss < best[0]:
            best = loss, model, tokens
    if best is None:
        raise UserError(f"{budget.name}: expected enough for a step of the smallest model, found less; give more")
    choice = _with_tokens(task, *best[1:])
    return replace(choice, unused=1 - choice.tokens / budget.amount if best[2] < budget.amount else 0.0)


def _for_parameters(task: Task, budget: Budget) -> Choice:
    """Return the choice with about so many parameters, which reads as many tokens as good runs of its size do."""
    vocab_size = task.text.vocab_size
    sizes = [(parameters_of(each, vocab_size), each) for each in shapes(task)]
    least, most = min(size for size, _ in sizes), max(size for size, _ in sizes)
    if not least / NEAR <= budget.amount <= most * NEAR:
        raise UserError(
            f"{budget.name}: expected about {least:,} to {most:,}, as the shapes to choose from have with a vocabulary of {vocab_size:,}, "
            f"found {budget.amount:,.0f}; give a number between"
        )
    size, shape = min(sizes, key=lambda each: abs(math.log(each[0] / budget.amount)))
    rough = _where(task, budget, lambda choice: choice.parameters)
    if rough.parameters >= budget.amount:
        tokens, unused = rough.tokens * rough.parameters / size, 0.0
    else:  # so large a model does not help the text, and yet reads as much of it as does no harm
        _, tokens = _length(task, shape, ENDS[-1] * task.text.train_tokens)
        unused = max(0.0, 1 - rough.parameters / size)
    return replace(_with_tokens(task, in_context(task, shape, tokens), tokens), unused=unused)


def _where(task: Task, budget: Budget, amount: Any) -> Choice:
    """Return the choice of the least FLOPs whose ``amount`` reaches the budget's, or of the most that help the text."""
    low, high = 6.0, 28.0  # powers of ten
    for _ in range(30):
        middle = (low + high) / 2
        try:
            reaches = amount(_for_flops(task, 10**middle, budget)) >= budget.amount
        except UserError:
            reaches = False
        low, high = (low, middle) if reaches else (middle, high)
    return _for_flops(task, 10**high, budget)


def _for_flops(task: Task, flops: float, budget: Budget) -> Choice:
    """Return the best choice that takes at most so many FLOPs."""
    best: tuple[float, ModelArgs, float] | None = None
    for model in shapes(task):
        model = in_context(task, model, flops / (6.0 * parameters_of(model, task.text.vocab_size)))
        most = _tokens_for(task, model, flops)
        if most < 1:
            continue
        loss, tokens = _length(task, model, most)
        if best is None or loss < best[0]:
            best = loss, model, tokens
    if best is None:
        raise UserError(f"{budget.name}: expected enough for a step of the smallest model, found less; give more")
    _, model, tokens = best
    choice = _with_tokens(task, model, tokens)
    ends_early = tokens < _tokens_for(task, model, flops)
    return replace(choice, unused=1 - choice.flops / flops if ends_early else 0.0)


def _length(task: Task, model: ModelArgs, most: float) -> tuple[float, float]:
    """Return what to expect of a model that reads up to ``most`` tokens, and how many it should read."""
    lengths = [most, *(end * task.text.train_tokens for end in ENDS if end * task.text.train_tokens < most)]
    found = [(_expected(task, model, tokens), tokens) for tokens in lengths]
    good = min(loss for loss, _ in found) * (1 + WORTH_IT)
    # All of them if they do no harm, else the shortest run that is as good.
    return found[0] if found[0][0] <= good else min((p for p in found if p[0] <= good), key=lambda p: p[1])


def _expected(task: Task, model: ModelArgs, tokens: float) -> float:
    text = task.text
    return task.laws.relative(parameters_of(model, text.vocab_size), tokens * text.bytes_per_token, text.train_bytes)


def _tokens_for(task: Task, model: ModelArgs, flops: float) -> float:
    """Return how many tokens so many FLOPs train a model on: whole steps, 0 if there is none."""
    tokens = flops / (6.0 * parameters_of(model, task.text.vocab_size))
    for _ in range(8):  # the batch depends on the tokens, and the FLOPs of an update on the batch
        batch = _batch(task, model, tokens)
        steps = math.floor(flops / _step_flops(task, model, batch))
        tokens = steps * batch * model.max_seq_len
        if steps < 1:
            return 0.0
    return tokens


def _with_tokens(task: Task, model: ModelArgs, tokens: float) -> Choice:
    """Return the choice of a model that reads so many tokens: whole steps, and at least one."""
    batch = _batch(task, model, tokens)
    steps = max(1, math.floor(tokens / (batch * model.max_seq_len)))
    config = _settings(task, model, batch, steps)
    read = steps * batch * model.max_seq_len
    parameters, flops = parameters_of(model, task.text.vocab_size), steps * _step_flops(task, model, batch)
    low, expected, high = _expectation(task, parameters, flops, read, config.train.min_lr_ratio)
    return Choice(config, parameters, read, flops, read / task.text.train_tokens, expected, low, high)


def _expectation(task: Task, parameters: int, flops: float, tokens: float, rate: float) -> Expected:
    """Return what to expect of a run of so many FLOPs after ``tokens``, at a share ``rate`` of the peak rate."""
    text, laws = task.text, task.laws
    loss = laws.bits_per_byte(text.level, parameters, tokens * text.bytes_per_token, text.train_bytes, rate)
    # The laws know no run that is as short as to have learned nothing, and nothing costs the logarithm of the vocabulary.
    loss = min(loss, math.log2(text.vocab_size) / text.bytes_per_token)
    low, high = laws.interval(loss, flops, rate, text.frequencies)
    return Expected(low, loss, high)


def with_curve(task: Task, choice: Choice) -> Choice:
    """Return a choice whose configuration says what to expect during the run, of which ``expected`` is the end."""
    train = choice.config.train
    rates, points = learning_rate(train, choice.steps), dict[int, tuple[float, ...]]()
    for share in SHARES:
        rate = float(rates(share * choice.steps)) / train.lr
        found = _expectation(task, choice.parameters, choice.flops, share * choice.tokens, rate)
        points[max(1, round(share * choice.tokens))] = tuple(float(f"{value:.5g}") for value in found)
    if len(points) == 1:  # a run of a token
        return choice
    low, bits, high = zip(*points.values(), strict=True)
    curve = ExpectedArgs(tuple(points), low, bits, high, choice.parameters)
    return replace(choice, config=replace(choice.config, expected=curve))


def shapes(task: Task) -> Iterator[ModelArgs]:
    """Yield the shapes to choose from, with what the person gave, that fit into memory."""
    return filter(task.fits, all_shapes(task))


def all_shapes(task: Task) -> Iterator[ModelArgs]:
    """Yield the shapes to choose from, with what the person gave, however much memory they take."""
    base, given = task.base.model, task.given
    for dim in (base.dim,) if "model.dim" in given else WIDTHS:
        chosen: dict[str, Any] = {
            "dim": dim, "n_layers": layers_for(dim), "n_heads": heads_for(dim), "n_kv_heads": None,
            "multiple_of": 32 if dim < 1024 else 256, "ffn_dim_multiplier": 1.25,
        }  # fmt: skip
        model = replace(base, **{name: value for name, value in chosen.items() if f"model.{name}" not in given})
        if model.dim % model.n_heads == 0 and model.head_width % 2 == 0:
            yield model


def bytes_within(budget: Budget) -> float:
    """Return about how many bytes a good run reads within a budget: 4 million for 16 TFLOP, and by its root elsewhere.

    A vocabulary is chosen for no more, since rare tokens are not learned from few of them.
    """
    if budget.unit == "flops":
        return 4e6 * (budget.amount / 1.6e13) ** 0.5
    return 2.6 * budget.amount  # tokens, or parameters, of which a good run has about as many


def layers_for(dim: int) -> int:
    """Return the layers of a model: one for each 64 features up to 768, and then fewer, 33 at 4,096, as LLaMA's."""
    return max(2, round(dim / 64 if dim <= 768 else 12 * (dim / 768) ** 0.6))


def heads_for(dim: int) -> int:
    """Return the number of heads: of 32 features below a width of 512, of 64 below 2,048, else of 128."""
    wanted = 32 if dim < 512 else 64 if dim < 2048 else 128
    widths = [width for width in range(2, dim + 1, 2) if dim % width == 0]
    return dim // min(widths, key=lambda width: abs(math.log(width / wanted))) if widths else 1


def in_context(task: Task, model: ModelArgs, tokens: float) -> ModelArgs:
    """Return a model with the context of a run of so many tokens, unless the person gave one."""
    if "model.max_seq_len" in task.given:
        return model
    size = parameters_of(model, task.text.vocab_size)
    return replace(model, max_seq_len=context_for(size, tokens, task.text.train_tokens))


def context_for(parameters: float, read: float, tokens: float) -> int:
    """Return the context of a model that reads so many tokens of a text of ``tokens``.

    It is 64 tokens below 1.6 million that are read, and grows by their root up to 256 for small models and to 2,048 for
    those of more than 500 million parameters: a short run learns more from many short sequences than from a few long
    ones. It is at most a sixteenth of the text.
    """
    most = 256 if parameters < 1e7 else 512 if parameters < 1e8 else 1024 if parameters < 5e8 else 2048
    length = min(most, max(SHORTEST, 2 ** math.floor(math.log2(max(1.0, read**0.5 / 10)))))
    while length > 32 and length * 16 > tokens:
        length //= 2
    return length


def _batch(task: Task, model: ModelArgs, tokens: float) -> int:
    """Return the sequences of a step: the person's, or about as many as the run's tokens bear."""
    if "train.batch_size" in task.given:
        return task.base.train.batch_size
    # The batch up to which more sequences save steps grows with what a run has learned (McCandlish et al., 2018). 1,448
    # tokens for a run of 1.4 million are those of tuned runs on a megabyte; with this power, 4 million for 10^13.
    wanted = 1448 * (tokens / 1.4e6) ** 0.5 / model.max_seq_len
    power = max(1, 2 ** round(math.log2(max(1.0, wanted))))
    pieces = task.rows * task.base.train.gradient_accumulation_steps
    return -(-power // pieces) * pieces


def _settings(task: Task, model: ModelArgs, batch: int, steps: int) -> Config:
    """Return the whole configuration, with what the person gave."""
    base, given, text = task.base, task.given, task.text
    every = -(-steps // EVALUATIONS)
    held_out = text.eval_tokens / model.max_seq_len
    # An evaluation's pass is a third of a step's.
    affordable = EVAL_SHARE * steps * batch * 3 / EVALUATIONS
    iters = 0 if held_out <= affordable else max(1, round(affordable / 16))
    chosen: dict[str, Any] = {
        "schedule": "linear", "min_lr_ratio": 0.0, "lr": rate_for(model.dim),
        "weight_decay": WEIGHT_DECAY, "warmup_steps": min(max(1, steps // 25), 2000, steps - 1), "max_steps": steps, "batch_size": batch, "eval_interval": every,
        "eval_iters": iters, "save_interval": every, "log_interval": max(1, min(10, steps // 20)),
    }  # fmt: skip
    train = replace(base.train, **{name: value for name, value in chosen.items() if f"train.{name}" not in given})
    data = replace(base.data, vocab_size=text.trains) if text.trains else base.data
    return replace(base, model=model, data=data, train=train)


def rate_for(dim: int) -> float:
    """Return the learning rate: 0.0025 at a width of 192, elsewhere by the width's root, to two digits, up to 0.004."""
    return min(4e-3, float(f"{2.5e-3 * (192 / dim) ** 0.5:.2g}"))


def parameters_of(model: ModelArgs, vocab_size: int) -> int:
    """Return the number of parameters of a model with a vocabulary, by arithmetic, as a choice looks at hundreds."""
    dim, queries, keys = model.dim, model.n_heads * model.head_width, model.kv_heads * model.head_width
    biases = (queries + 2 * keys + dim) * model.attention_bias + (2 * model.hidden_width + dim) * model.mlp_bias
    layer = 2 * dim * (queries + keys) + 3 * dim * model.hidden_width + 2 * dim + biases
    return model.n_layers * layer + dim + dim * vocab_size * (1 if model.tie_embeddings else 2)


def _step_flops(task: Task, model: ModelArgs, batch: int) -> float:
    sized = replace(model, vocab_size=task.text.vocab_size)
    per_token = train_flops_per_token(sized, parameters=parameters_of(model, task.text.vocab_size))
    return batch * model.max_seq_len * per_token + update_flops(sized, task.base.train)
