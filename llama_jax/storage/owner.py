"""The owner of a folder: the one process that may write it. A second one is refused at once, and a dead one never blocks.

The owner locks the file ``.owner`` (flock, which the kernel drops when a process dies) and writes into it who it is. Some
network disks do not carry locks from machine to machine, so the owner also touches the file every few seconds: a start that
gets the lock but finds the record of another machine waits to see whether the file is still touched. In object storage the
record alone counts. It is written under a precondition, so that one of two starts wins.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Protocol

from llama_jax.cli.programs import started_as
from llama_jax.errors import UserError
from llama_jax.storage.files import is_address

NAME = ".owner"
# Seconds between two signs of life, and seconds without one after which an owner on another machine counts as dead.
BEAT_SECONDS, DEAD_SECONDS, LOOK_SECONDS = 10.0, 60.0, 1.0


@dataclasses.dataclass(frozen=True)
class Record:
    """Who owns a folder. ``boot``, ``namespace`` and ``started`` tell a process from a later one of the same number."""

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
        """A new record, with a token that no other one has."""
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
        """The record in the bytes of a file. None where the file is empty; a damaged one is of an unknown owner."""
        if not content.strip(b"\0"):
            return None
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return cls()

    def to_bytes(self) -> bytes:
        """What ``parse`` reads."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @property
    def name(self) -> str:
        """The owner in words: "process 4711 (train.py) on host anna since 2026-11-28 16:10:22+00:00"."""
        command = f" ({self.command})" if self.command else ""
        return f"process {self.pid}{command} on host {self.host} since {self.since}"

    @property
    def of_this_machine(self) -> bool:
        """Whether the owner runs, or ran, under the kernel that runs now."""
        return self.boot == _boot()

    @property
    def lives(self) -> bool | None:
        """Whether the owner is alive. None where that cannot be seen from here."""
        if not self.of_this_machine or self.namespace != _namespace():
            return None
        return bool(self.started) and _started(self.pid) == self.started


class Owner:
    """This process as the owner of a folder, from ``owning``."""

    def __init__(self, folder: Path, place: "_Place", record: Record):
        self._folder, self._place, self._record = folder, place, record
        self._released = threading.Event()

    def check(self) -> None:
        """Raise UserError where another process has taken the folder over, as it may while this one was suspended."""
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
            with contextlib.suppress(Exception):  # a disk that is away for a moment; ``check`` has the last word
                self._place.touch()

    def release(self) -> None:
        """Give the folder back."""
        self._released.set()
        with contextlib.suppress(Exception):  # what is left behind blocks nobody
            self._place.release()


@contextlib.contextmanager
def owning(folder: Path, key: str, advice: str) -> Iterator[Owner]:
    """Own ``folder``, which exists, until the block ends.

    key: the setting that names the folder. advice: what to do while another process owns it.
    Raises UserError, which says "in use" and names the owner, where another process does.
    """
    place: _Place = _Bucket(folder) if is_address(str(folder)) else _Disk(folder)
    record = Record.of_this_process()
    if (found := place.acquire(record)) is not None:
        raise UserError(
            f"{key}: expected a folder that nobody else writes, found {folder} in use by {found.name}; {advice}"
        )
    owner = Owner(folder, place, record)
    threading.Thread(target=owner.show_signs_of_life, name=f"owner of {folder}", daemon=True).start()
    try:
        yield owner
    finally:
        owner.release()


class _Place(Protocol):
    """Where the record of an owner stands."""

    def acquire(self, record: Record) -> Record | None:
        """Write ``record`` and return None; or return that of the owner there is."""

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
            # A process that was killed is dead before the last of its threads has let go of its files.
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
        if not locks:  # of two that wrote here at once, the one that wrote last is the owner
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
        """Let go of the lock, once: the number of a closed file is soon another file's."""
        file, self._file = self._file, -1
        if file != -1:
            os.close(file)

    def _open_and_lock(self) -> bool | None:
        """Open the file; whether it is locked, which some disks cannot do. None where another process has the lock."""
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
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
            self.close()  # the owner before removed it in between

    def _is_alive(self, found: Record, locks: bool) -> bool:
        if locks and found.of_this_machine:
            return False  # it would hold the lock
        return found.lives if found.lives is not None else _moves(found, self._folder, self._age, self._stamp)

    def _stamp(self) -> float:
        return self._path.stat().st_mtime

    def _age(self) -> float:
        """Seconds since the last touch, both ends by the clock of the disk's server."""
        probe = self._folder / f"{NAME}.{uuid.uuid4().hex}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - self._stamp()


# A child that outlives this process must not hold its locks.
_HELD: weakref.WeakSet[_Disk] = weakref.WeakSet()


@functools.cache
def _close_in_children() -> None:
    """Have children of this process that are forked from now on close the locks of ``_HELD``."""
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    for place in list(_HELD):
        place.close()


class _Bucket:
    """An object in a folder of object storage."""

    def __init__(self, folder: Path):
        # Imported here: a command that writes to a disk need not wait for these.
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
        """Write, if nobody has since ``before``."""
        written = self._store.write(NAME, content, if_equal=before).result().generation
        self._generation = written or self._generation
        return bool(written)

    def _is_alive(self, found: Record) -> bool:
        return found.lives if found.lives is not None else _moves(found, self._folder, lambda: 0.0, self._stamp)

    def _stamp(self) -> bytes:
        return self._store.read(NAME).result().stamp.generation


def _moves(found: Record, folder: Path, age: Callable[[], float], stamp: Callable[[], object]) -> bool:
    """Whether the owner, on another machine, shows a sign of life before it counts as dead."""
    left = DEAD_SECONDS - age()
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
            return False  # it ended
    return False


def _boot() -> str:
    """A name of the running kernel: of this machine, since it was started."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _namespace() -> str:
    """A name of the space in which process numbers are unique, such as a container."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str:
    """When a process started, in the kernel's own count; empty where there is no such process."""
    with contextlib.suppress(OSError):
        # Fields 3 and 22 of proc(5), behind the name in brackets, which may hold anything. Z and X: it is dead already.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    if not Path("/proc/self/stat").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return "alive"
    return ""
