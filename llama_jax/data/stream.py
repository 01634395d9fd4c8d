"""Token files that can be sliced like one array, and are checked against their checksums before use."""

import collections
import contextlib
import os
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from llama_jax.errors import UserError

# Each block of this many bytes of a token file has a checksum.
BLOCK_BYTES = 1 << 16
# The background thread checks this many blocks between two pauses.
REST_BLOCKS = 16
# At most this many files of a stream are open at a time.
OPEN_FILES = 128


class OpenFiles:
    """Files that stay open to be read again. The one that was used longest ago is closed if there are many.

    A file that is deleted or replaced stays the one that was opened, and one that is being read is closed afterwards.
    """

    def __init__(self, mode: str = "rb"):
        self._mode = mode
        self._files: collections.OrderedDict[Path, BinaryIO] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def open(self, path: Path) -> BinaryIO:
        """Return an open file."""
        with self._lock:
            if path not in self._files:
                self._files[path] = cast(BinaryIO, open(path, self._mode, buffering=0))  # noqa: SIM115
                while len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return self._files[path]

    def clear(self) -> None:
        """Close all files, to open those of the same names anew."""
        with self._lock:
            self._files.clear()


class Shard(NamedTuple):
    """A file of a stream, and the number of its tokens."""

    path: Path
    tokens: int


class TokenStream(NDArrayOperatorsMixin):
    """Token files, one after the other, as an array of shape [tokens], uint16 or uint32.

    ``stream[a:b]`` reads from the files, and checks each block the first time. Everything else that arrays do goes
    through ``np.asarray(stream)``, which checks everything, and maps a single file.

    Slices do not map a file, because a mapped file that is truncated, or on a failing disk, ends the process with a bus
    error.
    """

    ndim = 1
    # Whether blocks are compared with their checksums at each read, or once.
    checked_at_each_read = False
    # The number of threads that read ahead of a run.
    readers = 2

    def __init__(self, shards: Sequence[Shard], dtype: np.dtype, vocab_size: int = 0, sums: np.ndarray | None = None):
        """``sums`` are uint32 checksums of each shard's blocks. None: do not check. Ids are below ``vocab_size``."""
        self.path, self.dtype, self.shards = shards[0].path, dtype, tuple(shards)
        self._ends = np.cumsum([0, *(shard.tokens for shard in shards)])
        self.size = int(self._ends[-1])
        self.shape = (self.size,)
        blocks = (-(-shard.tokens * dtype.itemsize // BLOCK_BYTES) for shard in shards)
        self._blocks = np.cumsum([0, *blocks])  # the number of each shard's first block
        self._sums, self._vocab_size = sums, vocab_size
        self._checked = bytearray(0 if sums is None else int(self._blocks[-1]))
        self._all_checked = sums is None
        self.damage = ""
        self._files = OpenFiles()
        self._open_first()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(self.size)
            return self._read(start, max(start, stop))
        if isinstance(index, int | np.integer):
            place = range(self.size)[index]
            return self._read(place, place + 1)[0]
        return np.asarray(self)[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(np.asarray(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        for block in range(self.blocks):
            self.check_block(block)
        if self.size and len(self.shards) == 1:
            whole: np.ndarray = np.memmap(self.path, self.dtype, mode="r", shape=self.shape)
        else:
            whole = self._read(0, self.size)
        return np.array(whole, dtype) if copy or dtype not in (None, self.dtype) else np.asarray(whole)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = (np.asarray(x) if isinstance(x, TokenStream) else x for x in inputs)
        return getattr(ufunc, method)(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    @property
    def blocks(self) -> int:
        """The number of blocks that have checksums."""
        return len(self._checked)

    def check_block(self, block: int) -> None:
        """Compare a block with its checksum, once. Raises UserError if it differs, now and at every later read."""
        if self._checked[block]:
            return
        number = int(np.searchsorted(self._blocks, block, "right")) - 1
        path, tokens = self.shards[number]
        start = (block - int(self._blocks[number])) * BLOCK_BYTES
        raw = self._pread(number, start, min(BLOCK_BYTES, tokens * self.dtype.itemsize - start))
        if fault := self._fault(block, start, raw):
            self._condemn(f"{path}: {fault}; delete {path.parent} and make it again")
        self._checked[block] = 1
        self._all_checked = self._checked.find(0) < 0

    def _fault(self, block: int, start: int, raw: bytes) -> str:
        """Return what is wrong with the bytes of a block, which begins at byte ``start`` of its shard, or nothing."""
        if self._sums is not None and zlib.crc32(raw) != self._sums[block]:
            end = start + len(raw) - 1
            return f"expected the tokens that were written, found bytes {start:,} to {end:,} changed since"
        largest = int(np.frombuffer(raw, self.dtype).max())
        if largest >= self._vocab_size:
            return f"expected ids below the vocabulary's {self._vocab_size:,}, found {largest:,}"
        return ""

    def _condemn(self, damage: str) -> NoReturn:
        """Raise UserError with the message ``damage``, now and at every later read."""
        self.damage = damage
        raise UserError(damage)

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start`` to ``stop``, checked."""
        if self.damage:
            raise UserError(self.damage)
        pieces = []
        first = max(0, int(np.searchsorted(self._ends, start, "right")) - 1)
        for number in range(first, len(self._ends) - 1):
            before, after = int(self._ends[number]), int(self._ends[number + 1])
            if before >= stop:
                break
            pieces.append(self._within(number, max(start, before) - before, min(stop, after) - before))
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self.dtype), *pieces])

    def _within(self, number: int, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start`` to ``stop`` of a shard, checked."""
        size, blocks = self.dtype.itemsize, int(self._blocks[number])
        if not self._all_checked and stop > start:
            first, last = blocks + start * size // BLOCK_BYTES, blocks + (stop * size - 1) // BLOCK_BYTES + 1
            while (block := self._checked.find(0, first, last)) >= 0:
                self.check_block(block)
        return np.frombuffer(self._pread(number, start * size, (stop - start) * size), self.dtype)

    def _pread(self, number: int, start: int, count: int) -> bytes:
        """Read bytes of a shard. Raises UserError if some are missing."""
        path, tokens = self.shards[number]
        with reading(path):
            file = self._files.open(path)
            raw = read_at(file.fileno(), start, count)
        if len(raw) < count:
            raise UserError(
                f"{path}: expected {tokens * self.dtype.itemsize:,} bytes, found it cut to {os.fstat(file.fileno()).st_size:,}; delete "
                f"{path.parent} and make it again"
            )
        return raw

    def _open_first(self) -> None:
        self._files.open(self.path)


# A stream of tokens: an array of shape [tokens], or token files, which can be sliced like one.
Tokens = np.ndarray | TokenStream


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a UserError that names the token file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: expected tokens that can be read, found: {error.strerror}; check the disk") from None


def read_at(file: int, start: int, count: int) -> bytes:
    """Return ``count`` bytes of an open file from ``start``, or fewer if it ends before."""
    raw = os.pread(file, count, start)
    while len(raw) < count and (more := os.pread(file, count - len(raw), start + len(raw))):
        raw += more
    return raw


def checksums(raw: bytes) -> list[int]:
    """Return the checksum of each block of ``raw``, which begins at the start of a block."""
    return [zlib.crc32(raw[start : start + BLOCK_BYTES]) for start in range(0, len(raw), BLOCK_BYTES)]


def check_in_background(streams: list[TokenStream], share: float = 0.25) -> threading.Thread:
    """Check all unchecked blocks in a thread that uses at most this share of a core.

    If a block is damaged, each of ``streams`` raises UserError at its next read.
    """
    thread = threading.Thread(target=_check, args=(streams, share), name="checksums", daemon=True)
    thread.start()
    return thread


def _check(streams: list[TokenStream], share: float) -> None:
    done, began = 0, time.perf_counter()
    for stream in streams:
        for block in range(stream.blocks):
            try:
                stream.check_block(block)
            except UserError as error:
                for each in streams:
                    each.damage = str(error)
                return
            done += 1
            if done % REST_BLOCKS == 0:
                time.sleep((time.perf_counter() - began) * (1 / share - 1))
                began = time.perf_counter()
