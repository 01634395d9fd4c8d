"""Files that appear whole or not at all, the bytes that go into them, and what is no file's path."""

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def is_address(path: str) -> bool:
    """Whether ``path`` is an address, such as gs://bucket/folder, and not a path on disk."""
    return "://" in path or re.match(r"\w{2,}:/", path) is not None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to: renamed to ``path`` at the end, deleted if the block fails.

    The name is one that no other process has, so that two that write the same file at once do not mix their bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, os.fspath(temporary)):
            error.filename = os.fspath(path)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that killed processes left in ``folder``. For its owner alone: no other process writes there."""
    for path in folder.iterdir():
        if re.fullmatch(r".+\.[0-9a-f]{12}\.tmp", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``path``, replacing what was there."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def raw_bytes(array: "np.ndarray") -> memoryview:
    """The bytes of an array in row-major order; a view, where the array lies like that."""
    import numpy as np  # here, so that a command can say what is wrong with its flags without it

    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
