"""The device mesh, and one table that lays the model's logical axes over it.

XLA's partitioner places the collectives of what is written for one device. Where it would place them badly, a function runs
shard by shard instead (``shard_by_shard``) and says itself what is gathered and what is summed.
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

# Logical axis -> the mesh axes that it is spread over (None: whole on every device).
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
}


def make_mesh(args: MeshArgs, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices (one device: a mesh of ones). Raises UserError where the sizes do not make up the devices."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(args)
    known = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if open_axes and len(devices) % known == 0:
        sizes[open_axes[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh: expected sizes that make up {len(devices)} devices, found {describe(sizes)}; change [mesh]"
        )
    return Mesh(
        _grid(list(sizes.values()), devices), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes)
    )


def _grid(sizes: list[int], devices: list[jax.Device]) -> np.ndarray:
    """The devices in an array of ``sizes``: slices (or hosts) lie along the outermost axes that they divide, data before fsdp."""
    left = slices = len({getattr(device, "slice_index", None) for device in devices})
    across = []
    for size in sizes:
        across.append(math.gcd(size, left))
        left //= across[-1]
    within = [size // part for size, part in zip(sizes, across, strict=True)]
    # An axis may be a part of a TPU's ring, or a plane of its torus.
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def describe(sizes: dict[str, int]) -> str:
    """Mesh sizes as text: "data 2 x fsdp 4"; axes of one device are left out."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "one device"


def check_divisible(mesh: Mesh, model: ModelArgs, train: TrainArgs | None = None) -> None:
    """Raise UserError where a size of the model, or of its training, cannot be laid evenly over its mesh axes."""
    sizes = {
        "model.max_seq_len": ("length", model.max_seq_len),
        "model.vocab_size": ("vocab", model.vocab_size),
        "model.dim": ("embed", model.dim),
        "model.n_heads": ("heads", model.n_heads),
        "model.n_kv_heads": ("kv_heads", model.kv_heads),
        "feed-forward width": ("mlp", model.hidden_dim),
    }
    if train is not None:
        rows = train.batch_size // train.gradient_accumulation_steps
        sizes = {"train.batch_size / train.gradient_accumulation_steps": ("batch", rows)} | sizes
    for name, (axis, size) in sizes.items():
        mesh_axes = mesh_axes_of(axis)
        parts = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % parts:
            spread = " x ".join(f"mesh.{a}" for a in mesh_axes)
            raise UserError(f"{name}: expected a multiple of {spread} = {parts}, found {size}; change one of them")


def mesh_axes_of(axis: str) -> tuple[str, ...]:
    """Mesh axes of a logical axis. Raises UserError for one that the table does not know."""
    if axis not in RULES:
        raise UserError(f"logical axis: expected one of {', '.join(RULES)}, found {axis}")
    rule = RULES[axis]
    return () if rule is None else (rule,) if isinstance(rule, str) else rule


def spec(*axes: str | None) -> PartitionSpec:
    """Partition of an array with these logical axes. Raises UserError where a mesh axis would be used twice."""
    parts = [() if axis is None else mesh_axes_of(axis) for axis in axes]
    used = [a for part in parts for a in part]
    if len(used) != len(set(used)):
        raise UserError(f"logical axes {axes}: expected each mesh axis once, found {used}")
    return PartitionSpec(*(part or None for part in parts))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of int [B, T] batches."""
    return NamedSharding(mesh, spec("batch", "length"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


@functools.cache
def _boxed_shapes(model: nn.Module) -> Any:
    """The parameters' shapes, each with the names of its axes. Remembered, since many ask, and tracing takes a tenth of a second.

    Nothing is made: JAX's backends are not started.
    """
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


def parameter_shapes(model: nn.Module) -> Any:
    """The parameters' shapes, float32."""
    return nn.unbox(_boxed_shapes(model))


def parameter_shardings(model: nn.Module, mesh: Mesh) -> Any:
    """A NamedSharding a parameter, in the tree of the parameters."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, spec(*leaf.names)),
        _boxed_shapes(model),
        is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )


def mesh_of(tree: Any) -> Mesh:
    """The mesh that arrays lie on; of arrays on one device, or of numpy's, a mesh of ones."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    if isinstance(sharding, NamedSharding):
        return cast(Mesh, sharding.mesh)
    return make_mesh(MeshArgs(), jax.local_devices()[:1] if sharding is None else list(sharding.device_set))


def shard_by_shard(f: Callable, over: tuple[str, ...], in_axes: tuple, out_axes: Any) -> Callable:
    """``f``, run on the shards of its arguments along the logical axes ``over``; the partitioner keeps the other axes.

    in_axes: the logical axes of each argument; out_axes: the same of the result, or of each of a tuple of results. Without
    a mesh (see ``on_mesh``), or with sizes that it does not divide (a single prompt), ``f`` itself, left to the partitioner.
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
    """Whether the mesh divides each size of an array with these logical axes."""
    return all(
        size % math.prod(mesh.shape[name] for name in mesh_axes_of(axis)) == 0
        for axis, size in zip(axes, shape, strict=True)
        if axis is not None
    )


def shard_axes(*axes: str) -> tuple[str, ...]:
    """Mesh axes of the logical ``axes`` that the running function sees one shard of; none outside ``shard_by_shard``."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for axis in axes for name in mesh_axes_of(axis) if name in manual)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """``x`` with these logical axes, where there is a mesh and it divides them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not _divides(mesh, axes, x.shape):
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def on_every_device(x: jax.Array) -> jax.Array:
    """``x``, whole on every device of the mesh, if there is one."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def gather_shards(x: jax.Array, logical: str, axis: int) -> jax.Array:
    """The whole of an array of which each shard holds a part along ``axis``."""
    names = shard_axes(logical)
    return jax.lax.all_gather(x, names, axis=axis, tiled=True) if names else x


def sum_shards(x: jax.Array, logical: str, axis: int, *others: str) -> jax.Array:
    """The shard along ``axis`` of the sum over the shards of ``logical`` and ``others`` (a reduce-scatter)."""
    names = shard_axes(logical)
    if names:
        x = jax.lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True)
    rest = tuple(name for name in shard_axes(*others) if name not in names)
    return jax.lax.psum(x, rest) if rest else x


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Trace under the mesh: what is said of shards and axes takes effect."""
    with jax.set_mesh(mesh):
        yield


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with the sharding that each array is to be restored into."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )
