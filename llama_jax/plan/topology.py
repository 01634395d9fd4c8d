"""TPU slices and GPUs, described without hardware: their chips, and JAX devices to compile for."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llama_jax.devices.chips import GPUS, TPUS, Chip
from llama_jax.errors import UserError, quoted
from llama_jax.plan.gpus import COUNTS, HOST_GPUS, gpu_devices
from llama_jax.programs import install_command

EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:8x8, v7x:2x2x1, 2 slices as 2xv5e:16x16, or GPUs as h100:8"
# Environment variables for libtpu without a TPU or a metadata server.
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

# The slices on Google's page of each version, smallest first. Larger ones of v4 and v5p consist of cubes of 4x4x4.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = (
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16),
    (16, 16, 16),
)  # fmt: skip
SLICES: dict[str, tuple[tuple[int, ...], ...]] = {
    "v4": _CUBES,
    "v5e": _FLAT,
    "v5p": (*_CUBES, (16, 16, 24)),
    "v6e": _FLAT,
    "v7x": (*_CUBES, (16, 24, 24)),
}
CUBE = 4
# Number of chips of a host.
HOST_CHIPS = {"v4": 4, "v5e": 8, "v5p": 4, "v6e": 8, "v7x": 4} | dict.fromkeys(GPUS, HOST_GPUS)
# Google's slice names, such as "v5p-16", count cores for the versions whose chips have two.
CORES = {"v4": 2, "v5p": 2, "v7x": 2}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "tpu7x": "v7x", "v7": "v7x"}
# Names that the compiler knows a version by, where it has another.
COMPILER_NAMES = {"v7x": "tpu7x"}
# More chips than any job has had; describing more takes minutes.
MOST_CHIPS = 100_000

_GRID = re.compile(r"(?:([0-9]{1,9})x)?(v[0-9]+[a-z]*|tpu7x):([0-9]{1,9}(?:x[0-9]{1,9})*)")
_GPUS = re.compile(r"(?:nvidia-?)?(" + "|".join(GPUS) + r")(?:[:x-]([0-9]{1,9}))?")
_TYPE = re.compile(r"(v[0-9]+[a-z]*|tpu7x)[-:]([0-9]{1,9})")


@dataclass(frozen=True)
class Topology:
    """One or more slices of chips, each a grid: "v5e:16x16". Or the GPUs of a host, a grid of one side: "h100:8"."""

    name: str
    version: str
    grid: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Parse the name of a topology, in any case and spacing. Raises UserError if it is not one."""
        plain = re.sub(r"\s+", "", text).lower().replace("\N{MULTIPLICATION SIGN}", "x")
        if gpus := _GPUS.fullmatch(plain):
            return cls._of_gpus(gpus[1], int(gpus[2] or 1), text)
        found = _GRID.fullmatch(plain)
        version = ALIASES.get(found[2], found[2]) if found else ""
        if not found or version not in TPUS or found[3].isdigit():
            raise UserError(
                f"--topology: {_expected(plain)}, found {quoted(text)}; versions: {', '.join([*TPUS, *GPUS])}"
            )
        grid, slices, axes = tuple(map(int, found[3].split("x"))), int(found[1] or 1), TPUS[version].torus_axes
        if len(grid) != axes or 0 in grid or slices == 0:
            proposed = _names(version, math.prod(grid)) if 0 not in grid else EXAMPLES
            raise UserError(
                f"--topology: expected a grid of {axes} sizes for {version}, found {quoted(text)}; such as {proposed}"
            )
        if slices > 1 and TPUS[version].slice_bytes is None:
            raise UserError(
                f"--topology: expected one slice of {version}, found {quoted(text)}; the network between its slices is not published"
            )
        topology = cls.of(version, grid, slices)
        topology._check_size()
        return topology

    @classmethod
    def _of_gpus(cls, version: str, count: int, text: str) -> "Topology":
        if not 1 <= count <= HOST_GPUS:
            raise UserError(
                f"--topology: expected 1 to {HOST_GPUS} GPUs, those of one host, such as {version}:{HOST_GPUS}, found {quoted(text)}; "
                "networks between hosts differ, so plan for one of them"
            )
        return cls.of(version, (count,))

    @classmethod
    def of(cls, version: str, grid: tuple[int, ...], slices: int = 1) -> "Topology":
        """Return the topology with its usual name."""
        name = f"{version}:{'x'.join(map(str, grid))}"
        return cls(name if slices == 1 else f"{slices}x{name}", version, grid, slices)

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return math.prod(self.grid) * self.slices

    @property
    def device_count(self) -> int:
        """The number of JAX devices in all slices: two a chip of v7x, one of all others."""
        return self.chips * self.chip.devices

    @property
    def chip(self) -> Chip:
        """The performance of one device, which is a chip but for v7x."""
        return GPUS[self.version] if self.is_gpu else TPUS[self.version]

    @property
    def is_gpu(self) -> bool:
        """Whether these are GPUs, of which the compiler tells no schedule."""
        return self.version in GPUS

    @property
    def unit(self) -> str:
        """The word for one of its devices."""
        return "device" if self.chip.devices > 1 else self.rented

    @property
    def rented(self) -> str:
        """The word for what is counted, and paid by the hour."""
        return "GPU" if self.is_gpu else "chip"

    @property
    def is_offered(self) -> bool:
        """Whether Google's tables list such a slice, in any orientation. GPUs come in any number."""
        if self.is_gpu:
            return True
        grid = tuple(sorted(self.grid))
        listed = {tuple(sorted(slice_)) for slice_ in SLICES[self.version]}
        cubes = self.chip.torus_axes == 3 and not any(size % CUBE for size in grid)
        return grid in listed or cubes

    @property
    def nearest(self) -> str:
        """The names of the offered slices with about as many chips."""
        return _names(self.version, math.prod(self.grid))

    def parts(self) -> list["Topology"]:
        """Return this topology and the smaller slices or parts of a host that it divides into, smallest first."""
        if self.slices > 1 or not self.is_offered:
            return [self]
        room, chips = sorted(self.grid), self.chips
        ones = (1,) * len(room)
        smaller = [
            Topology.of(self.version, grid)
            for grid in dict.fromkeys([ones, (*ones[1:], 2), *_sizes(self.version)])
            if chips > math.prod(grid)
            and chips % math.prod(grid) == 0
            and all(part <= size for part, size in zip(sorted(grid), room, strict=True))
        ]
        return [*smaller, self]

    def larger(self) -> Iterator["Topology"]:
        """Yield larger offered slices: first of the same version, then of TPUs with more memory per chip."""
        for grid in _sizes(self.version):
            if math.prod(grid) > math.prod(self.grid):
                yield Topology.of(self.version, grid, self.slices)
        if self.is_gpu:
            return
        room = {version: chip.hbm_bytes * chip.devices for version, chip in TPUS.items()}
        for version in sorted(room, key=lambda version: room[version]):
            for grid in SLICES[version] if room[version] > room[self.version] else ():
                yield Topology.of(version, grid)

    def devices(self) -> list[Any]:
        """Return JAX devices to compile for, in the order that make_mesh needs.

        ``ENVIRONMENT`` must be set. Raises UserError if the compiler is not installed or does not know the slice.
        """
        if self.is_gpu:
            return gpu_devices(self.version, self.chips)
        from jax.experimental import topologies

        # A full ring is closed: a side of 16 in a flat slice, a side that is a multiple of 4 in a 3-D slice.
        full = 16 if self.chip.torus_axes == 2 else CUBE
        options: dict[str, Any] = {
            "wrap": tuple(size % full == 0 for size in self.grid) + (False,) * (3 - len(self.grid))
        }
        if self.chip.torus_axes == 3 and self.chip.devices == 1:
            options["chip_config_name"] = "megacore"
        bounds = [min(2, self.grid[0]), min(2, self.grid[1]), 1]
        version = COMPILER_NAMES.get(self.version, self.version)
        name = f"{version}:{'x'.join(map(str, self.grid))}"
        try:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=name, chips_per_host_bounds=bounds, num_slices=self.slices, **options
            )
        except Exception as error:  # JAX raises whatever its plugin raises
            if not _has_libtpu():
                raise UserError(
                    f"plan: expected the TPU compiler, found no libtpu; install it with: {install_command('tpu')}"
                ) from None
            raise self.refused(str(error)) from None
        return list(described.devices)

    def refused(self, reason: str) -> UserError:
        """Return the error to raise if the TPU's compiler refuses the slice, or does not know the version."""
        if self.is_offered:
            return UserError(
                f"--topology: expected a TPU compiler that knows {self.name}, found one that refuses it: "
                f"{' '.join(reason.split())[:200]}; install a newer libtpu, or take another version"
            )
        return UserError(
            f"--topology: expected a slice that the TPU compiler knows, such as {self.nearest}, found {self.name}: "
            f"{' '.join(reason.split())[:200]}"
        )

    def _check_size(self) -> None:
        most = max(SLICES[self.version], key=math.prod)
        if math.prod(self.grid) > math.prod(most):
            largest = Topology.of(self.version, most)
            several = Topology.of(self.version, most, -(-math.prod(self.grid) // math.prod(most)))
            more = f", or {several.name}" if self.chip.slice_bytes and several.chips <= MOST_CHIPS else ""
            raise UserError(
                f"--topology: expected at most {largest.chips:,} chips a slice of {self.version}, found {self.name}, "
                f"{math.prod(self.grid):,}; take {largest.name}{more}"
            )
        if self.chips > MOST_CHIPS:
            raise UserError(
                f"--topology: expected at most {MOST_CHIPS:,} chips in all, found {self.name}, {self.chips:,}; take fewer slices"
            )


def _expected(plain: str) -> str:
    """Return what is expected instead of ``plain``: a grid, computed if it counts chips or cores."""
    usual = f"expected a version and a grid such as {EXAMPLES}"
    found = _TYPE.fullmatch(plain.removeprefix("tpu-"))
    version = ALIASES.get(found[1], found[1]) if found else ""
    if not found or version not in TPUS:
        return usual
    cores = CORES.get(version, 1) if "-" in plain else 1
    chips = max(1, int(found[2]) // cores)
    counted = f"{chips:,} chip{'s'[: chips > 1]}" + (f", {found[2]} cores" if cores > 1 else "")
    return f"expected a version and a grid, here {_names(version, chips)} ({counted})"


def _sizes(version: str) -> tuple[tuple[int, ...], ...]:
    """Return the grids of a version that are offered or usual, smallest first."""
    return tuple((count,) for count in COUNTS) if version in GPUS else SLICES[version]


def _names(version: str, chips: int) -> str:
    """Return the offered slices with this many chips, or else the next smaller and the next larger one."""
    sizes = {math.prod(grid): Topology.of(version, grid).name for grid in SLICES[version]}
    if chips in sizes:
        return sizes[chips]
    below, above = [size for size in sizes if size < chips], [size for size in sizes if size > chips]
    return " or ".join(f"{sizes[size]} of {size:,} chips" for size in [*below[-1:], *above[:1]])


def _has_libtpu() -> bool:
    from importlib.util import find_spec

    return find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ
