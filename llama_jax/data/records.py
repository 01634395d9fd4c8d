"""Records of a file, one after the other: JSON lines, a JSON array, parquet and arrow.

The text of a record is a document.
"""

import codecs
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NamedTuple

from llama_jax.data.chat_records import FIELDS_READ, KINDS, KNOWN, kind_of_fields, kind_of_name
from llama_jax.data.columns import (
    arrow,
    arrow_records,
    batches_of,
    columns_of,
    parquet,
    parquet_records,
    path_of,
    rows_of_tables,
)
from llama_jax.data.corpus_file import BOM, CorpusFile, Record, opened_at
from llama_jax.data.kinds import Format, decoded
from llama_jax.data.parts import Unit
from llama_jax.data.places import BLOCK_BYTES
from llama_jax.data.record_fields import TEXT, Fields, content_of, named
from llama_jax.errors import UserError, quoted
from llama_jax.tokenizer import clean

_fast_loads: Callable[[bytes], Any] = json.loads
with contextlib.suppress(ImportError):  # it reads the same, in a half to a quarter of the time
    from orjson import loads as _fast_loads

# A record is at most this long, in bytes, so that memory is bounded.
MOST_BYTES = 1 << 27
# Rows of conversations are read so many at a time.
ROWS_AT_ONCE = 256
# The field with the text is chosen by this many records, or fewer if they are this long together.
SAMPLE, SAMPLE_BYTES = 200, 1 << 22
# What a file of each format is called.
NAMES: dict[Format, str] = {
    "text": "text", "json lines": "JSON lines", "json": "a JSON array", "parquet": "a parquet file",
    "arrow file": "an arrow file", "arrow stream": "an arrow stream",
}  # fmt: skip
WHOLE_FILE = Unit(0)


class Group(NamedTuple):
    """A group of rows of a parquet file: how many there are, and about how many bytes of text they hold."""

    rows: int
    size: int


def groups_of(file: CorpusFile) -> list[Group]:
    """Return the groups of rows into which a parquet file is divided, none of other files."""
    if file.format != "parquet":
        return []
    with parquet(file) as table:
        column = table.schema_arrow.names.index(path_of(table.schema_arrow, file.field)[0])
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
        flat = table.metadata.num_columns == len(table.schema_arrow.names)  # without lists or structures
        sizes = [g.column(column).total_uncompressed_size if flat else g.total_byte_size for g in groups]
        return [Group(group.num_rows, size) for group, size in zip(groups, sizes, strict=True)]


def text_bytes_of(file: CorpusFile) -> int:
    """Return the size of a file's decompressed content, which is read for it."""
    size = 0
    with file.open() as stream:
        while block := stream.read(BLOCK_BYTES):
            size += len(block)
    return size


def records_of(file: CorpusFile, unit: Unit = WHOLE_FILE) -> Iterator[Record]:
    """Yield the records of a file, or of a unit of it, in order.

    Raises UserError if the file is damaged; a record that is wrong has a ``fault``.
    """
    if file.format == "parquet":
        yield from parquet_records(file, unit)
    elif file.format in ("arrow file", "arrow stream"):
        yield from arrow_records(file)
    else:
        for number, value, fault, replaced in _values(file, unit):
            yield Record(number, None, fault) if fault else _of_value(number, value, file.field, replaced)


def lines_before(file: CorpusFile, unit: Unit) -> int:
    """Return how many lines of a file come before a slice of it. They are read for it."""
    lines = 0
    with file.open() as stream:
        left = unit.start
        while left and (block := stream.read(min(left, BLOCK_BYTES))):
            lines, left, last = lines + block.count(b"\n"), left - len(block), block[-1:]
    return lines + (bool(unit.start) and last != b"\n")


def with_field(file: CorpusFile, wanted: str, key: str = "data.filepath") -> CorpusFile:
    """Return ``file`` with the field that holds the text: ``wanted``, else "text", else the only one with strings.

    A field within another has both names (``meta.text``), and is taken if it is wanted.
    Records without a text may be conversations (chat_records.py), whose fields are then named. Raises a UserError that
    names the option ``key`` and lists the fields if there is no such field, or several.
    """
    fields = _fields(file, wanted)
    strings, every = [*fields.texts], fields.names
    if (wanted and fields.has(wanted)) or not every:
        return replace(file, field=wanted or TEXT)
    if (kind := kind_of_name(wanted)) and {*KINDS[kind]} <= {*every}:
        return replace(file, field=", ".join(KINDS[kind]), chats=kind, chosen=True)
    if not wanted and TEXT not in strings and (kind := kind_of_fields(every)):
        return replace(file, field=", ".join(KINDS[kind]), chats=kind)
    if fields.chosen and not wanted:
        return replace(file, field=fields.chosen)
    asked = f"texts in the field {quoted(wanted)}" if wanted else "texts in a field text, or in one field alone"
    conversations = f", or conversations ({KNOWN})" if not wanted else ""
    raise UserError(
        f"{'data.text_field' if wanted else key}: expected {asked}{conversations}, found {NAMES[file.format]} with "
        f"{fields.found(wanted or TEXT)} from {file.word} 1 on: {file.name}; {fields.advice}, or take the file as it is with "
        "--data.as-text"
    )


def fields_of_texts(file: CorpusFile) -> list[str]:
    """Return the names of the fields of texts that the first records of ``file`` have."""
    return [*_fields(file, "").texts]


def also_chats(file: CorpusFile) -> str:
    """Return the fields of a conversation that records have beside the text that is taken, or an empty text."""
    if file.format == "text" or file.chats or file.field != TEXT:
        return ""
    kind = kind_of_fields(_fields(file, "").names)
    return ",".join(KINDS[kind]) if kind else ""


def values_of(file: CorpusFile) -> Iterator[tuple[int, Any, str, int]]:
    """Yield of each record of a file its number, its value, its fault, and how many byte sequences were replaced.

    Raises UserError if the file is damaged.
    """
    if file.format == "parquet":
        with parquet(file) as table:
            read = [name for name in table.schema_arrow.names if name in FIELDS_READ]
            yield from rows_of_tables(table.iter_batches(ROWS_AT_ONCE, columns=read, use_threads=False))
    elif file.format in ("arrow file", "arrow stream"):
        with arrow(file) as reader:
            yield from rows_of_tables(batches_of(file, reader))
    else:
        yield from _values(file, WHOLE_FILE)


def columns_not_read(file: CorpusFile) -> list[str]:
    """Return the names of the columns of a table that ``values_of`` does not read, none of other files."""
    columns = _fields(file, "").names if file.format == "parquet" else []
    return [name for name in columns if name not in FIELDS_READ]


def records_in(file: CorpusFile) -> int | None:
    """Return about how many records a file has, or None if it would have to be read as it is for its records.

    Lines are counted, also empty ones.
    """
    if file.format == "parquet":
        with parquet(file) as table:
            return int(table.metadata.num_rows)
    if file.format != "json lines" or file.place.is_remote:
        return None
    lines, last = 0, b"\n"
    with file.open() as stream:
        while block := stream.read(BLOCK_BYTES):
            lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n")


def _fields(file: CorpusFile, wanted: str) -> Fields:
    """Return the fields of a file's records, up to where ``wanted`` is found."""
    if file.format == "parquet":
        with parquet(file) as table:
            return columns_of(table.schema_arrow)
    if file.format in ("arrow file", "arrow stream"):
        with arrow(file) as batches:
            return columns_of(batches.schema)
    fields, size = Fields(), 0
    for number, value, _, _ in _values(file, WHOLE_FILE):
        if isinstance(value, dict):
            size += fields.add(value)
        if fields.has(wanted or TEXT) or number >= SAMPLE or size >= SAMPLE_BYTES:
            break
    return fields


def _of_value(number: int, value: Any, field: str, replaced: int) -> Record:
    """Return the record of a JSON value, in which ``replaced`` byte sequences were not UTF-8."""
    if not isinstance(value, dict):
        return Record(number, None, f"expected an object, found {named(value)}")
    text = content_of(value, field)
    if isinstance(text, str):
        try:
            return Record(number, text.encode(), "", replaced)
        except UnicodeEncodeError:
            whole = clean(text)
            return Record(number, whole.encode(), "", replaced + whole.count("\ufffd") - text.count("\ufffd"))
    if text is not None or field in value:
        found = named(text)
    else:
        found = f"the fields {', '.join(map(str, value))}" if value else "no field"
    return Record(number, None, f"expected a text in the field {quoted(field)}, found {quoted(found)[1:-1]}")


def _values(file: CorpusFile, unit: Unit) -> Iterator[tuple[int, Any, str, int]]:
    """Yield of each record of JSON the number, the value, the fault, and how many byte sequences were replaced."""
    if file.format != "json lines":
        with file.open() as stream:
            yield from _elements(stream, file.name)
    elif unit.is_whole:
        with file.open() as stream:
            yield from _lines(stream, Lines(0, None))
    else:
        # The line that begins before a slice ends in it, or right before it.
        with opened_at(file, max(0, unit.start - 1)) as (stream, place):
            lines = Lines(place[0], unit.stop)
            if unit.start:
                lines.skip(stream)
            yield from _lines(stream, lines)
            place[0] = lines.at


@dataclass
class Lines:
    """The place of a reader of lines, in bytes, and the place from where on it takes no more of them."""

    at: int
    stop: int | None

    def skip(self, stream: BinaryIO) -> None:
        """Read up to the end of a line."""
        while more := stream.readline(BLOCK_BYTES):
            self.at += len(more)
            if more.endswith(b"\n"):
                break


def _lines(stream: BinaryIO, lines: Lines) -> Iterator[tuple[int, Any, str, int]]:
    """Yield the values of JSON lines. Only a line feed ends a line, and blank lines are no records."""
    number, begins = 0, lines.at == 0
    while (lines.stop is None or lines.at < lines.stop) and (line := stream.readline(MOST_BYTES + 1)):
        number += 1
        lines.at += len(line)
        if len(line) > MOST_BYTES and not line.endswith(b"\n"):
            lines.skip(stream)
            yield number, None, f"expected up to {MOST_BYTES:,} bytes, found more", 0
            continue
        if number == 1 and begins:
            line = line.removeprefix(BOM)
        if line.isspace() or not line:
            continue
        try:
            yield number, *_parsed(line)
        except (ValueError, RecursionError) as error:
            yield number, None, f"expected JSON, found {_reason(error)}", 0


def _parsed(line: bytes) -> tuple[Any, str, int]:
    """Return the value of JSON, no fault, and how many byte sequences were not UTF-8 and became U+FFFD.

    Lone surrogates stay. Raises ValueError or RecursionError if it is not JSON.
    """
    try:
        return _fast_loads(line), "", 0
    except (ValueError, RecursionError):
        text, replaced = decoded(line)
        return json.loads(text), "", replaced


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"a fault at character {error.pos + 1:,} ({error.msg})"
    return "too many levels" if isinstance(error, RecursionError) else quoted(str(error))


def _elements(stream: BinaryIO, name: str) -> Iterator[tuple[int, Any, str, int]]:
    """Yield the values of a JSON array, which is read piece by piece."""
    reader, decoder = _Characters(stream), json.JSONDecoder()
    number = 0

    def fail(found: str) -> UserError:
        return UserError(
            f"{name}: expected a JSON array of objects, found {found} after record {number:,}; correct it, or make JSON lines of it"
        )

    if reader.next_mark() != "[":
        raise fail("no [")
    reader.at += 1
    while (mark := reader.next_mark()) != "]":
        if number:
            if mark != ",":
                raise fail("no , and no ]" if mark else "its end")
            reader.at += 1
            reader.next_mark()
        while True:
            try:
                value, end = decoder.raw_decode(reader.text, reader.at)
                break
            except (ValueError, RecursionError) as error:
                # The value may go on beyond what has been read.
                if isinstance(error, RecursionError) or len(reader.text) - reader.at > MOST_BYTES or not reader.more():
                    raise fail(_reason(error)) from None
        number += 1
        yield number, value, "", reader.replaced
        reader.at, reader.replaced = end, 0


class _Characters:
    """Decoded text of a stream: ``text`` from ``at`` on is not used yet.

    ``replaced`` counts the byte sequences that were not UTF-8.
    """

    def __init__(self, stream: BinaryIO):
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8-sig")("replace")
        self.text, self.at, self.replaced = "", 0, 0

    def more(self) -> bool:
        """Read as much again as is there, so that long values are not decoded too often.

        Return whether there was any.
        """
        raw = self._stream.read(max(BLOCK_BYTES, len(self.text) - self.at))
        text = self._decoder.decode(raw, not raw)
        self.replaced += max(0, text.count("\ufffd") - raw.count("\ufffd".encode()))
        self.text, self.at = self.text[self.at :] + text, 0
        return bool(raw)

    def next_mark(self) -> str:
        """Move to the next character that is not white space, and return it. It is empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]
