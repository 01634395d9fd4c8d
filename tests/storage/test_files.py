"""Files that appear whole or not at all, whoever else writes them."""

import os
import stat
import threading
from pathlib import Path

import pytest

from llama_jax.storage.files import is_stream, remove_leftovers, replacing, write_atomically


def test_two_that_write_one_file_at_once_do_not_mix_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        first.write_bytes(b"first, to its end")
    assert path.read_bytes() == b"first, to its end"
    assert list(tmp_path.iterdir()) == [path]


def test_many_threads_leave_one_whole_file(tmp_path: Path) -> None:
    contents = [bytes([i]) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(tmp_path / "file", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in contents
    assert len(list(tmp_path.iterdir())) == 1


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError) as error:
        write_atomically(tmp_path / "file", b"x")
    assert error.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    others = [
        "notes.tmp",
        "train.bin",
        "0123456789ab",
        "a.0123456789abc.tmp",
        "a.0123456789AB.tmp",
        ".0123456789ab.tmp",
    ]
    for name in others:
        (tmp_path / name).write_text("x")
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # as if it had been killed
        with replacing(tmp_path / "train.bin") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
    assert temporary.exists()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the names of open files need /proc")
def test_a_pipe_or_a_device_is_written_and_no_file_takes_its_place(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_atomically(pipe, "words")
    reader.join()
    assert read == ["words"] and stat.S_ISFIFO(pipe.stat().st_mode)
    (null := tmp_path / "null").symlink_to(os.devnull)
    write_atomically(null, "words")
    assert null.is_symlink() and is_stream(null)
    with open(tmp_path / "output", "w+") as file:
        (name := tmp_path / "stdout").symlink_to(f"/proc/self/fd/{file.fileno()}")
        write_atomically(name, "words")
        assert name.is_symlink() and file.read() == "words"
        assert is_stream(Path(f"/proc/self/fd/{file.fileno()}"))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["null", "output", "pipe", "stdout"]
    assert not any(is_stream(path) for path in (tmp_path, tmp_path / "output", tmp_path / "none"))
