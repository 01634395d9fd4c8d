"""Safetensors files, read and written in pieces: a JSON header and then the tensors' bytes.

The format (huggingface/safetensors, README, "Format"): 8 bytes with the header's length, little endian; the header, an
object with {"dtype", "shape", "data_offsets"} per tensor and perhaps a "__metadata__" of strings; the data without
gaps.
"""

import contextlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from llama_jax.convert.mapped import mapped
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.config_json import QUANTIZED
from llama_jax.storage.files import raw_bytes

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
# Hugging Face's LLaMA 2 70B has about 10 kB per file.
MAX_HEADER = 10_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Type, shape and position of a tensor in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass
class SafetensorsFile:
    """An open file. Its tensors are listed by name; their bytes are mapped and read on demand."""

    path: Path
    tensors: dict[str, StoredTensor]
    _map: mmap.mmap

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: str | Path) -> Iterator["SafetensorsFile"]:
        """Map a file and check its header. Raises UserError if it is not a safetensors file of plain tensors."""
        path = Path(path)
        if path.stat().st_size < 8:
            raise UserError(
                f"{path}: expected a safetensors file, found {path.stat().st_size} bytes; download it again"
            )
        with mapped(path) as memory:
            yield cls(path, _read_header(memory, path), memory)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows ``start`` to ``stop`` of a tensor as an array on the mapped file."""
        stored = self.tensors[name]
        whole: np.ndarray = np.ndarray(stored.shape, stored.dtype, buffer=self._map, offset=stored.offset)
        return whole[start:stop] if stored.shape else whole

    def release(self) -> None:
        """Free the memory of what was read. Arrays that are still in use read it again."""
        self._map.madvise(mmap.MADV_DONTNEED)


def metadata_of(path: Path) -> dict[str, Any]:
    """Return the metadata of a file that ``SafetensorsFile.open`` has accepted."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found = json.loads(file.read(min(length, MAX_HEADER))).get("__metadata__")
    return found if isinstance(found, dict) else {}


def _read_header(mapped: mmap.mmap, path: Path) -> dict[str, StoredTensor]:
    def refuse(message: str) -> NoReturn:
        raise UserError(f"{path}: {message}")

    (length,) = struct.unpack_from("<Q", mapped)
    if length > len(mapped) - 8:
        found = (
            "an HTML page; download it again"
            if mapped[:64].lstrip()[:1] == b"<"
            else "another file, or one that is cut short"
        )
        if mapped[:15] == b"version https:/":
            found = "a Git LFS pointer; fetch the file itself with git lfs pull"
        refuse(f"expected a safetensors file, found {found}")
    if length > MAX_HEADER:
        refuse(f"expected a header of up to {MAX_HEADER:,} bytes, found {length:,}")
    try:
        header = json.loads(mapped[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        refuse(f"expected a header of JSON, found {quoted(str(error))}")
    if not isinstance(header, dict):
        refuse("expected an object in the header, found another value")
    header.pop("__metadata__", None)
    begin, end = 8 + length, 0
    if (size := begin + _last_byte(header)) > len(mapped):
        refuse(
            f"expected {size:,} bytes, as its header says, found {len(mapped):,}; it is cut short: download it again"
        )
    tensors = {}
    for name, stored in sorted(header.items(), key=lambda item: _sort_key(item[1])):
        try:
            dtype, shape, (first, last) = stored["dtype"], stored["shape"], stored["data_offsets"]
        except (TypeError, KeyError, ValueError):
            refuse(f"{quoted(name)}: expected dtype, shape and data_offsets, found others")
        if type(dtype) is not str or dtype not in DTYPES:
            quantized = dtype in ("I8", "U8", "I16", "I32", "F8_E4M3", "F8_E5M2")
            advice = f", a type of quantized matrices; {QUANTIZED}" if quantized else ""
            refuse(f"{quoted(name)}: expected BF16, F16 or F32, found {quoted(dtype)}{advice}")
        if (
            type(shape) is not list
            or len(shape) > 8
            or not all(type(n) is int and n >= 0 for n in (*shape, first, last))
        ):
            refuse(f"{quoted(name)}: expected sizes and offsets of 0 or more, found others")
        if first != end or last - first != math.prod(shape) * DTYPES[dtype].itemsize or begin + last > len(mapped):
            refuse(
                f"{quoted(name)}: expected its bytes directly after the previous ones, and of its size, found others"
            )
        tensors[name] = StoredTensor(DTYPES[dtype], tuple(shape), begin + first)
        end = last
    if begin + end != len(mapped):
        refuse(f"expected {begin + end:,} bytes, found {len(mapped):,}")
    return tensors


def _last_byte(header: dict[str, Any]) -> int:
    """Return where the last tensor of a header ends, behind the header. Entries that no file can have count for 0."""
    offsets = [stored.get("data_offsets") for stored in header.values() if isinstance(stored, dict)]
    ends = [pair[1] for pair in offsets if isinstance(pair, list) and len(pair) == 2]
    return max((end for end in ends if type(end) is int and end < 1 << 62), default=0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key twice")
    return table


def _sort_key(stored: Any) -> tuple[int, int]:
    """Return the key to sort tensors by position. Malformed ones are found later."""
    offsets = stored.get("data_offsets") if isinstance(stored, dict) else None
    if type(offsets) is list and len(offsets) == 2 and all(type(n) is int for n in offsets):
        return offsets[0], offsets[1]
    return 0, 0


class SafetensorsWriter:
    """Writes a file of tensors. ``shapes`` names all. They must be written by rows, completely and in this order.

    ``dtypes`` is the type of all tensors, or that of each by name.
    """

    def __init__(
        self,
        path: Path,
        dtypes: np.dtype | Mapping[str, np.dtype],
        shapes: dict[str, tuple[int, ...]],
        metadata: Mapping[str, str] | None = None,
    ):
        self._path = path
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for name, shape in shapes.items():
            dtype = dtypes if isinstance(dtypes, np.dtype) else dtypes[name]
            kind = next(name for name, known in DTYPES.items() if known == dtype)
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._header, self._left = struct.pack("<Q", len(raw)) + raw, end

    def __enter__(self) -> "SafetensorsWriter":
        self._file = open(self._path, "wb")
        self._file.write(self._header)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                if self._left:
                    raise ValueError(f"{self._path}: {self._left} bytes of tensors are missing")
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, rows: np.ndarray) -> None:
        """Write the next rows of the next tensor."""
        data = raw_bytes(rows)
        self._left -= len(data)
        self._file.write(data)
