"""Memory: how much a device has, how much arrays take, and how a process on a CPU reuses freed memory."""

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

# Parameters of mallopt, from glibc's malloc.h, and their values.
KEEP_FREED_MEMORY = {
    -8: 1,  # M_ARENA_MAX: one heap for all threads
    -4: 0,  # M_MMAP_MAX: large blocks are on the heap, too
    -2: 64 << 20,  # M_TOP_PAD, bytes: the heap grows in large steps
    -1: -1,  # M_TRIM_THRESHOLD: the heap never shrinks
}


def keep_freed_memory() -> None:
    """Make glibc reuse the memory that a step frees. Call it before JAX starts its backend and threads.

    XLA on a CPU allocates a program's temporaries at every call. By default glibc returns such blocks to the kernel,
    which clears their pages each time. That costs a quarter of a small model's step. Without glibc, nothing happens.

    A program's temporaries are allocated when it is dispatched. So JAX dispatches programs on a CPU one after the other
    from now on: two steps at a time would hold twice what one needs, in a heap that never shrinks.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for parameter, value in KEEP_FREED_MEMORY.items():
            libc.mallopt(parameter, value)


def return_freed_memory() -> None:
    """Make glibc return what is free in its heap to the kernel, such as what the compiler took. It takes milliseconds.

    The heap keeps its addresses. Without glibc, nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def check_memory(need: float, devices: Sequence[jax.Device], what: str, hint: str) -> None:
    """Raise UserError if ``what`` takes more bytes per device than ``devices`` have."""
    limit = memory_of(devices)
    if need > limit:
        raise UserError(
            f"memory: expected up to {limit / 1e9:,.1f} GB a device, found that {what} {need / 1e9:,.1f} GB; {hint}"
        )


def memory_of(devices: Sequence[jax.Device]) -> float:
    """Return the bytes of memory of one device, infinite if unknown. CPU devices share the machine's memory."""
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices)
    return (devices[0].memory_stats() or {}).get("bytes_limit", math.inf)


def memory_in_use(devices: Sequence[jax.Device]) -> int | None:
    """Return the peak bytes in use on one device, or in the whole process on CPUs. None if unknown."""
    if devices[0].platform == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return max(((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices), default=0) or None


def bytes_of(tree: Any) -> int:
    """Return the bytes that a tree of arrays takes in memory."""
    return sum(math.ceil(x.size * _bits(x.dtype) / 8) for x in jax.tree.leaves(tree))


def _bits(dtype: Any) -> int:
    """Return the bits of a number. numpy counts a whole byte for an integer of 4 bits, of which memory holds two."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize
