"""Prompts that ask for the text between two others, in Code Llama's format (Rozière et al., 2023, section 2.3).

<PRE> prefix <SUF>suffix <MID>middle <EOT>     psm: prefix, suffix, middle
<PRE> <SUF>suffix <MID> prefix middle <EOT>    spm: suffix, prefix, middle

As in Meta's code (codellama/llama/generation.py, infilling_prompt_tokens).
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

from llama_jax.config import SampleArgs
from llama_jax.errors import UserError, quoted
from llama_jax.tokenizer import Tokenizer, clean

InfillFormat = Literal["psm", "spm"]
# A character that Code Llama's vocabulary never joins with what follows.
BEFORE = "\u263a"


class Marks(NamedTuple):
    """The ids of the tokens that stand around the texts."""

    prefix: int
    suffix: int
    middle: int
    end: int


PIECES = ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>")


@functools.lru_cache(4)
def infill_marks(tokenizer: Tokenizer) -> Marks:
    """Return the ids of Code Llama's tokens for infilling. Raises UserError if the vocabulary lacks one."""
    ids = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    missing = [piece for piece in PIECES if piece not in ids]
    if missing:
        raise UserError(
            f"infill: expected a vocabulary with the tokens {', '.join(PIECES)}, as Code Llama's 7B and 13B have, found none "
            f"named {', '.join(missing)}; take such a model, or give the prefix alone as a prompt"
        )
    return Marks(*(ids[piece] for piece in PIECES))


def encode_infill(tokenizer: Tokenizer, prefix: str, suffix: str, order: InfillFormat, drop: int = 0) -> list[int]:
    """Return the token ids of a prompt for the text between ``prefix`` and ``suffix``.

    drop: number of tokens to leave out at the beginning of the prefix. Raises UserError if the vocabulary has no tokens
    for infilling, or if the prefix has fewer than ``drop``.
    """
    for name, text in (("prefix", prefix), ("suffix", suffix)):
        if not isinstance(text, str):
            raise UserError(f"infill: expected a text as {name}, found {quoted(text)}")
    marks = infill_marks(tokenizer)
    before = tokenizer.encode(clean(prefix), bos=False)
    if drop > len(before):
        raise UserError("infill: expected a suffix that leaves room in the context, found a longer one; shorten it")
    before, after = before[drop:], _encode_suffix(tokenizer, clean(suffix))
    if order == "spm":
        return [tokenizer.bos_id, marks.prefix, marks.suffix, *after, marks.middle, *before]
    return [tokenizer.bos_id, marks.prefix, *before, marks.suffix, *after, marks.middle]


def with_infill_end(args: SampleArgs, tokenizer: Tokenizer) -> SampleArgs:
    """Return settings with which a completion also ends at <EOT>."""
    return dataclasses.replace(args, stop_token_ids=(*args.stop_token_ids, infill_marks(tokenizer).end))


def _encode_suffix(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text without the space that SentencePiece would put before it."""
    return tokenizer.encode(BEFORE + text, bos=False)[len(tokenizer.encode(BEFORE, bos=False)) :]
