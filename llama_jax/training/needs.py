"""Says what a run needs of memory before anything long begins, and what to change where the devices have less."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax

from llama_jax.build import fastest_dtype
from llama_jax.config import Config, MeshArgs
from llama_jax.devices.compiling import platform_of
from llama_jax.devices.memory import memory_of
from llama_jax.devices.sharding import check_divisible
from llama_jax.errors import UserError
from llama_jax.training.account import activation_bytes, rows_of, state_bytes

# The ways to hold the whole model, from the first to try to the smallest.
SMALLER: tuple[dict[str, Any], ...] = (
    {"moments": "int8"},
    {"param_dtype": "bfloat16"},
    {"param_dtype": "bfloat16", "moments": "int8"},
    {"param_dtype": "bfloat16", "optimizer": "adafactor"},
)
# Of other ways this many are named, each with this share of the memory left for what is not counted.
MOST, SHARE = 2, 0.9
# How many times more devices are considered.
DOUBLED = (2, 4, 8, 16, 32, 64, 128, 256)
# The share of a GPU's memory that JAX takes if XLA_PYTHON_CLIENT_MEM_FRACTION says nothing, and one that it may.
GPU_SHARE, GPU_MOST = 0.75, 0.95


@dataclasses.dataclass(frozen=True)
class Need:
    """The bytes of a device that a run needs, by part."""

    parts: dict[str, float]
    """Exact: the parameters, their gradients and the optimizer's state."""
    activations: float
    """An estimate."""

    @property
    def certain(self) -> float:
        """The bytes without which no step is possible."""
        return sum(self.parts.values())

    @property
    def all(self) -> float:
        """The bytes of a step, about."""
        return self.certain + self.activations


def need_of(config: Config) -> Need:
    """Return what a device needs for ``config``, whose mesh has no -1."""
    shards = config.mesh.fsdp * config.mesh.tensor
    parts = {name: size / shards for name, size in state_bytes(config.model, config.train).items()}
    return Need(parts, activation_bytes(config))


def announce_needs(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Print what a device needs and has.

    Raises UserError if the parameters, gradients and the optimizer's state alone are more than it has.
    """
    check_divisible(mesh, config.model, config.train)
    asked = config.train.compute_dtype
    dtype = fastest_dtype(platform_of(mesh.devices.flat[0])) if asked == "auto" else asked
    train = dataclasses.replace(config.train, compute_dtype=dtype)
    config = dataclasses.replace(config, train=train, mesh=MeshArgs(**dict(mesh.shape)))
    need, limit = need_of(config), memory_of(mesh.local_devices)
    if need.certain > limit:
        raise UserError(
            f"memory: expected up to {_gb(limit)} GB a device, found that {_text(need, config)} need {_gb(need.certain)} GB "
            f"without activations; {_advice(config, mesh, limit)}"
        )
    has = "" if math.isinf(limit) else f" of {_gb(limit)}"
    print(
        f"{'needs':>10}  about {_gb(need.all)}{has} GB a device: {_text(need, config)}, activations about {_gb(need.activations)}"
    )
    if need.all > limit:
        print(f"{'':>10}  this may be too much; {_advice(config, mesh, limit)}")


def _text(need: Need, config: Config) -> str:
    """Return the parts of the exact account: "parameters 13.5 (bfloat16), gradients 13.5, moments 13.9 (int8)"."""
    train = config.train
    kinds = {
        "parameters": train.param_dtype,
        "moments": train.optimizer if train.optimizer != "adamw" else train.moments,
        "rounding": train.rounding,
    }
    return ", ".join(
        f"{name} {_gb(size)}" + (f" ({kinds[name]})" if name in kinds else "") for name, size in need.parts.items()
    )


def _advice(config: Config, mesh: jax.sharding.Mesh, limit: float) -> str:
    """Return what would fit instead, by the account and the estimate."""
    ways = list(_ways(config))
    found = [f"{flags} (about {_gb(size)} GB)" for flags, size in ways if size <= SHARE * limit][:MOST]
    if not found and mesh.local_devices[0].platform == "gpu":
        least = min(size for _, size in ways)
        if least <= SHARE * limit * GPU_MOST / GPU_SHARE:
            found.append(f"the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_MOST}, beside such flags")
    count = next((n for n in DOUBLED if need_of(_on_more(config, n)).all <= SHARE * limit), None)
    if count is not None:
        more = count * mesh.devices.size
        found.append(f"{more} such devices and --mesh.fsdp {count * config.mesh.fsdp}")
    return f"what would fit: {'; '.join(found) or 'a smaller model'}"


def _ways(config: Config) -> Iterator[tuple[str, float]]:
    """Yield flags that need less memory on the same devices, and the bytes that a device then needs."""
    train, mesh = config.train, config.mesh
    # One sequence at a time, of which the backward pass recomputes what it can.
    least = {"remat": "full", "gradient_accumulation_steps": train.gradient_accumulation_steps * rows_of(config)}
    spread = dataclasses.replace(mesh, data=1, fsdp=mesh.fsdp * mesh.data)
    layouts = [mesh, spread] if config.model.dim % spread.fsdp == 0 else [mesh]
    for layout, state, rest in itertools.product(dict.fromkeys(layouts), ({}, *SMALLER), ({}, least)):
        changed = dataclasses.replace(train, **state | rest)
        flags = [*_flags("mesh", mesh, layout), *_flags("train", train, changed)]
        with contextlib.suppress(UserError):
            changed.check()
            if flags:
                yield " ".join(flags), need_of(dataclasses.replace(config, mesh=layout, train=changed)).all


def _on_more(config: Config, times: int) -> Config:
    """Return the configuration with its parameters spread over ``times`` as many devices, one sequence on each."""
    mesh = dataclasses.replace(config.mesh, fsdp=config.mesh.fsdp * times)
    one_row = mesh.data * mesh.fsdp
    train = dataclasses.replace(config.train, batch_size=one_row, gradient_accumulation_steps=1)
    return dataclasses.replace(config, mesh=mesh, train=train)


def _flags(section: str, before: Any, after: Any) -> Iterator[str]:
    """Yield the flags that make ``after`` of ``before``."""
    for field in dataclasses.fields(before):
        if (value := getattr(after, field.name)) != getattr(before, field.name):
            yield f"--{section}.{field.name.replace('_', '-')} {value}"


def _gb(size: float) -> str:
    """Return bytes as a number of GB: three digits, as small models need them."""
    return f"{size / 1e9:.1f}" if size >= 1e10 else f"{size / 1e9:.3g}"
