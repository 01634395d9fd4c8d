"""Files of a corpus, on disk or behind an address that fsspec opens: gs://, s3://, https:// and its other protocols."""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from llama_jax.errors import UserError
from llama_jax.programs import install_command
from llama_jax.storage.files import is_address

A = TypeVar("A")
B = TypeVar("B")
# Bytes that are read at once.
BLOCK_BYTES = 1 << 20
# Seconds to wait before each new attempt to read a file behind an address.
WAITS = (1, 2, 4, 8, 16, 32)
# No attempt begins later than this many seconds after the first: libraries wait, too, before they fail.
LONGEST_TRYING = 120
# The extra of this project that installs what a protocol needs.
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "http": "data", "https": "data"}
CHECK = "check the address, who you are, and that you may read there"
# What describes the content of an object in object storage.
CONTENT_KEYS = ("md5Hash", "crc32c", "ETag", "etag", "content_md5")
STAMP_KEYS = ("size", *CONTENT_KEYS, "generation", "LastModified", "mtime", "created", "updated")
# So many files are asked about at once.
AT_ONCE = 16


@dataclass(frozen=True)
class Place:
    """A file on disk or behind an address, with its size in bytes when it was found (-1: unknown).

    ``about`` is what object storage said of it then, ``STAMP_KEYS`` and their values.
    """

    name: str
    size: int
    about: tuple[tuple[str, str], ...] = ()

    @property
    def is_remote(self) -> bool:
        """Whether the file is behind an address."""
        return is_address(self.name)

    def open(self) -> BinaryIO:
        """Open the file to be read from its start. What it raises names the file, see ``Stored``."""
        return io.BufferedReader(Stored(self.name), BLOCK_BYTES)

    def stamp(self) -> tuple[Any, ...]:
        """Return values that change when the file is written. Raises UserError if it is gone."""
        with naming(self.name):
            if not self.is_remote:
                status = os.stat(self.name)
                return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
            system, path = system_of(self.name)
            system.invalidate_cache()
            return _about(system.info(path))

    def first_stamp(self) -> tuple[Any, ...]:
        """Return the values of ``stamp`` when the file was found, or now if they are not known."""
        return self.about or self.stamp()

    def mark(self) -> str:
        """Return what tells a later version of the file from this one, on any machine that sees it."""
        found = self.about or self.stamp()[2:]  # not the numbers of the disk and of the file on this machine
        return f"{os.path.basename(self.name)} {found}"

    def sha256(self) -> str:
        """Return the hex digest of the content, or of a checksum of it that object storage keeps."""
        if known := [value for key, value in self.about if key in CONTENT_KEYS]:
            return hashlib.sha256(f"{self.size} {known[0]}".encode()).hexdigest()
        sha = hashlib.sha256()
        with self.open() as file:
            while block := file.read(BLOCK_BYTES):
                sha.update(block)
        return sha.hexdigest()


class Stored(io.RawIOBase):
    """The bytes of a file on disk or behind an address.

    A read that fails raises a UserError with the file's name. Behind an address, it is tried again for a minute first.
    """

    def __init__(self, name: str):
        self._name, self._at = name, 0
        self._is_remote = is_address(name)
        with naming(name):
            self._file = self._opened()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file is not None and bool(self._file.seekable())

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with naming(self._name):
            if self._file is None:
                self._file = self._opened()
            self._at = self._file.seek(offset, whence)
        return self._at

    def readinto(self, buffer: Any) -> int:
        if not self._is_remote:
            with naming(self._name):
                return self._read(buffer)
        return tried_again(self._name, lambda: self._read(buffer), self._drop)

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _opened(self) -> Any:
        if not self._is_remote:
            return open(self._name, "rb", buffering=0)
        system, path = system_of(self._name)
        return system.open(path, "rb")

    def _opened_again(self) -> Any:
        """Open the file where it was left. Raises OSError if it ends before."""
        file = self._opened()
        if file.seekable():
            file.seek(self._at)
            return file
        left = self._at
        while left:
            piece = file.read(min(left, BLOCK_BYTES))
            if not piece:
                raise OSError(f"found its end {left:,} bytes before the place that was read last")
            left -= len(piece)
        return file

    def _read(self, buffer: Any) -> int:
        if self._file is None:  # a read failed; what was opened then may stand anywhere
            self._file = self._opened_again()
        raw = self._file.read(len(buffer))
        buffer[: len(raw)] = raw
        self._at += len(raw)
        return len(raw)


def tried_again(
    name: str,
    attempt: Callable[[], B],
    before: Callable[[], object] = lambda: None,
    tell: Callable[[str, int], None] | None = None,
) -> B:
    """Return the result of ``attempt``, which reads a file behind an address. If it fails, try again for a minute.

    ``before`` is called before each new attempt; its errors are ignored. ``tell`` gets the reason and the seconds to
    wait, which are printed by default. Raises UserError with the file's name, and a UserError of ``attempt`` at once.
    """
    until = time.monotonic() + LONGEST_TRYING
    for wait in (*WAITS, 0):
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:
            if not wait or time.monotonic() > until:
                with naming(name):
                    raise
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            (tell or functools.partial(tell_waiting, name))(reason, wait)
            time.sleep(wait)
            with contextlib.suppress(Exception):
                before()
    raise AssertionError


def tell_waiting(name: str, reason: str, wait: int) -> None:
    """Print that a file cannot be read, and when it is tried again."""
    print(f"warning: {name}: {reason}; trying again in {wait} s", flush=True)


def system_of(address: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the path in it. Raises UserError if a package is missing."""
    import fsspec.core  # imported here, as files on disk need it not

    protocol = address.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        hint = install_command(extra) if extra else str(error)
        raise UserError(
            f"{address}: expected the package that reads {protocol}://, found it not installed; {hint}"
        ) from None
    except ValueError:
        raise UserError(
            f"{address}: expected an address that can be read (gs://, s3://, https://), found one that starts with "
            f"{protocol}://; copy it to a disk first"
        ) from None


class FoundAt(NamedTuple):
    """The files of an address, sorted, the address above all of them, and whether they are those of a folder."""

    places: list[Place]
    root: str
    is_folder: bool


def files_at(address: str) -> FoundAt:
    """Find the files of an address: a file, a folder or a glob. There may be none."""
    system, path = system_of(address)
    marks = "*[" if address.startswith("http") else "*?["  # a ? begins the query of a web address
    first = min((path.find(mark) for mark in marks if mark in path), default=-1)
    is_folder = False
    with naming(address):
        system.invalidate_cache()
        if first >= 0:
            found = {name: info for name, info in system.glob(path, detail=True).items() if info["type"] == "file"}
            path = path[:first].rpartition("/")[0]
        else:
            info = _info(system, path)
            is_folder = path.endswith("/") or info.get("type") == "directory"
            found = system.find(path, detail=True) if is_folder else {path: info} if info else {}
            path = path if is_folder else path.rpartition("/")[0]
        places = [
            Place(
                str(system.unstrip_protocol(name)), -1 if info.get("size") is None else int(info["size"]), _about(info)
            )
            for name, info in found.items()
        ]
        root = str(system.unstrip_protocol(path))
    return FoundAt(sorted(places, key=lambda place: place.name), root, is_folder)


def at_once(function: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """Return the results of ``function`` for all items, in their order. It waits for several files at a time."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE, "files") as pool:
        return list(pool.map(function, items))


def _about(info: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((key, str(info[key])) for key in STAMP_KEYS if info.get(key) is not None)


def _info(system: Any, path: str) -> dict[str, Any]:
    """Return what a file system knows about a path, nothing if there is no such file."""
    try:
        found: dict[str, Any] = system.info(path)
        return found
    except FileNotFoundError as error:
        if error.__cause__ is not None:  # https:// says the same of a server that does not answer
            raise error.__cause__ from None
        return {}


def on_disk(path: Path) -> Place:
    """Return the place of a file on disk."""
    return Place(os.fspath(path), path.stat().st_size)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn an error in the block into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{name}: expected a package that reads it, found: {error}") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200] or type(error).__name__
        hint = CHECK if is_address(name) else "start again when it can"
        raise UserError(f"{name}: expected a file that can be read, found: {reason}; {hint}") from None
    except Exception as error:  # file systems raise errors of their own libraries
        if not is_address(name):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name}: expected a file that can be read, found: {reason}; {CHECK}") from None
