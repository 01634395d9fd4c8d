"""The sample of a text that a vocabulary is trained on."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from llama_jax.data.parts import Part

# A vocabulary is trained on at most this many bytes, spread evenly over the text.
VOCABULARY_BYTES = 30_000_000
# Short documents are sampled in blocks of at least this many bytes, so that a block costs no more memory than its text.
BLOCK_BYTES = 1 << 12
# The key of the hash that chooses the blocks. Another key would choose others.
KEY = b"llama-jax: vocabulary"


class Block(NamedTuple):
    """Consecutive parts of a text, from ``size`` bytes, a line or more each."""

    text: str
    size: int


class Sentences:
    """The text to train a vocabulary on: all of the parts that are to be trained on, or a sample if they are large.

    A sample has up to ``share`` of VOCABULARY_BYTES. ``read`` and ``taken`` count bytes so far, and are complete after
    the one iteration.
    """

    def __init__(self, parts: Iterable[Part], share: float = 1.0):
        self._parts, self._share = parts, share
        self.read = self.taken = 0

    def __iter__(self) -> Iterator[str]:
        """Yield the sample, in the order of the parts."""
        for block in sample(blocks(self._counted()), int(VOCABULARY_BYTES * self._share)):
            self.taken += block.size
            yield block.text

    def _counted(self) -> Iterator[Part]:
        for part in self._parts:
            self.read += part.size
            yield part


def blocks(parts: Iterable[Part]) -> Iterator[Block]:
    """Yield the parts in blocks. A line end stands between two parts, since a vocabulary is trained on single lines."""
    texts: list[str] = []
    size = 0
    for part in parts:
        texts.append(part.text)
        size += part.size
        if size >= BLOCK_BYTES:
            yield Block("\n".join(texts), size)
            texts, size = [], 0
    if texts:
        yield Block("\n".join(texts), size)


def sample(blocks: Iterable[Block], most: int) -> list[Block]:
    """Return all blocks, or a sample of up to ``most`` bytes of them, in their order.

    A hash of its number decides for each block. So the sample is spread evenly, it holds repeated text in its share,
    and it does not depend on a guess at the size of the whole. Not much more than ``most`` is in memory.
    """
    kept: list[tuple[int, int, Block]] = []  # a heap, in which the block with the largest hash comes first
    size, limit = 0, 1 << 64
    for number, block in enumerate(blocks):
        order = int.from_bytes(hashlib.blake2b(number.to_bytes(8, "big"), digest_size=8, key=KEY).digest(), "big")
        if order >= limit:
            continue
        heapq.heappush(kept, (-order, number, block))
        size += block.size
        while size > most and len(kept) > 1:
            dropped, _, block = heapq.heappop(kept)
            size, limit = size - block.size, -dropped
    return [block for _, _, block in sorted(kept, key=lambda entry: entry[1])]
