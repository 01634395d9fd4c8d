"""Keeps JAX from looking for a TPU that is not there.

With libtpu installed, as with the extra ``tpu`` and in the tests, JAX tries to start a TPU before it takes the CPU. On
a machine without one, libtpu then prints a page of errors, which no setting silences.
"""

import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import jax

GOOGLE = "0x1ae0"  # its PCI vendor number
# PCI classes of what Google's virtual machines have besides TPUs: disks and network cards.
NO_TPU_CLASSES = ("0x01", "0x02")
# Device nodes of a TPU's drivers: the older one's, and the kernel's own, by the number of its group.
NODES = ("accel[0-9]*", "vfio/[0-9]*")
# Variables that tell of no TPU: where libtpu is and how it logs, and what JAX sets where it sees no chips.
OTHER_VARIABLES = ("TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY", "TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL")
# JAX is told to try a TPU whatever there is.
FORCED = "JAX_FORCE_TPU_INIT"


def skip_absent_tpu(doing: str) -> str:
    """Make JAX take the CPU at once if it would look for a TPU in vain. Call it before JAX starts its backend.

    doing: what the program does, such as "training". Returns a line to print. It is "" if nothing was decided: somebody
    chose platforms already (JAX_PLATFORMS, ``jax.config``), something indicates a TPU, or other accelerators may exist.
    """
    if jax.config.jax_platforms is not None or FORCED in os.environ:  # type: ignore[attr-defined]
        return ""
    if not _has_libtpu() or _has_other_plugins() or tells_of_tpu():
        return ""
    jax.config.update("jax_platforms", "cpu")
    return f"no TPU found: {doing} on the CPU (JAX_PLATFORMS=tpu has JAX look for one all the same)"


def tells_of_tpu(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether files under ``root`` or variables indicate a TPU: a chip, its driver, a setting."""
    if any(name.startswith("TPU_") and name not in OTHER_VARIABLES for name in environment):
        return True
    if any(any((root / "dev").glob(pattern)) for pattern in NODES):
        return True
    return any(_may_be_tpu(device) for device in (root / "sys/bus/pci/devices").glob("*"))


def _may_be_tpu(device: Path) -> bool:
    """Check for a PCI device of Google's that is neither a disk nor a network card. Future chips have other numbers."""
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == GOOGLE and not kind.startswith(NO_TPU_CLASSES)


def _has_libtpu() -> bool:
    return find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ


def _has_other_plugins() -> bool:
    """Return whether JAX knows plugins of other accelerators. It takes the one that has a device."""
    return bool(entry_points(group="jax_plugins")) or find_spec("jax_plugins") is not None
