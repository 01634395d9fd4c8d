"""Encodes text word by word, several times faster than SentencePiece and to the same ids.

In a BPE vocabulary no token crosses a border between two characters that stand side by side in no piece. Where no
piece has a space or a newline behind another character, text can be cut before them, and the ids of what lies between
two cuts are always the same. Most words of a text came before, so their ids are looked up in a dict. SentencePiece
encodes the new words, so all ids are its own.
"""

import re
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece as spm

from llama_jax.sentencepiece_settings import BPE, Settings

# The character by which SentencePiece represents a space. Its models do not tell the two apart.
SPACE_MARK = "\u2581"
# As the last bytes of a model: add_dummy_prefix is false. The last value of a field in a protocol buffer counts.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# Is found in pieces that cross the border before a word, and in those that have a space in place of its mark.
ACROSS = re.compile(rf"[^{SPACE_MARK}]{SPACE_MARK}|.\n| ", re.DOTALL)
# Texts that are cut at a time: so few that their words stay in a CPU's cache.
CHARS_AT_ONCE = 1 << 16
# Among words and among ids, END stands for the end of a text. Within words, SPACE stands for a space. Texts that have
# these control characters themselves are not cut.
END, END_ID, SPACE = "\x1e", -1, "\x1f"
# The most bytes of remembered words, and what a word takes besides its text and its ids.
MEMORY_BYTES, ENTRY_BYTES = 80 << 20, 80
# Longer words, in characters, are not remembered. They rarely come again.
LONGEST = 64
# If unseen words make up more of the texts, SentencePiece encodes the texts as they are, which then takes less time.
MOST_UNSEEN = 0.75


class Encoded(NamedTuple):
    """The ids of several texts, one after the other."""

    ids: np.ndarray
    """int32 [tokens]"""
    lengths: np.ndarray
    """int64 [texts]: how many ids each text has."""


NOTHING = Encoded(np.zeros(0, np.int32), np.zeros(0, np.int64))


class Words:
    """Encodes with a SentencePiece model for which ``can_encode`` holds.

    Memory is bounded, and ids do not depend on what is remembered. Threads may share an object.
    """

    def __init__(self, model: bytes):
        self._sp = spm.SentencePieceProcessor()
        self._sp.LoadFromSerializedProto(model + NO_DUMMY_PREFIX)
        self._known, self._bytes = _nothing(), 0

    def __getstate__(self) -> dict[str, object]:
        """Return the state without the words, which another process need not be sent."""
        return self.__dict__ | {"_known": _nothing(), "_bytes": 0}

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the ids of the texts."""
        encoded = [self._encode(chunk) for chunk in _chunks(texts)]
        return Encoded(*(np.concatenate(of_all) for of_all in zip(*encoded, strict=True))) if encoded else NOTHING

    def _encode(self, texts: list[str]) -> Encoded:
        words = _cut(texts)
        found = [*map(self._known.get, words)]
        missing = [i for i, ids in enumerate(found) if ids is None]
        unseen = [*dict.fromkeys(words[i] for i in missing)]
        if not words or sum(map(len, unseen)) > MOST_UNSEEN * sum(map(len, texts)):
            return encode_whole(self._sp, [" " + text if text else "" for text in texts])
        if unseen:
            new = self._encode_each(unseen)
            for i in missing:
                found[i] = new[words[i]]
            self._remember(new)
        ids = np.frombuffer(b"".join(found), np.int32)  # type: ignore[arg-type]
        ends = np.flatnonzero(ids == END_ID)
        return Encoded(ids[ids != END_ID], np.diff(ends, prepend=-1) - 1)

    def _encode_each(self, words: list[str]) -> dict[str, bytes]:
        texts = [(word if word[:1] == "\n" else " " + word).replace(SPACE, " ") for word in words]
        rows = self._sp.encode(texts, num_threads=1)
        return {word: array("i", row).tobytes() for word, row in zip(words, rows, strict=True)}

    def _remember(self, new: dict[str, bytes]) -> None:
        """Add words. When memory is full, begin anew with them."""
        new = {word: ids for word, ids in new.items() if len(word) <= LONGEST}
        size = sum(map(sys.getsizeof, new)) + sum(map(sys.getsizeof, new.values())) + ENTRY_BYTES * len(new)
        if self._bytes + size > MEMORY_BYTES:
            self._known, self._bytes = _nothing(), 0
        self._known.update(new)
        self._bytes += size


def _nothing() -> dict[str, bytes]:
    """Return the ids of no words, and of the end of a text, as the bytes of int32."""
    return {END: array("i", [END_ID]).tobytes()}


def encode_whole(sp: spm.SentencePieceProcessor, texts: list[str]) -> Encoded:
    """Return the ids that ``sp`` itself gives the texts."""
    rows = sp.encode(texts, out_type="numpy", num_threads=1)
    return Encoded(np.concatenate([NOTHING.ids, *rows]), np.array([len(row) for row in rows], np.int64))


def can_encode(model: bytes) -> bool:
    """Return whether ``Words`` gives the ids of this SentencePiece model, judged by its settings and pieces."""
    settings = Settings.of(model)
    sp = spm.SentencePieceProcessor()
    sp.LoadFromSerializedProto(model)
    all_ids = [*range(sp.vocab_size())]
    across = [i for i, piece in zip(all_ids, sp.id_to_piece(all_ids), strict=True) if ACROSS.search(piece)]
    return (
        settings.model_type == BPE
        # Without bytes, unknown characters that follow one another become one token, whatever lies between.
        and settings.byte_fallback
        and settings.escape
        and settings.dummy_prefix
        and not (settings.charsmap or settings.collapse or settings.suffix)
        # SentencePiece takes unused pieces apart by what it has merged elsewhere in the text.
        and not any(sp.is_unused(all_ids))
        # Characters are not merged into pieces of the other kinds.
        and all(sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) for i in across)
    )


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    chars = 0
    for text in texts:
        chunk.append(text)
        chars += len(text)
        if chars >= CHARS_AT_ONCE:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _cut(texts: list[str]) -> list[str]:
    """Return the words of all texts, with END behind each text. Return none if a text has END or SPACE itself.

    A word that begins with a newline is as in the text. Others have a space before them, which they are returned
    without: the text's own, or, at its beginning, SentencePiece's.
    """
    joined = END.join([" " + text if text else "" for text in texts]) + END
    if SPACE in joined or joined.count(END) > len(texts):
        return []
    if SPACE_MARK in joined:
        joined = joined.replace(SPACE_MARK, " ")
    if "  " in joined:  # of several spaces, the first is the one before the word
        joined = joined.replace("  ", " " + SPACE).replace(SPACE + " ", SPACE + SPACE)
    return joined.replace("\n", " \n").replace(END, " " + END)[1:].split(" ")
