"""The owner of a folder: the only process that may write there. A second one is refused, and a dead one never blocks.

The owner locks the file ``.owner`` (with flock, which the kernel releases when a process dies) and writes into it who
it is. On some network disks locks do not work across machines. So the owner also touches the file every few seconds,
and a start that gets the lock but finds another machine's record waits to see whether the file is still touched. Object
storage has only the record. It is written with a precondition, so that one of two simultaneous starts wins.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import socket
import subprocess
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Protocol

from llama_jax.errors import UserError
from llama_jax.programs import started_as
from llama_jax.storage.files import is_address

NAME = ".owner"
# Seconds between touches, seconds without a touch after which an owner on another machine counts as dead, and seconds
# between looks.
BEAT_SECONDS, DEAD_SECONDS, LOOK_SECONDS = 10.0, 60.0, 1.0


class InUse(UserError):
    """Another process owns the folder."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The owner of a folder. ``boot``, ``namespace`` and ``started`` distinguish processes with the same number."""

    host: str = "an unknown host"
    pid: int = 0
    since: str = "an unknown time"
    command: str = ""
    boot: str = ""
    namespace: str = ""
    started: str = ""
    token: str = ""

    @classmethod
    def of_this_process(cls) -> "Record":
        """Return a new record of this process with a unique token."""
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            pid=pid,
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
            command=started_as(),
            boot=_boot(),
            namespace=_namespace(),
            started=_started(pid),
            token=uuid.uuid4().hex,
        )

    @classmethod
    def parse(cls, content: bytes) -> "Record | None":
        """Parse the content of a record file. None if it is empty; a damaged one is of an unknown owner."""
        if not content.strip(b"\0"):
            return None
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return cls()

    def to_bytes(self) -> bytes:
        """Return the record as bytes, which ``parse`` reads."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @property
    def name(self) -> str:
        """The owner in words: "process 4711 (train.py) on host anna since 2026-11-28 16:10:22+00:00"."""
        command = f" ({self.command})" if self.command else ""
        return f"process {self.pid}{command} on host {self.host} since {self.since}"

    @property
    def of_this_machine(self) -> bool:
        """Whether the owner runs, or ran, on this machine since its last boot."""
        return self.boot == _boot()

    @property
    def lives(self) -> bool | None:
        """Whether the owner is alive, or None if that is unknown here."""
        if not self.of_this_machine or self.namespace != _namespace():
            return None
        return bool(self.started) and _started(self.pid) == self.started


class Owner:
    """This process as the owner of a folder. ``owning`` returns it."""

    def __init__(self, folder: Path, place: "_Place", record: Record):
        self._folder, self._place, self._record = folder, place, record
        self._released = threading.Event()

    def check(self) -> None:
        """Raise UserError if another process has taken over the folder while this one was suspended."""
        found = self._place.read()
        if found is None:  # somebody deleted the record
            found = self._place.acquire(self._record) or self._record
        if found.token != self._record.token:
            raise UserError(
                f"{self._folder}: expected this process to own it still, found it in use by {found.name}; this process was "
                "suspended or lost the disk for a while, and ends so that two do not write"
            )

    def show_signs_of_life(self) -> None:
        """Touch the record until the folder is released."""
        while not self._released.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the disk may be away for a moment; check() decides
                self._place.touch()

    def release(self) -> None:
        """Release the folder."""
        self._released.set()
        with contextlib.suppress(Exception):  # a record that is left behind blocks nobody
            self._place.release()


@contextlib.contextmanager
def owning(folder: Path, key: str, advice: str) -> Iterator[Owner]:
    """Own the existing ``folder`` during the block.

    ``key`` is the setting that names the folder, and ``advice`` says what to do if another process owns it. In that
    case InUse is raised that says "in use" and names the owner.
    """
    place: _Place = _Bucket(folder) if is_address(str(folder)) else _Disk(folder)
    record = Record.of_this_process()
    if (found := place.acquire(record)) is not None:
        raise InUse(
            f"{key}: expected a folder that nobody else writes, found {folder} in use by {found.name}; {advice}"
        )
    owner = Owner(folder, place, record)
    threading.Thread(target=owner.show_signs_of_life, name=f"owner of {folder}", daemon=True).start()
    try:
        yield owner
    finally:
        owner.release()


class _Place(Protocol):
    """A place that stores the record of an owner."""

    def acquire(self, record: Record) -> Record | None:
        """Write ``record`` and return None, or return the record of the current owner."""

    def read(self) -> Record | None: ...
    def touch(self) -> None: ...
    def release(self) -> None: ...


class _Disk:
    """A locked file in a folder on disk."""

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / NAME
        self._file = -1

    def acquire(self, record: Record) -> Record | None:
        until = time.monotonic() + LOOK_SECONDS
        while (locks := self._open_and_lock()) is None:
            holder = self.read() or Record()
            # A killed process is already dead while the last of its threads still holds its files.
            if holder.lives is not False or time.monotonic() > until:
                return holder
            time.sleep(LOOK_SECONDS / 100)
        found = self.read()
        if found is not None and self._is_alive(found, locks):
            self.close()
            return found
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, record.to_bytes(), 0)
        os.fsync(self._file)
        if not locks:  # if two processes wrote at once, the later one is the owner
            time.sleep(LOOK_SECONDS)
            if (last := self.read()) != record:
                self.close()
                return last
        _close_in_children()
        _HELD.add(self)
        return None

    def read(self) -> Record | None:
        with contextlib.suppress(FileNotFoundError):
            return Record.parse(self._path.read_bytes())
        return None

    def touch(self) -> None:
        os.utime(self._file)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Release the lock, once, because the number of a closed file is soon that of another file."""
        file, self._file = self._file, -1
        if file != -1:
            os.close(file)

    def _open_and_lock(self) -> bool | None:
        """Open the file. Return whether it is locked (not all disks can), or None if another process holds the lock."""
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)  # umask decides who else may take over
            locks = True
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                return None
            except OSError:
                locks = False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), self._path.stat()):
                    return locks
            self.close()  # the previous owner removed the file in between

    def _is_alive(self, found: Record, locks: bool) -> bool:
        if locks and found.of_this_machine:
            return False  # a living owner would hold the lock
        return found.lives if found.lives is not None else _moves(found, self._folder, self._age, self._stamp)

    def _stamp(self) -> float:
        return self._path.stat().st_mtime

    def _age(self) -> float:
        """Return the seconds since the last touch, both times by the clock of the disk's server."""
        probe = self._folder / f"{NAME}.{uuid.uuid4().hex}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - self._stamp()


# A child process that outlives this one must not hold its locks.
_HELD: weakref.WeakSet[_Disk] = weakref.WeakSet()


@functools.cache
def _close_in_children() -> None:
    """Let child processes that are forked from now on close the locks in ``_HELD``."""
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    for place in list(_HELD):
        place.close()


class _Bucket:
    """An object in a folder of object storage."""

    def __init__(self, folder: Path):
        # Imported here, because commands that write to a disk do not need these slow imports.
        import tensorstore as ts

        from llama_jax.storage.locations import kvstore

        self._folder = folder
        self._store = ts.KvStore.open(kvstore(folder)).result()
        self._generation = b""
        self._content = b""

    def acquire(self, record: Record) -> Record | None:
        from llama_jax.storage.locations import user_errors

        with user_errors(self._folder, "write"):
            while True:
                there = self._store.read(NAME).result()
                found = Record.parse(there.value)
                if found is not None and self._is_alive(found):
                    return found
                self._content = record.to_bytes()
                if self._write(self._content, there.stamp.generation):
                    return None

    def read(self) -> Record | None:
        return Record.parse(self._store.read(NAME).result().value)

    def touch(self) -> None:
        self._write(self._content, self._generation)

    def release(self) -> None:
        self._store.write(NAME, None, if_equal=self._generation).result()

    def _write(self, content: bytes, before: bytes) -> bool:
        """Write unless somebody has written since the generation ``before``. Return whether it was written."""
        written = self._store.write(NAME, content, if_equal=before).result().generation
        self._generation = written or self._generation
        return bool(written)

    def _is_alive(self, found: Record) -> bool:
        return found.lives if found.lives is not None else _moves(found, self._folder, lambda: 0.0, self._stamp)

    def _stamp(self) -> bytes:
        return self._store.read(NAME).result().stamp.generation


def _moves(found: Record, folder: Path, age: Callable[[], float], stamp: Callable[[], object]) -> bool:
    """Return whether an owner on another machine shows a sign of life before it counts as dead."""
    left = DEAD_SECONDS - max(0.0, age())  # a copy may have a time of another clock, in the future
    before = stamp()
    end = time.monotonic() + left
    if left > 0:
        print(f"{folder}: was in use by {found.name}; waiting up to {left:.0f} s for a sign of life", flush=True)
    while time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        try:
            if stamp() != before:
                return True
        except FileNotFoundError:
            return False  # the owner ended
    return False


def _boot() -> str:
    """Return an id of the running kernel: this machine since its last boot."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _namespace() -> str:
    """Return an id of the namespace in which process numbers are unique, such as a container."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str:
    """Return when a process started, as the kernel counts, or "" if there is no such process."""
    with contextlib.suppress(OSError):
        # Fields 3 and 22 of proc(5), after the name in brackets, which may contain anything. State Z or X: already
        # dead.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return "" if Path("/proc/self/stat").exists() else _started_by_ps(pid)


def _started_by_ps(pid: int) -> str:
    """Return what ``_started`` does on a system without /proc, such as macOS."""
    command = ["ps", "-o", "state=", "-o", "lstart=", "-p", str(pid)]
    with contextlib.suppress(OSError):
        told = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
        state, _, when = told.strip().partition(" ")
        return "" if state[:1] == "Z" else when.strip()
    return ""
