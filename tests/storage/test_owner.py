"""One process owns a folder; a second is refused by name; a dead owner blocks nobody."""

import dataclasses
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_jax.errors import UserError
from llama_jax.storage import owner
from llama_jax.storage.locations import location
from llama_jax.storage.owner import Record, owning
from tests import bucket
from tests.commands import ROOT

HOLD = """
import sys, time
from llama_jax.storage.owner import owning
from llama_jax.storage.locations import location
with owning(location(sys.argv[1]), "key", "wait"):
    print("owned", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["disk", "disk without locks", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on disk, on a disk that cannot lock, or in a bucket."""
    if request.param == "bucket":
        with bucket.running() as running:
            for name, value in running.environment.items():
                monkeypatch.setenv(name, value)
            yield location(f"gs://bucket/{tmp_path.name}")
        return
    if request.param == "disk without locks":
        monkeypatch.setattr(owner, "LOOK_SECONDS", 0.05)
        monkeypatch.setattr(fcntl, "flock", no_locks)
    yield tmp_path


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that owns ``folder``."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "owned\n"
    return process


def take(folder: Path) -> None:
    with owning(folder, "train.save_dir", "wait for it"):
        pass


def write_record(folder: Path, record: Record) -> Path:
    path = folder / owner.NAME
    path.write_bytes(record.to_bytes())
    return path


def test_a_second_owner_is_refused_by_name_and_a_killed_one_blocks_nobody(folder: Path) -> None:
    process = hold(folder)
    try:
        with pytest.raises(UserError, match=rf"train.save_dir: .* in use by process {process.pid} .* since .*; wait"):
            take(folder)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    take(folder)


def test_an_owner_that_ends_leaves_nothing(folder: Path) -> None:
    take(folder)
    assert not (folder / owner.NAME).exists()
    take(folder)


def test_a_dead_process_that_nobody_has_waited_for_is_dead(folder: Path) -> None:
    process = hold(folder)
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    take(folder)
    process.wait()


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs the command ps")
def test_without_proc_a_process_is_known_by_when_it_started() -> None:
    """As on macOS. A process number alone says little after a restart of the machine, when others have it."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    mine, theirs = owner._started_by_ps(os.getpid()), owner._started_by_ps(process.pid)
    assert mine and theirs and mine == owner._started_by_ps(os.getpid())
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert owner._started_by_ps(process.pid) == ""
    process.wait()
    assert owner._started_by_ps(process.pid) == ""


def test_of_many_threads_one_becomes_the_owner(folder: Path) -> None:
    owners: list[int] = []
    refused: list[int] = []
    all_tried = threading.Barrier(8, timeout=60)

    def start(number: int) -> None:
        try:
            with owning(folder, "key", "wait"):
                owners.append(number)
                all_tried.wait()
        except UserError:
            refused.append(number)
            all_tried.wait()

    threads = [threading.Thread(target=start, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(owners), len(refused)) == (1, 7)


def elsewhere() -> Record:
    """The record of an owner on another machine."""
    return dataclasses.replace(Record.of_this_process(), boot="another", host="elsewhere")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner counts as dead after half a second."""
    monkeypatch.setattr(owner, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(owner, "DEAD_SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
def test_an_owner_on_another_machine_is_waited_for_until_it_counts_as_dead(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(folder, elsewhere())
    take(folder)
    assert "was in use by process" in capsys.readouterr().out


def test_an_owner_on_another_machine_that_shows_signs_of_life_is_in_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(owner, "DEAD_SECONDS", 30)
    other = elsewhere()
    path = write_record(folder, other)
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.1):
            path.write_bytes(other.to_bytes())

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by process .* on host elsewhere"):
            take(folder)
    finally:
        over.set()
        thread.join()


def test_a_record_that_was_old_when_the_machine_was_lost_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_record(tmp_path, elsewhere())
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    take(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("impatient")
def test_a_record_of_a_clock_that_was_ahead_is_waited_for_no_longer_than_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of a folder (rsync -a) has the times of the machine where it was."""
    path = write_record(tmp_path, elsewhere())
    os.utime(path, (time.time() + 100, time.time() + 100))
    take(tmp_path)
    assert "waiting up to 0 s for a sign of life" in capsys.readouterr().out


def test_who_may_write_the_folder_may_take_over_what_a_killed_owner_left(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with owning(tmp_path, "key", "wait"):
            assert (tmp_path / owner.NAME).stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


def test_an_owner_touches_its_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.05)
    with owning(folder, "key", "wait"):
        place = owner._Disk(folder) if folder.exists() and not str(folder).startswith("gs:") else owner._Bucket(folder)
        before = place._stamp()
        deadline = time.monotonic() + 30
        while place._stamp() == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_an_owner_that_was_suspended_notices_who_took_over(folder: Path) -> None:
    with owning(folder, "key", "wait") as held:
        held.check()
        write_record(folder, dataclasses.replace(Record.of_this_process(), host="elsewhere"))
        with pytest.raises(UserError, match=r"in use by process .* on host elsewhere"):
            held.check()


def test_an_owner_whose_record_was_deleted_writes_it_again(folder: Path) -> None:
    with owning(folder, "key", "wait") as held:
        (folder / owner.NAME).unlink()
        held.check()
        assert (folder / owner.NAME).exists()


@pytest.mark.parametrize("content", [b"not JSON", b"[]", b'{"pid": 1, "other": 2}', b"\xff\xfe"])
def test_a_damaged_record_blocks_nobody_on_a_disk_with_locks(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(owner, "DEAD_SECONDS", 0.1)
    (tmp_path / owner.NAME).write_bytes(content)
    take(tmp_path)


def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    code = HOLD.replace('print("owned"', "import os; child = os.fork() or time.sleep(60); print(child")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        take(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_closes_no_file_that_came_after_a_released_lock(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    take(tmp_path)
    files = [
        writer,
        *(os.dup(writer) for _ in range(8)),
    ]  # the lowest numbers that are free: the lock's was one of them
    if (child := os.fork()) == 0:
        try:
            for file in files:
                os.write(file, b"1")
        finally:
            os._exit(0)
    for file in files:
        os.close(file)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reader, 100) == b"1" * len(files)
    os.close(reader)
