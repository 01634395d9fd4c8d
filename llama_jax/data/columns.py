"""Tables of a corpus: parquet and arrow files, read column by column, and a few rows at a time."""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from llama_jax.data.corpus_file import CorpusFile, Record
from llama_jax.data.parts import Unit
from llama_jax.data.places import BLOCK_BYTES
from llama_jax.data.record_fields import Fields
from llama_jax.errors import UserError
from llama_jax.programs import install_command

# Rows of a table are read in groups of about this many bytes.
ROWS_BYTES = 1 << 22


@contextlib.contextmanager
def parquet(file: CorpusFile) -> Iterator[Any]:
    """Open a parquet file. Raises UserError if it is damaged, or if pyarrow is missing."""
    with _opened(file) as (arrow, stream):
        # Column chunks are read through a buffer, not whole.
        yield arrow.parquet.ParquetFile(
            stream, buffer_size=BLOCK_BYTES, pre_buffer=False, page_checksum_verification=True
        )


@contextlib.contextmanager
def arrow(file: CorpusFile) -> Iterator[Any]:
    """Open an arrow file or stream. Raises UserError if it is damaged, or if pyarrow is missing."""
    with _opened(file) as (arrow, stream):
        opener: Callable[[Any], Any] = getattr(arrow.ipc, f"open_{file.format.removeprefix('arrow ')}")
        yield opener(stream)


@contextlib.contextmanager
def _opened(file: CorpusFile) -> Iterator[tuple[Any, BinaryIO]]:
    """Import pyarrow, and open a file for it. What it raises in the block becomes a UserError that names the file."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file.name}: expected pyarrow, which reads parquet and arrow files, found it not installed; {install_command('data')}"
        ) from None
    with file.open() as stream:
        if file.format != "arrow stream" and not stream.seekable():
            raise UserError(
                f"{file.name}: expected a server that sends parts of a file, found one that does not; download it first"
            )
        try:
            yield pyarrow, stream
        except (pyarrow.ArrowException, OSError, io.UnsupportedOperation) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{file.name}: expected a whole {file.format.split()[0]} file, found it damaged ({reason}); download or make it "
                "again, or leave it out"
            ) from None


def columns_of(schema: Any) -> Fields:
    """Return which columns hold texts, also within structures, and of which types the others are."""
    fields = Fields()
    for column in schema:
        if schema.names.count(column.name) > 1:
            fields.others[column.name] = "in two columns"
        elif _is_text(column.type):
            fields.texts[column.name] = None
        else:
            fields.others[column.name] = f"of the type {column.type}"[:60]
            fields.within.update(dict.fromkeys(_texts_within(column.name, column.type)))
    return fields


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _texts_within(name: str, kind: Any) -> Iterator[str]:
    """Yield the names of the texts in a structure that a column has."""
    import pyarrow as pa

    for part in kind if pa.types.is_struct(kind) else ():
        inner = f"{name}.{part.name}"
        if _is_text(part.type):
            yield inner
        else:
            yield from _texts_within(inner, part.type)


def path_of(schema: Any, field: str) -> list[str]:
    """Return the column that a field stands in, and the names within it: ["meta", "text"] of meta.text."""
    return [field] if field in schema.names else field.split(".")


def _column(batch: Any, path: list[str]) -> Any:
    """Return the texts of some rows. Rows without the structure that they stand in have none."""
    import pyarrow.compute

    column = batch.column(batch.schema.get_field_index(path[0]))
    return pyarrow.compute.struct_field(column, path[1:]) if path[1:] else column


def parquet_records(file: CorpusFile, unit: Unit) -> Iterator[Record]:
    """Yield the records of a parquet file, or of a part of it: the texts of its field."""
    with parquet(file) as table:
        metadata = table.metadata
        groups = range(metadata.num_row_groups) if unit.group is None else [unit.group][: metadata.num_row_groups]
        for chosen in groups:
            before = sum(metadata.row_group(i).num_rows for i in range(chosen))
            about = metadata.row_group(chosen)
            # The sizes in the metadata are before compression, and before repeated values were stored once.
            rows = max(1, min(1024, ROWS_BYTES * about.num_rows // max(1, about.total_byte_size)))
            batches = table.iter_batches(rows, [chosen], [file.field], use_threads=False)
            path = path_of(table.schema_arrow, file.field)
            columns = _between((_column(batch, path) for batch in batches), unit.start, unit.stop)
            yield from _rows(columns, before + unit.start)


def arrow_records(file: CorpusFile) -> Iterator[Record]:
    """Yield the records of an arrow file or stream: the texts of its field."""
    with arrow(file) as reader:
        batches = batches_of(file, reader)
        path = path_of(reader.schema, file.field)
        yield from _rows((_column(batch, path) for batch in batches), 0)


def _rows(columns: Iterable[Any], number: int) -> Iterator[Record]:
    """Yield the records of a column of texts, counted from ``number`` + 1."""
    import pyarrow as pa

    for column in columns:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if not pa.types.is_large_string(column.type):
            column = column.cast(pa.large_string() if not pa.types.is_string(column.type) else pa.string())
        size = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        for raw in column.view(size):
            number += 1
            text = raw.as_py()
            yield Record(number, text) if text is not None else Record(number, None, "expected a text, found null")


def _between(columns: Iterable[Any], start: int, stop: int | None) -> Iterator[Any]:
    """Yield the parts of columns with rows ``start`` to ``stop`` (None: all that follow)."""
    at = 0
    for column in columns:
        first, at = at, at + len(column)
        if stop is not None and first >= stop:
            return
        if at > start:
            yield column.slice(max(0, start - first), None if stop is None else stop - max(start, first))


def batches_of(file: CorpusFile, reader: Any) -> Iterable[Any]:
    """Return the groups of rows of an opened arrow file or stream."""
    return reader if file.format == "arrow stream" else map(reader.get_batch, range(reader.num_record_batches))


def rows_of_tables(batches: Iterable[Any]) -> Iterator[tuple[int, Any, str, int]]:
    """Yield of each row its number from 1, its fields, no fault, and that nothing was replaced."""
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row, "", 0
