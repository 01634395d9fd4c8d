"""JAX and its compilers: its list of clusters, the texts of its errors, and the version of libtpu that it requires.

JAX is imported inside the functions that use it, so that errors.py can examine an error without importing JAX.
"""

import contextlib
import importlib.metadata
import os
import re
from typing import Any

# Words in the errors that JAX and Gloo raise in a process that waits for another one that does not answer.
LOST_PROCESS = ("Gloo", "oordination service", "CoordinationService", "heartbeat")


def cluster() -> Any | None:
    """Return JAX's class for the cluster in which this process was started, or None if there is none.

    Its methods ``get_coordinator_address``, ``get_process_count`` and ``get_process_id`` return what the processes of a
    job need to find each other.
    """
    from jax._src.clusters import ClusterEnv

    for kind in ClusterEnv._cluster_types:
        # A pod outside an indexed Job is a single process, for which JAX's check would warn or fail.
        alone = kind.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ
        # Open MPI 5 no longer gives the address of process 0, from which JAX concludes that there is no MPI.
        mpi = kind.name == "ompi" and "OMPI_COMM_WORLD_SIZE" in os.environ
        if not kind.opt_in_only_method and not alone and (mpi or kind.is_env_present()):
            return kind
    return None


def says_memory_is_too_small(refusal: str) -> bool:
    """Return whether the TPU compiler's error ``refusal`` says that a program needs more memory than a chip has."""
    return "RESOURCE_EXHAUSTED" in refusal and "hbm" in refusal.lower()


def needed_bytes(refusal: str) -> int:
    """Return the bytes per chip, state included, that the compiler's error says are needed; 0 if it does not say."""
    found = re.search(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT]?)", refusal)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else 0


def failed_check(words: str) -> str:
    """Return the failed check from what libtpu printed before it aborted the process; empty if it printed none."""
    return next(iter(re.findall(r"Check failed: .*", words)), "")


def is_described(device: Any) -> bool:
    """Return whether a JAX device is only a description to compile for, without hardware."""
    return type(getattr(device, "client", None)).__name__ == "CompileOnlyPyClient"


def has_started() -> bool:
    """Return whether JAX has started its backends in this process. Their threads hold locks that a fork never gets."""
    from jax._src import xla_bridge

    return bool(xla_bridge.backends_are_initialized())


def libtpu_version() -> str:
    """Return the version of libtpu that the installed JAX requires, without its last part ("0.0.43").

    It is empty if JAX requires none.
    """
    asked = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        asked = re.search(r"libtpu==([0-9.]+)\.\*", " ".join(importlib.metadata.requires("jax") or []))
    return asked[1] if asked else ""
