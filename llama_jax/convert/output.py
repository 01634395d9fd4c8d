"""An output folder that appears complete or not at all, and is written by one process at a time."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from llama_jax.cli.progress import bytes_text
from llama_jax.errors import UserError
from llama_jax.storage.owner import owning

ADVICE = "wait until it is done, or choose another folder"


def check_new(output: Path) -> None:
    """Raise UserError if ``output`` exists, even as a link to nothing."""
    if os.path.lexists(output):
        raise UserError(f"--output: expected a folder that does not exist, found {output}; choose another")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder to write to. It is renamed to ``output`` at the end, and deleted if the block fails.

    It is in .<name>.converting next to ``output``. One process owns that folder; a second one is refused. The next
    process deletes what a killed one left there. Raises UserError if ``output`` exists, at the start or at the end.
    """
    work = output.with_name(f".{output.name}.converting")
    parents = [path for path in output.absolute().parents if not path.exists()]
    try:
        with _owned(work):
            check_new(output)
            _clear(work)
            temporary = work / f"unfinished-{uuid.uuid4().hex}"
            temporary.mkdir()
            try:
                yield temporary
                check_new(output)
                temporary.rename(output)
            except BaseException:
                _delete(temporary)
                raise
    finally:
        for path in (work, *parents):  # removes only empty folders
            with contextlib.suppress(OSError):
                path.rmdir()


def _delete(folder: Path) -> None:
    """Delete a folder into which threads of a write that was stopped may still put files, for up to 5 seconds."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


@contextlib.contextmanager
def _owned(work: Path) -> Iterator[None]:
    """Own the folder ``work``, creating it if needed."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(owning(work, "--output", ADVICE))
            except FileNotFoundError:  # the previous owner removed the folder in between
                continue
            yield
            return


def _clear(work: Path) -> None:
    """Delete what a killed conversion left in ``work``, and print it."""
    left = [path for path in work.iterdir() if path.name.startswith("unfinished-")]
    if left:
        size = sum(path.stat().st_size for folder in left for path in folder.rglob("*") if path.is_file())
        for folder in left:
            shutil.rmtree(folder)
        print(f"{'cleared':>10}  {bytes_text(size)} that a conversion left in {work} when it was stopped")
