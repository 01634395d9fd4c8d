"""A job of several processes: how they connect, agree and end together. A single process is a job of one.

jax.distributed does the work. This module decides when to start it and how long to wait, and explains its failures.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.compat import jax_internals
from llama_jax.config import DistributedArgs
from llama_jax.errors import LOST, UserError, is_lost_process, lost_process

T = TypeVar("T")

# JAX's client aborts the process at its own limit. Ours comes this many seconds earlier, with an explanation.
MARGIN_SECONDS = 3600
PROBE_SECONDS = 2
# The value that process 0 sends to the others if it refused.
FAILED = -1


def start_job(args: DistributedArgs) -> None:
    """Join the other processes of the job, if there are any. Call it before JAX starts its backend.

    Returns at once if neither ``args`` nor a cluster's environment (Slurm, Open MPI, Cloud TPU, GKE) names other
    processes, and on repeated calls. From then on an error ends its process at once, so that the others notice. Raises
    UserError if ``args`` are incomplete, or if some process is missing after ``args.timeout_seconds``.
    """
    address, count, index = _find(args)
    if count == 1 or jax.distributed.is_initialized():
        return
    # Orbax's questions about old steps confuse this service; cli/stopping.py replaces it.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                address, count, index, initialization_timeout=args.timeout_seconds + MARGIN_SECONDS
            )
        except Exception as error:  # for example a port in use
            failures.append(error)

    thread = threading.Thread(target=join, name="join", daemon=True)
    thread.start()
    thread.join(args.timeout_seconds)
    if failures:
        reason = " ".join(str(failures[0]).split())
        raise UserError(
            f"distributed.coordinator_address: expected to start process {index} of {count} with {address}, "
            f"found: {reason}; choose another port, or see whether an earlier run still has it"
        )
    if thread.is_alive():
        _raise_late(address, count, index, args.timeout_seconds)
    sys.excepthook = _end_at_once
    _catch_abort()


def processes_of(args: DistributedArgs) -> int:
    """Return how many processes the job has that ``start_job`` would join, without joining it."""
    return _find(args)[1]


def _find(args: DistributedArgs) -> tuple[str, int, int]:
    """Return address, number of processes and index of this one, from ``args`` or else from the cluster."""
    found = {
        "coordinator_address": args.coordinator_address or None,
        "num_processes": args.num_processes,
        "process_id": args.process_id,
    }
    if None in found.values() and (cluster := jax_internals.cluster()) is not None:
        try:
            found["num_processes"] = args.num_processes or cluster.get_process_count()
            if found["num_processes"] != 1:
                if args.process_id is None:
                    found["process_id"] = cluster.get_process_id()
                port = os.environ.get("JAX_COORDINATOR_PORT")
                found["coordinator_address"] = args.coordinator_address or cluster.get_coordinator_address(
                    timeout_secs=args.timeout_seconds, override_coordinator_port=port
                )
        except Exception as error:  # each cluster has its own errors
            raise UserError(
                f"distributed.coordinator_address: expected to find process 0 through {cluster.__name__}, "
                f"found: {type(error).__name__} {error}; give the address, and num_processes and process_id if they are not known"
            ) from error
    given = [name for name, value in found.items() if value is not None]
    if found["num_processes"] == 1 or not given:
        return "", 1, 0
    for name, value in found.items():
        if value is None:
            raise UserError(
                f"distributed.{name}: expected a value, as {' and '.join(given)} {'are' if len(given) > 1 else 'is'} known, "
                "found none; give it too"
            )
    return tuple(found.values())  # type: ignore[return-value]


def _raise_late(address: str, count: int, index: int, seconds: int) -> None:
    """Raise a UserError that says which process is missing."""
    host, _, port = address.rpartition(":")
    if index == 0:
        found, advice = "not all of them", "start the others, or see what they say"
        expected = f"the other {count - 1} of {count} processes to come to process 0"
    else:
        expected = f"process 0, and all {count} processes with it, to answer process {index}"
        try:
            socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS).close()
            found, advice = "process 0 but not all others", "start the others, or see what they say"
        except OSError as error:
            found, advice = f"nothing there ({error.strerror or error})", "start process 0, or correct the address"
    raise UserError(
        f"distributed.coordinator_address: expected {expected} at {address} within {seconds} s "
        f"(distributed.timeout_seconds), found {found}; {advice}"
    )


def _end_at_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the error and exit without JAX's wait, at exit, for processes that wait for this one."""
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end_as_lost(_: int) -> None:
    print(
        "error: distributed: expected all processes of the job to go on, found that JAX, which lost another, aborts this one "
        "(see its own lines above); restart the job, which resumes from its last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)


def _catch_abort() -> None:
    """Make JAX's abort, on losing contact to another process, end this one with status LOST.

    The abort comes in a thread of JAX. A handler of the signal module would run in the main thread, which waits for a
    collective that never ends, so the handler is set through the C library.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(_end_as_lost, ctypes.c_void_p))


def is_main() -> bool:
    """Return whether this is process 0, which prints and writes."""
    return jax.process_index() == 0


def only_main_prints() -> None:
    """Close the standard output of all processes but process 0. This silences libraries, too.

    On TPUs JAX numbers processes by their place in the slice, whatever number they joined with. So this asks JAX,
    which starts its backend.
    """
    if jax.distributed.is_initialized() and not is_main():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def from_main(value: int) -> int:
    """Return process 0's ``value`` on all processes. All wait until each has called this."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def from_all(value: int) -> list[int]:
    """Return the ``value`` of each process, in order. All wait until each has called this."""
    return [int(each) for each in np.ravel(multihost_utils.process_allgather(np.int32(value)))]


def text_from_main(text: str) -> str:
    """Return process 0's ``text`` on all processes. All wait until each has called this."""
    raw = np.frombuffer(text.encode(), np.uint8)
    size = from_main(len(raw))
    mine = raw if is_main() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8)).decode()


def main_first(make: Callable[[], T], then: Callable[[], T]) -> T:
    """Run ``make()`` on process 0, then ``then()`` on the others, which find what it has written. Return the result."""
    made = make() if is_main() else None
    from_main(0)
    return then() if made is None else made


def on_main(make: Callable[[], int]) -> int:
    """Return on all processes what ``make()`` returns on process 0. If it raises UserError there, all raise one."""
    made, error = 0, None
    if is_main():
        try:
            made = make()
        except UserError as found:
            made, error = FAILED, found
    made = from_main(made)
    if error is not None:
        raise error
    if made == FAILED:
        raise UserError("distributed: expected process 0 to start the run, found that it refused; see what it says")
    return made


@contextlib.contextmanager
def lost_processes_told() -> Iterator[None]:
    """Turn the error of a collective whose other process is gone into a LostProcess.

    On a CPU a collective raises. On TPU and GPU it hangs until JAX, which has not heard from that process for 100
    seconds, aborts this one; see ``_end_as_lost``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if jax.process_count() > 1 and is_lost_process(error):
            raise lost_process(error) from error
        raise


class Consensus:
    """Lets all processes agree on integers, the largest of each, without waiting for the devices.

    With several processes, a call returns the result of the previous call, so that it need not wait for the devices,
    which are busy with a step.

    Example:
        consensus = Consensus(2)
        for ...:
            step(...)
            stop, save = consensus(stop_here, save_here)
    """

    def __init__(self, count: int) -> None:
        self._nothing = (0,) * count
        self._under_way: jax.Array | None = None
        if jax.process_count() > 1:
            shape = jax.process_count(), jax.local_device_count()
            mesh = Mesh(np.array(jax.devices()).reshape(shape), ("processes", "devices"))
            self._sharding = NamedSharding(mesh, PartitionSpec("processes"))
            self._largest = jax.jit(lambda x: jnp.max(x, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, *mine: int) -> tuple[int, ...]:
        """Return the largest of each of ``mine`` over all processes, which must call this equally often."""
        if jax.process_count() == 1:
            return mine
        told = self._largest(jax.make_array_from_process_local_data(self._sharding, np.array([mine], np.int32)))
        before, self._under_way = self._under_way, told
        return self._nothing if before is None else tuple(np.asarray(before).tolist())

    def forget(self) -> None:
        """Drop the pending result, because what it asks for has been done."""
        self._under_way = None
