"""Log-likelihoods of continuations, many at a time: contexts are read once for all that follow them.

A row holds a context and, side by side behind it, its continuations. Each of these attends to the context and to
itself (ops/attention.py: a segment below 0 is shared), and its positions go on from the context's. So a row is one
forward pass without a cache, on every mesh and for every kind of weights.

B rows, T tokens of a row, W predicted tokens of a row, D dim, V vocab, C positions per chunk.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.build import count_parameters
from llama_jax.devices.compiling import GenerationProgram
from llama_jax.devices.sharding import constrain, mesh_axes_of, mesh_of, on_every_device, on_mesh
from llama_jax.errors import UserError, quoted
from llama_jax.generation import Model
from llama_jax.generation.rows import not_finite
from llama_jax.model import Llama
from llama_jax.ops.attention import Documents
from llama_jax.ops.loss import log_likelihood
from llama_jax.ops.rotary import original_length
from llama_jax.rope_scaling import depends_on_length
from llama_jax.tokenizer import Tokenizer

# Tokens of a forward pass, if the caller does not say how many rows it has; and the maximum number of rows then.
TOKENS, CPU_TOKENS = 16_384, 2_048
MOST_ROWS = 64
# Operations that take as long as compiling one more shape of rows, roughly.
COMPILING, CPU_COMPILING = 5e14, 1e11
# Lengths of rows are multiples of this. Attention in 128 positions or fewer is as fast padded.
GRAIN = 8
# A row with several continuations may be longer than the model's context, since each of them fits by itself.
MOST_CONTEXTS = 2
# Positions whose logits exist at once, over all rows.
LOGITS = 1024
# The segment of a context, which all continuations of its row see.
SHARED = -1


class Request(NamedTuple):
    """Tokens to score behind a context."""

    context: Sequence[int]
    """Token ids, one or more."""
    continuation: Sequence[int]
    """Token ids, one or more."""


class Score(NamedTuple):
    """The score of a continuation."""

    loglikelihood: float
    """The natural logarithm of its probability behind the context."""
    greedy: bool
    """Whether each of its tokens is the likeliest one, so that greedy decoding gives it."""
    tokens: int
    """Its number of tokens."""


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], bos: bool | None = None) -> list[Request]:
    """Encode contexts and continuations as the lm-eval harness does, so that results can be compared.

    White space at the end of a context belongs to the continuation. Both are encoded as one text, and are split behind
    as many tokens as the context alone has. ``bos``: whether BOS begins a context. None: as it begins the tokenizer's
    texts. An empty context is BOS.
    """
    moved = []
    for context, continuation in pairs:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    texts = list({text for context, continuation in moved for text in (context, context + continuation)})
    rows = tokenizer.encode_all(texts)
    if tokenizer.adds_bos:
        rows = [row[1:] for row in rows]
    # An empty text is BOS whatever the tokenizer does.
    ids = {text: [] if row == [tokenizer.bos_id] else row for text, row in zip(texts, rows, strict=True)}
    begun = [tokenizer.bos_id] if (tokenizer.adds_bos if bos is None else bos) else []
    return [
        Request([*begun, *ids[context]] or [tokenizer.bos_id], ids[context + more][len(ids[context]) :])
        for context, more in moved
    ]


def fit(request: Request, context: int) -> tuple[Request, int]:
    """Cut the beginning of a request that is too long for a model's context, as the lm-eval harness does.

    The last token is predicted and not read, so ``context`` + 1 tokens fit. Returns the request and the number of
    tokens that were cut. Raises UserError if the continuation alone does not fit.
    """
    if len(request.continuation) > context:
        raise UserError(
            f"expected a continuation of up to {context} tokens, the model's context, found {len(request.continuation)}"
        )
    cut = max(0, len(request.context) + len(request.continuation) - context - 1)
    return Request(request.context[cut:], request.continuation), cut


class Shape(NamedTuple):
    """The shape of a forward pass. Each is compiled once."""

    rows: int
    length: int
    width: int  # predicted tokens of a row
    shared: bool  # whether rows hold more than one continuation


class Packed(NamedTuple):
    """A context with the requests that share it."""

    context: tuple[int, ...]
    numbers: tuple[int, ...]  # of its requests
    tokens: int  # that are read
    predicted: int  # tokens that are scored


def whole(key: str, value: Any, low: int) -> int:
    """Return a whole number of ``low`` or more as an int. Raises UserError, which names ``key``, if it is none."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or number < low:
        raise UserError(f"{key}: expected a whole number, {low} or more, found {quoted(value)}")
    return number


def context_of(model: Model) -> int:
    """Return the most positions of a forward pass. Longer rows would have other frequencies with dynamic scaling."""
    args = model.args
    return min(args.max_seq_len, original_length(args)) if depends_on_length(args.rope_scaling) else args.max_seq_len


def score(
    model: Model,
    requests: Sequence[Request],
    rows: int = 0,
    share: bool = True,
    on_batch: Callable[[Sequence[int]], None] | None = None,
) -> list[Score]:
    """Return the score of each request, in order. Results do not depend on the order or on ``rows``, up to rounding.

    Arguments:
        model: the model. Its cache is not used.
        requests: token ids, which fit the context (see ``fit``).
        rows: contexts in a forward pass. 0: as many as fill it.
        share: whether requests of one context are read together. It changes the speed alone.
        on_batch: is called after each forward pass with the numbers of the requests that it scored.

    Raises UserError if a log-likelihood is not finite.
    """
    if not requests:
        return []
    # A sliding window counts places in the row. Dynamic frequencies depend on its length.
    share = share and model.args.window is None and not depends_on_length(model.args.rope_scaling)
    groups = _grouped(requests, share, MOST_CONTEXTS * context_of(model))
    module = model.module.clone(kernel="xla") if model.module.kernel == "splash" else model.module
    mesh = mesh_of(model.params)
    parts = _rows_divisor(mesh)
    scores: list[Score | None] = [None] * len(requests)
    for shape, together in _batches(groups, model, rows, parts):
        batch = _arrays(requests, together, shape)
        with on_mesh(mesh):
            documents = (batch.segments, batch.positions) if shape.shared else (None, None)
            found = _judge(module, model.params, batch.tokens, *documents, batch.at, batch.targets)
        logprobs, greedy = (np.asarray(x) for x in found)
        for row, group in enumerate(together):
            at = 0
            for number in group.numbers:
                end = at + len(requests[number].continuation)
                total = float(logprobs[row, at:end].sum(dtype=np.float64))
                if not math.isfinite(total):
                    raise not_finite(model.source, "in the score of a continuation")
                scores[number] = Score(total, bool(greedy[row, at:end].all()), end - at)
                at = end
        if on_batch is not None:
            on_batch([number for group in together for number in group.numbers])
    return cast(list[Score], scores)


@functools.partial(GenerationProgram, static_argnames=("model",))
def _judge(
    model: Llama,
    params: Any,
    tokens: jax.Array,
    segments: jax.Array | None,
    positions: jax.Array | None,
    at: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probabilities of tokens, float32 [B, W], and whether each is the likeliest one, bool [B, W].

    tokens, segments, positions: int [B, T], a row's tokens and their ``Documents``, or None. at: int [B, W], the
    columns whose next tokens are ``targets``, int [B, W].
    """
    tokens = constrain(jnp.asarray(tokens), "batch", "length")
    documents = None if segments is None else Documents(jnp.asarray(segments), jnp.asarray(positions))
    hidden = cast(jax.Array, model.apply({"params": params}, tokens, documents, method="hidden"))
    hidden = jnp.take_along_axis(hidden, jnp.asarray(at)[:, :, None], axis=1)
    B, W = hidden.shape[:2]
    C = min(W, max(1, LOGITS // B))
    count = -(-W // C)

    def chunks(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, count * C - W)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(B, count, C, *x.shape[2:]).swapaxes(0, 1)

    def judge(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, wanted = xs
        logits = cast(jax.Array, model.apply({"params": params}, x, method="logits"))
        return log_likelihood(logits, wanted), jnp.argmax(logits, axis=-1) == wanted

    found = jax.lax.map(judge, (chunks(hidden), chunks(jnp.asarray(targets))))
    logprobs, greedy = (x.swapaxes(0, 1).reshape(B, count * C)[:, :W] for x in found)
    return on_every_device(logprobs), on_every_device(greedy)


def _grouped(requests: Sequence[Request], share: bool, most: int) -> list[Packed]:
    """Gather requests of one context in a group, split where its row would have more than ``most`` tokens."""
    numbers: dict[Any, list[int]] = {}
    for number, request in enumerate(requests):
        numbers.setdefault(tuple(request.context) if share else number, []).append(number)
    groups = []
    for together in numbers.values():
        own: list[int] = []
        begin = read = len(requests[together[0]].context)
        for number in together:
            more = len(requests[number].continuation) - 1
            if own and read + more > most:
                groups.append(_packed(requests, own))
                own, read = [], begin
            own.append(number)
            read += more
        groups.append(_packed(requests, own))
    return groups


def _packed(requests: Sequence[Request], numbers: list[int]) -> Packed:
    context = tuple(requests[numbers[0]].context)
    predicted = sum(len(requests[number].continuation) for number in numbers)
    return Packed(context, tuple(numbers), len(context) + predicted - len(numbers), predicted)


def _batches(groups: Sequence[Packed], model: Model, rows: int, parts: int) -> Iterator[tuple[Shape, list[Packed]]]:
    """Yield the shape of each forward pass and the groups in it, the longest first."""
    context = context_of(model)
    devices = mesh_of(model.params).devices
    compiling = CPU_COMPILING if devices.flat[0].platform == "cpu" else COMPILING
    penalty = compiling / (2 * count_parameters(model.args))
    lengths = chosen_lengths([group.tokens for group in groups], context, penalty, rows)
    for shorter, length in reversed(list(zip([0, *lengths], lengths, strict=False))):
        own = [group for group in groups if shorter < group.tokens <= length]
        count = _rounded(min(rows or _rows_of(length), len(own)), parts)
        width = _rounded(max(group.predicted for group in own), GRAIN)
        shared = length > context or any(len(group.numbers) > 1 for group in own)
        for start in range(0, len(own), count):
            yield Shape(count, length, width, shared), own[start : start + count]


def chosen_lengths(tokens: Sequence[int], context: int, penalty: float, rows: int = 0) -> list[int]:
    """Choose the lengths that rows are padded to, which are the shapes to compile.

    The choice has the lowest cost in tokens: those that are computed, padding included, and ``penalty`` per length. It
    is found by dynamic programming over the distinct lengths, rounded up to multiples of GRAIN.

    Returns the lengths, ascending, up to ``context``.
    """
    rounded = np.minimum(-(-np.asarray(tokens) // GRAIN) * GRAIN, max(context, *tokens))
    lengths, counts = np.unique(rounded, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    best, begins = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, int)
    for end in range(1, len(lengths) + 1):
        length = int(lengths[end - 1])
        batch = min(rows or _rows_of(length), int(before[-1]))
        passes = -(-(before[end] - before[:end]) // batch)
        costs = best[:end] + passes * batch * length + penalty
        begins[end] = np.argmin(costs)
        best[end] = costs[begins[end]]
    chosen, end = [], len(lengths)
    while end:
        chosen.append(int(lengths[end - 1]))
        end = int(begins[end])
    return chosen[::-1]


class _Arrays(NamedTuple):
    """The arguments of a forward pass (see ``_judge``)."""

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    at: np.ndarray
    targets: np.ndarray


def _arrays(requests: Sequence[Request], groups: Sequence[Packed], shape: Shape) -> _Arrays:
    """Return the arrays of a forward pass, of which ``groups`` fill the first rows."""
    tokens, segments, positions = (np.zeros((shape.rows, shape.length), np.int32) for _ in range(3))
    at, targets = (np.zeros((shape.rows, shape.width), np.int32) for _ in range(2))
    for row, group in enumerate(groups):
        end = begin = len(group.context)
        tokens[row, :end], segments[row, :end], positions[row, :end] = group.context, SHARED, np.arange(end)
        scored = 0
        for segment, number in enumerate(group.numbers, 1):
            ids = requests[number].continuation
            more = len(ids) - 1
            own = slice(end, end + more)
            tokens[row, own], segments[row, own] = ids[:-1], segment
            positions[row, own] = begin + np.arange(more)
            at[row, scored : scored + len(ids)] = [begin - 1, *range(end, end + more)]
            targets[row, scored : scored + len(ids)] = ids
            scored += len(ids)
            end += more
    return _Arrays(tokens, segments, positions, at, targets)


def _rows_of(length: int) -> int:
    """Return how many rows of ``length`` tokens fill a forward pass."""
    tokens = CPU_TOKENS if jax.default_backend() == "cpu" else TOKENS
    return max(1, min(MOST_ROWS, tokens // length))


def _rows_divisor(mesh: jax.sharding.Mesh) -> int:
    """Return the number of devices that rows are spread over, which divides the rows of a forward pass."""
    return math.prod(mesh.shape[name] for name in mesh_axes_of("batch"))


def _rounded(number: int, to: int) -> int:
    return -(-number // to) * to
