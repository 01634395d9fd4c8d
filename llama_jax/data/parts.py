"""Corpora as ``prepare`` reads them: lists of units, whose documents come in parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Literal, NamedTuple, Protocol

from llama_jax.data.places import Place

SPLITS = ("train", "eval")
# So many records that were skipped are named.
EXAMPLES = 3
# What is held out: the end of the text, documents chosen by a hash, a text of its own, or what another program chose.
HeldOut = Literal["end", "documents", "own", "given"]


class Part(NamedTuple):
    """A part of a document's text, from ``size`` bytes.

    ``starts`` and ``ends`` tell whether it is the first or last part. ``number`` is that of the record in its file.
    """

    text: str
    size: int
    starts: bool
    ends: bool
    number: int = 0


SIZE = itemgetter(1)  # of a part: by its number, which is faster where there are millions


class Unit(NamedTuple):
    """A piece of a corpus that gives the same parts whenever it is read, whatever else is read.

    It is the part of file number ``file`` that belongs to ``split``, or a group of rows of it, some for each split. A
    slice of it has what begins from ``start`` up to ``stop`` (None: the end), in bytes of text, or in rows of a group.
    ``size`` is about the number of bytes of its text.
    """

    file: int
    split: str = ""
    group: int | None = None
    start: int = 0
    stop: int | None = None
    size: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether it is not a slice."""
        return not self.start and self.stop is None

    def slices(self, stop: int, size: int, largest: int) -> "list[Unit]":
        """Return slices of about equal length up to ``stop``, of ``largest`` to twice as many of its ``size`` bytes."""
        whole = self._replace(size=size)
        count = max(1, size // largest) if stop > self.start else 1
        if count == 1:
            return [whole]
        borders = [self.start + (stop - self.start) * i // count for i in range(count)]
        return [
            whole._replace(start=first, stop=last, size=size // count)
            for first, last in zip(borders, [*borders[1:], None], strict=True)
        ]


class AnyCorpus(Protocol):
    """A text that ``prepare`` encodes: a list of units, with counts of what was odd, and a digest to know it again.

    ``odd`` has, for each file of which a slice was read, how many bytes were read, and how many of them are not UTF-8.
    """

    train_size: float
    separator: bytes
    replaced: int
    skipped: "Skipped"
    odd: dict[str, tuple[int, int]]

    @property
    def stored_bytes(self) -> int:
        """The size of all files as they are stored."""

    @property
    def text_bytes(self) -> int:
        """The size of all texts, if it is known before they are read, else a guess."""

    @property
    def files(self) -> tuple["TextFile", ...]:
        """The files with the digests of their contents."""

    @property
    def eval_files(self) -> tuple["TextFile", ...]:
        """The files of a held-out text of its own."""

    @property
    def held_out(self) -> "HeldOut":
        """How the held-out part is chosen."""

    @property
    def text_field(self) -> str:
        """The field of the records that holds the text. It is empty for plain text."""

    def digest(self) -> str:
        """Return a digest of all that decides the documents and their split."""

    @property
    def places(self) -> list[Place]:
        """The files, also those of a held-out text of its own, in the order in which they are numbered."""

    def stamp(self) -> str:
        """Return what is known of the files without reading them, and all else that decides the documents."""

    def file_of(self, number: int) -> "TextFile":
        """Return a file with the digest of its content, which is read for it."""

    def know(self, files: "Sequence[TextFile]") -> None:
        """Take these for ``files`` and ``eval_files``, which are then not read for their digests."""

    def check_unchanged(self) -> None:
        """Raise UserError if a file has changed since ``files`` was computed."""

    def units(self, largest: int = 0) -> list[Unit]:
        """Return the units in order. Those of more than ``largest`` bytes are sliced where possible (0: none)."""

    def read(self, unit: Unit, splits: Sequence[str] = SPLITS) -> Iterator[tuple[str, Part]]:
        """Yield the parts of a unit in order, each with its split."""

    def groups(self, unit: Unit, splits: Sequence[str] = SPLITS) -> Iterator[tuple[str, list[Part]]]:
        """Yield what ``read`` yields, in lists of parts of the same split."""

    def parts(self, split: str) -> Iterator[Part]:
        """Yield the text of a split, document by document."""


@dataclass(frozen=True)
class TextFile:
    """A file of a text, at the time it was read."""

    path: str
    bytes: int
    sha256: str


@dataclass
class Skipped:
    """Records that could not be read and were left out, with some examples, and records without any text."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    empty: int = 0

    def and_of(self, after: "Skipped") -> "Skipped":
        """Return these and those of what follows."""
        examples = (self.examples + after.examples)[:EXAMPLES]
        return Skipped(self.count + after.count, examples, self.empty + after.empty)
