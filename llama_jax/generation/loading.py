"""Loads parameters from a checkpoint, quantizes them if asked, and places them on the fewest devices that hold them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath, tree_map_with_path

from llama_jax.adapters import PLACES, adapter_shapes, at, joined, merged
from llama_jax.checkpoint import Checkpoint, key_name
from llama_jax.config import MeshArgs, Weights
from llama_jax.devices.memory import bytes_of, check_memory, memory_of
from llama_jax.devices.sharding import check_divisible, make_mesh, parameter_shardings, with_shardings
from llama_jax.generation.serving import checkpoint_shapes, generation_shardings, layer_by_layer, stacked
from llama_jax.model import Llama
from llama_jax.ops.parameters import is_vector


def load_parameters(
    checkpoint: Checkpoint,
    model: Llama,
    mesh: jax.sharding.Mesh,
    weights: Weights,
    adapter: Checkpoint | None = None,
) -> Any:
    """Load the parameters onto a mesh, in the form for generation (serving.py). Each device reads its own part.

    weights: the quantization of matrices, unless the checkpoint is already quantized. Other arrays have the model's
    dtype. On a CPU, parameters that are not quantized stay stacked as in the checkpoint, because both forms share the
    same memory there. An adapter is merged into plain matrices, and stays beside quantized ones. Raises UserError if
    the mesh does not divide the model, or if a file of the checkpoint is damaged.
    """
    check_divisible(mesh, model.args)
    if adapter is not None:
        return _load_adapted(checkpoint, model, mesh, weights, adapter)
    shapes = _read_shapes(checkpoint, model, weights)
    is_quantized = checkpoint.weights != "auto"
    shardings = generation_shardings(shapes, mesh) if is_quantized else parameter_shardings(model, mesh)
    targets = with_shardings(shapes, shardings)
    with checkpoint.verified():
        if weights == "auto" and not is_quantized and mesh.devices.flat[0].platform == "cpu":
            return checkpoint.restore("params", targets)
        arrays = checkpoint.restore_one_by_one("params", targets)
        return layer_by_layer(arrays, shapes, "auto" if is_quantized else weights, mesh, model.dtype)


def _load_adapted(
    base: Checkpoint, model: Llama, mesh: jax.sharding.Mesh, weights: Weights, adapter: Checkpoint
) -> Any:
    """Load the parameters of a base with an adapter; see ``load_parameters``."""
    assert adapter.adapter is not None
    lora = adapter.adapter.lora
    with adapter.verified():
        factors = adapter.restore("params", adapter_shapes(model.args, lora, mesh))
    if weights != "auto" or base.weights != "auto":
        params = load_parameters(base, model, mesh, weights)
        return joined(params, jax.tree.map(lambda x: x.astype(model.dtype), factors), lora, model.args)
    shapes = checkpoint_shapes(model, "auto", base.arrays("params"))
    targets = with_shardings(shapes, parameter_shardings(model, mesh))
    of_name = {PLACES[name]: at(factors, PLACES[name]) for name in lora.targets}

    def merge(path: KeyPath, w: jax.Array) -> jax.Array:
        place = tuple(map(key_name, path))
        if place in of_name:
            return merged(w, of_name[place], lora.scale, model.dtype)
        return w if is_vector(path) else w.astype(model.dtype)

    with base.verified():
        arrays = ((path, merge(path, w)) for path, w in base.restore_one_by_one("params", targets))
        if mesh.devices.flat[0].platform == "cpu":
            made = dict(arrays)
            return tree_map_with_path(lambda path, _: made[path], shapes)
        return layer_by_layer(arrays, shapes, "auto", mesh)


def load_frozen(checkpoint: Checkpoint, model: Llama, mesh: jax.sharding.Mesh, weights: Weights) -> Any:
    """Load the parameters onto a mesh, as the frozen base of adapters: matrices as Matrix, with layers stacked.

    weights: the quantization of matrices. A checkpoint that is quantized has it already. Plain matrices have the
    model's dtype. Arrays are read and quantized one by one. Raises UserError as ``load_parameters`` does.
    """
    check_divisible(mesh, model.args)
    shapes = _read_shapes(checkpoint, model, weights)
    is_quantized = checkpoint.weights != "auto"
    shardings = generation_shardings(shapes, mesh) if is_quantized else parameter_shardings(model, mesh)
    with checkpoint.verified():
        arrays = checkpoint.restore_one_by_one("params", with_shardings(shapes, shardings))
        return stacked(arrays, shapes, "auto" if is_quantized else weights, mesh)


def fitting_mesh(checkpoint: Checkpoint, model: Llama, weights: Weights) -> jax.sharding.Mesh:
    """Return a mesh of the fewest of this process's devices that hold the parameters.

    Heads, hidden units and vocabulary are sharded over the devices, whose number divides them. Raises UserError if the
    parameters do not fit on any such number of devices.
    """
    args, dtype, devices = checkpoint.args, jnp.dtype(model.dtype), jax.local_devices()
    need = bytes_of(_read_shapes(checkpoint, model, weights))
    if weights == "auto" and jax.default_backend() == "cpu" and dtype.itemsize < 4:
        need *= 3  # XLA on a CPU computes in float32, and keeps a float32 copy of narrower parameters.
    spread = args.kv_heads, args.hidden_width, args.vocab_size
    counts = [n for n in range(1, len(devices) + 1) if not any(size % n for size in spread)]
    count = next((n for n in counts if need / n <= memory_of(devices[:n])), counts[-1])
    what = f"the parameters of {checkpoint.folder} need, computed in {dtype.name} on {count} device{'s'[: count > 1]},"
    check_memory(need / count, devices[:count], what, "use a machine with more memory, or a smaller model")
    return make_mesh(MeshArgs(data=1, tensor=count), devices[:count])


def _read_shapes(checkpoint: Checkpoint, model: Llama, weights: Weights) -> Any:
    """Return the shapes and types in which the parameters are read.

    Matrices to be quantized are read in the type that they are stored in, as the converter reads them. So their
    integers do not depend on the model's dtype.
    """
    if checkpoint.weights != "auto":
        return checkpoint_shapes(model, checkpoint.weights)
    return checkpoint_shapes(model, "auto", None if weights == "auto" else checkpoint.arrays("params"))
