"""A folder that appears whole or not at all, written by one process at a time."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from llama_jax.cli.progress import bytes_text
from llama_jax.errors import UserError
from llama_jax.storage.owner import owning

ADVICE = "wait until it is done, or choose another folder"


def check_new(output: Path) -> None:
    """Raise UserError where there is something of the name ``output``, be it a link to nothing."""
    if os.path.lexists(output):
        raise UserError(f"--output: expected a folder that does not exist, found {output}; choose another")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, which is renamed to ``output`` at the end, and deleted if the block fails.

    It lies in .<name>.converting beside ``output``, which one process owns: a second one is refused by its name. What a process
    that was killed left there is cleared away by the next. Raises UserError where ``output`` is or gets there meanwhile.
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
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    finally:
        for path in (work, *parents):  # only those that are empty go
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _owned(work: Path) -> Iterator[None]:
    """Own the folder ``work``, made here unless it is there."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(owning(work, "--output", ADVICE))
            except FileNotFoundError:  # the owner before removed it in between
                continue
            yield
            return


def _clear(work: Path) -> None:
    """Delete what a conversion that was killed left in ``work``, and say so."""
    left = [path for path in work.iterdir() if path.name.startswith("unfinished-")]
    if left:
        size = sum(path.stat().st_size for folder in left for path in folder.rglob("*") if path.is_file())
        for folder in left:
            shutil.rmtree(folder)
        print(f"{'cleared':>10}  {bytes_text(size)} that a conversion left in {work} when it was stopped")
