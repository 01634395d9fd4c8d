"""Buffered reading of text files, and their documents between separators."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO

from llama_jax.errors import UserError

# Files are read in blocks of this many bytes.
BUFFER_BYTES = 1 << 20
# White space at the start and end of a document is examined in blocks of this many bytes.
LOOK_BYTES = 1 << 12
# Of a compressed text this many bytes are kept, since the end of a document is looked for before it is read.
KEPT_BYTES = 1 << 25
# The beginning of a run of separators is looked for in this many bytes before a place.
BACK_BYTES = 1 << 16
LINE_END = re.compile(rb"\r\n|\n|\r")
WHITE = b" \t\r\n"

# A document: the places of its first byte and behind its last one, and its bytes if they are at hand.
Document = tuple[int, int, bytes | None]


class Reader:
    """Reads the bytes of a file through a buffer.

    The file is not mapped into memory, because a mapped file that is truncated ends the process with a bus error.
    ``file`` is another source of the bytes than the file on disk at ``path``.
    """

    def __init__(self, path: Path, size: int, file: Any = None):
        self.path, self.size = path, size
        self._at, self._buffer = 0, b""
        self.has_returns = False  # whether the last result of window() holds a carriage return
        with _naming_the_file(path):
            self._file = file or open(path, "rb", buffering=0)  # noqa: SIM115

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes ``start`` to ``stop``, a range within the file. Raises UserError if some are missing."""
        first, last = start - self._at, stop - self._at
        if first >= 0 and last <= len(self._buffer):
            return self._buffer[first:last]
        at, buffer = self.window(start, stop)
        return buffer[start - at : stop - at]

    def starts_or_ends_in_white(self, start: int, stop: int) -> bool:
        """Return whether the first or the last byte of a range is white space."""
        first, last = start - self._at, stop - 1 - self._at
        if first >= 0 and last < len(self._buffer):
            return self._buffer[first] in WHITE or self._buffer[last] in WHITE
        return self.read(start, start + 1) in WHITE or self.read(stop - 1, stop) in WHITE

    def window(self, start: int, stop: int) -> tuple[int, bytes]:
        """Return a buffer that holds bytes ``start`` to ``stop``, after the offset of its first byte."""
        if not self._at <= start <= stop <= self._at + len(self._buffer):
            self._at, self._buffer = start, self._bytes(start, min(self.size, max(stop, start + BUFFER_BYTES)))
            self.has_returns = b"\r" in self._buffer
        return self._at, self._buffer

    def _bytes(self, start: int, stop: int) -> bytes:
        with _naming_the_file(self.path):
            self._file.seek(start)
            pieces, left = [], stop - start
            while left and (piece := self._read(left)):
                pieces.append(piece)
                left -= len(piece)
        if left:
            raise UserError(
                f"{self.path}: expected {self.size:,} bytes, as there were at first, found it cut to {stop - left:,} meanwhile; "
                "start again when nobody writes it"
            )
        return b"".join(pieces)

    def _read(self, count: int) -> bytes:
        piece: bytes = self._file.read(count)
        return piece


class Rewinding:
    """A stream that can only go forward, as a file in which one can seek.

    Going back is free within the last ``kept`` bytes. Beyond, the stream is opened again and read from its start.
    """

    def __init__(self, opened: Callable[[], BinaryIO], kept: int = KEPT_BYTES):
        self._open, self._kept = opened, kept
        self._stream, self._recent = opened(), bytearray()
        self._at = self._end = 0  # the position, and where the stream is

    def seek(self, offset: int) -> None:
        """Move to ``offset``."""
        if offset < self._end - len(self._recent):
            self._stream.close()
            self._stream, self._end = self._open(), 0
            self._recent.clear()
        while self._end < offset and self._advance(min(BUFFER_BYTES, offset - self._end)):
            pass
        self._at = offset

    def read(self, count: int) -> bytes:
        """Return the next ``count`` bytes, or fewer, none at the end."""
        if self._at >= self._end and not self._advance(count):
            return b""
        start = len(self._recent) - (self._end - self._at)
        piece = bytes(self._recent[start : start + count])
        self._at += len(piece)
        return piece

    def _advance(self, count: int) -> int:
        if len(self._recent) > 2 * self._kept:
            del self._recent[: -self._kept]
        piece = self._stream.read(count)
        self._recent += piece
        self._end += len(piece)
        return len(piece)


class Separator:
    """Finds the text between two documents. A line end in it matches any line end: LF, CRLF or CR."""

    def __init__(self, separator: bytes):
        pieces = LINE_END.split(separator)
        self._plain = b"\n".join(pieces)
        self._pattern = re.compile(rb"(?:\r\n|\n|\r(?!\n))".join(map(re.escape, pieces)))
        self._longest = len(self._plain) + len(pieces) - 1
        self._bytes = frozenset(separator + b"\r\n" * (len(pieces) > 1))

    def first_start(self, data: Reader, at: int, stop: int) -> int | None:
        """Return the first end of a separator in bytes ``at`` to ``stop``, where a document begins, or None.

        Separators may overlap. They are found from a byte on that none of them contains.
        """
        first = max(0, at - BACK_BYTES)
        before = data.read(first, at)
        sync = at
        while sync > first and before[sync - 1 - first] in self._bytes:
            sync -= 1
        offset, buffer = data.window(sync, stop)
        for _, end in self._within(buffer[: stop - offset], sync - offset, data.has_returns):
            if end == stop - offset < data.size - offset:
                break  # the match may be longer
            if offset + end >= at:
                return offset + end
        return None

    def occurs(self, data: Reader) -> bool:
        """Return whether a file contains the separator."""
        look = 0
        while look < data.size:
            at, buffer = data.window(look, min(data.size, look + 2 * self._longest))
            if self._pattern.search(buffer, look - at):
                return True
            if at + len(buffer) == data.size:
                break
            look = max(look, at + len(buffer) - self._longest)  # the buffer's end may cut one
        return False

    def groups(self, data: Reader, start: int) -> Iterator[list[Document]]:
        """Yield the documents after ``start``, trimmed of blank lines at both ends, in lists.

        Empty ones are skipped.
        """
        lines = self._plain == b"\n"
        look = start
        while look < data.size:
            at, buffer = data.window(look, min(data.size, look + 2 * self._longest))
            if lines and not data.has_returns:
                # There may be millions of lines, so that each call here counts. They keep their white space.
                raws = buffer[look - at :].split(b"\n")
                sizes = [*map(len, raws)]
                begins = [*accumulate(map((1).__add__, sizes), initial=look)][:-1]
                if len(raws) > 1:
                    yield _trimmed(data, start, look + sizes[0])
                    rows = zip(begins[1:-1], sizes[1:-1], raws[1:-1], strict=True)
                    yield [(first, first + size, raw) for first, size, raw in rows if raw.strip(WHITE)]
                    start = begins[-1]
                look = at + len(buffer)
                continue
            ranges, start, look = self._ranges(data, at, buffer, start, look)
            yield from _trimmed_each(data, at, buffer, ranges)
        yield _trimmed(data, start, data.size)

    def _ranges(
        self, data: Reader, at: int, buffer: bytes, start: int, look: int
    ) -> tuple[list[tuple[int, int]], int, int]:
        """Return the ranges between the separators from ``look`` on in the window ``buffer`` at ``at``, relative to it.

        The first one begins at ``start``, which may be before the window. Return ``start`` and ``look`` for the next
        window, too.
        """
        last = at + len(buffer) == data.size
        ranges: list[tuple[int, int]] = []
        look, begins = look - at, start - at
        for found, end in self._within(buffer, look, data.has_returns):
            look = found
            if end == len(buffer) and not last:
                break  # the match may be longer: an LF may follow a CR at the end of the buffer
            ranges.append((begins, found))
            begins = look = end
        # A separator that the buffer's end cuts begins in its last bytes.
        return ranges, at + begins, data.size if last else at + max(look, len(buffer) - self._longest)

    def _within(self, buffer: bytes, start: int, has_returns: bool) -> Iterable[tuple[int, int]]:
        """Return where the separators in ``buffer`` begin and end."""
        if has_returns:
            return (match.span() for match in self._pattern.finditer(buffer, start))
        size = len(self._plain)  # a plain search is ten times as fast
        ends = accumulate((len(piece) + size for piece in buffer[start:].split(self._plain)[:-1]), initial=start)
        return [(end - size, end) for end in islice(ends, 1, None)]


def _trimmed_each(data: Reader, at: int, buffer: bytes, ranges: list[tuple[int, int]]) -> Iterator[list[Document]]:
    """Yield the documents in ranges of ``buffer``, in lists of those whose bytes are at hand, and of others."""
    found: list[Document] = []
    for first, last in ranges:
        raw = buffer[first:last] if first >= 0 and last <= len(buffer) and last - first <= LOOK_BYTES else None
        if raw and raw[0] not in WHITE and raw[-1] not in WHITE:
            found.append((at + first, at + last, raw))
        elif raw is None or b"\n" in raw or b"\r" in raw:
            yield found
            found = []
            yield _trimmed(data, at + first, at + last)
        elif raw.strip(WHITE):  # a single line keeps its white space
            found.append((at + first, at + last, raw))
    yield found


def _trimmed(data: Reader, first: int, last: int) -> list[Document]:
    """Return the document in a range that may begin or end with white space. There is none in an empty one."""
    if first < last and data.starts_or_ends_in_white(first, last):
        first, last = _without_blank_lines(data, first, last)
    return [(first, last, None)] if first < last else []


def _without_blank_lines(data: Reader, start: int, end: int) -> tuple[int, int]:
    """Return a document's range without blank lines at its start and end. It is empty if all is white space.

    The first line keeps its indentation, and the last one its trailing white space.
    """
    first, last = start, end
    while first < end and not (text := data.read(first, min(end, first + LOOK_BYTES)).lstrip(WHITE)):
        first = min(end, first + LOOK_BYTES)
    if first == end:
        return end, end
    first = min(end, first + LOOK_BYTES) - len(text)
    while not (text := data.read(max(first, last - LOOK_BYTES), last).rstrip(WHITE)):
        last = max(first, last - LOOK_BYTES)
    last = max(first, last - LOOK_BYTES) + len(text)
    return _line_start(data, start, first), _line_end(data, last, end)


def _line_start(data: Reader, start: int, at: int) -> int:
    """Return where the line that contains ``at`` begins, not before ``start``."""
    while at > start:
        before = data.read(max(start, at - LOOK_BYTES), at)
        if (found := max(before.rfind(b"\n"), before.rfind(b"\r"))) >= 0:
            return at - len(before) + found + 1
        at -= len(before)
    return start


def _line_end(data: Reader, at: int, end: int) -> int:
    """Return where the line that contains ``at`` ends, not after ``end``."""
    while at < end:
        behind = data.read(at, min(end, at + LOOK_BYTES))
        if found := LINE_END.search(behind):
            return at + found.start()
        at += len(behind)
    return end


def sha256_of(path: Path, size: int) -> str:
    """Return the digest of a file's first ``size`` bytes. Raises UserError if it has fewer."""
    sha, data = hashlib.sha256(), Reader(path, size)
    for start in range(0, size, BUFFER_BYTES):
        sha.update(data.read(start, min(size, start + BUFFER_BYTES)))
    return sha.hexdigest()


@contextlib.contextmanager
def _naming_the_file(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: expected a file that can be read, found: {error.strerror}; start again when it can"
        ) from None
