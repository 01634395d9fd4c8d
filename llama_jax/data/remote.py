"""Prepared tokens behind an address: read in parts, checked block by block, and kept in a cache on the local disk."""

import collections
import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.cli.progress import bytes_text
from llama_jax.data.cache import TokenCache, writing
from llama_jax.data.manifest import sha256
from llama_jax.data.places import naming, system_of, tell_waiting, tried_again
from llama_jax.data.stream import BLOCK_BYTES, Shard, TokenStream
from llama_jax.errors import UserError
from llama_jax.storage.files import write_atomically

# So many blocks are fetched together if all tokens fit in the cache, since those beside a block are needed, too.
TOGETHER = 16
# A long read is made of requests for at most so many blocks.
MOST_TOGETHER = 64
# Threads of a run that read windows ahead: each waits for its answer.
READERS = 16
# The last blocks stay in memory, for those who read in order.
RECENT = 64
# Fetches of neighbouring blocks wait for each other, by one of so many locks.
LOCKS = 64
AGAIN = "upload it again, or prepare the tokens again"
# Statuses of HTTP that say who asks, or what for, is wrong.
REFUSED = ("400", "401", "403", "404", "405", "410")


class Bucket:
    """The files of a folder behind an address."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self._system, self._path = system_of(self.address)
        self._lock = threading.Lock()
        self._told_until = 0.0

    def name_of(self, name: str) -> str:
        """Return the address of a file."""
        return f"{self.address}/{name}"

    def find(self, name: str) -> bytes | None:
        """Return a small file, or None if there is none, or none that we may read.

        Raises UserError, at once, if the bucket does not answer: the address may be wrong.
        """
        with naming(self.address):
            try:
                return bytes(self._system.cat_file(f"{self._path}/{name}"))
            except Exception as error:
                # A web server may answer anything if the path of a file goes on.
                if _is_refusal(error) or (self.address.startswith("http") and hasattr(error, "status")):
                    return None
                raise

    def read(self, name: str, digest: str) -> bytes:
        """Return a small file. Raises UserError if it is not there, or has another SHA-256 than ``digest``."""

        def attempt() -> bytes:
            try:
                return bytes(self._system.cat_file(f"{self._path}/{name}"))
            except FileNotFoundError:
                return b""

        raw = tried_again(self.name_of(name), attempt, tell=self._teller(name))
        if sha256(raw) != digest:
            raise UserError(
                f"{self.name_of(name)}: expected the file that belongs to these tokens, found {'another' if raw else 'none'}; {AGAIN}"
            )
        return raw

    def read_part(self, name: str, start: int, stop: int, size: int) -> bytes:
        """Return bytes of a file of ``size`` bytes. Raises UserError if they are not there, or the bucket is away."""

        def attempt() -> bytes:
            try:
                raw = bytes(self._system.cat_file(f"{self._path}/{name}", start=start, end=stop))
            except FileNotFoundError:
                raise UserError(self._has_another_size(name, size, None)) from None
            except Exception:
                self._check_size(name, size)
                raise
            if len(raw) > stop - start:
                raise UserError(
                    f"{self.name_of(name)}: expected a server that sends parts of files, found one that sends them whole; copy the "
                    "tokens to a disk"
                )
            if len(raw) < stop - start:
                self._check_size(name, size)
                raise OSError(f"found {len(raw):,} bytes, expected {stop - start:,}")
            return raw

        return tried_again(self.name_of(name), attempt, tell=self._teller(name))

    def check_sizes(self, sizes: dict[str, int]) -> None:
        """Raise UserError if a file is missing or has another size, as far as a listing tells."""
        if self.address.startswith("http"):
            return  # there are no listings: what is missing is found when it is read

        def attempt() -> dict[str, int | None]:
            self._system.invalidate_cache()
            try:
                listed = self._system.ls(self._path, detail=True)
            except Exception as error:
                if _is_refusal(error):  # who may read files may not always list them
                    return dict.fromkeys(sizes)
                raise
            return {str(info["name"]).rpartition("/")[2]: info.get("size") for info in listed}

        found = tried_again(self.address, attempt, tell=self._teller(""))
        for name, size in sizes.items():
            if name not in found:
                raise UserError(self._has_another_size(name, size, None))
            if found[name] not in (None, size):
                raise UserError(self._has_another_size(name, size, found[name]))

    def _check_size(self, name: str, size: int) -> None:
        """Raise UserError if a file has another size. Nothing is said if that cannot be known now."""
        found = None
        with contextlib.suppress(Exception):
            self._system.invalidate_cache()
            found = self._system.info(f"{self._path}/{name}").get("size")
        if found not in (None, size):
            raise UserError(self._has_another_size(name, size, found))

    def _has_another_size(self, name: str, size: int, found: int | None) -> str:
        there = "none" if found is None else f"{found:,}"
        return f"{self.name_of(name)}: expected a file of {size:,} bytes, found {there}; {AGAIN}"

    def _teller(self, name: str) -> Any:
        """Return a function that says that the bucket is away, for all threads that wait for it at a time."""

        def tell(reason: str, wait: int) -> None:
            with self._lock:
                now = time.monotonic()
                if now < self._told_until:
                    return
                self._told_until = now + wait
            tell_waiting(self.name_of(name), reason, wait)

        return tell


class RemoteStream(TokenStream):
    """Token files behind an address, as an array of shape [tokens].

    A block is taken from the cache or fetched, and compared with its checksum each time before it is used.
    """

    checked_at_each_read = True
    readers = READERS

    def __init__(
        self,
        bucket: Bucket,
        cache: TokenCache,
        shards: Sequence[Shard],
        dtype: np.dtype,
        vocab_size: int,
        sums: np.ndarray | None,
    ):
        """``shards`` have the names of files. For the rest see ``TokenStream``."""
        self._bucket, self._cache = bucket, cache
        self._recent: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._recent_lock = threading.Lock()
        self._fetching = [threading.Lock() for _ in range(LOCKS)]
        super().__init__(shards, dtype, vocab_size, sums)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._read(0, self.size), dtype or self.dtype)

    def check_block(self, block: int) -> None:
        """Compare a block with its checksum. Raises UserError if it differs in the bucket."""
        number = int(np.searchsorted(self._blocks, block, "right")) - 1
        self._held(number, block - int(self._blocks[number]), block - int(self._blocks[number]) + 1)

    def _open_first(self) -> None:
        """Open nothing: what is first needed is fetched then."""

    def _within(self, number: int, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start`` to ``stop`` of a shard, checked."""
        if stop <= start:
            return np.zeros(0, self.dtype)
        low, high = start * self.dtype.itemsize, stop * self.dtype.itemsize
        first = low // BLOCK_BYTES
        raw = b"".join(self._held(number, first, -(-high // BLOCK_BYTES)))
        return np.frombuffer(raw, self.dtype, stop - start, low - first * BLOCK_BYTES)

    def _held(self, number: int, first: int, last: int) -> list[bytes]:
        """Return blocks ``first`` to ``last`` of a shard, checked."""
        found = [self._local(number, block) for block in range(first, last)]
        held: list[bytes] = []
        while len(held) < len(found):
            begin = len(held)
            if (block := found[begin]) is not None:
                held.append(block)
                continue
            end = begin + 1
            while end < len(found) and found[end] is None and end - begin < MOST_TOGETHER:
                end += 1
            held += self._fetched(number, first + begin, first + end)
        return held

    def _local(self, number: int, block: int) -> bytes | None:
        """Return a block from memory or from the cache, None if it is in neither."""
        index = int(self._blocks[number]) + block
        with self._recent_lock:
            if index in self._recent:
                self._recent.move_to_end(index)
                return self._recent[index]
        start, stop = self._span(number, block)
        raw = self._cache.read(self._name(number), start, stop - start)
        if len(raw) < stop - start or self._fault(index, start, raw):
            return None
        self._remember(index, raw)
        return raw

    def _fetched(self, number: int, first: int, last: int) -> list[bytes]:
        """Return blocks of a shard that another thread has fetched meanwhile, or fetch them, with those beside them."""
        begin, end = first, last
        if self._cache.fits:
            count = int(self._blocks[number + 1] - self._blocks[number])
            begin, end = first // TOGETHER * TOGETHER, min(count, -(-last // TOGETHER) * TOGETHER)
        with self._fetching[(int(self._blocks[number]) + begin) // TOGETHER % LOCKS]:
            found = [self._local(number, block) for block in range(first, last)]
            if None not in found:
                return [block for block in found if block is not None]
            raw = self._checked_part(number, begin, end)
            self._cache.keep(self._name(number), begin * BLOCK_BYTES, raw)
        parts = [raw[i : i + BLOCK_BYTES] for i in range((first - begin) * BLOCK_BYTES, len(raw), BLOCK_BYTES)]
        for block, part in zip(range(first, last), parts, strict=False):
            self._remember(int(self._blocks[number]) + block, part)
        return parts[: last - first]

    def _checked_part(self, number: int, first: int, last: int) -> bytes:
        """Fetch blocks of a shard. Those that are not as they were written are fetched once more, then refused."""
        size = self.shards[number].tokens * self.dtype.itemsize
        start, stop = first * BLOCK_BYTES, min(size, last * BLOCK_BYTES)
        for attempt in (1, 2):
            raw = self._bucket.read_part(self._name(number), start, stop, size)
            faults = (
                self._fault(int(self._blocks[number]) + first + i // BLOCK_BYTES, start + i, raw[i : i + BLOCK_BYTES])
                for i in range(0, len(raw), BLOCK_BYTES)
            )
            if not (fault := next(filter(None, faults), "")):
                return raw
            if attempt == 2:
                self._condemn(f"{self._bucket.name_of(self._name(number))}: {fault}; {AGAIN}")
        raise AssertionError

    def _remember(self, index: int, raw: bytes) -> None:
        with self._recent_lock:
            self._recent[index] = raw
            while len(self._recent) > RECENT:
                self._recent.popitem(last=False)

    def _name(self, number: int) -> str:
        return self.shards[number].path.name

    def _span(self, number: int, block: int) -> tuple[int, int]:
        """Return the bytes of a shard that a block holds, the first and the one after the last."""
        size = self.shards[number].tokens * self.dtype.itemsize
        return block * BLOCK_BYTES, min(size, (block + 1) * BLOCK_BYTES)


def keep_small_files(bucket: Bucket, folder: Path, digests: dict[str, str]) -> None:
    """Fetch small files into ``folder``, apart from those that are there, by their SHA-256.

    Raises UserError if the bucket has others, or if they cannot be written.
    """
    for name, digest in digests.items():
        path = folder / name
        with contextlib.suppress(OSError):
            if sha256(path.read_bytes()) == digest:
                continue
        raw = bucket.read(name, digest)
        with writing(folder):
            write_atomically(path, raw)


def cache_text(address: str, cache: TokenCache, size: int, shards: int) -> str:
    """Describe a set of tokens behind an address, and what is kept of it where."""
    text = f"{address}: {bytes_text(size)} of tokens in {shards:,} file{'s' * (shards != 1)}"
    if not cache.limit:
        return f"{text}, of which none are kept here (data.cache_gb 0)"
    how = "all are" if cache.fits else f"at most {bytes_text(cache.limit)} of all tokens are"
    text += f"; {how} kept in {cache.folder}, where {bytes_text(cache.used)} are already (data.cache_gb {cache.limit / 1e9:g})"
    if cache.removed:
        text += f"; {bytes_text(cache.removed)} of others, not used for longest, were removed"
    return text


def _is_refusal(error: Exception) -> bool:
    """Return whether an error says that there is no such file, or none for us, by its kind or its status of HTTP."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return True
    status = error.status if hasattr(error, "status") else getattr(error, "code", "")
    return str(status) in REFUSED
