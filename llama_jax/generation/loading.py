"""Parameters out of a checkpoint: quantized there, or here, and laid over as few devices as hold them."""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.checkpoint import Checkpoint
from llama_jax.config import MeshArgs, Weights
from llama_jax.devices.memory import bytes_of, check_memory, memory_of
from llama_jax.devices.sharding import check_divisible, make_mesh, parameter_shardings, with_shardings
from llama_jax.generation.serving import checkpoint_shapes, generation_shardings, layer_by_layer
from llama_jax.model import Llama


def load_parameters(checkpoint: Checkpoint, model: Llama, mesh: jax.sharding.Mesh, weights: Weights) -> Any:
    """Return the parameters over a mesh, each device reading its own part; matrices quantized, or in the type that is computed in.

    They are in the form for generation (serving.py). On a CPU, where both forms are the same memory, parameters that are not
    quantized are stacked as in the checkpoint. Raises UserError where the mesh does not divide the model, or a file of the
    checkpoint is damaged.
    """
    check_divisible(mesh, checkpoint.args)
    shapes = _read_shapes(checkpoint, model, weights)
    is_quantized = checkpoint.weights != "auto"
    shardings = generation_shardings(shapes, mesh) if is_quantized else parameter_shardings(model, mesh)
    targets = with_shardings(shapes, shardings)
    with checkpoint.verified():
        if weights == "auto" and not is_quantized and mesh.devices.flat[0].platform == "cpu":
            return checkpoint.restore("params", targets)
        arrays = checkpoint.restore_one_by_one("params", targets)
        return layer_by_layer(arrays, shapes, "auto" if is_quantized else weights, mesh)


def fitting_mesh(checkpoint: Checkpoint, model: Llama, weights: Weights) -> jax.sharding.Mesh:
    """The fewest of this process's devices that hold the parameters, heads, hidden units and vocabulary spread over them.

    Raises UserError where all of them are too few.
    """
    args, dtype, devices = checkpoint.args, jnp.dtype(model.dtype), jax.local_devices()
    need = bytes_of(_read_shapes(checkpoint, model, weights))
    if weights == "auto" and jax.default_backend() == "cpu" and dtype.itemsize < 4:
        need *= 3  # XLA on a CPU computes in float32: what is narrower, it keeps twice
    spread = args.kv_heads, args.hidden_dim, args.vocab_size
    counts = [n for n in range(1, len(devices) + 1) if not any(size % n for size in spread)]
    count = next((n for n in counts if need / n <= memory_of(devices[:n])), counts[-1])
    what = f"the parameters of {checkpoint.folder} need, computed in {dtype.name} on {count} device{'s'[: count > 1]},"
    check_memory(need / count, devices[:count], what, "use a machine with more memory, or a smaller model")
    return make_mesh(MeshArgs(data=1, tensor=count), devices[:count])


def _read_shapes(checkpoint: Checkpoint, model: Llama, weights: Weights) -> Any:
    """Shapes and types of the parameters as they are read.

    What is quantized here is read in the type in which it is stored, as the converter does: its integers are the same then,
    whatever is computed in.
    """
    if checkpoint.weights != "auto":
        return checkpoint_shapes(model, checkpoint.weights)
    stored = None if weights == "auto" else checkpoint.arrays("params").get("output")
    return checkpoint_shapes(model, "auto", None if stored is None else stored.dtype)
