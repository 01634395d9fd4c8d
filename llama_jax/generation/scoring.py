"""Scores the tokens of a prompt: their log-probabilities, and the likeliest tokens in their places.

T tokens of a pass, V vocab.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.devices.compiling import GenerationProgram
from llama_jax.generation.decode import empty_cache, next_logits, prompt_slots, slots_read
from llama_jax.generation.rows import not_finite
from llama_jax.generation.sampling import likeliest_tokens
from llama_jax.model import Llama
from llama_jax.ops.cache import KVCache
from llama_jax.ops.loss import log_likelihood

# Tokens of a pass, whose logits are all in memory.
PASS = 512


class Scores(NamedTuple):
    """The scores of the tokens of a prompt after the first."""

    logprobs: list[float]
    top: list[tuple[list[int], list[float]]]
    """Ids and log-probabilities of the likeliest tokens in each one's place. Empty if none are asked for."""


def score(
    model: Llama,
    params: Any,
    prompt: Sequence[int],
    alternatives: int,
    cache_dtype: Any,
    source: str,
    absent: np.ndarray | None = None,
) -> Scores:
    """Return the scores of the tokens of a prompt, which does not share a batch with others.

    params: in the form for generation. cache_dtype: the type of keys and values. None: that of activations.
    absent: bool [V], ids without a token. None: all have one.
    Raises UserError, naming ``source``, if a logit is not finite.
    """
    absent = absent if absent is not None and absent.any() else None
    length = np.array([len(prompt)], np.int32)
    wanted = len(prompt) - 1
    logprobs: list[float] = []
    top: list[tuple[list[int], list[float]]] = []
    cache, slots = None, slots_read(max(prompt_slots(max(wanted, 1)), PASS))
    for start in range(0, wanted, PASS):
        end = min(start + PASS, wanted)
        width = min(PASS, prompt_slots(end - start))
        fed, targets = np.zeros((2, 1, width), np.int32)
        fed[0, : end - start], targets[0, : end - start] = prompt[start:end], prompt[start + 1 : end + 1]
        read = slots_read(start) if start else 0
        cache, *found = _score(
            model, params, fed, targets, length, absent, cache, slots, read, alternatives, cache_dtype or model.dtype
        )
        values, ids, likeliest = (np.asarray(x)[: end - start] for x in found)
        if not np.isfinite(values).all():
            raise not_finite(source, "in the logits of a prompt")
        logprobs += values.tolist()
        top += zip(ids.tolist(), likeliest.tolist(), strict=True) if alternatives else []
    return Scores(logprobs, top)


@functools.partial(
    GenerationProgram,
    static_argnames=("model", "slots", "end", "alternatives", "cache_dtype"),
    donate_argnames=("cache",),
)
def _score(
    model: Llama,
    params: Any,
    fed: jax.Array,
    targets: jax.Array,
    length: jax.Array,
    absent: jax.Array | None,
    cache: KVCache | None,
    slots: int,
    end: int,
    alternatives: int,
    cache_dtype: Any,
) -> tuple[KVCache, jax.Array, jax.Array, jax.Array]:
    """Return the cache with ``fed`` [1, T] added, and of each position the scores of ``targets`` [1, T].

    They are log-probabilities [T], and ids and log-probabilities of the likeliest tokens, each [T, alternatives].
    Without a cache, there is an empty one of ``slots`` slots, of which ``end`` are read. length: int32 [1], that of the
    prompt. absent: bool [V], ids without a token.
    """
    if cache is None:
        cache = empty_cache(model, jnp.zeros(1, jnp.int32), slots, cache_dtype, length)
    logits, cache = next_logits(model, params, fed, cache, end)
    (logits,) = logits
    is_finite = jnp.all(jnp.isfinite(logits), axis=-1)
    if absent is not None:
        logits = jnp.where(absent, -jnp.inf, logits)
    chosen = log_likelihood(logits, targets[0])
    # As in sampling, a single logit that is not finite makes all of them worthless.
    chosen = jnp.where(is_finite, chosen, jnp.nan)
    return cache, chosen, *likeliest_tokens(logits, alternatives)
