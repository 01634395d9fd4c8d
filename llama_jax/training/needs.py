"""Says what a run needs of memory before anything long begins, and what to change where the devices have less."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax

from llama_jax.build import fastest_dtype
from llama_jax.config import Config, MeshArgs, TrainArgs
from llama_jax.devices.compiling import platform_of
from llama_jax.devices.memory import memory_of
from llama_jax.devices.sharding import check_divisible
from llama_jax.errors import UserError
from llama_jax.training.account import OF_STATE, adapter_bytes, rows_of, state_bytes, working_bytes

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
# The rank of adapters that are proposed.
RANK = 16
# The share of a GPU's memory that JAX takes if XLA_PYTHON_CLIENT_MEM_FRACTION says nothing, and one that it may.
GPU_SHARE, GPU_MOST = 0.75, 0.95
# A run that needs less than this share of a device's memory does not say so.
LITTLE = 0.05


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


def need_of(config: Config, held: dict[str, int] | None = None) -> Need:
    """Return what a device needs for ``config``, whose mesh has no -1.

    held: the bytes over all devices of a frozen base and of its adapters. None: the whole model is trained.
    """
    shards = config.mesh.fsdp * config.mesh.tensor
    parts = state_bytes(config.model, config.train) if held is None else held
    return Need({name: size / shards for name, size in parts.items()}, working_bytes(config))


def announce_needs(config: Config, mesh: jax.sharding.Mesh, held: dict[str, int] | None = None) -> None:
    """Print what a device needs and has, unless that is little. ``held`` is that of ``need_of``.

    Raises UserError if the parameters, gradients and the optimizer's state alone are more than it has.
    """
    check_divisible(mesh, config.model, config.train)
    asked = config.train.compute_dtype
    dtype = fastest_dtype(platform_of(mesh.devices.flat[0])) if asked == "auto" else asked
    train = dataclasses.replace(config.train, compute_dtype=dtype)
    config = dataclasses.replace(config, train=train, mesh=MeshArgs(**dict(mesh.shape)))
    need, limit = need_of(config, held), memory_of(mesh.local_devices)
    if need.certain > limit:
        raise UserError(
            f"memory: expected up to {_gb(limit)} GB a device, found that {_text(need, config)} need {_gb(need.certain)} GB "
            f"without activations; {_advice(config, mesh, limit, held)}"
        )
    if need.all < LITTLE * limit and not math.isinf(limit):
        return
    has = "" if math.isinf(limit) else f" of {_gb(limit)}"
    rest = f"activations about {_gb(need.activations)}"
    print(f"{'needs':>10}  about {_gb(need.all)}{has} GB a device: {_text(need, config)}, {rest}")
    if need.all > limit:
        print(f"{'':>10}  by this estimate it may not fit; {_advice(config, mesh, limit, held)}")


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


def _advice(config: Config, mesh: jax.sharding.Mesh, limit: float, held: dict[str, int] | None) -> str:
    """Return what would fit instead, by the account and the estimate."""
    ways = list(dict(_ways(config, held)).items())
    found = [f"{flags} (about {_gb(size)} GB)" for flags, size in ways if size <= SHARE * limit]
    found = [*found[:MOST], *found[MOST:][-1:]] if held is None and config.train.init_from else found[:MOST]
    least = min((size for _, size in ways), default=math.inf)
    if not found and mesh.local_devices[0].platform == "gpu" and least <= SHARE * limit * GPU_MOST / GPU_SHARE:
        found.append(f"the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_MOST}, beside {ways[-1][0]}")
    found += next(
        ([text] for text, size in _more_devices(config, mesh.devices.size, held) if size <= SHARE * limit), []
    )
    return f"what would fit: {'; or '.join(found) or 'a smaller model'}"


def _ways(config: Config, held: dict[str, int] | None) -> Iterator[tuple[str, float]]:
    """Yield flags that need less memory on the same devices, and the bytes that a device then needs."""
    train, mesh = config.train, config.mesh
    # One sequence at a time, of which the backward pass recomputes what it can.
    least: dict[str, Any] = {
        "remat": "full",
        "gradient_accumulation_steps": train.gradient_accumulation_steps * rows_of(config),
    }
    spread = dataclasses.replace(mesh, data=1, fsdp=mesh.fsdp * mesh.data)
    layouts = [mesh, spread] if config.model.dim % spread.fsdp == 0 else [mesh]
    states = ({}, *SMALLER) if held is None else ({},)
    # Muon goes with none of these.
    adamw = {name: getattr(TrainArgs(), name) for name in ("optimizer", "muon_momentum")}
    states = tuple(adamw | state if state and train.optimizer == "muon" else state for state in states)
    for layout, state, rest in itertools.product(dict.fromkeys(layouts), states, ({}, least)):
        changed = dataclasses.replace(train, **state | rest)
        flags = [*_flags("mesh", mesh, layout), *_flags("train", train, changed)]
        with contextlib.suppress(UserError):
            changed.check()
            if flags:
                yield " ".join(flags), need_of(dataclasses.replace(config, mesh=layout, train=changed), held).all
    if train.init_from and config.lora.base_weights != "int4":
        lora = dataclasses.replace(config.lora, rank=config.lora.rank or RANK, base_weights="int4")
        changed = dataclasses.replace(train, **{name: getattr(TrainArgs(), name) for name in OF_STATE} | adamw | least)
        flags = [*_flags("lora", config.lora, lora), *_flags("train", train, changed)]
        adapted = dataclasses.replace(config, train=changed, lora=lora)
        yield " ".join(flags), need_of(adapted, adapter_bytes(adapted)).all


def _more_devices(config: Config, devices: int, held: dict[str, int] | None) -> Iterator[tuple[str, float]]:
    """Yield what to do with ever more devices, and the bytes that each then needs, with one sequence at a time."""
    for times in DOUBLED:
        mesh = dataclasses.replace(config.mesh, fsdp=config.mesh.fsdp * times)
        parts, uneven = divmod(config.train.batch_size, mesh.data * mesh.fsdp)
        if uneven or config.model.dim % mesh.fsdp:
            return
        train = dataclasses.replace(config.train, remat="full", gradient_accumulation_steps=parts)
        flags = [f"--mesh.fsdp {mesh.fsdp}", *_flags("train", config.train, train)]
        changed = dataclasses.replace(config, mesh=mesh, train=train)
        yield f"{times * devices} such devices with {' '.join(flags)}", need_of(changed, held).all


def _flags(section: str, before: Any, after: Any) -> Iterator[str]:
    """Yield the flags that make ``after`` of ``before``."""
    for field in dataclasses.fields(before):
        if (value := getattr(after, field.name)) != getattr(before, field.name):
            yield f"--{section}.{field.name.replace('_', '-')} {value}"


def _gb(size: float) -> str:
    """Return bytes as a number of GB: three digits, as small models need them."""
    return f"{size / 1e9:.1f}" if size >= 1e10 else f"{size / 1e9:.3g}"
