"""Splits files into train and eval, finds their documents and reads them in bounded memory.

Offsets count the bytes of all files on disk, in order of their paths.
"""

import functools
import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

from llama_jax.cli.flags import unescape
from llama_jax.data.corpus_file import BOM, CorpusFile
from llama_jax.data.documents import BACK_BYTES, BUFFER_BYTES, Document, Reader, Rewinding, Separator, sha256_of
from llama_jax.data.held_out import hash_of, is_held_out
from llama_jax.data.kinds import bad_bytes, decoded
from llama_jax.data.odd_bytes import note_odd
from llama_jax.data.parts import SPLITS, HeldOut, Part, Skipped, TextFile, Unit
from llama_jax.data.places import Place, on_disk
from llama_jax.data.slices import cut_near, letter_border
from llama_jax.errors import UserError, quoted

# A document is read in parts of about this many bytes.
PART_BYTES = 1 << 16
# Separators in common corpora, to suggest in an error.
MARKERS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</s>", "<eos>", "<EOS>", "\\n\\n", "\\n")


@dataclass
class Corpus:
    """Text files and the position of the cut between the training part and the held-out part.

    ``paths`` are files on disk, or CorpusFiles, which may be compressed or behind an address. ``any_bytes`` accepts
    files that are not UTF-8. ``by_documents``: a hash of its first part decides for each document whether it is held
    out, in place of the cut. ``replaced`` counts the byte sequences so far that were not UTF-8 and were read as U+FFFD.
    """

    paths: Sequence[Path | CorpusFile]
    separator: bytes
    train_size: float
    any_bytes: bool = True
    by_documents: bool = False
    replaced: int = 0
    _stamps: list[tuple[Any, ...]] = field(default_factory=list)
    odd: dict[str, tuple[int, int]] = field(default_factory=dict)
    _open: tuple[int, Reader] | None = None

    # A text is plain: it has no fields, and no records that could be skipped.
    text_field = ""
    eval_files: ClassVar[tuple[TextFile, ...]] = ()

    def __post_init__(self) -> None:
        self._files = [f if isinstance(f, CorpusFile) else CorpusFile(on_disk(f)) for f in self.paths]
        self.skipped = Skipped()

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: not the file that is open here."""
        return self.__dict__ | {"_open": None}

    @property
    def held_out(self) -> HeldOut:
        """How the held-out part is chosen."""
        return "documents" if self.by_documents else "end"

    @property
    def stored_bytes(self) -> int:
        """The size of all files as they are stored."""
        return sum(max(0, file.place.size) for file in self._files)

    @functools.cached_property
    def _sizes(self) -> list[int]:
        """The sizes of the texts. Compressed ones are read for it."""
        return [self._measured[i][0] if _is_stream(file) else file.place.size for i, file in enumerate(self._files)]

    @functools.cached_property
    def _measured(self) -> dict[int, tuple[int, str]]:
        """The sizes and digests of the texts that are compressed, or whose size is not known before they are read."""
        found = {}
        for i, file in enumerate(self._files):
            if _is_stream(file):
                sha, size = hashlib.sha256(), 0
                with file.open() as stream:
                    while block := stream.read(BUFFER_BYTES):
                        sha.update(block)
                        size += len(block)
                found[i] = size, sha.hexdigest()
        return found

    @functools.cached_property
    def text_bytes(self) -> int:
        """The size of all texts."""
        return sum(self._sizes)

    @functools.cached_property
    def cut(self) -> int:
        """The offset of the held-out part. It is the end if documents are held out instead."""
        return self.text_bytes if self.by_documents else int(self.text_bytes * self.train_size)

    @functools.cached_property
    def _cuts(self) -> list[int]:
        """The position of the cut within each file: 0 if all of it is held out, its size if none is."""
        offsets = accumulate(self._sizes, initial=0)
        return [min(max(self.cut - offset, 0), size) for offset, size in zip(offsets, self._sizes, strict=False)]

    @functools.cached_property
    def files(self) -> tuple[TextFile, ...]:
        """The files with the digests of their contents, at the time of first use. Compressed ones are decompressed."""
        self._stamps = [file.place.first_stamp() for file in self._files]
        return tuple(self.file_of(i) for i in range(len(self._files)))

    @property
    def places(self) -> list[Place]:
        """The files."""
        return [file.place for file in self._files]

    def stamp(self) -> str:
        """Return what is known of the files without reading them, the separator and the cut."""
        return repr(("text", [place.mark() for place in self.places], self.separator, self._split))

    def know(self, files: Sequence[TextFile]) -> None:
        """Take these for ``files``."""
        self._stamps = [file.place.first_stamp() for file in self._files]
        self.files = tuple(files)

    def file_of(self, i: int) -> TextFile:
        """Return a file with the digest of its content."""
        file = self._files[i]
        if i in self._measured:
            return TextFile(full_name(file), *self._measured[i])
        known = file.place.sha256() if file.place.is_remote else sha256_of(Path(file.name), self._sizes[i])
        return TextFile(full_name(file), self._sizes[i], known)

    def digest(self) -> str:
        """Return the sha256 of the files' contents and sizes, the separator and the cut."""
        files = self.files
        sha = hashlib.sha256(repr((self._sizes, self.separator, self._split)).encode())
        for file in files:
            sha.update(bytes.fromhex(file.sha256))
        return sha.hexdigest()

    @property
    def _split(self) -> int | tuple[str, float]:
        """The cut, or the share that decides which documents are held out."""
        return ("documents", self.train_size) if self.by_documents else self.cut

    def check_unchanged(self) -> None:
        """Raise UserError if a file has changed since ``files`` was computed."""
        for i, (file, stamp) in enumerate(zip(self._files, self._stamps, strict=True)):
            remote = file.place.is_remote or _is_stream(file)
            if file.place.stamp() != stamp and (remote or self.file_of(i) != self.files[i]):
                raise UserError(
                    f"{full_name(file)}: expected a file that nobody writes, found it changed meanwhile; start again"
                )

    def units(self, largest: int = 0) -> list[Unit]:
        """Return the files that are trained on, then those that are held out. The cut may go through one.

        Those of more than ``largest`` bytes are sliced, if that is not 0.
        """
        train: list[Unit] = []
        held_out: list[Unit] = []
        for i, (size, cut) in enumerate(zip(self._sizes, self._cuts, strict=True)):
            for units, split, start, stop in ((train, "train", 0, cut), (held_out, "eval", cut, size)):
                if start < stop:
                    first = Unit(i, split, start=start if largest else 0)
                    units += first.slices(stop, stop - start, largest or stop)
        return train + held_out

    def parts(self, split: str) -> Iterator[Part]:
        """Yield the text of a split ("train" or "eval"), document by document.

        Parts are cut as in ``tokenizer.split_text``. Raises UserError if a file cannot be read to its end or is not
        text.
        """
        for unit in self.units():
            yield from (part for _, part in self.read(unit, (split,)))

    def read(self, unit: Unit, splits: Sequence[str] = SPLITS) -> Iterator[tuple[str, Part]]:
        """Yield the parts of a unit in order, each with its split."""
        return ((split, part) for split, parts in self.groups(unit, splits) for part in parts)

    def groups(self, unit: Unit, splits: Sequence[str] = SPLITS) -> Iterator[tuple[str, list[Part]]]:
        """Yield the parts of a unit in order, in lists, each with its split."""
        if self.by_documents:
            return ((split, [part]) for split, part in self._divided(unit) if split in splits)
        return ((unit.split, parts) for parts in self._parts(unit)) if unit.split in splits else iter(())

    def _divided(self, unit: Unit) -> Iterator[tuple[str, Part]]:
        """Yield the parts of a unit, each with the split that the hash of its document's first part chooses."""
        split = "train"
        for part in chain.from_iterable(self._parts(unit)):
            if part.starts:
                split = SPLITS[is_held_out(hash_of(part.text.encode()), self.train_size)]
            yield split, part

    def _parts(self, unit: Unit) -> Iterator[list[Part]]:
        """Yield the parts of a unit in lists. Raises UserError if its file is not text."""
        data = self._reader(unit.file)
        look, start, end, goes_on = self._range(data, unit)
        one_by_one = functools.partial(self._document, data, start, end, goes_on)
        read = bad = 0
        for documents in self._documents(data, look) if start < end else ():
            # The range may cut one at each end of those that are inside.
            first = bisect_left(documents, start + goes_on, key=itemgetter(0))
            last = max(first, bisect_right(documents, end, key=itemgetter(1)))
            before, inside, after = documents[:first][-1:], documents[first:last], documents[last:][:1]
            groups = chain(map(one_by_one, before), [_together(inside, one_by_one)], map(one_by_one, after))
            for parts, odd in chain.from_iterable(groups):
                read, bad = read + sum(part.size for part in parts), bad + odd
                yield parts
            if documents and documents[-1][0] >= end:
                break
        if not self.any_bytes:
            note_odd(self, self._files[unit.file].name, unit, read, bad)

    def _range(self, data: Reader, unit: Unit) -> tuple[int, int, int, bool]:
        """Return where to look for a unit's documents from, its start and end, and whether it starts in a document."""
        size, cut = self._sizes[unit.file], self._cuts[unit.file]
        while 0 < cut < size and data.read(cut, cut + 1)[0] & 0xC0 == 0x80:  # do not cut inside a character
            cut -= 1
        start, end = (0, cut) if unit.split == "train" else (cut, size)
        look, goes_on = 0, False
        if unit.start not in (0, self._cuts[unit.file]):
            start, goes_on = self._cut_near(data, unit.start, end)
            look = start
        elif start:
            look = self._document_before(data, start)
        if unit.stop is not None:
            end, _ = self._cut_near(data, unit.stop, end)
        return look, start, end, goes_on

    def _cut_near(self, data: Reader, at: int, end: int) -> tuple[int, bool]:
        """Return the beginning of the slice at ``at``, and whether it is within a document.

        It is not if documents are held out, since the first part of each decides.
        """
        return cut_near(data, at, end, self._separator, within=not self.by_documents)

    def _document_before(self, data: Reader, cut: int) -> int:
        """Return where to begin to look for the document that ``cut`` goes through."""
        back = BACK_BYTES
        while self._separator is not None and back < cut:
            if (start := cut_near(data, cut - back, cut, self._separator)[0]) < cut:
                return start
            back *= 16
        return 0

    @functools.cached_property
    def _separator(self) -> Separator | None:
        return Separator(self.separator) if self.separator else None

    def _reader(self, number: int) -> Reader:
        """Return a reader of file ``number``. It is kept for the next call."""
        if self._open is None or self._open[0] != number:
            file, size = self._files[number], self._sizes[number]
            plain = not file.compression and not file.place.is_remote
            stream = None if plain else Rewinding(file.open) if _is_stream(file) else file.open()
            self._open = number, Reader(Path(file.name), size, stream)
        return self._open[1]

    def separates(self) -> bool:
        """Return whether the separator occurs in a file. True without a separator."""
        return self._separator is None or any(self._separator.occurs(self._reader(i)) for i in range(len(self._files)))

    def beginnings(self) -> str:
        """Return the beginnings of some files, as a sample."""
        sizes = [min(size, BUFFER_BYTES) for size in self._sizes[:16]]
        raw = (self._reader(i).read(0, size) for i, size in enumerate(sizes) if size)
        return "".join(text.decode("utf-8", "replace") for text in raw)

    def _documents(self, data: Reader, start: int) -> Iterator[list[Document]]:
        """Yield lists of a file's documents from ``start``. Without a separator, the whole file is one."""
        if start == 0 and data.read(0, min(3, data.size)) == BOM:
            start = len(BOM)
        if self._separator is None:
            yield [(start, data.size, None)]
            return
        yield from self._separator.groups(data, start)

    def _document(
        self, data: Reader, start: int, end: int, goes_on: bool, document: Document
    ) -> Iterator[tuple[list[Part], int]]:
        """Yield each part of a document within ``start`` and ``end``, with its number of bytes that are not UTF-8.

        A document that the cut goes through has no end in training, and starts again in evaluation. ``goes_on`` says
        that a document from ``start`` on is not the beginning of one.
        """
        at = first = max(document[0], start)
        last = min(document[1], end)
        starts, ends = not (goes_on and document[0] == start), last == document[1]
        while at < last:
            raw = data.read(at, min(last, at + 4 * PART_BYTES + 1))
            if len(raw) > PART_BYTES:
                raw = raw[: border(raw)]
            stop = at + len(raw)
            text, bad = self._decode(raw)
            yield [Part(text, len(raw), starts and at == first, ends and stop == last)], bad
            at = stop

    def _decode(self, raw: bytes) -> tuple[str, int]:
        if raw.isascii():
            return raw.decode("ascii"), 0
        text, replaced = decoded(raw)
        self.replaced += replaced
        return text, bad_bytes(raw) if replaced else 0


def _together(
    documents: list[Document], one_by_one: Callable[[Document], Iterator[tuple[list[Part], int]]]
) -> Iterator[tuple[list[Part], int]]:
    """Yield the parts of documents in lists as long as ``_at_hand`` allows: one that is long or odd stands alone."""
    if (parts := _at_hand(documents)) is not None:
        yield parts, 0
    elif len(documents) == 1:
        yield from one_by_one(documents[0])
    else:
        half = len(documents) // 2
        yield from _together(documents[:half], one_by_one)
        yield from _together(documents[half:], one_by_one)


def _at_hand(documents: list[Document]) -> list[Part] | None:
    """Return the parts of short documents, each of which is one, or None if one is long or is not UTF-8."""
    raws = [raw for _, _, raw in documents]
    if max(map(len, filter(None, raws)), default=0) > PART_BYTES:
        return None
    try:
        texts = [raw.decode() for raw in raws]  # type: ignore[union-attr]
    except (AttributeError, UnicodeDecodeError):
        return None
    # A corpus may have a document for each few bytes, so that each call here counts.
    rows = zip(texts, map(len, raws), repeat(True), repeat(True), repeat(0))  # type: ignore[arg-type]
    return [*map(functools.partial(tuple.__new__, Part), rows)]


def full_name(file: CorpusFile) -> str:
    """Return the address of a file, or its absolute path."""
    return file.name if file.place.is_remote else str(Path(file.name).absolute())


@functools.cache
def _is_stream(file: CorpusFile) -> bool:
    """Return whether a text can only be read from its start, so that its size is known when it has been read."""
    if file.compression or file.place.size < 0:
        return True
    if not file.place.is_remote:
        return False
    with file.open() as stream:
        return not stream.seekable()


def border(raw: bytes) -> int:
    """Return how many bytes the next part takes: up to a newline or space that no token crosses."""
    if len(raw) <= PART_BYTES:
        return len(raw)
    reach = min(len(raw), 4 * PART_BYTES)
    white = b" \n\t\r\v\f"
    for mark, shift in ((b"\n", 1), (b" ", 0)):
        at = PART_BYTES
        while (at := raw.find(mark, at, reach - 1)) >= 0:
            before, after = raw[at - 1 : at], raw[at + 1 : at + 2]
            if after not in white and after.isascii() and (shift or (before not in white and before.isascii())):
                return at + shift
            at += 1
    if (among_letters := letter_border(raw[:reach], PART_BYTES)) is not None:
        return among_letters
    stop = reach
    while stop < len(raw) and raw[stop] & 0xC0 == 0x80 and stop > reach - 4:
        stop -= 1
    return stop


def separator_bytes(separator: str) -> bytes:
    r"""Return the separator as UTF-8, with the escapes \n, \r, \t and \\ resolved."""
    return unescape(separator).encode()


def check_separator(corpus: Corpus, source: str) -> None:
    """Raise UserError if the separator occurs nowhere. The message names separators that do occur."""
    if corpus.separates():
        return
    sample = corpus.beginnings()
    wanted = corpus.separator.decode()
    likely = [*map(unescape, MARKERS), wanted.strip(), unescape(wanted)]
    if wanted.strip():  # the same separator in other letter case
        likely += re.findall(re.escape(wanted.strip()), sample, re.IGNORECASE)[:1]
    there = [
        f"{quoted(text)} ({sample.count(text):,} times)" for text in dict.fromkeys(likely) if text and text in sample
    ]
    hint = f"its beginning has {', '.join(there)}" if there else "leave it out where a file is a document"
    raise UserError(
        f"data.separator: expected what stands between documents, found {quoted(wanted)} nowhere in {source}; {hint}"
    )
