"""Measures the text that a tokenizer loses: unknown characters, collapsed white space, normalized letters."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llama_jax.data.parts import SIZE, Part
from llama_jax.data.text import PART_BYTES
from llama_jax.tokenizer import SPACE_MARK, Tokenizer

# About this many bytes of a text are compared, spread evenly. A text of less than twice the size is compared in full.
COMPARED_BYTES = 1_000_000
# U+2581, SentencePiece's character for a space, decodes to a space. Up to this share of bytes that is not a loss.
FEW_MARKS = 0.001
EXAMPLES = 4
NAMES = {" ": "spaces", "\n": "line ends", "\r": "carriage returns", "\t": "tabs"}


@dataclass
class Losses:
    """Compares parts of a text of ``text_bytes`` bytes with their decoded tokens."""

    tokenizer: Tokenizer
    text_bytes: int
    read: int = 0
    """Bytes of text read so far."""
    compared: int = 0
    """Bytes of text compared so far."""
    unknown: int = 0
    """Tokens so far that stand for unknown characters."""
    chars: collections.Counter[str] = field(default_factory=collections.Counter)
    """Characters that decoding did not restore, with their counts."""

    def add(self, parts: Sequence[Part], ids: np.ndarray, lengths: np.ndarray) -> None:
        """Add the next parts of the text, their tokens, int [tokens], and the number of tokens of each."""
        stride = max(1, self.text_bytes // COMPARED_BYTES)
        self.unknown += int(np.count_nonzero(ids == self.tokenizer.unk_id))
        sizes = np.fromiter(map(SIZE, parts), np.int64, len(parts))
        places = self.read + np.cumsum(sizes) - sizes
        self.read += int(sizes.sum())
        ends = np.cumsum(lengths)
        for i in np.flatnonzero(places // PART_BYTES % stride == 0).tolist():
            part, row = parts[i], ids[ends[i] - lengths[i] : ends[i]].tolist()
            back = self.tokenizer.decode_part(row, part.starts)
            if back != part.text:
                self.chars.update(collections.Counter(part.text) - collections.Counter(back))
            self.compared += part.size

    @property
    def lost(self) -> int:
        """Bytes of the compared text that decoding did not restore."""
        return lost_bytes(self.chars, self.compared)


def lost_bytes(chars: collections.Counter[str], compared: int) -> int:
    """Return how many bytes of ``compared`` bytes of text decoding did not restore: those of ``chars``."""
    lost = {char: count * len(char.encode()) for char, count in chars.items()}
    if lost.get(SPACE_MARK, 0) <= FEW_MARKS * compared:
        lost.pop(SPACE_MARK, None)
    return sum(lost.values())


def examples(chars: collections.Counter[str]) -> list[str]:
    """Return the most frequent characters, in words."""
    return [
        f"{NAMES.get(char, char if char.isprintable() else ascii(char))} ({count:,})"
        for char, count in chars.most_common(EXAMPLES)
    ]


def loss_warning(lost: int, compared: int, unknown: int, most: Sequence[str]) -> str:
    """Return a warning if the tokenizer loses text, else an empty text."""
    if not lost and not unknown:
        return ""
    unknowns = f" and {unknown:,} tokens are unknown" if unknown else ""
    chars = f", mostly {', '.join(most)}" if most else ""
    return (
        f"warning: the tokenizer loses text: decoding does not restore {share(lost, compared)} of its bytes{unknowns}{chars}; "
        "bits per byte are not reported; use a tokenizer with byte fallback that keeps white space, or leave it out to train one"
    )


def share(part: int, whole: int) -> str:
    """Return a share in percent. A share above 0 is never shown as 0%."""
    value = part / max(1, whole)
    return "0%" if not part else f"{value:.2%}" if value >= 0.0001 else "less than 0.01%"
