"""Counts of a split, made while it is encoded. The counts of consecutive tasks add up to those of the whole."""

import collections
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from llama_jax.data.lost import examples, lost_bytes
from llama_jax.data.manifest import TextCounts
from llama_jax.data.parts import SPLITS, Part

# At most this many digests of documents are kept to find copies; beyond it, a sample.
DIGESTS = 1 << 22
# Documents of up to so many characters have digests by ``digests_of``: a random odd number for the place of each byte.
SHORT = 1024
FACTORS = np.random.PCG64(0).random_raw(4 * SHORT) | np.uint64(1)
Chars = collections.Counter[str]
Lengths = collections.Counter[int]


@dataclass
class Counts:
    """Counts of a stretch of a split: tokens, documents that begin in it, bytes of text, and what is lost of it.

    ``lengths`` counts the documents that begin and end in it, by their tokens. The document that was begun before has
    ``head`` tokens in it, and the last one that begins in it has ``tail``.
    """

    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    byte_tokens: int = 0
    largest_id: int = 0
    unknown: int = 0
    compared: int = 0
    chars: Chars = field(default_factory=Chars)
    lengths: Lengths = field(default_factory=Lengths)
    head: int = 0
    tail: int = 0

    def extend(self, tokens: int) -> None:
        """Count tokens of the document that is open."""
        if self.documents:
            self.tail += tokens
        else:
            self.head += tokens

    def add_parts(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Count documents by their consecutive parts.

        starts: bool [parts], whether a part begins its document.
        lengths: int64 [parts], the tokens of each part.
        """
        first = np.flatnonzero(starts)
        self.extend(int(lengths[: first[0] if len(first) else None].sum()))
        if len(first):
            *whole, tail = np.add.reduceat(lengths, first).tolist()
            if self.documents:
                self.lengths[self.tail] += 1
            self.documents += len(first)
            self.lengths.update(whole)
            self.tail = tail

    def add(self, after: "Counts") -> None:
        """Add the counts of the stretch that follows."""
        self.extend(after.head)
        if after.documents:
            if self.documents:
                self.lengths[self.tail] += 1
            self.tail = after.tail
        for name in ("tokens", "documents", "text_bytes", "byte_tokens", "unknown", "compared"):
            setattr(self, name, getattr(self, name) + getattr(after, name))
        self.largest_id = max(self.largest_id, after.largest_id)
        self.chars.update(after.chars)
        self.lengths.update(after.lengths)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON, which ``from_dict`` reads."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "Counts":
        """Return the counts of a dict. Raises TypeError, KeyError or ValueError on anything else."""
        lengths = Lengths({int(length): int(count) for length, count in table["lengths"].items()})
        return cls(**table | {"chars": Chars(table["chars"]), "lengths": lengths})

    @property
    def lost(self) -> int:
        """Bytes of the compared text that decoding does not restore."""
        return lost_bytes(self.chars, self.compared)

    def median_and_longest(self) -> tuple[int, int]:
        """Return the median and the largest number of tokens of a document."""
        lengths = Lengths(self.lengths)
        if self.documents:
            lengths[self.tail] += 1
        left = sum(lengths.values()) // 2
        for length in sorted(lengths):
            left -= lengths[length]
            if left < 0:
                return length, max(lengths)
        return 0, 0


def text_counts(counts: dict[str, Counts], copies: int) -> TextCounts:
    """Return the counts of both splits as the manifest has them."""
    lengths = {split: counts[split].median_and_longest() for split in SPLITS}
    lossy = (counts[split].chars for split in SPLITS if counts[split].lost)
    return TextCounts(
        median={split: lengths[split][0] for split in SPLITS},
        longest={split: lengths[split][1] for split in SPLITS},
        unknown={split: counts[split].unknown for split in SPLITS},
        byte_tokens={split: counts[split].byte_tokens for split in SPLITS},
        compared_bytes={split: counts[split].compared for split in SPLITS},
        lost_bytes={split: counts[split].lost for split in SPLITS},
        lost_examples=examples(sum(lossy, Chars())),
        copies=copies,
    )


class Digests:
    """8-byte digests of documents.

    If there are too many, only those that end in some zero bits are kept, as a sample.
    """

    def __init__(self, limit: int = DIGESTS):
        self._limit, self._zeros = limit, 0
        self._kept = bytearray()
        self._hash: Any = None

    def add(self, parts: Sequence[Part]) -> None:
        """Add the next parts of documents. A document whose start or end is not here gets no digest."""
        short = [text for text, _, starts, ends, _ in parts if starts and ends and len(text) <= SHORT]
        found = [] if len(short) == len(parts) else self._of_others(parts)
        self.join(np.concatenate([digests_of(short), np.frombuffer(b"".join(found), "<u8")]))

    def _of_others(self, parts: Sequence[Part]) -> list[bytes]:
        """Return the digests of the documents that are not short."""
        found = []
        for text, _, starts, ends, _ in parts:
            if starts and ends and len(text) <= SHORT:
                self._hash = None
                continue
            if starts:
                self._hash = blake2b(text.encode(), digest_size=8)
            elif self._hash is not None:
                self._hash.update(text.encode())
            if ends and self._hash is not None:
                found.append(self._hash.digest())
                self._hash = None
        return found

    def join(self, digests: np.ndarray) -> None:
        """Add the digests of other documents, uint64."""
        self._kept += ending_in_zeros(digests, self._zeros).tobytes()
        self._shrink()

    @property
    def kept(self) -> np.ndarray:
        """The digests that are kept, uint64."""
        return np.frombuffer(bytes(self._kept), "<u8")

    def copies_in(self, others: "Digests") -> int:
        """Return how many documents of ``others`` are also here, estimated if either is a sample."""
        zeros = max(self._zeros, others._zeros)
        here, theirs = np.sort(self._sample(zeros)), others._sample(zeros)
        if not len(here):
            return 0
        nearest = here[np.minimum(np.searchsorted(here, theirs), len(here) - 1)]
        return int(np.count_nonzero(nearest == theirs)) << zeros

    def _shrink(self) -> None:
        while len(self._kept) > 8 * self._limit:
            self._zeros += 1
            self._kept = bytearray(self._sample(self._zeros).tobytes())

    def _sample(self, zeros: int) -> np.ndarray:
        return ending_in_zeros(self.kept, zeros)


def digests_of(texts: Sequence[str]) -> np.ndarray:
    """Return a digest of each of some texts of up to SHORT characters, uint64 [texts].

    A digest is the sum of a text's bytes, each times a random number for its place (multilinear hashing: Carter and
    Wegman, 1979), and of its length, with its bits mixed. Of millions of lines it takes less than half of the time of
    a hash function for each.
    """
    joined = "".join(texts)
    if joined.isascii():
        raw, lengths = joined.encode(), np.fromiter(map(len, texts), np.int64, len(texts))
    else:
        raws = [text.encode() for text in texts]
        raw, lengths = b"".join(raws), np.fromiter(map(len, raws), np.int64, len(raws))
    sums = lengths.astype(np.uint64)
    filled = np.flatnonzero(lengths)
    if len(filled):
        starts = (np.cumsum(lengths) - lengths)[filled]
        places = np.arange(len(raw)) - np.repeat(starts, lengths[filled])
        sums[filled] += np.add.reduceat(np.frombuffer(raw, np.uint8) * FACTORS[places], starts)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the mixing of SplitMix64
        sums = (sums ^ (sums >> np.uint64(shift))) * np.uint64(factor)
    return sums ^ (sums >> np.uint64(31))


def ending_in_zeros(digests: np.ndarray, bits: int) -> np.ndarray:
    """Return the digests, uint64, that end in so many zero bits: a sample of them that is the same for all."""
    return digests[digests & np.uint64((1 << bits) - 1) == 0]
