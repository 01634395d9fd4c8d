"""Cuts a large file into slices, so that several processes read it. A cut depends on the bytes around it alone.

A process finds both ends of its slice by itself, and the slices of all processes have each document once.
"""

import re
import unicodedata

from llama_jax.data.documents import Reader, Separator

# A cut is looked for in windows of this many bytes: a document's beginning, else a border between two words.
WINDOW_BYTES = 1 << 22
WORDS_BYTES = 1 << 18
# Tokens never cross these borders, as in text.border. Text goes on behind them, so that a document does not end there.
WORD_BORDER = re.compile(rb"(?<=[!-~])(?:\n(?=[!-~])|(?= [!-~]))")
# The same between letters or digits of any script.
LETTER_BORDER = re.compile(r"(?<=[^\W_])(?:\n(?=[^\W_])|(?= [^\W_]))")


def cut_near(data: Reader, at: int, end: int, separator: Separator | None, within: bool = True) -> tuple[int, bool]:
    """Return the first cut of a text from ``at`` on, and whether it is within a document.

    A cut is where a document begins, or, if none begins in the next WINDOW_BYTES and ``within`` allows it, between two
    words. It is ``end`` if there is neither before.
    """
    while at < end:
        reach = min(data.size, at + 2 * WINDOW_BYTES)
        start = None if separator is None else separator.first_start(data, at, reach)
        last = data.size if reach == data.size or separator is None else reach - WINDOW_BYTES
        last = min(end, last if start is None else start - WINDOW_BYTES)
        stop = min(last, at + WORDS_BYTES) if within else last
        if within and (word := _word_border(data, at, stop, separator)) is not None:
            return word, True
        if start is not None and stop >= last:
            return min(start, end), False
        at = max(stop, at + 1)
    return end, False


def _word_border(data: Reader, at: int, stop: int, separator: Separator | None) -> int | None:
    """Return the first border between words of a document from ``at`` up to ``stop``, or None.

    Two bytes on each side decide. The word before may not be a separator, behind which the document would begin.
    """
    if stop <= at:
        return None
    before = max(0, at - 2)
    for found in WORD_BORDER.finditer(data.read(before, min(data.size, stop + 2))):
        border = before + found.end()
        begins = separator is not None and separator.first_start(data, max(0, border - 1), border) is not None
        if at <= border < stop and not begins:
            return border
    return None


def letter_border(raw: bytes, start: int) -> int | None:
    """Return the first border of ``raw``, in UTF-8, from ``start`` on between two words in letters of any script.

    None if there is none. Letters that a tokenizer's normalizer may change, such as full-width ones, make no border.
    """
    while start < len(raw) and raw[start] & 0xC0 == 0x80:
        start += 1
    text = raw[start:].decode(errors="surrogateescape")  # each byte that is no character counts as one byte
    for found in LETTER_BORDER.finditer(text):
        end = found.end()
        behind = text[end] if text[end] != " " else text[end + 1]
        if unicodedata.is_normalized("NFKC", text[found.start() - 1] + behind):
            return start + len(text[:end].encode(errors="surrogateescape"))
    return None
