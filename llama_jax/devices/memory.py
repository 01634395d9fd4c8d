"""Memory: what a device has, what arrays take, and how a process on a CPU keeps what it frees."""

import contextlib
import ctypes
import math
import os
import resource
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.errors import UserError

# Parameters of mallopt, from glibc's malloc.h, and what they are set to.
KEEP_FREED_MEMORY = {
    -8: 1,  # M_ARENA_MAX: one heap, from which all threads allocate
    -4: 0,  # M_MMAP_MAX: large blocks too lie on the heap
    -2: 64 << 20,  # M_TOP_PAD, bytes: the heap grows in large strides
    -1: -1,  # M_TRIM_THRESHOLD: and never shrinks
}


def keep_freed_memory() -> None:
    """Have glibc reuse the memory that a step frees; call it before JAX starts its backend, and with that its threads.

    XLA on a CPU allocates a program's temporaries at every call. By default glibc gives such blocks back to the kernel,
    which clears their pages anew each time: a quarter of a small model's step. Does nothing where there is no glibc.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for parameter, value in KEEP_FREED_MEMORY.items():
            libc.mallopt(parameter, value)


def check_memory(need: float, devices: Sequence[jax.Device], what: str, hint: str) -> None:
    """Raise UserError where ``what`` takes more bytes a device than one of ``devices`` has."""
    limit = memory_of(devices)
    if need > limit:
        raise UserError(
            f"memory: expected up to {limit / 1e9:,.1f} GB a device, found that {what} {need / 1e9:,.1f} GB; {hint}"
        )


def memory_of(devices: Sequence[jax.Device]) -> float:
    """Bytes of memory that one of the devices has; infinite where that is not known. CPU devices share the machine's."""
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices)
    return (devices[0].memory_stats() or {}).get("bytes_limit", math.inf)


def memory_in_use(devices: Sequence[jax.Device]) -> int | None:
    """The most bytes that were in use on one of the devices; on CPUs, in the whole process. None where it is not known."""
    if devices[0].platform == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return max(((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices), default=0) or None


def bytes_of(tree: Any) -> int:
    """Bytes that a tree of arrays takes in memory."""
    return sum(
        math.ceil(x.size * (4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize) / 8) for x in jax.tree.leaves(tree)
    )
