"""A file of a corpus, with how it is compressed and stored, and its content as a stream from any place on."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from llama_jax.data.compression import decompressed
from llama_jax.data.kinds import Format
from llama_jax.data.places import BLOCK_BYTES, Place

BOM = b"\xef\xbb\xbf"
# What a record is called in each format. In the others it is a row.
WORDS: dict[Format, str] = {"json lines": "line", "json": "record"}


class Record(NamedTuple):
    """A record of a file: its number from 1, and its text in UTF-8, or what is wrong with it.

    ``replaced`` counts what was read as U+FFFD: lone surrogates in the text, and bytes of the record that are not
    UTF-8.
    """

    number: int
    raw: bytes | None
    fault: str = ""
    replaced: int = 0


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus, how it is compressed, how its texts are stored, and in which field of its records."""

    place: Place
    compression: str = ""
    format: Format = "text"
    field: str = ""
    chats: str = ""
    """The kind of conversations that its records are, see chat_records.py. Empty: texts."""
    chosen: bool = False
    """Whether the kind was asked for, so that its fields are taken of records that are of another kind by theirs."""

    @property
    def name(self) -> str:
        """The path or the address."""
        return self.place.name

    @property
    def word(self) -> str:
        """The word for a record of the file: line, record or row."""
        return WORDS.get(self.format, "row")

    def open(self) -> BinaryIO:
        """Open the decompressed content as a stream."""
        return decompressed(self.place.open(), self.compression, self.name)


# The last file that was read, its stream, and where it is.
_kept: dict[CorpusFile, tuple[BinaryIO, int]] = {}


@contextlib.contextmanager
def opened_at(file: CorpusFile, at: int) -> Iterator[tuple[BinaryIO, list[int]]]:
    """Open a file to be read from byte ``at`` of its decompressed content on.

    It yields the stream, and a list with the position where the reader stops, for the reader to keep. A compressed file
    is not read from its start again if the position is before the next ``at``.
    """
    stream, place = _kept.pop(file, (None, 0))
    if stream is None or place > at:
        if stream is not None:
            stream.close()
        stream, place = file.open(), 0
    try:
        if not file.compression and stream.seekable():
            stream.seek(at)
            place = at
        while place < at and (piece := stream.read(min(BLOCK_BYTES, at - place))):
            place += len(piece)
        position = [place]
        yield stream, position
    except BaseException:
        stream.close()
        raise
    for other, _ in _kept.values():
        other.close()
    _kept.clear()
    _kept[file] = stream, position[0]
