"""Memory-mapped files, with a clear error if one is truncated while it is read."""

import contextlib
import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import WRONG

# The files mapped now, with their sizes.
_mapped: dict[Path, int] = {}


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """Map a file that is not empty for reading.

    If it is truncated meanwhile, the process ends with one line and status 2.
    """
    with open(path, "rb") as raw:
        memory = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
    _mapped[path] = len(memory)
    _catch_bus_errors()
    try:
        yield memory
    finally:
        _mapped.pop(path, None)
        with contextlib.suppress(BufferError):  # arrays that are still in use keep the mapping
            memory.close()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end(_: int) -> None:
    """Name the file that can no longer be read, and exit. Returning would make the processor repeat the read."""
    cut = [path for path, size in _mapped.items() if not path.exists() or path.stat().st_size < size]
    found = (
        f"found {cut[0]} cut short"
        if cut
        else f"found a disk that cannot be read, of one of {', '.join(map(str, _mapped))}"
    )
    print(
        f"error: --input: expected files that do not change while they are read, {found}; make it whole and start again",
        file=sys.stderr,
        flush=True,
    )
    os._exit(WRONG)


def _catch_bus_errors() -> None:
    """Handle SIGBUS through the C library. A Python handler would run only after the read, which never ends."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGBUS, ctypes.cast(_end, ctypes.c_void_p))
