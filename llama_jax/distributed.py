"""A job of several processes: how they find each other, agree, and end together. One process is a job of one.

jax.distributed does the work; here is when it is started, how long it may take, and what is said where it fails.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config import DistributedArgs
from llama_jax.errors import UserError

T = TypeVar("T")

# The exit status of a run that SIGTERM ended, saved: the same command goes on. EX_TEMPFAIL of sysexits.h.
PREEMPTED = 75
# JAX's client aborts the process at its own limit; ours, which says why, comes first by so many seconds.
MARGIN_SECONDS = 3600
PROBE_SECONDS = 2


def start_job(args: DistributedArgs) -> None:
    """Join the other processes of the job, if there are any; call it before JAX starts its backend.

    Returns at once where neither ``args`` nor a cluster's environment (Slurm, Open MPI, Cloud TPU, GKE) tells of others, and
    when it is called again.
    From then on only process 0 prints, and an error that ends one process ends it at once, so that the others notice.
    Raises UserError where ``args`` are incomplete, or not all processes come within ``args.timeout_seconds``.
    """
    address, count, index = _find(args)
    if count == 1 or jax.distributed.is_initialized():
        return
    # Orbax asks that service about old steps, which confuses it; StopSignals takes its place.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                address, count, index, initialization_timeout=args.timeout_seconds + MARGIN_SECONDS
            )
        except Exception as error:  # a port that is taken, for one
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
    if index:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries' prints too


def _find(args: DistributedArgs) -> tuple[str, int, int]:
    """Address, number of processes, and which one this is: as given, or else as the cluster says."""
    found = {
        "coordinator_address": args.coordinator_address or None,
        "num_processes": args.num_processes,
        "process_id": args.process_id,
    }
    if None in found.values() and (cluster := _cluster()) is not None:
        try:
            found["num_processes"] = args.num_processes or cluster.get_process_count()
            if found["num_processes"] != 1:
                if args.process_id is None:
                    found["process_id"] = cluster.get_process_id()
                port = os.environ.get("JAX_COORDINATOR_PORT")
                found["coordinator_address"] = args.coordinator_address or cluster.get_coordinator_address(
                    timeout_secs=args.timeout_seconds, override_coordinator_port=port
                )
        except Exception as error:  # each cluster has its own
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


def _cluster() -> type[ClusterEnv] | None:
    """The cluster that this process was started in, as JAX knows them."""
    for kind in ClusterEnv._cluster_types:
        # A pod that is not one of an indexed Job stands alone, and JAX's look at it would warn or fail.
        alone = kind.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ
        # Open MPI 5 no longer says where process 0 is, which JAX takes for its absence.
        mpi = kind.name == "ompi" and "OMPI_COMM_WORLD_SIZE" in os.environ
        if not kind.opt_in_only_method and not alone and (mpi or kind.is_env_present()):
            return kind
    return None


def _raise_late(address: str, count: int, index: int, seconds: int) -> None:
    """Say who was waited for."""
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
    """End without JAX's wait, at exit, for processes that wait for this one."""
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


def is_main() -> bool:
    """Whether this is process 0, which prints and writes."""
    return jax.process_index() == 0


def from_main(value: int) -> int:
    """Process 0's ``value``, on all; none goes on before all have come here."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def main_first(make: Callable[[], T], then: Callable[[], T]) -> T:
    """``make()`` on process 0; when it is done, ``then()`` on the others, where they find what it has written."""
    made = make() if is_main() else None
    from_main(0)
    return then() if made is None else made


@contextlib.contextmanager
def lost_processes_told() -> Iterator[None]:
    """Turn what a collective raises when another process has gone into a UserError.

    On a CPU. On TPU and GPU it hangs instead, until JAX, which hears nothing of that process for 100 seconds, aborts this one.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() == 1 or "Gloo" not in str(error):
            raise
        raise UserError(
            f"distributed: expected all {jax.process_count()} processes to go on, found that process {jax.process_index()} "
            f"lost another ({' '.join(str(error).split())[:160]}); see what that one says, then start all again"
        ) from error


class StopSignals:
    """SIGTERM and Ctrl-C, to one process or to all: all stop after the same step.

    with StopSignals() as signals:
        for ...:
            step(...)
            if signals.agreed(): ...

    A second signal acts as it would without us.
    """

    NAMES = ("", "Ctrl-C", "SIGTERM")

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[signal.Signals, object] = {}
        self._under_way: jax.Array | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._note)
        if jax.process_count() > 1:
            shape = jax.process_count(), jax.local_device_count()
            mesh = Mesh(np.array(jax.devices()).reshape(shape), ("processes", "devices"))
            self._sharding = NamedSharding(mesh, PartitionSpec("processes"))
            self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = self.NAMES.index("Ctrl-C" if number == signal.SIGINT else "SIGTERM")
        signal.signal(number, self._before[signal.Signals(number)])  # type: ignore[arg-type]

    def agreed(self) -> str:
        """The signal to stop for, the same on all processes, which call this after every step; empty: go on.

        What they tell each other is read at the next call, so that the devices, busy with a step, are not waited for.
        """
        if jax.process_count() == 1:
            return self.NAMES[self._received]
        mine = np.array([self._received], np.int32)
        told = self._largest(jax.make_array_from_process_local_data(self._sharding, mine))
        before, self._under_way = self._under_way, told
        return "" if before is None else self.NAMES[int(before)]
