"""Computes on the host, by llguidance, which tokens a JSON schema allows next.

B rows, V vocab, W 32-bit words of a mask.
"""

import functools
import importlib.util
import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from llama_jax.config import SampleArgs
from llama_jax.errors import UserError, quoted
from llama_jax.generation.decode import Row
from llama_jax.generation.token_text import token_bytes, token_text
from llama_jax.programs import install_command
from llama_jax.tokenizer import Tokenizer

# White space between the parts of a JSON text: models that may write more of it at times write nothing else.
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,40}"


def check_schema(args: SampleArgs, tokenizer: Tokenizer, drafts: bool, prefix: str = "") -> None:
    """Raise UserError, after ``prefix``, if the JSON schema of settings cannot be followed.

    That is so if llguidance is missing or does not support it, or if tokens are drafted (``drafts``).
    """
    schema = args.json_schema
    if not schema:
        return
    if drafts:
        raise UserError(
            f"{prefix}json_schema: expected no --draft beside it, since the schema decides after each token, found one; leave one "
            "of them out"
        )
    texts = {token: token_text(tokenizer, token) for token in args.stop_token_ids if token_bytes(tokenizer, token)}
    for token, text in texts.items():
        raise UserError(
            f"{prefix}stop_token_ids: expected tokens without text beside json_schema, found {token}, {quoted(text)}; leave one of "
            "them out"
        )
    if importlib.util.find_spec("llguidance") is None:
        raise UserError(
            f"{prefix}json_schema: expected the package llguidance, found none; {install_command('grammar')}, or leave "
            "the schema out"
        )
    if error := _matcher(schema, tokenizer).get_error():
        reason = " ".join(error.split())
        raise UserError(
            f"{prefix}json_schema: expected a schema that can be followed token by token, found {quoted(schema, 60)}: "
            f"{reason[:160]}; change or leave out that part"
        )


class Constraints:
    """The states of a pass's rows in their schemas. Rows without a schema may sample every token."""

    def __init__(self, tokenizer: Tokenizer, rows: Sequence[Row], ends: Sequence[AbstractSet[int]], vocab_size: int):
        """``ends``: the tokens that end each row. They are allowed where, and only where, the schema is fulfilled."""
        import llguidance

        self._vocab_size, self._eos = vocab_size, tokenizer.eos_id
        self._args, self._ends = [args for _, args, _ in rows], ends
        self._matchers = [
            _matcher(args.json_schema, tokenizer).deep_copy() if args.json_schema else None for args in self._args
        ]
        self._executor = llguidance.LLExecutor()
        self._made, self._error = 0, ""
        self._words = -(-tokenizer.vocab_size // 32)

    def masks(self, rows: int) -> np.ndarray:
        """Return which tokens each row may sample next, as bits: uint32 [rows, W]. More rows may sample every token.

        Raises UserError if a row may sample none, or a schema takes too much work.
        """
        masks = np.full((rows, -(-self._vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        found = np.zeros((len(self._matchers), self._words), np.int32)
        active = [(matcher, i) for i, matcher in enumerate(self._matchers) if matcher is not None]
        if active:
            from llguidance.numpy import fill_next_token_bitmask_par

            fill_next_token_bitmask_par(self._executor, active, found)
        for matcher, i in active:
            self._error = self._error or matcher.get_error()
            masks[i] = 0
            masks[i, : self._words] = found[i].view(np.uint32)
            # llguidance allows EOS where the schema is fulfilled.
            fulfilled = bool(_bit(masks[i], self._eos))
            for token in {self._eos, *self._ends[i]}:
                _set_bit(masks[i], token, fulfilled and token in self._ends[i])
            for token, bias in self._args[i].logit_bias.items():
                if np.float32(bias) == -np.inf:
                    _set_bit(masks[i], token, False)
            if not masks[i].any():
                raise UserError(
                    f"logit_bias: expected a token that json_schema allows behind {self._made}, found all of them forbidden; leave "
                    "some out"
                )
        self._check()
        return masks

    def push(self, ids: np.ndarray) -> None:
        """Take the tokens that rows have sampled, int [B or more]. ``masks`` raises what is wrong with them."""
        self._made += 1
        for i, matcher in enumerate(self._matchers):
            if matcher is None:
                continue
            if int(ids[i]) in self._ends[i] or self._made >= self._args[i].max_new_tokens:
                self._matchers[i] = None
            elif not matcher.consume_token(int(ids[i])):
                self._matchers[i], self._error = None, self._error or matcher.get_error() or "the token is not allowed"

    def _check(self) -> None:
        if self._error:
            reason = " ".join(self._error.split())[:160]
            raise UserError(
                f"json_schema: expected a schema that can be followed token by token, found that llguidance gave up behind "
                f"{self._made} tokens: {reason}; make it simpler"
            )


def _bit(mask: np.ndarray, token: int) -> int:
    return int(mask[token >> 5]) >> (token & 31) & 1


def _set_bit(mask: np.ndarray, token: int, value: bool) -> None:
    bit = np.uint32(1 << (token & 31))
    mask[token >> 5] = mask[token >> 5] | bit if value else mask[token >> 5] & ~bit


@functools.lru_cache(64)
def _matcher(schema: str, tokenizer: Tokenizer) -> Any:
    """Return llguidance's matcher at the start of a schema. Its ``get_error`` says what is wrong with the schema.

    A space may come first, since SentencePiece's vocabularies begin words with one. Callers copy the matcher.
    """
    import llguidance

    found = json.loads(schema)
    if isinstance(found, dict):
        found = found | {"x-guidance": {"whitespace_pattern": WHITE_SPACE}}
    parts = [{"lark_grammar": "start: / ?/ @schema"}, {"name": "schema", "json_schema": found}]
    return llguidance.LLMatcher(_vocabulary(tokenizer), json.dumps({"grammars": parts}), log_level=0)


@functools.lru_cache(4)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    """Return the vocabulary for llguidance."""
    import llguidance

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)))


class _Vocabulary:
    """A tokenizer as llguidance asks for it: its tokens as bytes, and a function that encodes text."""

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [token_bytes(tokenizer, i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if not text]
        for i in self.special_token_ids:
            self.tokens[i] = f"<{i}:{tokenizer.piece(i)}>".encode()
        self._tokenizer = tokenizer
        self._ids = {text: i for i, text in reversed([*enumerate(self.tokens)]) if i not in {*self.special_token_ids}}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a stretch of text that has other text before it."""
        if not isinstance(text, str):
            raise TypeError  # so that llguidance encodes texts, and no bytes
        (ids,) = self._tokenizer.encode_parts([text], [False])
        if b"".join(self.tokens[i] for i in ids) == text.encode():
            return ids
        return self._longest_first(text.encode())

    def _longest_first(self, rest: bytes) -> list[int]:
        ids = []
        while rest:
            lengths = range(min(self._longest, len(rest)), 0, -1)
            length = next((n for n in lengths if rest[:n] in self._ids), None)
            if length is None:
                break
            ids.append(self._ids[rest[:length]])
            rest = rest[length:]
        return ids
