"""JAX and its compilers: its list of clusters, words of its errors, and the libtpu that it was made for.

This imports JAX where it is used, so that errors.py can ask about an error without it.
"""

import contextlib
import importlib.metadata
import os
import re
from typing import Any

# Words in what JAX and Gloo raise on a process that waits for another one in vain.
LOST_PROCESS = ("Gloo", "oordination service", "CoordinationService", "heartbeat")


def cluster() -> Any | None:
    """The class of JAX's that describes the cluster in which this process was started; None where there is none.

    Its ``get_coordinator_address``, ``get_process_count`` and ``get_process_id`` say how the processes of a job find each other.
    """
    from jax._src.clusters import ClusterEnv

    for kind in ClusterEnv._cluster_types:
        # A pod that is not one of an indexed Job stands alone, and JAX's look at it would warn or fail.
        alone = kind.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ
        # Open MPI 5 no longer says where process 0 is, which JAX takes for its absence.
        mpi = kind.name == "ompi" and "OMPI_COMM_WORLD_SIZE" in os.environ
        if not kind.opt_in_only_method and not alone and (mpi or kind.is_env_present()):
            return kind
    return None


def says_memory_is_too_small(refusal: str) -> bool:
    """Whether the TPU's compiler refused a program, in the words ``refusal``, as it needs more memory than a chip has."""
    return "RESOURCE_EXHAUSTED" in refusal and "hbm" in refusal.lower()


def needed_bytes(refusal: str) -> int:
    """Bytes a chip, the state's among them, that the compiler says it needs; 0 where it does not say."""
    found = re.search(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT]?)", refusal)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else 0


def failed_check(words: str) -> str:
    """The check that failed where libtpu aborted its process, out of what it printed; empty where it says none."""
    return next(iter(re.findall(r"Check failed: .*", words)), "")


def libtpu_version() -> str:
    """The version of libtpu, up to its last part, that the installed JAX asks for: "0.0.43"; empty where it asks for none."""
    asked = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        asked = re.search(r"libtpu==([0-9.]+)\.\*", " ".join(importlib.metadata.requires("jax") or []))
    return asked[1] if asked else ""
