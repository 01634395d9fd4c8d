"""Speculative decoding: drafted tokens are checked together in one pass, which reads the weights only once.

A drafted token is kept if it is the token that would have been sampled. A token's random number depends on its row and
its place in the completion, so the text does not depend on the draft and equals that of plain decoding. A draft model
samples with the same random numbers and so agrees more often than with its own. (Leviathan et al., 2023, correct the
distribution of independent guesses instead.)

B rows, T tokens that are checked together, V vocab.
"""

import functools
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.devices.compiling import GenerationProgram
from llama_jax.devices.sharding import mesh_of, on_every_device, on_mesh
from llama_jax.generation.decode import (
    DecodeState,
    Row,
    Sampled,
    alternatives_of,
    bytes_read,
    choose,
    ensure_slots,
    next_logits,
    pad_rows,
    prompt_slots,
    read_prompts,
    sample_once,
    slots_read,
)
from llama_jax.generation.sampling import Sampler, sample
from llama_jax.model import Llama
from llama_jax.ops.cache import KVCache

# The longest run of tokens to look up in earlier text.
LONGEST_RUN = 3


@dataclass(frozen=True, eq=False)
class Draft:
    """The source of drafted tokens, and how many are drafted at a time.

    Without a model, they are looked up in earlier text.
    """

    tokens: int
    model: Llama | None = None
    params: Any = field(default=None, repr=False)  # in the form for generation (serving.py)


def generate_speculatively(
    model: Llama,
    params: Any,
    rows: Sequence[Row],
    max_new_tokens: int,
    draft: Draft,
    end_ids: Sequence[AbstractSet[int]],
    cache_dtype: Any = None,
    absent: np.ndarray | None = None,
) -> Iterator[Sampled]:
    """Yield what ``generate_chunks`` yields, in chunks as long as the guesses were right. All rows advance equally.

    end_ids: the tokens that end each row. Rows that have produced one do not limit the chunk. absent: as there.
    """
    mesh, count, alternatives = mesh_of(params), len(rows), alternatives_of(rows)
    rows = pad_rows(rows, mesh)
    end_ids = [*end_ids, *[end_ids[-1]] * (len(rows) - count)]
    longest = prompt_slots(max(len(prompt) for prompt, _, _ in rows))
    slots = slots_read(longest + max_new_tokens + draft.tokens + 1)
    with on_mesh(mesh):
        state = read_prompts(model, params, rows, longest, slots, cache_dtype or model.dtype, absent=absent)
        guesser = Lookup(draft.tokens) if draft.model is None else DraftModel(draft, rows, longest, slots)
        state, found = sample_once(model, state, alternatives)
    texts = [list(prompt) for prompt, _, _ in rows]
    filled, made, kept = longest, 0, 1
    while True:
        found = Sampled(*(None if x is None else np.asarray(x)[:, :kept] for x in found))
        for text, row in zip(texts, found.ids.tolist(), strict=True):
            text += row
        yield found.fetched(count)
        made += kept
        if made >= max_new_tokens:
            return
        waited_for = np.array(
            [ends.isdisjoint(text[len(text) - made :]) for ends, text in zip(end_ids, texts, strict=True)]
        )
        with on_mesh(mesh):
            guessed = guesser.guess(texts, state)
            fed = np.concatenate([[[text[-1]] for text in texts], guessed], axis=1).astype(np.int32)
            end = slots_read(filled + fed.shape[1])
            state = state.replace(cache=ensure_slots(state.cache, end))
            state, found, right = _check(model, params, state, fed, waited_for, end, alternatives)
        kept = int(right)
        filled += kept


@functools.partial(
    GenerationProgram,
    cache_bytes=bytes_read,
    static_argnames=("model", "end", "alternatives"),
    donate_argnames=("state",),
)
def _check(
    model: Llama,
    params: Any,
    state: DecodeState,
    fed: jax.Array,
    waited_for: jax.Array,
    end: int,
    alternatives: int,
) -> tuple[DecodeState, Sampled, jax.Array]:
    """Sample after each of ``fed`` [B, T], a row's last token and its guesses.

    Return the state, the tokens, and how many of each row to keep: one more than the guesses that were right in all
    rows ``waited_for`` [B].
    """
    logits, cache = next_logits(model, params, fed, state.cache, end)

    def one(carry: tuple[Sampler, jax.Array], now: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        sampler, number = carry
        made, sampler = choose(model, sampler, now, number, alternatives)
        return (sampler, number + 1), made

    _, made = jax.lax.scan(one, (state.sampler, state.made), logits.swapaxes(0, 1))
    sampled = Sampled(*(x.swapaxes(0, 1) for x in made))
    ids = sampled.ids
    right = jnp.cumprod(ids[:, :-1] == fed[:, 1:], axis=1).sum(axis=1)
    kept = 1 + jnp.min(jnp.where(waited_for, right, fed.shape[1] - 1))
    sampler = state.sampler
    if (p := sampler.penalties) is not None:
        counted = (jnp.arange(fed.shape[1]) < kept).astype(jnp.int32)
        counts = p.counts.at[jnp.arange(len(fed))[:, None], ids].add(counted)
        sampler = sampler.replace(penalties=p.replace(counts=counts))
    # The slots after the last right guess are overwritten later.
    cache = cache.replace(slot=state.cache.slot + kept)
    state = DecodeState(cache, state.logits, sampler, state.made + kept)
    return state, jax.tree.map(on_every_device, sampled), on_every_device(kept)


class Lookup:
    """Guesses that the tokens which followed the last ones before follow them again (prompt lookup)."""

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._runs: list[Runs] = []

    def guess(self, rows: list[list[int]], state: DecodeState) -> np.ndarray:
        """Return int32 [B, tokens] to follow ``rows``, prompts and completions so far.

        The cache of ``state`` lacks each row's last token.
        """
        self._runs = self._runs or [Runs() for _ in rows]
        return np.array([runs.look_up(row, self._tokens) for runs, row in zip(self._runs, rows, strict=True)], np.int32)


class Runs:
    """The runs of tokens in a growing row, each with the position where its latest occurrence ends."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._seen = 0  # number of tokens whose runs are known

    def look_up(self, row: Sequence[int], tokens: int) -> list[int]:
        """Return the tokens after the latest earlier occurrence of the longest run, up to LONGEST_RUN, that ends
        ``row``.

        Missing tokens are filled with the last one. ``row`` is that of the previous call with tokens appended.
        """
        for end in range(self._seen + 1, len(row)):  # runs at the very end have no earlier occurrence yet
            for length in range(1, min(LONGEST_RUN, end) + 1):
                self._ends[tuple(row[end - length : end])] = end
        self._seen = len(row) - 1
        found: list[int] = []
        for length in range(min(LONGEST_RUN, len(row) - 1), 0, -1):
            if (end := self._ends.get(tuple(row[-length:]), 0)) > 0:
                found = list(row[end : end + tokens])
                break
        return found + [row[-1]] * (tokens - len(found))


def look_up(row: Sequence[int], tokens: int) -> list[int]:
    """Return ``Runs.look_up`` of a single row."""
    return Runs().look_up(row, tokens)


class DraftModel:
    """Guesses with a smaller model of the same vocabulary, which samples with the same settings and random numbers."""

    def __init__(self, draft: Draft, rows: Sequence[Row], longest: int, slots: int):
        assert draft.model is not None
        # A guess need not be exact, since a wrong one only costs time.
        self._draft, self._model, self._read = draft, draft.model.clone(exact_rows=0), longest
        self._cache: KVCache = read_prompts(self._model, draft.params, rows, longest, slots, self._model.dtype).cache

    def guess(self, rows: list[list[int]], state: DecodeState) -> np.ndarray:
        """Return int32 [B, tokens], as ``Lookup`` does."""
        last = np.array([[row[-1]] for row in rows], np.int32)
        slot = self._read + int(state.made[0]) - 1  # the last token is not in the cache yet
        count = self._draft.tokens
        end = slots_read(slot + count + 1)
        cache = ensure_slots(self._cache, end).replace(slot=np.int32(slot))
        ids, self._cache = _propose(
            self._model, self._draft.params, cache, last, state.sampler, state.made, count, end, state.logits.shape[-1]
        )
        return np.asarray(ids)


@functools.partial(
    GenerationProgram,
    cache_bytes=lambda model, params, cache, *_, **__: cache.layer_bytes,
    static_argnames=("model", "count", "end", "vocab_size"),
    donate_argnames=("cache",),
)
def _propose(
    model: Llama,
    params: Any,
    cache: KVCache,
    last: jax.Array,
    sampler: Sampler,
    made: jax.Array,
    count: int,
    end: int,
    vocab_size: int,
) -> tuple[jax.Array, KVCache]:
    """Draft ``count`` tokens after ``last`` [B, 1]: int32 [B, count]. The returned cache holds all of them.

    ``vocab_size`` is the target's number of rows, which the draft's may differ from by padding.
    """

    def step(carry: Any, _: Any) -> tuple[Any, jax.Array]:
        cache, fed, sampler, number = carry
        logits, cache = next_logits(model, params, fed, cache, end)
        ids, _logprobs, sampler = sample(sampler, _as_wide(logits[:, 0], vocab_size), number)
        return (cache, ids[:, None], sampler, number + 1), ids

    start: Any = (cache, last, sampler, made)
    (cache, *_), ids = jax.lax.scan(step, start, None, length=count + 1)
    return on_every_device(ids[:count].T), cache


def _as_wide(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Return logits of ``vocab_size`` tokens, float32 [B, V], without the padding of another model or with more."""
    logits = logits[:, :vocab_size]
    return jnp.pad(logits, ((0, 0), (0, vocab_size - logits.shape[1])), constant_values=-jnp.inf)
