"""What a tokenizer does not give back of a text: unknown characters, collapsed white space, letters that it normalizes."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field

from llama_jax.data.text import PART_BYTES, Part
from llama_jax.tokenizer import SPACE_MARK, Tokenizer

# Of a text so many bytes are compared, spread over it; all of one that is less than twice as long.
COMPARED_BYTES = 1_000_000
# SentencePiece gives U+2581, its own mark of a space, back as a space. Up to this share of the bytes that is no loss.
FEW_MARKS = 0.001
EXAMPLES = 4
NAMES = {" ": "spaces", "\n": "line ends", "\r": "carriage returns", "\t": "tabs"}


@dataclass
class Losses:
    """Compares parts of a text of ``text_bytes`` bytes with what their tokens decode to."""

    tokenizer: Tokenizer
    text_bytes: int
    read: int = 0
    """Bytes of text so far."""
    compared: int = 0
    """Bytes of those that were compared."""
    unknown: int = 0
    """Tokens so far of characters that the tokenizer does not know."""
    chars: collections.Counter[str] = field(default_factory=collections.Counter)
    """The characters that did not come back."""

    def add(self, parts: Sequence[Part], rows: Sequence[list[int]]) -> None:
        """Take the next parts of the text, and their tokens."""
        stride = max(1, self.text_bytes // COMPARED_BYTES)
        for part, row in zip(parts, rows, strict=True):
            self.unknown += row.count(self.tokenizer.unk_id)
            if self.read // PART_BYTES % stride == 0:
                back = self.tokenizer.decode_part(row, part.starts)
                if back != part.text:
                    self.chars.update(collections.Counter(part.text) - collections.Counter(back))
                self.compared += part.size
            self.read += part.size

    @property
    def lost(self) -> int:
        """Bytes, of those compared, of characters that did not come back."""
        lost = {char: count * len(char.encode()) for char, count in self.chars.items()}
        if lost.get(SPACE_MARK, 0) <= FEW_MARKS * self.compared:
            lost.pop(SPACE_MARK, None)
        return sum(lost.values())


def examples(chars: collections.Counter[str]) -> list[str]:
    """The most frequent characters, in words."""
    return [
        f"{NAMES.get(char, char if char.isprintable() else ascii(char))} ({count:,})"
        for char, count in chars.most_common(EXAMPLES)
    ]


def loss_warning(lost: int, compared: int, unknown: int, most: Sequence[str]) -> str:
    """What to tell where tokens do not hold the text; nothing, where they do."""
    if not lost and not unknown:
        return ""
    unknowns = f" and {unknown:,} tokens are of unknown characters" if unknown else ""
    chars = f", most of all {', '.join(most)}" if most else ""
    return (
        f"warning: the tokenizer does not hold this text: {share(lost, compared)} of its bytes do not come back{unknowns}{chars}; "
        "bits per byte are not told; use a tokenizer with byte fallback that keeps white space, or leave it out to train one"
    )


def share(part: int, whole: int) -> str:
    """A share in per cent, never 0% of something."""
    value = part / max(1, whole)
    return "0%" if not part else f"{value:.2%}" if value >= 0.0001 else "less than 0.01%"
