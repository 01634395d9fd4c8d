"""Files beside a corpus that are no part of it, as their names or the folders around them tell."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from llama_jax.data.corpus_file import CorpusFile

# What Spark, Dask and Delta Lake keep beside their data: unfinished tasks, logs, and descriptions of all files.
ENGINES = {"_temporary", "_delta_log", "_spark_metadata", "_metadata", "_common_metadata"}
DELTA = "_delta_log"
# The folders of a data set in the hub's cache: the files by their digests, and links to them by their names.
BLOBS, REVISIONS = "blobs", "snapshots"
# Names of downloads that are not finished, and of copies that editors keep, end so.
UNFINISHED = re.compile(
    r".*(\.(part|partial|tmp|temp|crdownload|download|incomplete|filepart|aria2|bak|old|orig|swp)|~)", re.IGNORECASE
)
# Plain texts that describe the files beside them have such names.
DESCRIBING = re.compile(
    r"(read[-_ ]?me|licen[cs]e|copying|notice|authors|citation|change[-_ ]?log|contributing|requirements|robots|manifest|checksums?|"
    r"(sha|md5)\w*sums?)\b.*",
    re.IGNORECASE,
)
# A note shows this many names.
SHOWN = 3


def earlier_revisions(folder: Path) -> list[str]:
    """Return the revisions in a data set's folder in the hub's cache that are not its main one, if that is there."""
    main, revisions = folder / "refs" / "main", sorted(os.listdir(folder / REVISIONS))
    try:
        newest = main.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return []
    return [name for name in revisions if name != newest] if newest in revisions else []


def is_unfinished(name: str) -> bool:
    """Return whether a file's name says that it is an unfinished download, or a copy that an editor keeps."""
    return UNFINISHED.fullmatch(os.path.basename(name)) is not None


def is_describing(name: str) -> bool:
    """Return whether a file's name says that it describes the files beside it, such as README.txt."""
    return DESCRIBING.fullmatch(name) is not None


def texts_beside(files: Sequence[CorpusFile]) -> list[str]:
    """Return lines about plain texts that are read, though they may not be meant to be.

    Those are texts that describe the others by their names, and all texts beside records.
    """
    texts = [file for file in files if file.format == "text"]
    describing = [file for file in texts if is_describing(os.path.basename(file.name))]
    lines = []
    if 0 < len(describing) < len(files):
        lines.append(
            f"warning: read, though their names say that they describe the other files: {named(describing)}; move them elsewhere"
        )
    others = [file for file in texts if file not in describing]
    if others and len(texts) < len(files):
        lines.append(f"read beside the records, a document each: {named(others)}")
    return lines


def named(files: Sequence[CorpusFile]) -> str:
    """Return how many files there are, and the names of the first ones."""
    return names_of([os.path.basename(file.name) for file in files])


def names_of(names: Sequence[str]) -> str:
    """Return "3 (a, b, c)", or an empty text if there are none."""
    shown = ", ".join(ascii(name)[1:-1] for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names):,} ({shown})" if names else ""
