"""Parameters as generation runs on them: each layer's flat matrices, plain or quantized, laid over the mesh.

L layers, D dim, N query heads, K KV heads, H head_dim, F hidden, V vocab.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath, tree_leaves_with_path, tree_map_with_path

from llama_jax.checkpoint import key_name
from llama_jax.config import Weights
from llama_jax.devices.sharding import mesh_of, parameter_shapes, spec
from llama_jax.model import Llama, is_norm
from llama_jax.ops.quantize import Matrix, quantize

# Logical axes (sharding.py) of a layer's flat matrices, inputs first, and of the two that belong to no layer.
AXES = {
    "wq": ("embed", "heads"),
    "wk": ("embed", "kv_heads"),
    "wv": ("embed", "kv_heads"),
    "wo": ("heads", "embed"),
    "w1": ("embed", "mlp"),
    "w3": ("embed", "mlp"),
    "w2": ("mlp", "embed"),
    "output": ("embed", "vocab"),
    "tok_embeddings": ("vocab", "embed"),
}


def serve(params: Any, weights: Weights = "auto") -> Any:
    """Parameters, stacked as in a checkpoint, as generation runs on them, on the mesh that they lie on; such as do already, as
    they are. On a CPU, what is not quantized is the same memory."""
    if is_served(params):
        return params
    return served_one_by_one(tree_leaves_with_path(params), params, weights, mesh_of(params))


def served_one_by_one(
    arrays: Iterable[tuple[KeyPath, jax.Array]], like: Any, weights: Weights, mesh: jax.sharding.Mesh
) -> Any:
    """The serving form of a checkpoint's arrays, or of those of a quantized checkpoint, that come with their paths, each as soon
    as it is there; ``like``: a tree of their structure."""
    made = {path: _served(path, w, weights, mesh) for path, w in arrays}
    return by_layer(tree_map_with_path(lambda path, _: made[path], like))


def is_served(params: Any) -> bool:
    """Whether parameters are in the serving form."""
    return isinstance(params["output"], Matrix)


def _served(path: KeyPath, w: jax.Array, weights: Weights, mesh: jax.sharding.Mesh) -> Any:
    """An array of a checkpoint in the serving form: where it is of all layers, a tuple of one for each.

    XLA on CPUs and GPUs copies a layer out of a stack before it multiplies; a TPU's compiler fetches a layer's matrix ahead of
    its product, but not out of a stack. On one CPU, layers are views of the same memory.
    """
    if not _on_one_cpu(mesh):
        return _served_on(w, path, weights, mesh)
    stack = jax.tree.map(np.asarray, stacked_form(path, np.asarray(w), weights))
    return jax.device_put(_in_layers(path, stack), jax.NamedSharding(mesh, spec()), may_alias=True)


@functools.partial(jax.jit, static_argnames=("path", "weights", "mesh"))
def _served_on(w: jax.Array, path: KeyPath, weights: Weights, mesh: jax.sharding.Mesh) -> Any:
    form = _in_layers(path, stacked_form(path, w, weights))
    shardings = tree_map_with_path(lambda inner, x: _sharding((*path, *inner), x, mesh), form)
    return jax.lax.with_sharding_constraint(form, shardings)


def _on_one_cpu(mesh: jax.sharding.Mesh) -> bool:
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def stacked_form(path: KeyPath, w: Any, weights: Weights) -> Any:
    """An array of a checkpoint; a matrix as a Matrix [L, inputs, outputs], quantized where ``weights`` says so.

    A TPU lays the two last axes of an array out in tiles, and multiplies no other form without copying it. Embeddings, of
    which a row a token is read, and norms stay as they are, and so do the parts of a Matrix.
    """
    name = key_name(path[-1])
    if name not in AXES or name == "tok_embeddings":
        return w
    if name != "output":
        inputs = w.shape[1:-1] if name == "wo" else w.shape[1:2]
        w = w.reshape(w.shape[0], math.prod(inputs), -1)
    return Matrix(w) if weights == "auto" else _quantized(w, weights)


@functools.partial(jax.jit, static_argnames="weights")
def _quantized(w: jax.Array, weights: Weights) -> Matrix:
    """[inputs, outputs], or [L, inputs, outputs] layer by layer. A program for each shape: several matrices share one."""
    return quantize(w, 1, weights) if w.ndim == 2 else jax.lax.map(lambda layer: quantize(layer, 1, weights), w)


def _in_layers(path: KeyPath, form: Any) -> Any:
    """What is of all layers, as a tuple of one for each."""
    if key_name(path[0]) != "layers":
        return form
    return tuple(jax.tree.map(lambda x, i=i: x[i], form) for i in range(len(jax.tree.leaves(form)[0])))


def by_layer(params: Any) -> Any:
    """Parameters whose layers are a tree of tuples, as such with a tuple of trees."""
    trees, structure = jax.tree.flatten(params["layers"], is_leaf=lambda x: isinstance(x, tuple))
    return params | {"layers": tuple(jax.tree.unflatten(structure, layer) for layer in zip(*trees, strict=True))}


@functools.partial(jax.jit, static_argnames="model")
def dequantized(served: Any, model: Llama) -> Any:
    """The reverse of ``serve``: parameters stacked as in training, matrices with their values in the type that is computed in."""
    stacked = served | {"layers": jax.tree.map(lambda *layers: jnp.stack(layers), *served["layers"])}

    def value(shape: jax.ShapeDtypeStruct, w: Any) -> jax.Array:
        if not isinstance(w, Matrix):
            return w
        dequantize = Matrix.dequantized if w.values.ndim == 2 else jax.vmap(Matrix.dequantized)
        return dequantize(w).reshape(shape.shape).astype(shape.dtype)

    return jax.tree.map(value, stacked_shapes(model), stacked)


def stacked_shapes(model: Llama, dtype: Any = None) -> Any:
    """Shapes and types of the parameters as in a checkpoint: norms' weights float32, all else in the type that is computed in.

    dtype: of the matrices but the embeddings, where it is another.
    """

    def typed(path: KeyPath, s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if is_norm(path):
            return s
        other = dtype is not None and key_name(path[-1]) != "tok_embeddings"
        return jax.ShapeDtypeStruct(s.shape, dtype if other else model.dtype)

    return tree_map_with_path(typed, parameter_shapes(model))


def quantized_shapes(model: Llama, weights: Weights) -> Any:
    """Shapes and types of what a quantized checkpoint holds: the serving form, its layers stacked."""
    shapes = stacked_shapes(model)
    return jax.eval_shape(
        lambda params: tree_map_with_path(lambda path, w: stacked_form(path, w, weights), params), shapes
    )


def served_shapes(model: Llama, weights: Weights) -> Any:
    """Shapes and types of the parameters in the serving form."""

    def form(params: Any) -> Any:
        return by_layer(tree_map_with_path(lambda path, w: _in_layers(path, stacked_form(path, w, weights)), params))

    return jax.eval_shape(form, stacked_shapes(model))


def serving_shardings(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """A NamedSharding for each array of a tree in the serving form, or of one whose layers are stacked."""
    return tree_map_with_path(lambda path, leaf: _sharding(path, leaf, mesh), shapes)


def _sharding(path: KeyPath, leaf: Any, mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """Of an array at ``path`` of a tree in the serving form. Scales lie where their outputs do."""
    names = [key_name(key) for key in path]
    axes: tuple[str | None, ...] = next((AXES[name] for name in names if name in AXES), (None,) * leaf.ndim)
    if names[-1] == "scales":
        axes = (None, axes[-1])
    return jax.NamedSharding(mesh, spec(*("layers",) * (leaf.ndim - len(axes)), *axes))
