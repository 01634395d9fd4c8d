"""Splits files into train and eval, finds their documents and reads them in bounded memory.

Offsets count the bytes of all files on disk, in order of their paths.
"""

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from llama_jax.cli.flags import unescape
from llama_jax.data.documents import BUFFER_BYTES, Reader, Separator, sha256_of
from llama_jax.data.kinds import bad_bytes, is_too_odd
from llama_jax.errors import UserError, quoted

# A document is read in parts of about this many bytes.
PART_BYTES = 1 << 16
BOM = b"\xef\xbb\xbf"
# Separators in common corpora, to suggest in an error.
MARKERS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</s>", "<eos>", "<EOS>", "\\n\\n", "\\n")


class Part(NamedTuple):
    """A part of a document's text, from ``size`` bytes.

    ``starts`` and ``ends`` tell whether it is the first or last part.
    """

    text: str
    size: int
    starts: bool
    ends: bool


@dataclass(frozen=True)
class TextFile:
    """A file of a text, at the time it was read."""

    path: str
    bytes: int
    sha256: str


@dataclass
class Corpus:
    """Text files and the position of the cut between the training part and the held-out part.

    ``any_bytes`` accepts files that are not UTF-8. ``replaced`` counts the byte sequences so far that were not UTF-8
    and were read as U+FFFD.
    """

    paths: list[Path]
    separator: bytes
    train_size: float
    any_bytes: bool = True
    replaced: int = 0
    _sizes: list[int] = field(default_factory=list)
    _stamps: list[tuple[int, ...]] = field(default_factory=list)
    _begins: dict[Path, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sizes = [path.stat().st_size for path in self.paths]
        self._begins = {}
        self.bytes = sum(self._sizes)
        self.cut = int(self.bytes * self.train_size)

    @functools.cached_property
    def files(self) -> tuple[TextFile, ...]:
        """The files with the digests of their contents, at the time of first use."""
        self._stamps = [_stamp(path) for path in self.paths]
        return tuple(
            TextFile(str(path.absolute()), size, sha256_of(path, size))
            for path, size in zip(self.paths, self._sizes, strict=True)
        )

    def digest(self) -> str:
        """Return the sha256 of the files' contents and sizes, the separator and the cut."""
        sha = hashlib.sha256(repr((self._sizes, self.separator, self.cut)).encode())
        for file in self.files:
            sha.update(bytes.fromhex(file.sha256))
        return sha.hexdigest()

    def check_unchanged(self) -> None:
        """Raise UserError if a file has changed since ``files`` was computed."""
        for path, file, stamp in zip(self.paths, self.files, self._stamps, strict=True):
            if _stamp(path) != stamp and sha256_of(path, file.bytes) != file.sha256:
                raise UserError(
                    f"{file.path}: expected a file that nobody writes, found it changed meanwhile; start again"
                )

    def parts(self, split: str) -> Iterator[Part]:
        """Yield the text of a split ("train" or "eval"), document by document.

        Parts are cut as in ``tokenizer.split_text``. Raises UserError if a file cannot be read to its end or is not
        text.
        """
        offset = 0
        for path, size in zip(self.paths, self._sizes, strict=True):
            cut = min(max(self.cut - offset, 0), size)
            offset += size
            if size == 0 or (cut == 0 if split == "train" else cut == size):
                continue
            data = Reader(path, size)
            while 0 < cut < size and data.read(cut, cut + 1)[0] & 0xC0 == 0x80:  # do not cut inside a character
                cut -= 1
            start, end = (0, cut) if split == "train" else (cut, size)
            read = bad = 0
            for doc_start, doc_end in self._documents(data, self._begins.get(path, 0) if split == "eval" else 0):
                if doc_end > cut:
                    self._begins.setdefault(path, doc_start)  # lets evaluation start at its first document
                if doc_start >= end:
                    break
                first, last = max(doc_start, start), min(doc_end, end)
                if first >= last:
                    continue
                # A document that the cut goes through has no end in training, and starts again in evaluation.
                ends = last == doc_end
                if last - first <= PART_BYTES:
                    text, odd = self._decode(data.read(first, last))
                    read, bad = read + last - first, bad + odd
                    yield Part(text, last - first, True, ends)
                    continue
                for part, odd in self._document(data, first, last, ends):
                    read, bad = read + part.size, bad + odd
                    yield part
            if is_too_odd(bad, read) and not self.any_bytes:
                raise UserError(
                    f"{path}: expected plain text in UTF-8, found {bad:,} of {read:,} bytes that are not; convert it, or take "
                    "it as it is with --data.as-text"
                )

    def separates(self) -> bool:
        """Return whether the separator occurs in a file. True without a separator."""
        return not self.separator or any(
            Separator(self.separator).occurs(Reader(path, size))
            for path, size in zip(self.paths, self._sizes, strict=True)
        )

    def _documents(self, data: Reader, start: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of a file's documents from ``start``. Without a separator, the whole file is one."""
        if start == 0 and data.read(0, min(3, data.size)) == BOM:
            start = len(BOM)
        if not self.separator:
            yield start, data.size
            return
        yield from Separator(self.separator).documents(data, start)

    def _document(self, data: Reader, start: int, end: int, ends: bool) -> Iterator[tuple[Part, int]]:
        """Yield the parts of a document, each with its number of bytes that are not UTF-8."""
        first = start
        while start < end:
            raw = data.read(start, min(end, start + 4 * PART_BYTES + 1))
            if len(raw) > PART_BYTES:
                raw = raw[: _border(raw)]
            stop = start + len(raw)
            text, bad = self._decode(raw)
            yield Part(text, len(raw), start == first, ends and stop == end), bad
            start = stop

    def _decode(self, raw: bytes) -> tuple[str, int]:
        try:
            return raw.decode("utf-8"), 0
        except UnicodeDecodeError:
            text = raw.decode("utf-8", errors="replace")
            self.replaced += text.count("\ufffd") - raw.count("\ufffd".encode())
            return text, bad_bytes(raw)


def _border(raw: bytes) -> int:
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
    stop = reach
    while stop < len(raw) and raw[stop] & 0xC0 == 0x80 and stop > reach - 4:
        stop -= 1
    return stop


def _stamp(path: Path) -> tuple[int, ...]:
    """Return values that change when a file is written."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def replacement_warning(replaced: int) -> str:
    """Return a warning if bytes were replaced, else an empty text."""
    return f"warning: {replaced:,} byte sequences are not UTF-8; each was read as U+FFFD" if replaced else ""


def separator_bytes(separator: str) -> bytes:
    r"""Return the separator as UTF-8, with the escapes \n, \r, \t and \\ resolved."""
    return unescape(separator).encode()


def check_separator(corpus: Corpus, source: str) -> None:
    """Raise UserError if the separator occurs nowhere. The message names separators that do occur."""
    if corpus.separates():
        return
    sample = "".join(
        Reader(path, size).read(0, min(size, BUFFER_BYTES)).decode("utf-8", "replace")
        for path in corpus.paths[:16]
        if (size := path.stat().st_size)
    )
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
