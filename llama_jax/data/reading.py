"""The flags of how a corpus is read, and the progress, which the commands that read corpora share."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llama_jax.cli.progress import Progress, bytes_text
from llama_jax.config import BadRecords, DataArgs
from llama_jax.data.parts import AnyCorpus
from llama_jax.data.text import Corpus
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
    """Field of the records that holds the text. Empty: "text", or else the only field with texts."""
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


@contextlib.contextmanager
def reading(corpus: AnyCorpus) -> Iterator[Callable[[int], None]]:
    """Show the progress of the block, which reads all that is to be trained on: bytes, rate, and the time that is left.

    Yields a function that counts bytes as read. How long it takes is told where the size is known: of plain text.
    """
    total = int(corpus.text_bytes * corpus.train_size) if isinstance(corpus, Corpus) else None
    began, done, waiting = time.monotonic(), 0, 0
    with Progress("reading", total, "B") as progress:

        def count(size: int) -> None:
            nonlocal done, waiting
            waiting += size
            if waiting < TOLD_BYTES:
                return
            done += waiting
            progress.note(f"{bytes_text(done / max(1e-9, time.monotonic() - began))}/s")
            progress.update(waiting)
            waiting = 0

        yield count
