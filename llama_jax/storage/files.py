"""Atomic file writes, the raw bytes of arrays, the folder of caches, and the test for an address."""

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

# How a file of Git LFS begins that was not fetched itself.
LFS_POINTER = b"version https://git-lfs"


def is_address(path: str) -> bool:
    """Return whether ``path`` is an address such as gs://bucket/folder, not a path on disk."""
    return "://" in path or re.match(r"\w{2,}:/", path) is not None


def copying(address: str) -> str:
    """Return the command that copies a folder from or to an address, in parentheses, or nothing if none is known."""
    commands = {"gs": "gcloud storage cp -r", "gcs": "gcloud storage cp -r", "s3": "aws s3 cp --recursive"}
    command = commands.get(address.partition(":")[0])
    return f" ({command})" if command else ""


def user_cache() -> Path:
    """Return the folder in which this project keeps what it can make or fetch again, for later runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_jax"


def is_stream(path: Path) -> bool:
    """Return whether what is at ``path`` is no file of a disk: a pipe, a device, or a name of standard output."""
    if path.is_dir() or not path.exists():
        return False
    link = os.readlink(path) if path.is_symlink() else ""
    return not path.is_file() or any(place.startswith("/proc/") for place in (link, os.path.realpath(path.parent)))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``. It is renamed to ``path`` at the end, and deleted if the block fails.

    The temporary name is unique, so that two processes that write the same file do not mix their bytes. A pipe or a
    device is yielded itself: a file that took its place would take it from everybody.
    """
    if is_stream(path):
        yield path
        return
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
    """Delete temporary files that killed processes left in ``folder``. Only its owner may call this."""
    for path in folder.iterdir():
        if re.fullmatch(r".+\.[0-9a-f]{12}\.tmp", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``path``, replacing the old content."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def raw_bytes(array: "np.ndarray") -> memoryview:
    """Return the bytes of an array in row-major order, without a copy if it is stored in that order."""
    import numpy as np  # imported here, so that a command can check its flags without it

    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def check_downloaded(raw: bytes, name: str) -> None:
    """Raise a UserError that names ``name`` if the content of a JSON file is what failed downloads leave behind."""
    if raw.lstrip()[:1] == b"<":
        raise UserError(
            f"{name}: expected JSON, found an HTML page, as failed downloads leave behind; download it again"
        )
    if raw.startswith(LFS_POINTER):
        raise UserError(f"{name}: expected JSON, found a Git LFS pointer; fetch the file itself with git lfs pull")
