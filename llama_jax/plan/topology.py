"""TPU slices that are not there: their chips, and JAX devices that describe them."""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from llama_jax.chips import TPUS, Chip
from llama_jax.errors import UserError

EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:8x8, or 2 slices as 2xv5e:16x16"
# What libtpu asks of its surroundings, where there is neither a TPU nor a server that describes one.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Topology:
    """One or more slices of chips, each a grid: "v5e:16x16"."""

    name: str
    version: str
    grid: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, name: str) -> "Topology":
        """Raises UserError where ``name`` is no topology."""
        found = re.fullmatch(r"(?:(\d+)x)?(v\d+[a-z]*):(\d+(?:x\d+)*)", name.strip())
        if not found or found[2] not in TPUS:
            raise UserError(
                f"--topology: expected a version and a grid such as {EXAMPLES}, found {name!r}; versions: {', '.join(TPUS)}"
            )
        grid, axes = tuple(map(int, found[3].split("x"))), TPUS[found[2]].torus_axes
        if len(grid) != axes or 0 in grid or found[1] == "0":
            raise UserError(
                f"--topology: expected a grid of {axes} sizes for {found[2]}, found {name!r}; such as {EXAMPLES}"
            )
        slices = int(found[1] or 1)
        if slices > 1 and TPUS[found[2]].slice_bytes is None:
            raise UserError(
                f"--topology: expected one slice of {found[2]}, found {name!r}; the network between its slices is not published"
            )
        return cls(name, found[2], grid, slices)

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.grid) * self.slices

    @property
    def chip(self) -> Chip:
        """What one of its chips can do."""
        return TPUS[self.version]

    def devices(self) -> list[Any]:
        """JAX devices to compile for, in the order in which make_mesh wants them.

        Raises UserError where libtpu is not installed, or knows no such slice. ``ENVIRONMENT`` must be set.
        """
        from jax.experimental import topologies

        # A full ring closes: every side of 16 of a flat slice, every side of 4 or its multiples of a cube.
        full = 16 if self.chip.torus_axes == 2 else 4
        options: dict[str, Any] = {
            "wrap": tuple(size % full == 0 for size in self.grid) + (False,) * (3 - len(self.grid))
        }
        if self.chip.torus_axes == 3:
            options["chip_config_name"] = "megacore"
        bounds = [min(2, self.grid[0]), min(2, self.grid[1]), 1]
        name = f"{self.version}:{'x'.join(map(str, self.grid))}"
        try:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=name, chips_per_host_bounds=bounds, num_slices=self.slices, **options
            )
        except Exception as error:  # JAX raises what its plugin raises
            if not _has_libtpu():
                raise UserError(
                    "plan: expected the TPU compiler, found no libtpu; install it with: pip install -e '.[tpu]'"
                ) from None
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--topology: expected a slice that exists, such as {EXAMPLES}, found {self.name}: {reason}"
            ) from None
        return list(described.devices)


def _has_libtpu() -> bool:
    from importlib.util import find_spec

    return find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ
