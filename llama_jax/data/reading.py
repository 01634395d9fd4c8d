"""The flags of how a corpus is read, and the reading itself, which the commands about corpora share."""

import collections
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from llama_jax.cli.progress import Progress, bytes_text, duration, working
from llama_jax.config import BadRecords, DataArgs
from llama_jax.data.corpus import Records
from llama_jax.data.finding import Text
from llama_jax.data.parts import AnyCorpus, Part, Unit
from llama_jax.data.records import CorpusFile
from llama_jax.data.text import Corpus, check_separator
from llama_jax.errors import UserError

# Progress is told each time that so many bytes were read.
TOLD_BYTES = 1 << 20


@dataclass(frozen=True)
class ReadingArgs:
    """The corpus, and how its documents are told apart."""

    filepath: str = ""
    """Text to read: a file, a folder, a glob or an address (gs://, s3://, https://).
    It is plain text, JSON lines, parquet or arrow, also compressed, as its bytes tell.
    Of a folder all *.txt and all files of records are read, recursively."""
    separator: str = ""
    r"""Text between two documents in a file, for example '<|endoftext|>', '\n\n', or '\n' for one document per line.
    The escape \n matches any line end (LF, CRLF, CR), \t a tab, \\ a backslash.
    Blank lines at the start and end of a document are dropped.
    Empty: each file is one document. Of records each is a document, and there is no separator."""
    text_field: str = ""
    """Field of the records that holds the text; meta.text is one within another.
    Empty: "text", or else the only field with texts."""
    bad_records: BadRecords = "error"
    """Records that cannot be read: error (stop at the first) or skip (leave them out and count them)."""
    as_text: bool = False
    """Read files as plain text even if they look like something else, such as JSON lines or HTML.
    Bytes that are not UTF-8 become U+FFFD."""

    def data_args(self, **others: Any) -> DataArgs:
        """Return the settings as a run has them, together with ``others``. Raises UserError on impossible values."""
        if not self.filepath:
            raise UserError("--filepath: expected a path, found none")
        args = DataArgs(
            filepath=self.filepath, separator=self.separator, text_field=self.text_field, bad_records=self.bad_records,
            as_text=self.as_text, **others,
        )  # fmt: skip
        args.check()
        return args


def files_of(corpus: AnyCorpus) -> list[CorpusFile]:
    """Return the files of a corpus, in the order of their numbers. Nothing is read."""
    files = corpus.sources if isinstance(corpus, Records) else corpus.paths if isinstance(corpus, Corpus) else []
    return [file for file in files if isinstance(file, CorpusFile)]


def check_text(text: Text) -> None:
    """Raise UserError if the separator occurs nowhere. Compressed text is read for its size. Show that this goes on."""
    with working(f"reading {text.source}, {bytes_text(text.corpus.stored_bytes)}"):
        if isinstance(text.corpus, Corpus) and text.corpus.text_bytes:
            check_separator(text.corpus, text.source)


class Read(NamedTuple):
    """A part of a corpus, with the numbers of its file and of its record in it. Plain text counts documents."""

    file: int
    record: int
    part: Part


def read_parts(corpus: AnyCorpus) -> Iterator[Read]:
    """Yield all that is to be trained on, in its order. Show the progress: bytes, rate, and the time that is left.

    That time is known of plain text. Of records it is estimated from the files, or groups of rows, that were read.
    """
    total = int(corpus.text_bytes * corpus.train_size) if isinstance(corpus, Corpus) else None
    began, done, waiting = time.monotonic(), 0, 0
    with Progress("reading", total, "B") as progress:
        for unit, share in _shares(corpus):
            document = 0
            for _, part in corpus.read(unit, ("train",)):
                document += part.starts
                yield Read(unit.file, part.number or document, part)
                waiting += part.size
                if waiting >= TOLD_BYTES:
                    done, seconds = done + waiting, max(1e-9, time.monotonic() - began)
                    left = f", {duration(seconds / share - seconds)} to go" if total is None and share else ""
                    progress.note(f"{bytes_text(done / seconds)}/s{left}")
                    progress.update(waiting)
                    waiting = 0


def _shares(corpus: AnyCorpus) -> Iterator[tuple[Unit, float]]:
    """Yield the units, each with the share of the stored bytes in those before it."""
    units, files = corpus.units(), files_of(corpus)
    of_file = collections.Counter(unit.file for unit in units)
    sizes = [max(0, files[unit.file].place.size) / of_file[unit.file] for unit in units]
    before, whole = 0.0, max(1.0, sum(sizes))
    for unit, size in zip(units, sizes, strict=True):
        yield unit, before / whole
        before += size
