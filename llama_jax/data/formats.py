"""Tells by its bytes how a file of a corpus is read: compressed or not, plain text or records."""

import json
import os
import re
from pathlib import Path

from llama_jax.data.compression import compression_of, decompressed
from llama_jax.data.corpus_file import BOM, CorpusFile
from llama_jax.data.kinds import FORMATS, WHOLE, Kind, kind_of, kind_of_bytes
from llama_jax.data.places import Place
from llama_jax.data.record_fields import TEXT, content_of

# A first look at a file, for whether it may be something to read.
LOOK_BYTES = 4096
PACKED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst", ".zstd"}
# What the datasets library keeps beside its data: results of its own functions.
CACHE = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")


def examine(place: Place) -> tuple[CorpusFile, Kind | None]:
    """Return how a file is read, and what it is if it is neither plain text nor records.

    Raises OSError, or for a file behind an address UserError, if it cannot be read.
    """
    if not place.is_remote:
        kind = kind_of(Path(place.name), place.size)
        if kind is None or kind.format != "text":
            return CorpusFile(place, "", "text" if kind is None else kind.format), None
    with place.open() as file:
        head = file.read(WHOLE)
    compression = compression_of(head)
    if not compression:
        if not place.is_remote:
            return CorpusFile(place), kind
        kind = kind_of_bytes([head], len(head) if len(head) < WHOLE else max(place.size, WHOLE + 1), place.name)
        return CorpusFile(place, "", "text" if kind is None else kind.format), _unread(kind)
    with decompressed(place.open(), compression, place.name) as stream:
        head = stream.read(WHOLE)
    name = os.path.splitext(place.name)[0]
    kind = kind_of_bytes([head], len(head) if len(head) < WHOLE else WHOLE + 1, name)
    if kind is not None and kind.format not in ("text", "json lines", "json"):
        return CorpusFile(place), Kind(f"{kind.name} within {compression}", "decompress it first")
    if kind is not None and kind.format == "text":
        kind = Kind(f"{kind.name} within {compression}", kind.advice)
    return CorpusFile(place, compression, "text" if kind is None else kind.format), _unread(kind)


def may_be_read(place: Place) -> bool:
    """Return whether a file looks, by its first bytes, like records or something compressed."""
    if CACHE.fullmatch(os.path.basename(place.name)) or not place.size:
        return False
    with place.open() as file:
        head = file.read(LOOK_BYTES)
    text = head.lstrip(BOM + b" \t\r\n")
    return bool(compression_of(head) or head.startswith(tuple(FORMATS)) or text[:1] in (b"{", b"[") or b"\n{" in text)


def is_read_in_a_folder(file: CorpusFile, text_field: str) -> bool:
    """Return whether a file that is not a *.txt is read as a part of a folder.

    Compressed texts are, by their names, and records, but not a single object that describes something.
    """
    name = os.path.basename(file.name)
    stem, suffix = os.path.splitext(name)
    stem = stem if file.compression and suffix in PACKED_SUFFIXES else name
    if file.format == "text":
        return bool(file.compression) and stem.endswith(".txt")
    if file.format != "json lines" or stem.endswith((".jsonl", ".ndjson")):
        return True
    with file.open() as stream:
        head = stream.read(WHOLE)
        whole = not stream.read(1)
    lines = [line for line in head.split(b"\n") if line.strip()]
    if not whole or len(lines) > 1:
        return True
    try:
        record = json.loads(lines[0].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return True
    return isinstance(record, dict) and isinstance(content_of(record, text_field or TEXT), str)


def _unread(kind: Kind | None) -> Kind | None:
    """Return ``kind`` unless its records are read."""
    return None if kind is None or kind.format != "text" else kind
