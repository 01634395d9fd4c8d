"""Cuts long texts where no token crosses, and encodes a part behind a mark as it is encoded in the whole text."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from llama_jax.words import SPACE_MARK, Encoded

# Readers hold a whole string in memory, so longer texts are encoded in parts of about this many characters.
PART_CHARS = 32_768
# A position that no token crosses: after a newline, or before a space, if no white space follows.
BORDER = re.compile(rf"(?<=\n)(?=[^\s{SPACE_MARK}])|(?<=[^\s{SPACE_MARK}])(?= [^\s{SPACE_MARK}])")
# A piece in which such a position may be.
ACROSS = re.compile(rf"[^\s{SPACE_MARK}][ {SPACE_MARK}]|\n[^\s{SPACE_MARK}]")
# Texts in two parts, for which marks are tried.
PROBES = (("a", " b"), ("a\n", "b"), ("the fox\n", "owl saw"), ("1\n", "\u4e2d"), ("a.\n", "Zebra  x"))
Marks = tuple[str, str]
NO_MARKS: Marks = ("", "")


def split_text(text: str, part_chars: int = PART_CHARS, everywhere: bool = True) -> Iterator[str]:
    """Yield ``text`` in consecutive parts of about ``part_chars`` characters, cut where no token crosses.

    If there is no such place (a single enormous word), a part is cut at four times that length, unless ``everywhere``
    is false.
    """
    start = 0
    while len(text) - start > part_chars:
        last = min(len(text), start + 4 * part_chars) if everywhere else len(text)
        border = BORDER.search(text, start + part_chars, last)
        end = border.start() if border else last
        yield text[start:end]
        start = end
    yield text[start:]


def starts_of(parts: Sequence[str]) -> list[bool]:
    """Say of each part of one document whether it begins the document."""
    return [i == 0 for i in range(len(parts))]


def find_marks(encode: Callable[[str], list[int]], candidates: Iterable[Marks]) -> Marks | None:
    """Return the first marks after which parts get the same ids as in the whole text, for a few samples, or None.

    A mark is a text before a part (if a line ended before the part, if a word did), whose ids are removed again. Some
    tokenizers put a space before their input or strip white space, which a mark keeps from the part.
    """

    def fits(after_line: str, after_word: str) -> bool:
        for before, part in PROBES:
            mark = after_word if part.startswith(" ") else after_line
            row = encode(mark + part)[len(encode(mark)) :] if mark else encode(part)
            if encode(before) + row != encode(before + part):
                return False
        return True

    return next((marks for marks in candidates if fits(*marks)), None)


def encode_with_marks(
    encode: Callable[[list[str]], Encoded],
    count: Callable[[str], int],
    marks: Marks,
    parts: Sequence[str],
    starts: Sequence[bool],
) -> Encoded:
    """Encode parts, those that begin no document after a mark, whose ids are cut off.

    encode: returns the ids of texts. count: returns the number of ids of a mark.
    """
    if all(starts):
        return encode([*parts])
    before = ["" if start else marks[part.startswith(" ")] for part, start in zip(parts, starts, strict=True)]
    ids, lengths = encode([mark + part for mark, part in zip(before, parts, strict=True)])
    if any(before):
        of_mark = {mark: count(mark) if mark else 0 for mark in {*before}}
        cuts = np.minimum([of_mark[mark] for mark in before], lengths)
        place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # of each id in its part
        ids, lengths = ids[place >= np.repeat(cuts, lengths)], lengths - cuts
    return Encoded(ids, lengths)
