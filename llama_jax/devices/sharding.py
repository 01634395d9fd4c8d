"""The device mesh, and one table that maps the model's logical axes to its axes.

XLA's partitioner inserts collectives into code written for one device. Where it would place them badly, a function runs
per shard instead (``shard_by_shard``) and says explicitly what is gathered and what is summed.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config import MeshArgs, ModelArgs, TrainArgs
from llama_jax.errors import UserError
from llama_jax.seeds import random_key

# Logical axis -> the mesh axes that it is split over (None: every device holds all of it).
RULES: dict[str, tuple[str, ...] | str | None] = {
    "batch": ("data", "fsdp"),
    "length": "sequence",
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "layers": None,
    "rank": None,
}
# Logical axes that are split over all axes of a mesh.
EVERY_AXIS = ("batch", "length", "embed", "mlp")


def make_mesh(args: MeshArgs, devices: list[jax.Device] | None = None) -> Mesh:
    """Return the mesh of all devices. One device is a mesh of ones.

    Raises UserError if the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(args)
    known = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if open_axes and len(devices) % known == 0:
        sizes[open_axes[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        flags = ", ".join(f"--mesh.{name}" for name, size in dataclasses.asdict(args).items() if size > 1)
        raise UserError(
            f"mesh: expected sizes whose product is {len(devices)} devices, found {describe(sizes)}; change [mesh]"
            + (f", or give {flags}" if flags else "")
        )
    return Mesh(
        _grid(list(sizes.values()), devices), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes)
    )


def _grid(sizes: list[int], devices: list[jax.Device]) -> np.ndarray:
    """Return the devices as an array of ``sizes``.

    Slices (or hosts) are laid along the outermost axes that they divide: data before fsdp.
    """
    left = slices = len({getattr(device, "slice_index", None) for device in devices})
    across = []
    for size in sizes:
        across.append(math.gcd(size, left))
        left //= across[-1]
    within = [size // part for size, part in zip(sizes, across, strict=True)]
    # An axis may be part of a ring of the TPU's torus, or a plane of it.
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def describe(sizes: dict[str, int]) -> str:
    """Return mesh sizes as text: "data 2 x fsdp 4". Axes of one device are left out."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "one device"


def check_divisible(mesh: Mesh, model: ModelArgs, train: TrainArgs | None = None) -> None:
    """Raise UserError if a size of the model, or of its batches, is not divisible by its mesh axes."""
    sizes = {
        "model.max_seq_len": ("length", model.max_seq_len),
        "model.vocab_size": ("vocab", model.vocab_size),
        "model.dim": ("embed", model.dim),
        "model.n_heads": ("heads", model.n_heads),
        "model.n_kv_heads": ("kv_heads", model.kv_heads),
        "feed-forward width": ("mlp", model.hidden_width),
    }
    if train is not None:
        rows = train.batch_size // train.gradient_accumulation_steps
        batches = {"train.batch_size / train.gradient_accumulation_steps": ("batch", rows)}
        if train.batch_start:
            batches["train.batch_start"] = ("batch", train.batch_start)
        sizes = batches | sizes
    for name, (axis, size) in sizes.items():
        mesh_axes = mesh_axes_of(axis)
        parts = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % parts:
            spread = " x ".join(f"mesh.{a}" for a in mesh_axes)
            raise UserError(f"{name}: expected a multiple of {spread} = {parts}, found {size}; change one of them")


def mesh_axes_of(axis: str) -> tuple[str, ...]:
    """Return the mesh axes of a logical axis. Raises UserError if the table does not have it."""
    if axis not in RULES:
        raise UserError(f"logical axis: expected one of {', '.join(RULES)}, found {axis}")
    rule = RULES[axis]
    return () if rule is None else (rule,) if isinstance(rule, str) else rule


def spec(*axes: str | None) -> PartitionSpec:
    """Return the partition of an array with these logical axes. Raises UserError if a mesh axis would be used twice."""
    parts = [() if axis is None else mesh_axes_of(axis) for axis in axes]
    used = [a for part in parts for a in part]
    if len(used) != len(set(used)):
        raise UserError(f"logical axes {axes}: expected each mesh axis once, found {used}")
    return PartitionSpec(*(part or None for part in parts))


def shards_of(axis: str | None, mesh: Mesh) -> int:
    """Return the number of shards into which a mesh cuts a logical axis."""
    return math.prod(mesh.shape[name] for name in mesh_axes_of(axis)) if axis is not None else 1


def shards_here(axis: str | None) -> int:
    """Return the number of shards into which the mesh of the running function cuts a logical axis, 1 without one."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else shards_of(axis, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of int [B, T] batches."""
    return NamedSharding(mesh, spec("batch", "length"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


@functools.cache
def _boxed_shapes(model: nn.Module) -> Any:
    """Return the parameters' shapes with their logical axes. It makes no arrays and does not start JAX's backends.

    Cached, because tracing takes a tenth of a second and many functions call this.
    """
    return jax.eval_shape(lambda: model.init(random_key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


def parameter_shapes(model: nn.Module) -> Any:
    """Return the parameters' shapes, float32."""
    return nn.unbox(_boxed_shapes(model))


def parameter_shardings(model: nn.Module, mesh: Mesh) -> Any:
    """Return the NamedSharding of each parameter, in a tree like the parameters."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, spec(*leaf.names)),
        _boxed_shapes(model),
        is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )


def mesh_of(tree: Any) -> Mesh:
    """Return the mesh of a tree of arrays. For arrays on one device, and numpy arrays, it is a mesh of ones."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    if isinstance(sharding, NamedSharding):
        return cast(Mesh, sharding.mesh)
    return make_mesh(MeshArgs(), jax.local_devices()[:1] if sharding is None else list(sharding.device_set))


def shard_by_shard(f: Callable, over: tuple[str, ...], in_axes: tuple, out_axes: Any) -> Callable:
    """Return ``f`` run per shard of its arguments along the logical axes ``over``.

    Other axes stay with the partitioner.

    ``in_axes`` are the logical axes of each argument, ``out_axes`` those of the result or of each in a tuple of
    results. Without a mesh (see ``on_mesh``), or if the mesh does not divide the sizes (a single prompt), ``f`` runs as
    it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = {name for axis in over for name in mesh_axes_of(axis)}

    def manual(axes: tuple[str | None, ...]) -> PartitionSpec:
        return spec(*(axis if axis is not None and names.issuperset(mesh_axes_of(axis)) else None for axis in axes))

    in_specs = tuple(map(manual, in_axes))
    out_specs = tuple(map(manual, out_axes)) if out_axes and isinstance(out_axes[0], tuple) else manual(out_axes)

    def run(*args: jax.Array) -> Any:
        if mesh.empty or not all(_divides(mesh, axes, x.shape) for axes, x in zip(in_axes, args, strict=True)):
            return f(*args)
        sharded = jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)
        return sharded(*args)

    return run


def _divides(mesh: Any, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> bool:
    """Return whether the mesh divides each size of an array with these logical axes."""
    return all(
        size % math.prod(mesh.shape[name] for name in mesh_axes_of(axis)) == 0
        for axis, size in zip(axes, shape, strict=True)
        if axis is not None
    )


def shard_axes(*axes: str) -> tuple[str, ...]:
    """Return the mesh axes of ``axes`` that the running function sees one shard of: none outside shard_by_shard.

    An axis of one device is left out. XLA would copy an array to gather it from one device, and it cannot compile a sum
    over such axes while the partitioner splits others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = (name for axis in axes for name in mesh_axes_of(axis))
    return tuple(name for name in names if name in mesh.manual_axes and mesh.shape[name] > 1)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of ``x`` to these logical axes, if there is a mesh and it divides them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not _divides(mesh, axes, x.shape):
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def on_every_device(x: jax.Array) -> jax.Array:
    """Constrain ``x`` to be held in full by every device of the mesh, if there is one."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def gather_shards(x: jax.Array, logical: str, axis: int) -> jax.Array:
    """Gather an array of which each shard holds a part along ``axis``."""
    names = shard_axes(logical)
    return jax.lax.all_gather(x, names, axis=axis, tiled=True) if names else x


def sum_shards(x: jax.Array, logical: str, axis: int, *others: str) -> jax.Array:
    """Sum over the shards of ``logical`` and ``others``; return this shard's part along ``axis`` (a reduce-scatter)."""
    names = shard_axes(logical)
    if names:
        x = jax.lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True)
    rest = tuple(name for name in shard_axes(*others) if name not in names)
    return jax.lax.psum(x, rest) if rest else x


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Trace the block under the mesh, so that shards and constraints take effect."""
    with jax.set_mesh(mesh):
        yield


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Return a tree of shapes with the shardings to restore the arrays into."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )
