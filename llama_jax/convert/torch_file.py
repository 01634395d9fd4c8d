"""Checkpoints of torch.save, read and written without torch: memory-mapped, lazy, and never executed.

    with TorchFile.open(path) as file:
        file.tensors["norm.weight"].shape
        file.read("norm.weight")

The layout (torch/serialization.py, caffe2/serialize/inline_container.cc) is a zip of stored entries under one top
folder: ``data.pkl`` (the object, see torch_pickle.py), ``data/<key>`` (one per storage), ``version``, and since 2023
``byteorder``.
"""

import contextlib
import itertools
import math
import mmap
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llama_jax.convert.mapped import mapped
from llama_jax.convert.torch_pickle import MAX_BYTES, TensorView, read_pickle, write_pickle
from llama_jax.convert.torch_zip import (
    Entry,
    central_header,
    check_crc,
    end_records,
    local_header,
    read_directory,
    refused,
)
from llama_jax.errors import quoted
from llama_jax.storage.files import raw_bytes

# Entries other than storages. The newer ones are only informative.
SMALL_ENTRIES = {"data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
FOLDERS = {"", "data/", ".data/"}
# If tensors interleave, storages up to this many elements are checked element by element.
MAX_INTERLEAVED = 1 << 29


@dataclass
class TorchFile:
    """An open checkpoint. Its tensors are listed by name; their bytes are mapped and read on demand."""

    path: Path
    tensors: dict[str, TensorView]
    _map: mmap.mmap
    _records: dict[str, Entry]
    _checked: set[str] = field(default_factory=set)

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: str | Path) -> Iterator["TorchFile"]:
        """Map a file and check everything except the bytes of its tensors.

        Raises UserError if it is not a dict of plain tensors as torch.save writes. The rules are in torch_zip,
        torch_pickle and below.
        """
        path = Path(path)
        if not path.stat().st_size:
            raise refused(path, "expected a zip archive as torch.save writes, found an empty file")
        with mapped(path) as memory:
            yield _Opening(path, memory).file()

    def read(self, name: str, start: int = 0, stop: int | None = None, verify: bool = True) -> np.ndarray:
        """Return rows ``start`` to ``stop`` of a tensor (all, if it has no axes) as an array on the mapped file.

        ``verify`` checks a storage's checksum when it is first read. Raises UserError if it is wrong.
        """
        view = self.tensors[name]
        record = self._records[view.storage.key]
        if verify and record.name not in self._checked:
            check_crc(memoryview(self._map), record, self.path, self.release)
            self._checked.add(record.name)
        itemsize = view.storage.dtype.itemsize
        whole: np.ndarray = np.ndarray(
            view.shape,
            view.storage.dtype,
            buffer=self._map,
            offset=record.offset + view.offset * itemsize,
            strides=[step * itemsize for step in view.strides],
        )
        return whole[start:stop] if view.shape else whole

    def release(self) -> None:
        """Free the memory of what was read. Arrays that are still in use read it again."""
        self._map.madvise(mmap.MADV_DONTNEED)


class _Opening:
    """The checks before a file becomes a TorchFile."""

    def __init__(self, path: Path, mapped: mmap.mmap):
        self._path, self._map = path, mapped
        self._data = memoryview(mapped)

    def file(self) -> TorchFile:
        entries = self._entries_below_top(read_directory(self._data, self._path))
        if "data.pkl" not in entries:
            hint = (
                "; torch.jit.save writes such, torch.save of the state_dict does not"
                if "constants.pkl" in entries
                else ""
            )
            self._refuse(f"expected data.pkl in the archive, found none{hint}")
        self._check_names(entries)
        if "byteorder" in entries and self._bytes(entries["byteorder"], 16) != b"little":
            self._refuse("expected little-endian tensors, found another byte order")
        if "version" not in entries or not re.fullmatch(rb"[1-9]\d?\n?", self._bytes(entries["version"], 3)):
            self._refuse("expected the version of the format, found none")
        tensors = self._tensors(read_pickle(self._bytes(entries["data.pkl"]), self._path))
        records = {name.removeprefix("data/"): entry for name, entry in entries.items() if name.startswith("data/")}
        for name, view in tensors.items():
            self._check_view(name, view, records)
        idle = set(records) - {view.storage.key for view in tensors.values()}
        if idle:
            self._refuse(f"expected tensors for every storage, found none for data/{min(idle)}")
        self._check_disjoint(tensors)
        return TorchFile(self._path, tensors, self._map, records)

    def _entries_below_top(self, entries: dict[str, Entry]) -> dict[str, Entry]:
        """Return entries by their name inside the top folder, without folders."""
        tops = {name.split("/")[0] for name in entries}
        if len(tops) != 1:
            self._refuse(f"expected one top folder in the archive, found {len(tops)}")
        (top,) = tops
        found = {}
        for name, entry in entries.items():
            inner = name.removeprefix(top + "/")
            if name.endswith("/") and inner in FOLDERS and not entry.size:
                continue
            found[inner] = entry
        return found

    def _check_names(self, entries: dict[str, Entry]) -> None:
        for name, entry in entries.items():
            small = name in SMALL_ENTRIES
            if not small and not re.fullmatch(r"data/[0-9A-Za-z]+", name):
                self._refuse(f"expected weights and nothing else in the archive, found {quoted(name)}")
            if small and entry.size > MAX_BYTES:
                self._refuse(f"{name}: expected up to {MAX_BYTES:,} bytes, found {entry.size:,}")

    def _bytes(self, entry: Entry, limit: int | None = None) -> bytes:
        check_crc(self._data, entry, self._path)
        return bytes(
            self._data[entry.offset : entry.offset + (entry.size if limit is None else min(limit, entry.size))]
        )

    def _tensors(self, found: Any) -> dict[str, TensorView]:
        if type(found) is not dict:
            self._refuse("expected a dict of tensors, found another object")
        for name, value in found.items():
            if type(value) is not TensorView:
                inside = " (a training checkpoint? save its weights alone)" if type(value) is dict else ""
                self._refuse(f"expected a dict of tensors, found {quoted(name)} to be something else{inside}")
        return found

    def _check_view(self, name: str, view: TensorView, records: dict[str, Entry]) -> None:
        storage, label = view.storage, quoted(name)
        record = records.get(storage.key)
        if record is None:
            self._refuse(f"{label}: expected its storage data/{storage.key} in the archive, found none")
        if storage.numel * storage.dtype.itemsize != record.size:
            self._refuse(
                f"{label}: expected {storage.numel} elements of {storage.dtype} in {record.name}, found {record.size} bytes"
            )
        if 0 not in view.shape and any(
            size > 1 and not step for size, step in zip(view.shape, view.strides, strict=True)
        ):
            self._refuse(f"{label}: expected every element to have a place of its own, found a stride of 0")
        if _end(view) > storage.numel:
            self._refuse(f"{label}: expected it within its {storage.numel} elements, found it to reach {_end(view)}")

    def _check_disjoint(self, tensors: dict[str, TensorView]) -> None:
        """Check that no byte belongs to two tensors, unless they are the same view (tied weights)."""
        by_storage: dict[str, dict[tuple, tuple[str, TensorView]]] = {}
        for name, view in tensors.items():
            if 0 not in view.shape:
                same = (view.offset, view.shape, view.strides)
                by_storage.setdefault(view.storage.key, {})[same] = (name, view)
        for views in by_storage.values():
            ordered = sorted(views.values(), key=lambda item: item[1].offset)
            borders = [(view.offset, _end(view)) for _, view in ordered]
            apart = all(end <= start for (_, end), (start, _) in itertools.pairwise(borders))
            if not apart or not all(_is_nested(view) for _, view in ordered):
                self._check_elements(ordered)

    def _check_elements(self, views: list[tuple[str, TensorView]]) -> None:
        """Check the same for interleaved tensors, such as columns of one matrix, by marking each element."""
        numel = views[0][1].storage.numel
        elements = sum(math.prod(view.shape) for _, view in views)
        if elements > numel or numel > MAX_INTERLEAVED:
            self._refuse(f"{quoted(views[0][0])}: expected tensors that do not share bytes, found some that do")
        taken = np.zeros(numel, bool)
        for _, view in views:
            np.lib.stride_tricks.as_strided(taken[view.offset :], view.shape, view.strides)[...] = True
        if int(taken.sum()) != elements:
            self._refuse(f"{quoted(views[0][0])}: expected tensors that do not share bytes, found some that do")

    def _refuse(self, message: str) -> NoReturn:
        raise refused(self._path, message)


def _end(view: TensorView) -> int:
    """Return the index after the last element of a tensor."""
    if 0 in view.shape:
        return view.offset
    return view.offset + 1 + sum((size - 1) * step for size, step in zip(view.shape, view.strides, strict=True))


def _is_nested(view: TensorView) -> bool:
    """Return whether each axis steps over everything that axes with smaller steps reach, so that indices are unique."""
    reach = 0
    for step, size in sorted(zip(view.strides, view.shape, strict=True)):
        if size > 1 and step <= reach:
            return False
        reach += step * (size - 1)
    return True


class TorchFileWriter:
    """Writes a dict of tensors like torch.save. torch.load(path, weights_only=True) reads it.

    ``shapes`` names all tensors. They must be written completely and in this order, each at once or in pieces of rows.
    ``dtypes`` is the type of all tensors, or that of each by name.
    """

    # Bytes of entries begin at multiples of this, as in torch.
    ALIGNMENT = 64

    def __init__(self, path: Path, dtypes: np.dtype | Mapping[str, np.dtype], shapes: dict[str, tuple[int, ...]]):
        self._path, self._top = path, path.stem
        self._dtypes = dict.fromkeys(shapes, dtypes) if isinstance(dtypes, np.dtype) else dtypes
        self._sizes = {name: math.prod(shape) * self._dtypes[name].itemsize for name, shape in shapes.items()}
        self._shapes = shapes
        self._order = list(shapes)
        self._directory: list[bytes] = []
        self._open_entry: tuple[str, int, int] | None = None  # name, offset of the header, size
        self._crc = self._written = 0

    def __enter__(self) -> "TorchFileWriter":
        self._file = open(self._path, "wb")
        self._small("data.pkl", write_pickle(self._dtypes, self._shapes))
        self._small("byteorder", b"little")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def write(self, name: str, rows: np.ndarray) -> None:
        """Write the next rows of a tensor."""
        if self._open_entry is None:
            if name != self._order[len(self._directory) - 2]:
                raise ValueError(f"expected {self._order[len(self._directory) - 2]} next, found {name}")
            self._begin(f"data/{len(self._directory) - 2}", self._sizes[name])
        self._append(raw_bytes(rows))
        if self._open_entry is not None and self._written == self._open_entry[2]:
            self._end()

    def _small(self, name: str, content: bytes) -> None:
        self._begin(name, len(content))
        self._append(content)
        self._end()

    def _begin(self, name: str, size: int) -> None:
        self._open_entry = (f"{self._top}/{name}", self._file.tell(), size)
        self._crc = self._written = 0
        self._file.write(self._header(0))

    def _append(self, data: bytes | memoryview) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._written += len(data)
        self._file.write(data)

    def _end(self) -> None:
        assert self._open_entry is not None
        name, offset, size = self._open_entry
        if self._written != size:
            raise ValueError(f"{name}: expected {size} bytes, found {self._written}")
        end = self._file.tell()
        self._file.seek(offset)
        self._file.write(self._header(self._crc))
        self._file.seek(end)
        self._directory.append(central_header(name, offset, size, self._crc))
        self._open_entry = None

    def _header(self, crc: int) -> bytes:
        assert self._open_entry is not None
        name, offset, size = self._open_entry
        return local_header(name, offset, size, crc, self.ALIGNMENT)

    def _finish(self) -> None:
        if len(self._directory) != len(self._order) + 2:
            raise ValueError(f"expected {len(self._order)} tensors, found {len(self._directory) - 2}")
        self._small("version", b"3\n")
        start = self._file.tell()
        for header in self._directory:
            self._file.write(header)
        self._file.write(end_records(len(self._directory), start, self._file.tell() - start))
        self._file.flush()
        os.fsync(self._file.fileno())
