"""The protocol of the readers of tokenizers, and how added tokens are found in a text."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from llama_jax.words import Encoded

_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """Return ``text`` with lone surrogates (from undecodable arguments, say), which UTF-8 lacks, replaced by U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


class Added(NamedTuple):
    """A token that a file adds to a vocabulary, and how it is found in a text.

    A special one stands for itself only where special tokens are asked for. Others are always found.
    """

    id: int
    text: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Finder:
    """Finds added tokens in a text, the longest at each place, as the tokenizers library does."""

    def __init__(self, tokens: Iterable[Added]):
        self._tokens = {token.text: token for token in tokens}
        texts = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def split(self, text: str) -> Iterator[tuple[Added | None, str]]:
        """Yield the stretches of a text that are not empty, in order, each with the token that it is, or None."""
        done = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            token, start, end = self._tokens[match[0]], match.start(), match.end()
            if start < done or (token.single_word and _is_inside_word(text, start, end)):
                continue
            if token.lstrip:
                start = done + len(text[done:start].rstrip())
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            if start > done:
                yield None, text[done:start]
            yield token, text[start:end]
            done = end
        if done < len(text):
            yield None, text[done:]


def _is_inside_word(text: str, start: int, end: int) -> bool:
    """Return whether a character of a word stands on either side of a stretch of ``text``."""
    return bool(re.match(r"\w", text[start - 1 : start])) or bool(re.match(r"\w", text[end : end + 1]))


class Reader(Protocol):
    """Turns texts into the token ids of one vocabulary, and back. It knows nothing of BOS and EOS."""

    vocab_size: int
    """The largest id of a token, plus 1."""
    unk_id: int
    """The id of the token for unknown characters. -1: there is none."""
    specials: Mapping[str, int]
    """The ids of control tokens and added tokens by their texts."""
    divides: bool
    """Whether a special token always divides a text: it is found wherever its text stands, and takes no more."""

    @property
    def byte_ids(self) -> Sequence[int]:
        """The ids of tokens that stand for single bytes, which are no characters of their own."""
        ...

    def piece(self, token_id: int) -> str:
        """Return a token's entry in the vocabulary, or "" for an id without a token."""
        ...

    def is_text(self, token_id: int) -> bool:
        """Return whether a token stands for text: it is no special token, unknown, unused or a byte."""
        ...

    def encode(self, text: str, specials: bool) -> list[int]:
        """Return the ids of a whole text.

        ``specials``: texts of special tokens become these tokens.
        """
        ...

    def encode_batch(self, parts: Sequence[str], starts: Sequence[bool]) -> Encoded:
        """Return the ids of parts of documents. ``starts`` says of each whether it begins its document."""
        ...

    def decode(self, ids: Sequence[int], specials: bool) -> str:
        """Return the text of ids. ``specials``: the texts of special tokens are shown."""
        ...

    def decode_part(self, ids: Sequence[int], start: bool) -> str:
        """Return the text of one part of a document. ``start`` says whether it begins the document."""
        ...
