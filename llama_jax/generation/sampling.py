"""Chooses the next token from logits, row by row: penalties, bias, temperature, top-k, Meta's top-p rule, min-p.

Each row has its own settings and random key, and rows never affect each other. B rows, V vocab.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.ops.exact import rounded
from llama_jax.ops.loss import log_likelihood
from llama_jax.seeds import random_key


class Sampler(flax.struct.PyTreeNode):
    """The sampling settings of each row. A setting that no row uses is None and costs nothing."""

    keys: (
        jax.Array
    )  # random keys [B]; a token's random number depends on its row's key and its number in the completion
    temperature: jax.Array  # float32 [B]
    filters: dict[str, jax.Array]  # rule of FILTERS -> each row's value [B]; rules that no row uses are absent
    bias: jax.Array | None  # float32 [B, V]
    penalties: "Penalties | None"
    absent: jax.Array | None = None  # bool [B, V]: whether the vocabulary has no such token; padding is never sampled
    not_yet: "NotYet | None" = None
    allowed: jax.Array | None = None  # uint32 [B, W], the tokens that each row may sample, as bits; None: all


class NotYet(flax.struct.PyTreeNode):
    """The tokens that a row may not sample yet: those that would end a completion that is too short."""

    ends: jax.Array  # bool [B, V]: whether a token ends a row
    until: jax.Array  # int32 [B]: the number of the first token that may be one of them


class Penalties(flax.struct.PyTreeNode):
    """The penalties of each row, and the counts they depend on."""

    repetition: jax.Array  # float32 [B]
    presence: jax.Array  # float32 [B]
    frequency: jax.Array  # float32 [B]
    prompt: jax.Array  # bool [B, V]: whether the prompt contains a token
    counts: jax.Array  # int32 [B, V]: how often the completion contains a token


def check_tokens(args: SampleArgs, absent: np.ndarray, prefix: str = "", ends: Collection[int] = ()) -> None:
    """Raise UserError, after ``prefix``, if settings name tokens that do not exist, or leave none to sample.

    absent: bool [V], ids without a token, which are never sampled. ends: the tokens that end a completion.
    """
    vocab_size = len(absent)
    for name, ids in (("logit_bias", args.logit_bias), ("stop_token_ids", args.stop_token_ids)):
        for token in ids:
            if not 0 <= token < vocab_size:
                raise UserError(f"{prefix}{name}: expected ids from 0 to {vocab_size - 1}, found {token}")
    if args.logprobs > vocab_size:
        raise UserError(
            f"{prefix}logprobs: expected up to {vocab_size}, the size of the vocabulary, found {args.logprobs}"
        )
    biases = zip(args.logit_bias, _float32(args.logit_bias.values()), strict=True)
    forbidden = {token for token, bias in biases if bias == -np.inf}
    forbidden |= {int(i) for i in np.flatnonzero(absent)}
    if len(forbidden) == vocab_size:
        raise UserError(
            f"{prefix}logit_bias: expected a token that may be said, found all {vocab_size} forbidden; leave one out"
        )
    if args.min_new_tokens and len(forbidden.union(ends)) == vocab_size:
        raise UserError(
            f"{prefix}min_new_tokens: expected a token that does not end the text, found all {vocab_size} in logit_bias, "
            "stop_token_ids or the model's end tokens; leave one out"
        )


def make_sampler(
    rows: Sequence[tuple[Sequence[int], SampleArgs, int]], vocab_size: int, absent: np.ndarray | None = None
) -> Sampler:
    """Return the sampler of rows of (prompt, settings, number of the row among the prompt's ``n``).

    The tokens that end a row are its ``stop_token_ids``: callers that generate name EOS among them (rows.py).
    absent: bool [V], which ids have no token. None: all have one.
    """
    settings = [args for _, args, _ in rows]
    filters = {
        name: jnp.array([getattr(args, name) for args in settings], rule.dtype)
        for name, rule in FILTERS.items()
        if any(getattr(args, name) != rule.off for args in settings)
    }
    penalties = bias = not_yet = None
    if any(a.repetition_penalty != 1 or a.presence_penalty or a.frequency_penalty for a in settings):
        penalties = _make_penalties(rows, vocab_size)
    if any(args.logit_bias for args in settings):
        bias = np.zeros((len(rows), vocab_size), np.float32)
        for row, args in zip(bias, settings, strict=True):
            row[list(args.logit_bias)] = _float32(args.logit_bias.values())
    if any(args.min_new_tokens for args in settings):
        ends = np.zeros((len(rows), vocab_size), bool)
        for row, args in zip(ends, settings, strict=True):
            row[list(args.stop_token_ids)] = True
        not_yet = NotYet(jnp.asarray(ends), jnp.array([args.min_new_tokens for args in settings], jnp.int32))
    seeds = np.array([args.seed for args in settings], np.uint32)
    keys = _row_keys(seeds, np.array([number for _, _, number in rows], np.uint32))
    # Greedy rows ignore what follows the temperature. A temperature too small to divide by in float32 counts as 0.
    temperature = np.array([args.temperature for args in settings], np.float32)
    temperature[temperature < np.finfo(np.float32).tiny] = 0
    return Sampler(
        keys,
        jnp.asarray(temperature),
        filters,
        None if bias is None else jnp.asarray(bias),
        penalties,
        None if absent is None or not absent.any() else jnp.asarray(np.broadcast_to(absent, (len(rows), vocab_size))),
        not_yet,
    )


def _float32(values: Iterable[float]) -> np.ndarray:
    """Return numbers as float32. Those below its range become -inf."""
    with np.errstate(over="ignore"):
        return np.array(list(values), np.float64).astype(np.float32)


@jax.jit
@jax.vmap
def _row_keys(seed: jax.Array, number: jax.Array) -> jax.Array:
    return jax.random.fold_in(random_key(seed), number)


def _make_penalties(rows: Sequence[tuple[Sequence[int], SampleArgs, int]], vocab_size: int) -> Penalties:
    prompt = np.zeros((len(rows), vocab_size), bool)
    for row, (ids, _, _) in zip(prompt, rows, strict=True):
        row[list(ids)] = True
    return Penalties(
        jnp.array([args.repetition_penalty for _, args, _ in rows], jnp.float32),
        jnp.array([args.presence_penalty for _, args, _ in rows], jnp.float32),
        jnp.array([args.frequency_penalty for _, args, _ in rows], jnp.float32),
        jnp.asarray(prompt),
        jnp.zeros(prompt.shape, jnp.int32),
    )


@jax.named_scope("sampling")
def sample(
    sampler: Sampler, logits: jax.Array, number: jax.Array, one_by_one: bool = False
) -> tuple[jax.Array, jax.Array, Sampler]:
    """Choose each row's next token, the ``number``-th of its completion: logits float32 [B, V], number int32 [B] ->
    int32 [B].

    At temperature 0 it is the likeliest token. Also returns the token's log-probability under the model, before
    penalties and other changes (NaN if a logit is not finite), and the sampler with updated counts. ``one_by_one``
    processes rows one after the other, so that a row's sums do not depend on the other rows.
    """
    if one_by_one:

        def one(row: Any) -> Any:
            return jax.tree.map(lambda x: x[0], sample(*jax.tree.map(lambda x: x[None], row)))

        return jax.lax.map(one, (sampler, logits, number))
    is_finite = jnp.all(jnp.isfinite(logits), axis=-1)
    if sampler.absent is not None:
        logits = jnp.where(sampler.absent, -jnp.inf, logits)
    changed = _changed(sampler, logits, number)
    likeliest = jnp.argmax(changed, axis=-1).astype(jnp.int32)
    # If all rows take the likeliest token, no random numbers are needed, and none of the sums for top-p.
    ids = jax.lax.cond(jnp.any(sampler.temperature > 0), _draw, lambda *_: likeliest, sampler, changed, number)
    ids = jnp.where(sampler.temperature > 0, ids, likeliest)
    logprobs = log_likelihood(logits, ids)
    logprobs = jnp.where(is_finite, logprobs, jnp.nan)
    if sampler.penalties is not None:
        p = sampler.penalties
        counted = p.counts.at[jnp.arange(len(ids)), ids].add(1)
        sampler = sampler.replace(penalties=p.replace(counts=counted))
    return ids, logprobs, sampler


def _changed(sampler: Sampler, logits: jax.Array, number: jax.Array) -> jax.Array:
    """Return the logits after penalties and bias, with -inf for tokens that may not be sampled.

    Repetition is penalised as in CTRL (Keskar et al., 2019, section 4.1), with multiplication for negative logits.
    Presence and frequency are penalised as in OpenAI's API.
    """
    if (p := sampler.penalties) is not None:
        repetition = jnp.where(p.prompt | (p.counts > 0), p.repetition[:, None], 1.0)
        logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits -= jnp.where(p.counts > 0, p.presence[:, None], 0.0)
        logits -= rounded(p.frequency[:, None] * p.counts)
    if sampler.bias is not None:
        logits += sampler.bias
    if (n := sampler.not_yet) is not None:
        logits = jnp.where(n.ends & (number < n.until)[:, None], -jnp.inf, logits)
    if sampler.allowed is not None:
        tokens = jnp.arange(logits.shape[-1])
        bits = sampler.allowed[:, tokens // 32] >> (tokens % 32).astype(jnp.uint32) & 1
        logits = jnp.where(bits == 1, logits, -jnp.inf)
    return logits


def _draw(sampler: Sampler, logits: jax.Array, number: jax.Array) -> jax.Array:
    """Draw a token per row by tempered probability among those that top-k, top-p and min-p keep: int32 [B]."""
    temperature = jnp.where(sampler.temperature > 0, sampler.temperature, 1.0)[:, None]
    # Subtract the largest logit first: as temperature goes to 0, all others go to -inf, and nothing overflows.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    probs = jax.nn.softmax(logits)
    for name, rule in FILTERS.items():
        if name in sampler.filters:
            probs = rule.apply(probs, sampler.filters[name])
    # Take the token where the cumulative probability passes a random number. Gumbel's trick would need V random
    # numbers.
    uniform = jax.vmap(lambda key, number: jax.random.uniform(jax.random.fold_in(key, number), dtype=jnp.float32))(
        sampler.keys, number
    )
    # Parallel sums are not exactly monotonic. Setting sums of zero-probability tokens to 0 prevents choosing one.
    passed = jnp.where(probs > 0, jnp.cumsum(probs, axis=-1), 0.0)
    border = uniform[:, None] * jnp.max(passed, axis=-1, keepdims=True)
    return jnp.min(
        jnp.where(passed > border, jnp.arange(probs.shape[-1], dtype=jnp.int32), probs.shape[-1] - 1), axis=-1
    )


@jax.named_scope("alternatives")
def likeliest_tokens(logits: jax.Array, count: int, one_by_one: bool = False) -> tuple[jax.Array, jax.Array]:
    """Return the ``count`` likeliest tokens of each row, the likeliest first, of float32 [B, V].

    Returns ids, int32 [B, count], and log-probabilities, float32 [B, count], which are those of ``sample``. Equal
    tokens are ordered by id. ``one_by_one``: as in ``sample``.
    """
    if one_by_one:
        ids, logprobs = jax.lax.map(lambda row: likeliest_tokens(row[None], count), logits)
        return ids[:, 0], logprobs[:, 0]
    values, ids = jax.lax.top_k(logits, min(count, logits.shape[-1]))
    return ids, values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _top_k(probs: jax.Array, top_k: jax.Array) -> jax.Array:
    limit = jnp.where(top_k > 0, top_k - 1, probs.shape[-1]).astype(jnp.float32)
    kept = jnp.where(keep_top(probs, jnp.ones_like(probs), limit), probs, 0.0)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


def _top_p(probs: jax.Array, top_p: jax.Array) -> jax.Array:
    return jnp.where(keep_top(probs, probs, top_p), probs, 0.0)


def _min_p(probs: jax.Array, min_p: jax.Array) -> jax.Array:
    return jnp.where(probs >= min_p[:, None] * jnp.max(probs, axis=-1, keepdims=True), probs, 0.0)


def keep_top(probs: jax.Array, weights: jax.Array, limit: jax.Array) -> jax.Array:
    """Return the mask of the likeliest tokens: those whose likelier tokens weigh at most ``limit`` together.

    probs, weights: float32 [B, V], not negative; limit [B]. With probabilities as weights this is Meta's top-p rule
    (llama/generation.py, sample_top_p): a token is dropped if those before it have more than top_p, so the token that
    crosses the border stays, and so does the first. With weights of 1 it is top-k. Equal tokens are ordered by id.

    Nothing is sorted. The border is a probability, found by bisection on its bits, since floats that are not negative
    are ordered like their bits.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)
    limit = limit[:, None]

    def before(border: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(bits > border, weights, 0.0), axis=-1, keepdims=True)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends  # tokens at ``high`` stay, those at ``low`` are dropped
        middle = low + (high - low) // 2
        stays = before(middle) <= limit
        return jnp.where(stays, low, middle), jnp.where(stays, middle, high)

    ends = jnp.full_like(bits[:, :1], -1), jnp.max(bits, axis=-1, keepdims=True)
    _, border = jax.lax.fori_loop(0, 31, halve, ends)
    # Tokens exactly at the border are equal. They stay in order of their ids while there is room.
    at_border = bits == border
    earlier = jnp.cumsum(jnp.where(at_border, weights, 0.0), axis=-1) - jnp.where(at_border, weights, 0.0)
    return (bits > border) | at_border & (before(border) + earlier <= limit)


class Filter(NamedTuple):
    """A rule that drops tokens by their probabilities. The field of SampleArgs with the rule's name sets it."""

    off: float
    """The value with which the rule drops nothing."""
    apply: Callable[[jax.Array, jax.Array], jax.Array]
    """Maps probabilities, float32 [B, V], and each row's value, [B], to probabilities with 0 for dropped tokens.

    The result need not sum to 1.
    """
    dtype: type = np.float32
    """The type of the rows' values."""


# The rules apply in this order. docs/design.md has the steps to add one.
FILTERS: dict[str, Filter] = {
    "top_k": Filter(0, _top_k, np.int32),
    "top_p": Filter(1.0, _top_p),
    "min_p": Filter(0.0, _min_p),
}
