"""Corpora of records, in which each record is a document, and a text together with a held-out text of its own."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llama_jax.data.corpus_file import BOM, CorpusFile, Record
from llama_jax.data.held_out import hash_of, is_held_out
from llama_jax.data.kinds import bad_bytes, decoded
from llama_jax.data.odd_bytes import check_is_text, note_odd
from llama_jax.data.parts import EXAMPLES, SPLITS, AnyCorpus, HeldOut, Part, Skipped, TextFile, Unit
from llama_jax.data.places import Place, at_once
from llama_jax.data.records import Group, groups_of, lines_before, records_of, text_bytes_of
from llama_jax.data.text import PART_BYTES, Corpus, border, full_name
from llama_jax.errors import UserError

# Without a separator, so many texts are documents of which some are held out. The end of fewer is.
MANY_TEXTS = 100
# Compressed text is taken to be so many times as large.
PACKED = 4
# Compressed files of this size are read once for the size of their texts, if there are few, so that they can be sliced.
FEW_FILES, MEASURED_SHARE = 64, 8


@dataclass
class Records:
    """Files of records, and plain texts among them. Each record is a document, and so is each text.

    A document is held out or not by a hash of its text, so that exact copies are on the same side. ``skip`` leaves out
    records that cannot be read, which otherwise raise a UserError. The counts ``replaced`` and ``skipped`` are of the
    units that were read for both splits, or for training.
    """

    sources: Sequence[CorpusFile]
    train_size: float
    skip: bool = False
    any_bytes: bool = False
    replaced: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    odd: dict[str, tuple[int, int]] = field(default_factory=dict)
    _stamps: list[tuple[Any, ...]] = field(default_factory=list)
    _measured: dict[int, int] = field(default_factory=dict)

    separator = b""
    held_out: ClassVar[HeldOut] = "documents"
    eval_files: ClassVar[tuple[TextFile, ...]] = ()

    @property
    def stored_bytes(self) -> int:
        """The size of all files as they are stored."""
        return sum(max(0, file.place.size) for file in self.sources)

    @property
    def text_bytes(self) -> int:
        """A guess at the size of all texts: that of the files, four times as much if they are compressed."""
        packed = {"parquet": 3}
        sizes = (
            max(0, file.place.size) * (PACKED if file.compression else packed.get(file.format, 1))
            for file in self.sources
        )
        return sum(sizes)

    @property
    def text_field(self) -> str:
        """The field of the records that holds the text, or several, if files have different ones."""
        return ", ".join(sorted({file.field for file in self.sources if file.field}))

    @functools.cached_property
    def files(self) -> tuple[TextFile, ...]:
        """The files with the digests of their contents as they are stored, at the time of first use."""
        self._stamps = [file.place.first_stamp() for file in self.sources]
        return tuple(at_once(self.file_of, range(len(self.sources))))

    @property
    def places(self) -> list[Place]:
        """The files."""
        return [file.place for file in self.sources]

    def stamp(self) -> str:
        """Return what is known of the files without reading them, how they are read, and the share that is held out."""
        how = [(file.place.mark(), file.field) for file in self.sources]
        return repr(("records", how, self.train_size))

    def file_of(self, number: int) -> TextFile:
        """Return a file with the digest of its content as it is stored."""
        file = self.sources[number]
        return TextFile(full_name(file), max(0, file.place.size), file.place.sha256())

    def know(self, files: Sequence[TextFile]) -> None:
        """Take these for ``files``."""
        self._stamps = [file.place.first_stamp() for file in self.sources]
        self.files = tuple(files)

    def digest(self) -> str:
        """Return the sha256 of the files' contents, how they are read, and the share that is held out."""
        how = [(file.sha256, source.field) for file, source in zip(self.files, self.sources, strict=True)]
        return hashlib.sha256(repr(("records", how, self.train_size)).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raise UserError if a file has changed since ``files`` was computed."""
        stamps = at_once(lambda file: file.place.stamp(), self.sources)
        for source, file, now, then in zip(self.sources, self.files, stamps, self._stamps, strict=True):
            if now != then and (source.place.is_remote or source.place.sha256() != file.sha256):
                raise UserError(
                    f"{file.path}: expected a file that nobody writes, found it changed meanwhile; start again"
                )

    def units(self, largest: int = 0) -> list[Unit]:
        """Return the files, those in parquet by groups of rows, and slices of those of more than ``largest`` bytes."""
        units: list[Unit] = []
        for i, (file, groups) in enumerate(zip(self.sources, self._groups, strict=True)):
            if groups or file.format == "parquet":
                for number, group in enumerate(groups or [Group(0, 0)]):
                    unit = Unit(i, "", number, size=group.size)
                    units += unit.slices(group.rows, group.size, largest) if largest else [unit]
                continue
            size = self._size_of(i, largest)
            unit = Unit(i, "", 0, size=size)
            sliced = largest and file.format == "json lines" and (not file.compression or i in self._measured)
            units += unit.slices(size, size, largest) if sliced else [unit]
        return units

    def _size_of(self, i: int, largest: int) -> int:
        """Return the size of a file's text, or a guess if it is compressed and is not worth to be measured."""
        file = self.sources[i]
        stored = max(0, file.place.size)
        worth_it = len(self.sources) < FEW_FILES and stored * MEASURED_SHARE > largest > 0
        if worth_it and file.compression and file.format == "json lines" and i not in self._measured:
            self._measured[i] = text_bytes_of(file)
        return self._measured.get(i, stored * PACKED if file.compression else stored)

    @functools.cached_property
    def _groups(self) -> list[list[Group]]:
        """The groups of rows of each file. Each parquet file is opened for it."""
        return at_once(groups_of, self.sources)

    def parts(self, split: str) -> Iterator[Part]:
        """Yield the text of a split, document by document."""
        for unit in self.units():
            yield from (part for _, part in self.read(unit, (split,)))

    def read(self, unit: Unit, splits: Sequence[str] = SPLITS) -> Iterator[tuple[str, Part]]:
        """Yield the parts of a unit in order, each with its split.

        Raises UserError if a file is damaged or is not text, or if a record cannot be read and none may be skipped.
        """
        file = self.sources[unit.file]
        if file.format == "text":
            yield from self._read_text(file, splits)
            return
        counted = "train" in splits
        read = bad = 0
        for record in records_of(file, unit):
            if record.raw is None:
                self._skip(file, unit, record, counted)
                continue
            if not record.raw:
                self.skipped.empty += counted
                continue
            raw, odd = self._valid(record.raw, counted)
            read, bad = read + len(raw), bad + odd
            self.replaced += record.replaced * counted
            split = SPLITS[is_held_out(hash_of(raw), self.train_size)]
            if split in splits:
                yield from ((split, part) for part in cut(raw, record.number))
        if not self.any_bytes:
            note_odd(self, file.name, unit, read, bad)

    def groups(self, unit: Unit, splits: Sequence[str] = SPLITS) -> Iterator[tuple[str, list[Part]]]:
        """Yield what ``read`` yields, each part in a list of its own."""
        return ((split, [part]) for split, part in self.read(unit, splits))

    def _read_text(self, file: CorpusFile, splits: Sequence[str]) -> Iterator[tuple[str, Part]]:
        """Yield the parts of a text, which is one document. It is read twice: for its hash, and for its parts."""
        sha, read, bad = hash_of(b""), 0, 0
        for raw, odd in self._blocks(file, counted="train" in splits):
            sha.update(raw)
            read, bad = read + len(raw), bad + odd
        if not self.any_bytes:
            check_is_text(file.name, read, bad)
        split = SPLITS[is_held_out(sha, self.train_size)]
        if not read or split not in splits:
            return
        waiting, starts = b"", True
        for raw, _ in self._blocks(file, counted=False):
            waiting += raw
            while len(waiting) > 4 * PART_BYTES:
                stop = border(waiting[: 4 * PART_BYTES + 1])
                yield split, Part(waiting[:stop].decode(), stop, starts, False, 1)
                waiting, starts = waiting[stop:], False
        parts = list(cut(waiting, 1))
        yield from ((split, part._replace(starts=starts and i == 0)) for i, part in enumerate(parts))

    def _blocks(self, file: CorpusFile, counted: bool) -> Iterator[tuple[bytes, int]]:
        """Yield the content of a text in blocks of valid UTF-8, each with its number of bytes that were not."""
        with file.open() as stream:
            rest = stream.read(3).removeprefix(BOM)
            while block := stream.read(PART_BYTES):
                rest += block
                end = len(rest)
                # A character may go on in the next block.
                while end > len(rest) - 4 and end and rest[end - 1] & 0xC0 == 0x80:
                    end -= 1
                end -= bool(end and rest[end - 1] >= 0xC0)
                yield self._valid(rest[:end], counted)
                rest = rest[end:]
            yield self._valid(rest, counted)

    def _valid(self, raw: bytes, counted: bool) -> tuple[bytes, int]:
        """Return ``raw`` as valid UTF-8, and how many of its bytes were not."""
        text, replaced = decoded(raw)
        if not replaced:
            return raw, 0
        self.replaced += counted * replaced
        return text.encode(), bad_bytes(raw)

    def _skip(self, file: CorpusFile, unit: Unit, record: Record, counted: bool) -> None:
        """Count a record that cannot be read. Raises UserError if none may be skipped."""
        if self.skip and counted:
            self.skipped.count += 1
        if self.skip and (not counted or len(self.skipped.examples) >= EXAMPLES):
            return
        lines = file.format == "json lines" and unit.start
        number = record.number + (lines_before(file, unit) if lines else 0)
        where = f"{file.name}: {file.word} {number:,}: {record.fault}"
        if not self.skip:
            raise UserError(f"{where}; correct it, or leave out such records with --data.bad-records skip")
        self.skipped.examples.append(where)


@dataclass
class WithHeldOut:
    """A text to train on, all of it, and a held-out text of its own. Both hold nothing out themselves."""

    train: AnyCorpus
    eval: AnyCorpus

    held_out: ClassVar[HeldOut] = "own"

    def __post_init__(self) -> None:
        self.separator = self.train.separator
        self.train_size = 1.0

    @property
    def replaced(self) -> int:
        """The number of byte sequences so far that were read as U+FFFD."""
        return self.train.replaced + self.eval.replaced

    @replaced.setter
    def replaced(self, count: int) -> None:
        self.train.replaced = self.eval.replaced = count

    @property
    def skipped(self) -> Skipped:
        """The records that were skipped so far."""
        return self.train.skipped.and_of(self.eval.skipped)

    @skipped.setter
    def skipped(self, skipped: Skipped) -> None:
        self.train.skipped, self.eval.skipped = skipped, Skipped()

    @property
    def odd(self) -> dict[str, tuple[int, int]]:
        """The bytes of each file of which a slice was read."""
        return self.train.odd | self.eval.odd

    @odd.setter
    def odd(self, odd: dict[str, tuple[int, int]]) -> None:
        self.train.odd, self.eval.odd = odd, {}

    @property
    def stored_bytes(self) -> int:
        """The size of all files as they are stored."""
        return self.train.stored_bytes + self.eval.stored_bytes

    @property
    def text_bytes(self) -> int:
        """The size of the text to train on, or a guess at it."""
        return self.train.text_bytes

    @property
    def text_field(self) -> str:
        """The fields of both texts."""
        return ", ".join(dict.fromkeys(filter(None, (self.train.text_field, self.eval.text_field))))

    @property
    def files(self) -> tuple[TextFile, ...]:
        """The files to train on."""
        return self.train.files

    @property
    def eval_files(self) -> tuple[TextFile, ...]:
        """The files of the held-out text."""
        return self.eval.files

    @property
    def places(self) -> list[Place]:
        """The files to train on, then those that are held out."""
        return self.train.places + self.eval.places

    def stamp(self) -> str:
        """Return what is known of the files of both texts without reading them."""
        return f"{self.train.stamp()} {self.eval.stamp()}"

    def file_of(self, number: int) -> TextFile:
        """Return a file with the digest of its content."""
        first = len(self.train.places)
        return self.train.file_of(number) if number < first else self.eval.file_of(number - first)

    def know(self, files: Sequence[TextFile]) -> None:
        """Take these for ``files`` and ``eval_files``."""
        first = len(self.train.places)
        self.train.know(files[:first])
        self.eval.know(files[first:])

    def digest(self) -> str:
        """Return the sha256 of the digests of both texts."""
        return hashlib.sha256(f"{self.train.digest()} {self.eval.digest()}".encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raise UserError if a file has changed since ``files`` was computed."""
        self.train.check_unchanged()
        self.eval.check_unchanged()

    def units(self, largest: int = 0) -> list[Unit]:
        """Return the units to train on, then those that are held out. Files are numbered through."""
        first = len(self.train.places)
        held_out = (unit._replace(file=unit.file + first, split="eval") for unit in self.eval.units(largest))
        return [*(unit._replace(split="train") for unit in self.train.units(largest)), *held_out]

    def read(self, unit: Unit, splits: Sequence[str] = SPLITS) -> Iterator[tuple[str, Part]]:
        """Yield the parts of a unit in order, each with its split."""
        return ((split, part) for split, parts in self.groups(unit, splits) for part in parts)

    def groups(self, unit: Unit, splits: Sequence[str] = SPLITS) -> Iterator[tuple[str, list[Part]]]:
        """Yield what ``read`` yields, in lists."""
        if unit.split not in splits:
            return
        corpus, first = (self.train, 0) if unit.split == "train" else (self.eval, len(self.train.places))
        inner = unit._replace(file=unit.file - first, split="train")
        yield from ((unit.split, parts) for _, parts in corpus.groups(inner, ("train",)))

    def parts(self, split: str) -> Iterator[Part]:
        """Yield the text of a split, document by document."""
        return (self.train if split == "train" else self.eval).parts("train")


def corpus_of(
    files: Sequence[CorpusFile],
    separator: bytes = b"",
    train_size: float = 1.0,
    skip: bool = False,
    any_bytes: bool = False,
) -> AnyCorpus:
    """Return the corpus of ``files``: plain text, or Records if there are records among them; see both."""
    if all(file.format == "text" for file in files):
        many = len(files) > 1 and (bool(separator) or len(files) >= MANY_TEXTS)
        return Corpus(files, separator, train_size, any_bytes, by_documents=many and train_size < 1)
    return Records(files, train_size, skip)


def cut(raw: bytes, number: int) -> Iterator[Part]:
    """Yield the parts of a document in UTF-8."""
    if len(raw) <= PART_BYTES:
        yield Part(raw.decode(), len(raw), True, True, number)
        return
    start = 0
    while start < len(raw):
        stop = start + border(raw[start : start + 4 * PART_BYTES + 1])
        yield Part(raw[start:stop].decode(), stop - start, start == 0, stop == len(raw), number)
        start = stop
