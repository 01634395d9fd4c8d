"""Completions while they grow: where they end, and which part of their text is final."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation.decode import Row
from llama_jax.generation.token_text import textless, token_text
from llama_jax.tokenizer import Tokenizer


class Alternative(NamedTuple):
    """One of the likeliest tokens at a position."""

    token: str
    """Its text behind other text. Without whole characters, it is spelled as in the vocabulary: "</s>", "<0xE2>"."""
    id: int
    logprob: float
    """Natural logarithm of its probability under the model, before temperature and other changes."""


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt. ``token_ids`` and ``logprobs`` have the same length and do not include the end."""

    text: str
    """The text after the prompt, without a stop string and what follows it. With ``echo``, the prompt is before it."""
    token_ids: list[int]
    """Its tokens. With a stop string, those that begin before it; the text of the last one may reach into it."""
    logprobs: list[float]
    """Natural logarithm of each token's probability under the model, before temperature and other changes."""
    finish_reason: str
    """"stop": the model ended with EOS or another end token, or came to a stop string; "length": max_new_tokens or the
    context came first; "too_long": the prompt filled the context and was skipped (sample.py --too-long skip)."""
    top_logprobs: list[list[Alternative]] = field(default_factory=list)
    """With ``logprobs``: that many likeliest tokens at the place of each of ``token_ids``, the likeliest first."""
    prompt_token_ids: list[int] = field(default_factory=list)
    """With ``echo``: the tokens of the prompt."""
    prompt_logprobs: list[float | None] = field(default_factory=list)
    """With ``echo``: as ``logprobs``, of each token of the prompt. The first has None, since nothing is before it."""
    prompt_top_logprobs: list[list[Alternative] | None] = field(default_factory=list)
    """With ``echo`` and ``logprobs``: as ``top_logprobs``, of each token of the prompt. The first has None."""


def not_finite(source: str, where: str) -> UserError:
    """Return the error for a model, loaded from ``source``, that produces NaN or infinity."""
    return UserError(
        f"{source}: expected finite logits, found NaN or infinity {where}; the weights hold such values, or overflow the compute "
        "type (try --compute-dtype float32): use another checkpoint, or convert it again from intact weights"
    )


def ends_of(args: SampleArgs, end_ids: Collection[int]) -> frozenset[int]:
    """Return the ids of the tokens that end a completion with settings ``args``, if ``end_ids`` are the model's."""
    return frozenset(args.stop_token_ids) | (frozenset() if args.ignore_eos else frozenset(end_ids))


def with_stop_tokens(args: SampleArgs, tokenizer: Tokenizer) -> SampleArgs:
    """Return settings with which a completion also ends at the tokens that are stop strings, but have no text.

    The text of a completion never holds "</s>" where the model wrote EOS.
    """
    known = textless(tokenizer)
    ids = [known[text] for text in args.stop if text in known]
    return replace(args, stop_token_ids=(*args.stop_token_ids, *ids)) if ids else args


def for_sampler(row: Row, end_ids: Collection[int]) -> Row:
    """Return a row with settings for the sampler, which does not know the tokens that end a text.

    Its ``stop_token_ids`` are all tokens that end it.
    """
    prompt, args, number = row
    if args.min_new_tokens:
        args = replace(args, stop_token_ids=tuple(sorted(ends_of(args, end_ids))))
    return prompt, args, number


def alternatives(tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float], count: int) -> list[Alternative]:
    """Return the first ``count`` of a position's likeliest tokens. Rows of the model without a token have -inf."""
    known = [(i, x) for i, x in zip(ids, logprobs, strict=True) if x > -math.inf]
    return [Alternative(token_text(tokenizer, i), i, x) for i, x in known[:count]]


def echoed(completion: Completion, before: str, after: str = "") -> Completion:
    """Return a completion whose text stands between those that were given."""
    return replace(completion, text=before + completion.text + after)


class PartialCompletion:
    """The completion of a prompt while it grows. ``end_ids``: the tokens that end it. None: EOS."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        args: SampleArgs,
        context: int,
        source: str = "the model",
        end_ids: Collection[int] | None = None,
    ):
        self.finish_reason = ""
        self.ids: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[list[Alternative]] = []
        self._alternatives = args.logprobs
        self._tokenizer, self._prompt_ids, self._stop, self._source = tokenizer, prompt_ids, args.stop, source
        self._end_ids = ends_of(args, (tokenizer.eos_id,) if end_ids is None else end_ids)
        self._limit = min(args.max_new_tokens, context - len(prompt_ids))
        self._stream = tokenizer.stream(prompt_ids)
        self._text = ""  # the final text of the first _read tokens
        self._read = self._taken = 0

    def push(
        self,
        ids: np.ndarray,
        logprobs: np.ndarray,
        top_ids: np.ndarray | None = None,
        top_logprobs: np.ndarray | None = None,
    ) -> None:
        """Add the tokens of a chunk, up to an end token, the limit, or a stop string. See ``Sampled`` for the arrays.

        Raises UserError if a token was sampled from logits that are not finite.
        """
        for i, (token, logprob) in enumerate(zip(ids.tolist(), logprobs.tolist(), strict=True)):
            if self.finish_reason:
                break
            if math.isnan(logprob):
                raise not_finite(self._source, f"behind {len(self._prompt_ids) + len(self.ids)} tokens")
            if token in self._end_ids:
                self.finish_reason = "stop"
                break
            self.ids.append(token)
            self._logprobs.append(logprob)
            if self._alternatives and top_ids is not None and top_logprobs is not None:
                top = top_ids[i].tolist(), top_logprobs[i].tolist()
                self._top.append(alternatives(self._tokenizer, *top, self._alternatives))
            if len(self.ids) == self._limit:
                self.finish_reason = "length"
        if self._stop:
            self._read_text()
            self._cut(first_end(self._text, self._stop))

    def take(self) -> str:
        """Return the text that has become final since the last call, without a possible beginning of a stop string."""
        self._read_text()
        end = len(self._text) - (0 if self.finish_reason else held_back(self._text, self._stop))
        taken, self._taken = self._text[self._taken : end], max(self._taken, end)
        return taken

    def completion(self) -> Completion:
        """Return the completion, once it has a ``finish_reason``."""
        self._read_text()
        return Completion(self._text, self.ids, self._logprobs, self.finish_reason, self._top)

    def _read_text(self) -> None:
        self._text += self._stream.push(self.ids[self._read :]) if self._read < len(self.ids) else ""
        self._read = len(self.ids)
        if self.finish_reason:
            self._text += self._stream.flush()

    def _cut(self, end: int | None) -> None:
        if end is None:
            return
        self.finish_reason, self._text = "stop", self._text[:end]
        before = len(self._tokenizer.decode(self._prompt_ids))
        # Drop tokens from the end that the remaining text does not need.
        while self.ids and self._decoded(self.ids[:-1], before).startswith(self._text):
            del self.ids[-1], self._logprobs[-1], self._top[len(self.ids) :]
        self._read = len(self.ids)
        self._stream = self._tokenizer.stream([*self._prompt_ids, *self.ids])  # yields nothing more

    def _decoded(self, ids: Sequence[int], before: int) -> str:
        return self._tokenizer.decode([*self._prompt_ids, *ids])[before:]


def first_end(text: str, stop: Sequence[str]) -> int | None:
    """Return where the stop string begins that is complete first, or None.

    Completeness decides, not the beginning, so that the result does not depend on the size of chunks.
    """
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    return min(found)[1] if found else None


def held_back(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of a stop string."""
    return max((n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0)
