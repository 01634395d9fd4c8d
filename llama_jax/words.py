"""Encodes text word by word, several times faster than SentencePiece and to the same ids.

In a BPE vocabulary no token crosses a border between two characters that stand side by side in no piece. Where no
piece has a space or a newline behind another character, text can be cut before them, and the ids of what lies between
two cuts are always the same. Most words of a text came before, so their ids are looked up in a dict. New words are cut
further, into runs of letters, digits and marks, as far as no piece has two of them side by side; many of these came
before, too, above all in source code. SentencePiece encodes the new runs, so all ids are its own.
"""

import bisect
import itertools
import re
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
# The most bytes of remembered words and runs, and what one takes besides its text and its ids.
MEMORY_BYTES, ENTRY_BYTES = 80 << 20, 160
# Longer words, in characters, are not remembered. They rarely come again.
LONGEST = 24
# If unseen runs make up more of the texts, SentencePiece encodes the texts as they are, which then takes less time.
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
        self._runs_of = re.compile(_pattern(_pieces_of_text(self._sp)))
        self._known, self._known_runs, self._bytes, self._run_bytes = _nothing(), _nothing(), 0, 0

    def __getstate__(self) -> dict[str, object]:
        """Return the state without the words, which another process need not be sent."""
        return self.__dict__ | {"_known": _nothing(), "_known_runs": _nothing(), "_bytes": 0, "_run_bytes": 0}

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the ids of the texts."""
        encoded = [self._encode(chunk) for chunk in _chunks(texts)]
        return Encoded(*(np.concatenate(of_all) for of_all in zip(*encoded, strict=True))) if encoded else NOTHING

    def _encode(self, texts: list[str]) -> Encoded:
        words = _cut(texts)
        found = [*map(self._known.get, words)]
        if not words or (None in found and not self._complete(words, found, sum(map(len, texts)))):
            return encode_whole(self._sp, [" " + text if text else "" for text in texts])
        ids = np.frombuffer(b"".join(found), np.int32)  # type: ignore[arg-type]
        ends = np.flatnonzero(ids == END_ID)
        return Encoded(ids[ids != END_ID], np.diff(ends, prepend=-1) - 1)

    def _complete(self, words: list[str], found: list[bytes | None], chars: int) -> bool:
        """Fill ``found`` with the ids of the words that are not known. Return False if SentencePiece takes less time.

        It does if too many runs are new, or if words are long. ``chars`` is the length of the texts.
        """
        missing = [i for i, ids in enumerate(found) if ids is None]
        unseen = [*dict.fromkeys(words[i] for i in missing)]
        if (size := sum(map(len, unseen))) > MOST_UNSEEN * chars and size > LONGEST * len(unseen):
            return False  # such as numbers with commas, of which each digit is a run
        joined = (" " + f"{END} ".join(unseen) + END).replace(" \n", "\n").replace(SPACE, " ")
        runs = self._runs_of.findall(joined)
        of_runs = [*map(self._known_runs.get, runs)]
        new_runs: dict[str, bytes] = {}
        if None in of_runs:
            absent = [i for i, ids in enumerate(of_runs) if ids is None]
            new = [*dict.fromkeys(runs[i] for i in absent)]
            if sum(map(len, new)) > MOST_UNSEEN * chars:
                return False
            rows = self._sp.encode(new, num_threads=1)
            new_runs = {run: array("i", row).tobytes() for run, row in zip(new, rows, strict=True)}
            for i in absent:
                of_runs[i] = new_runs[runs[i]]
        raw = b"".join(of_runs)  # type: ignore[arg-type]
        ends = (np.flatnonzero(np.frombuffer(raw, np.int32) == END_ID) * 4).tolist()
        starts = itertools.chain((0,), (end + 4 for end in ends))
        new_words = {word: raw[start:end] for word, start, end in zip(unseen, starts, ends, strict=False)}
        for i in missing:
            found[i] = new_words[words[i]]
        self._remember(_short(new_words), _short(new_runs))
        return True

    def _remember(self, words: dict[str, bytes], runs: dict[str, bytes]) -> None:
        """Add words and runs. When memory is full, begin anew: with all runs, or with none if they take half of it."""
        self._bytes += (of_words := _most_bytes(words)) + (of_runs := _most_bytes(runs))
        self._run_bytes += of_runs
        if self._bytes > MEMORY_BYTES:
            if self._run_bytes > MEMORY_BYTES // 2:
                self._known_runs, self._run_bytes = _nothing(), of_runs
            self._known, self._bytes = _nothing(), self._run_bytes + of_words
        self._known.update(words)
        self._known_runs.update(runs)


def _short(new: dict[str, bytes]) -> dict[str, bytes]:
    """Return what is worth to be remembered."""
    if max(map(len, new), default=0) <= LONGEST:
        return new
    return {text: ids for text, ids in new.items() if len(text) <= LONGEST}


def _most_bytes(known: dict[str, bytes]) -> int:
    """Return how many bytes texts and their ids take at most. A character takes one byte, or up to four."""
    joined = "".join(known)
    return len(joined) * (1 if joined.isascii() else 4) + sum(map(len, known.values())) + ENTRY_BYTES * len(known)


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
    return (
        settings.model_type == BPE
        # Without bytes, unknown characters that follow one another become one token, whatever lies between.
        and settings.byte_fallback
        and settings.escape
        and settings.dummy_prefix
        and not (settings.charsmap or settings.collapse or settings.suffix)
        # SentencePiece takes unused pieces apart by what it has merged elsewhere in the text.
        and not any(sp.is_unused(all_ids))
        and not any(map(ACROSS.search, _pieces_of_text(sp)))
    )


def _pieces_of_text(sp: spm.SentencePieceProcessor) -> list[str]:
    """Return the pieces into which characters are merged: not those of control tokens, of bytes and of the unknown."""
    all_ids = [*range(sp.vocab_size())]
    kinds = zip(sp.is_control(all_ids), sp.is_unknown(all_ids), sp.is_byte(all_ids), strict=True)
    return [piece for piece, kind in zip(sp.id_to_piece(all_ids), kinds, strict=True) if not any(kind)]


def _pattern(pieces: Sequence[str]) -> str:
    """Return an expression for the runs of a text and for END, in which spaces belong to the run behind them.

    A run is of characters that may stand side by side in a piece. Letters count as if they might, and so do characters
    that are in no piece and not in ASCII, and whatever stands beside one of these in a piece.
    """
    joined = SPACE_MARK.join(pieces)
    pairs = {pair for pair in itertools.pairwise(joined) if SPACE_MARK not in pair}
    pairs |= {(b, a) for a, b in pairs}
    apart = {char for char in {*joined, *map(chr, range(128))} if not char.isalpha()} - {" ", SPACE_MARK, END}
    while beside := {a for a, b in pairs if a in apart and b not in apart}:
        apart -= beside
    together = {a for a, _ in pairs if a in apart}
    alone, marks = ("".join(map(re.escape, sorted(chars))) for chars in (apart - together, together))
    kinds = [f"[^{alone}{marks} {END}]+"] + [f"[{marks}]+"] * bool(marks) + [f"[{alone}]"] * bool(alone)
    return f"{END}| *(?:{'|'.join(kinds)})| +"


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts in lists of CHARS_AT_ONCE characters or more, but for the last."""
    ends, first, before = [*itertools.accumulate(map(len, texts))], 0, 0
    while first < len(texts):
        last = min(len(texts), bisect.bisect_left(ends, before + CHARS_AT_ONCE, first) + 1)
        yield [*texts[first:last]]
        first, before = last, ends[last - 1]


def _cut(texts: list[str]) -> list[str]:
    """Return the words of all texts, with END behind each text. Return none if a text has END or SPACE itself.

    A word that begins with a newline is as in the text. Others have a space before them, which they are returned
    without: the text's own, or, at its beginning, SentencePiece's.
    """
    joined = " " + f"{END} ".join(texts) + END
    if "" in texts:  # it has no space before it
        joined = END.join([" " + text if text else "" for text in texts]) + END
    if SPACE in joined or joined.count(END) > len(texts):
        return []
    if SPACE_MARK in joined:
        joined = joined.replace(SPACE_MARK, " ")
    if "  " in joined:  # of several spaces, the first is the one before the word
        joined = joined.replace("  ", " " + SPACE).replace(SPACE + " ", SPACE + SPACE)
    return joined.replace("\n", " \n").replace(END, " " + END)[1:].split(" ")
