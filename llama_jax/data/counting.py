"""Counts the documents, copies, characters and tokens of a corpus in one pass and in bounded memory."""

import collections
import hashlib
import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from llama_jax.data.counts import ending_in_zeros
from llama_jax.data.parts import Part

# Up to this many digests of different documents are kept. Beyond it, copies are estimated from a sample of them.
DIGESTS = 1 << 22
DIGEST_BYTES = 8
# New digests are compared with the others when so many wait.
WAITING = 1 << 18
# So many of the longest documents are shown, and so many random ones.
LONGEST, RANDOM = 10, 5
# So much is kept of the beginning of a document that may be shown, in characters and in tokens.
HEAD_CHARS, HEAD_TOKENS = 200, 100
UNICODE = 0x110000
# Control characters that texts do not contain, and NUL.
CONTROLS = [c for c in range(160) if (c < 32 and chr(c) not in "\t\n\v\f\r\b\x1b") or c >= 127]
REPLACEMENT = 0xFFFD
# Binary data has more than this share of control characters.
BINARY_SHARE = 0.1


class Shown(NamedTuple):
    """A document to show: its number in the corpus, its file and the number in it, its length, and how it begins.

    ``head`` holds characters, or token ids if the text is not known.
    """

    document: int
    file: int
    record: int
    length: int
    head: str | list[int]


class Distinct:
    """Counts different documents by 8-byte digests.

    If there are too many, only digests that end in some zero bits are kept, as a sample, and the count is an estimate.
    """

    def __init__(self, limit: int = DIGESTS):
        self._limit, self._zeros = limit, 0
        self._kept, self._new = np.empty(0, "<u8"), bytearray()

    def add(self, digest: bytes) -> None:
        """Add the digest of a document."""
        self._new += digest
        if len(self._new) >= 8 * WAITING:
            self._merge()

    @property
    def count(self) -> int:
        """The number of different documents so far."""
        self._merge()
        return len(self._kept) << self._zeros

    @property
    def is_estimate(self) -> bool:
        """Whether ``count`` is an estimate."""
        self._merge()
        return self._zeros > 0

    def _merge(self) -> None:
        if not self._new:
            return
        new = np.frombuffer(bytes(self._new), "<u8")
        self._new.clear()
        self._kept = np.unique(np.concatenate([self._kept, ending_in_zeros(new, self._zeros)]))
        while len(self._kept) > self._limit:
            self._zeros += 1
            self._kept = ending_in_zeros(self._kept, self._zeros)


class Documents:
    """Counts documents, whole or in pieces, and chooses some to show: the longest, and random ones by ``seed``."""

    def __init__(self, seed: int):
        self.count = 0
        self.lengths: collections.Counter[int] = collections.Counter()
        self.distinct = Distinct()
        self._rng = random.Random(seed)
        self._longest: list[tuple[int, int, Shown]] = []  # a heap, with the shortest first
        self._random: list[Shown] = []

    def add(self, file: int, record: int, head: str | list[int], length: int, digest: bytes) -> None:
        """Add a document, number ``record`` of its file, by how it begins, its length and its digest."""
        self.lengths[length] += 1
        self.distinct.add(digest)
        place = self.count if self.count < RANDOM else int(self._rng.random() * (self.count + 1))
        if place < RANDOM or len(self._longest) < LONGEST or length > self._longest[0][0]:
            shown = Shown(self.count, file, record, length, head)
            if place < RANDOM:
                self._random[place : place + 1] = [shown]
            # Of equally long documents the first ones are kept.
            heapq.heappush(self._longest, (length, -self.count, shown))
            if len(self._longest) > LONGEST:
                heapq.heappop(self._longest)
        self.count += 1

    def start(self, file: int, record: int, head: str | list[int]) -> None:
        """Start a document that comes in pieces."""
        self._started = file, record, head
        self._length, self._hash = 0, hashlib.blake2b(digest_size=DIGEST_BYTES)

    def extend(self, length: int, content: bytes) -> None:
        """Add a piece to the document that was started."""
        self._length += length
        self._hash.update(content)

    def end(self) -> None:
        """Add the document that was started."""
        self.add(*self._started, self._length, self._hash.digest())

    @property
    def duplicates(self) -> int:
        """The number of documents that are exact copies of earlier ones, estimated if ``distinct`` is."""
        return max(0, self.count - self.distinct.count)

    @property
    def longest(self) -> list[Shown]:
        """The longest documents, the longest first."""
        return [shown for _, _, shown in sorted(self._longest, reverse=True)]

    @property
    def random(self) -> list[Shown]:
        """Random documents, in their order."""
        return sorted(self._random)

    @property
    def longest_length(self) -> int:
        """The length of the longest document."""
        return max(self.lengths, default=0)

    @property
    def median(self) -> int:
        """The median length; of an even number of documents, the larger of the two in the middle."""
        left = self.count // 2
        for length in sorted(self.lengths):
            left -= self.lengths[length]
            if left < 0:
                return length
        return 0

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return how many documents have a length between two powers of two: (from, to, count).

        No bin between the first and the last is left out.
        """
        bins: collections.Counter[int] = collections.Counter()
        for length, count in self.lengths.items():
            bins[length.bit_length()] += count
        if not bins:
            return []
        return [((1 << i) // 2, (1 << i) - 1, bins[i]) for i in range(min(bins), max(bins) + 1)]


@dataclass
class Texts:
    """Counts what the documents of a text hold, by its parts in their order."""

    documents: Documents
    bytes: int = 0
    chars: np.ndarray = field(default_factory=lambda: np.zeros(UNICODE, np.int64))
    """How often each code point occurs, int64 [1,114,112]."""
    white: int = 0
    """Documents of nothing but white space."""
    replaced: int = 0
    """Documents of which half the characters or more are U+FFFD."""
    binary: int = 0
    """Documents with many control characters."""

    def __post_init__(self) -> None:
        self._size = self._marks = self._controls = 0  # characters of the document so far, and the odd ones among them
        self._blank = True  # whether it has only white space so far

    def add(self, parts: Sequence[Part], places: Sequence[tuple[int, int]], lengths: Sequence[int]) -> None:
        """Add the next parts, each with its file and record number and its length."""
        sizes = np.array([len(part.text) for part in parts])
        codes = _codes("".join(part.text for part in parts))
        counts = np.bincount(codes, minlength=REPLACEMENT + 1)
        self.chars[: len(counts)] += counts
        marks = _in_each(codes == REPLACEMENT, sizes) if counts[REPLACEMENT] else np.zeros_like(sizes)
        controls = _in_each(np.isin(codes, CONTROLS), sizes) if counts[CONTROLS].any() else np.zeros_like(sizes)
        self.bytes += sum(part.size for part in parts)
        columns = zip(parts, places, lengths, sizes.tolist(), marks.tolist(), controls.tolist(), strict=True)
        for part, (file, record), length, size, part_marks, part_controls in columns:
            text, content = part.text, part.text.encode()
            if part.starts and part.ends:  # faster than in pieces
                digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
                self.documents.add(file, record, text[:HEAD_CHARS], length, digest)
                self._judge(text.isspace(), size, part_marks, part_controls)
                continue
            if part.starts:
                self.documents.start(file, record, text[:HEAD_CHARS])
                self._size = self._marks = self._controls = 0
                self._blank = True
            self.documents.extend(length, content)
            self._blank = self._blank and text.isspace()
            self._size += size
            self._marks += part_marks
            self._controls += part_controls
            if part.ends:
                self.documents.end()
                self._judge(self._blank, self._size, self._marks, self._controls)

    def _judge(self, is_blank: bool, size: int, marks: int, controls: int) -> None:
        """Count a document as odd, by its number of characters, and of U+FFFD and control characters among them."""
        self.white += is_blank
        self.replaced += 2 * marks >= size
        self.binary += controls > BINARY_SHARE * size

    @property
    def characters(self) -> int:
        """The number of characters."""
        return int(self.chars.sum())

    @property
    def replacements(self) -> int:
        """How often U+FFFD occurs."""
        return int(self.chars[REPLACEMENT])

    @property
    def controls(self) -> int:
        """The number of control characters that texts do not contain."""
        return int(self.chars[CONTROLS].sum())

    def scripts(self) -> dict[str, float]:
        """Return the share of each script of Unicode in the characters, the largest first.

        Spaces, digits and signs, which scripts share, are "Common"; accents that combine with letters, "Inherited".
        """
        from fontTools import unicodedata

        counts: collections.Counter[str] = collections.Counter()
        for code in np.flatnonzero(self.chars).tolist():
            counts[unicodedata.script(chr(code))] += int(self.chars[code])
        total = max(1, self.characters)
        return {str(unicodedata.script_name(script)): count / total for script, count in counts.most_common()}


def _codes(text: str) -> np.ndarray:
    """Return the code points of a text, uint8 or uint32 [characters]."""
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _in_each(is_odd: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return how many of the characters of each part are odd. ``is_odd`` is of all parts, which have ``sizes``."""
    sums = np.concatenate([[0], np.cumsum(is_odd)])
    ends = np.cumsum(sizes)
    return np.asarray(sums[ends] - sums[ends - sizes])


class Tokens:
    """Counts how often each token of a vocabulary occurs."""

    def __init__(self, vocab_size: int):
        self.counts = np.zeros(vocab_size, np.int64)

    def add(self, ids: np.ndarray) -> None:
        """Add token ids, of any shape and integer type."""
        self.counts += np.bincount(ids.reshape(-1).astype(np.int64), minlength=len(self.counts))

    def of(self, ids: Sequence[int]) -> int:
        """Return how often tokens of ``ids`` occur. A negative id stands for no token."""
        return int(self.counts[[i for i in ids if i >= 0]].sum())

    @property
    def total(self) -> int:
        """The number of tokens."""
        return int(self.counts.sum())

    @property
    def used(self) -> int:
        """The number of different tokens that occur."""
        return int(np.count_nonzero(self.counts))

    @property
    def most_frequent(self) -> tuple[int, int]:
        """The most frequent token, and how often it occurs."""
        most = int(self.counts.argmax())
        return most, int(self.counts[most])
