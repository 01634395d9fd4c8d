"""A bounded cache, on the local disk, of tokens that are behind an address.

A set of tokens has a folder, named by the digest of its manifest. It holds the set's small files, and for each shard a
sparse file with the blocks that were fetched. Nothing says which blocks these are: whoever reads one compares it with
its checksum, as one from the bucket. So several processes write to one file without a word to each other, and a kill, a
deleted file or a failing disk costs no more than that a block is fetched again.
"""

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from llama_jax.cli.progress import bytes_text
from llama_jax.data.stream import OpenFiles, read_at
from llama_jax.errors import UserError
from llama_jax.storage.files import user_cache

# Whoever uses a set of tokens holds a lock on a file of this name in its folder.
IN_USE = "in-use"
# The files of tokens in a set's folder end so.
KEPT = ".blocks"
# The size of the cache, which others fill as well, is measured again after this many bytes were written.
MEASURED_BYTES = 1 << 26
# This share of the disk, or these bytes if that is more, is left free, for checkpoints.
FREE_SHARE, FREE_BYTES = 0.03, 1 << 30


def cache_folder() -> Path:
    """Return the folder of all sets of tokens that are kept."""
    return user_cache() / "tokens"


class TokenCache:
    """The blocks of one set of tokens on the local disk.

    The process holds a lock on the set's folder to its end. Sets that nobody uses make room for it, those that were not
    used for longest first.
    """

    def __init__(self, key: str, limit: int):
        """``key`` names the set. All sets together take ``limit`` bytes. Raises UserError if nothing can be written."""
        self.folder = cache_folder() / key
        self.limit = limit
        self.removed = 0  # bytes of other sets that were removed
        self.fits = False  # whether all of the set has room
        self._files = OpenFiles("r+b")
        self._lock = threading.Lock()
        self._used = self._unmeasured = self._always = self._size = 0
        self._is_full = False
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._in_use = _locked(self.folder / IN_USE, fcntl.LOCK_SH)
            os.utime(self.folder / IN_USE)

    def make_room(self, train: int, held_out: int) -> None:
        """Remove other sets until one of so many bytes fits, or until there are none that nobody uses.

        Held-out tokens are read again and again. They are kept even if those to train on leave no room.
        """
        self._size = train + held_out
        self._always = held_out if held_out <= self.limit // 2 else 0
        for folder in _not_used_for_longest(self.folder):
            if self._of_others() + min(self._size, self.limit) <= self.limit:
                break
            self.removed += _remove(folder)
        others = self._of_others()
        for path in sorted(self.folder.glob(f"train*{KEPT}"), reverse=True):  # the limit was higher before
            if others + _bytes_in(self.folder) <= self.limit:
                break
            path.unlink(missing_ok=True)
        self._measure()

    @property
    def used(self) -> int:
        """The bytes of this set that are on the disk."""
        return _bytes_in(self.folder)

    def read(self, name: str, start: int, count: int) -> bytes:
        """Return bytes of a file as they are in the cache. They may be fewer, or zeros, if they were never kept."""
        try:
            return read_at(self._files.open(self._path(name)).fileno(), start, count)
        except OSError:
            return b""

    def keep(self, name: str, start: int, raw: bytes) -> None:
        """Keep bytes of a file if there is room. A disk that is full is told once, and takes nothing from then on."""
        if not self.limit or not self._has_room(name, len(raw)):
            return
        path = self._path(name)
        try:
            if not path.exists():
                with open(path, "ab"):
                    pass
            file = self._files.open(path).fileno()
            done = 0
            while done < len(raw):
                done += os.pwrite(file, raw[done:], start + done)
        except OSError as error:
            self._stop_keeping(f"{path}: {error.strerror}")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{KEPT}"

    def _has_room(self, name: str, count: int) -> bool:
        with self._lock:
            if self._is_full:
                return False
            self._unmeasured += count
            if self._unmeasured > min(MEASURED_BYTES, self.limit // 16):
                self._measure()
            if self._always and name.startswith("eval"):
                return True
            if self._used + count > self.limit:
                return False
            self._used += count
            return True

    def _measure(self) -> None:
        """Measure what all sets take, and look whether the disk has room."""
        self._unmeasured = 0
        self._files.clear()  # a file that somebody deleted is not filled further
        held_out = sum(_bytes_of(path) for path in self.folder.glob(f"eval*{KEPT}")) if self._always else 0
        others = self._of_others()
        self._used = others + _bytes_in(self.folder) - held_out + self._always
        with contextlib.suppress(OSError):
            disk = shutil.disk_usage(self.folder)
            if disk.free < max(FREE_BYTES, FREE_SHARE * disk.total) and not self._is_full:
                self._is_full = True
                self._tell(f"{self.folder}: the disk has only {bytes_text(disk.free)} left")
        self.fits = others + self._size <= self.limit and not self._is_full

    def _stop_keeping(self, reason: str) -> None:
        with self._lock:
            if not self._is_full:
                self._is_full = True
                self._tell(reason)

    def _tell(self, reason: str) -> None:
        print(f"warning: {reason}; no more tokens are kept there, they are read from their address", flush=True)

    def _of_others(self) -> int:
        return sum(_bytes_in(folder) for folder in _sets() if folder != self.folder)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error in the block, which writes to the cache, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: expected a folder that can be written, to keep tokens in, found: {error.strerror}; free some disk, or name "
            "another folder for caches in the environment, XDG_CACHE_HOME"
        ) from None


def _locked(path: Path, kind: int) -> int:
    """Open a file of locks and lock it. On a disk without locks it is open alone."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        os.close(file)
        raise
    except OSError:
        pass
    return file


def _sets() -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in cache_folder().iterdir() if path.is_dir()]
    return []


def _not_used_for_longest(but: Path) -> list[Path]:
    """Return the folders of all sets ``but`` one, those that were not used for longest first."""

    def used(folder: Path) -> float:
        with contextlib.suppress(OSError):
            return (folder / IN_USE).stat().st_mtime
        return 0.0

    return sorted((folder for folder in _sets() if folder != but), key=used)


def _remove(folder: Path) -> int:
    """Delete the tokens of a set that nobody uses. Return their bytes."""
    try:
        lock = _locked(folder / IN_USE, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return 0
    try:
        size = _bytes_in(folder)
        for path in folder.glob(f"*{KEPT}"):
            path.unlink(missing_ok=True)
        return size
    finally:
        os.close(lock)


def _bytes_in(folder: Path) -> int:
    """Return what the tokens in a folder take on the disk, where files have holes."""
    return sum(_bytes_of(path) for path in folder.glob(f"*{KEPT}"))


def _bytes_of(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_blocks * 512
    return 0
