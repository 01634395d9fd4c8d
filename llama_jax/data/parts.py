"""Corpora as ``prepare`` reads them: lists of units, whose documents come in parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

SPLITS = ("train", "eval")
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


class Unit(NamedTuple):
    """A piece of a corpus that gives the same parts whenever it is read, whatever else is read.

    It is the part of file number ``file`` that belongs to ``split``, or a group of rows of it, some for each split.
    """

    file: int
    split: str = ""
    group: int | None = None


class AnyCorpus(Protocol):
    """A text that ``prepare`` encodes: a list of units, with counts of what was odd, and a digest to know it again."""

    train_size: float
    separator: bytes
    replaced: int
    skipped: "Skipped"

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

    def check_unchanged(self) -> None:
        """Raise UserError if a file has changed since ``files`` was computed."""

    def units(self) -> list[Unit]:
        """Return the units in order."""

    def read(self, unit: Unit, splits: Sequence[str] = SPLITS) -> Iterator[tuple[str, Part]]:
        """Yield the parts of a unit in order, each with its split."""

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
