"""From files to documents: which files, how they are split into train and eval, and read in bounded memory.

Offsets count bytes of the files as they lie on disk, one after the other in order of their paths.
"""

import glob
import hashlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llama_jax.errors import UserError

# A document is read in parts of about this many bytes.
PART_BYTES = 1 << 16
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Part:
    """A stretch of a document's text, out of so many bytes; ``starts`` and ``ends``: it holds the document's beginning and its end."""

    text: str
    size: int
    starts: bool
    ends: bool


@dataclass
class Corpus:
    """Text files and the place of the cut between the training part and the held-out part.

    replaced: how many byte sequences that are not UTF-8 have been read as U+FFFD so far.
    """

    paths: list[Path]
    separator: bytes
    train_size: float
    replaced: int = 0
    _sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sizes = [path.stat().st_size for path in self.paths]
        self.cut = int(sum(self._sizes) * self.train_size)

    def digest(self) -> str:
        """sha256 over the files' contents and borders, the separator and the cut."""
        sha = hashlib.sha256(repr((self._sizes, self.separator, self.cut)).encode())
        for path in self.paths:
            with open(path, "rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
        return sha.hexdigest()

    def parts(self, split: str) -> Iterator[Part]:
        """All text of a split ("train" or "eval"), document by document, cut as ``tokenizer.split_text`` asks."""
        offset = 0
        for path, size in zip(self.paths, self._sizes, strict=True):
            cut = min(max(self.cut - offset, 0), size)
            offset += size
            if size == 0 or (cut == 0 if split == "train" else cut == size):
                continue
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                while 0 < cut < size and data[cut] & 0xC0 == 0x80:  # not in the middle of a character
                    cut -= 1
                start, end = (0, cut) if split == "train" else (cut, size)
                for doc_start, doc_end in self._documents(data, len(BOM) if data[:3] == BOM else 0, size):
                    if doc_start >= end:
                        break
                    first, last = max(doc_start, start), min(doc_end, end)
                    if first < last:
                        # The document that the cut goes through stays open in training, and begins anew in evaluation.
                        yield from self._document(data, first, last, ends=last == doc_end)

    def _documents(self, data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Ranges of the documents between ``start`` and ``end``; empty ones are passed over."""
        while start < end:
            found = data.find(self.separator, start, end) if self.separator else -1
            stop = end if found < 0 else found
            if stop > start:
                yield start, stop
            start = stop + len(self.separator) if found >= 0 else end

    def _document(self, data: mmap.mmap, start: int, end: int, ends: bool) -> Iterator[Part]:
        first = start
        while start < end:
            stop = _border(data, start, end)
            yield Part(self._decode(data[start:stop]), stop - start, starts=start == first, ends=ends and stop == end)
            start = stop

    def _decode(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("utf-8", errors="replace")
            self.replaced += text.count("\ufffd") - raw.count("\ufffd".encode())
            return text


def _border(data: mmap.mmap, start: int, end: int) -> int:
    """Where a part that begins at ``start`` ends: behind a newline or before a space, where no token reaches across."""
    if end - start <= PART_BYTES:
        return end
    reach = min(end, start + 4 * PART_BYTES)
    white = b" \n\t\r\v\f"
    for mark, shift in ((b"\n", 1), (b" ", 0)):
        at = start + PART_BYTES
        while (at := data.find(mark, at, reach - 1)) >= 0:
            before, after = data[at - 1 : at], data[at + 1 : at + 2]
            if after not in white and after.isascii() and (shift or (before not in white and before.isascii())):
                return at + shift
            at += 1
    stop = reach
    while stop < end and data[stop] & 0xC0 == 0x80 and stop > reach - 4:
        stop -= 1
    return stop


def replacement_warning(replaced: int) -> str:
    """What to tell of so many byte sequences that are not UTF-8; nothing, if there are none."""
    return f"warning: {replaced:,} byte sequences are not UTF-8; each was read as U+FFFD" if replaced else ""


def find_files(filepath: str, key: str = "data.filepath") -> list[Path]:
    """The text files that ``filepath`` (a file, a folder, a glob) stands for, sorted.

    Raises UserError, which speaks of the option ``key``, where there are none.
    """
    path = Path(filepath).expanduser()
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*.txt") if p.is_file())
        if not paths:
            raise UserError(f"{key}: expected *.txt files in the folder {filepath}, found none")
    elif path.exists():
        paths = [path]
    else:
        paths = sorted(p for p in map(Path, glob.glob(os.fspath(path), recursive=True)) if p.is_file())
        if not paths:
            raise UserError(f"{key}: expected a text file, a folder or a glob, found nothing at {filepath}")
    for p in paths:
        if not os.access(p, os.R_OK):
            raise UserError(f"{key}: expected a readable file, found no permission to read {p}")
        with open(p, "rb") as file:
            head = file.read(2)
        if head in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{key}: expected UTF-8, found UTF-16 in {p}; convert it, for example with iconv")
    if all(p.stat().st_size == 0 for p in paths):
        raise UserError(f"{key}: expected text, found {filepath} empty")
    return paths


def separator_bytes(separator: str) -> bytes:
    r"""The separator as UTF-8; \n, \r and \t may be spelled with a backslash, as a shell hands them over."""
    for spelled, char in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t")):
        separator = separator.replace(spelled, char)
    return separator.encode()
