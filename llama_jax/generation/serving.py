"""Parameters as generation runs on them: each layer's matrices, flat, plain or quantized, laid over the mesh.

L layers, D dim, N query heads, K KV heads, H head_dim, F hidden, V vocab.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.tree_util import KeyPath, tree_leaves_with_path, tree_map_with_path

from llama_jax.checkpoint import key_name
from llama_jax.config import Weights
from llama_jax.devices.sharding import mesh_of, parameter_shapes, spec
from llama_jax.model import Llama
from llama_jax.ops.parameters import is_norm
from llama_jax.ops.quantize import Matrix, flat, quantize

# Logical axes (devices/sharding.py) of the matrices' inputs and outputs. A token's row is read out of the embeddings.
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


def for_generation(params: Any, weights: Weights = "auto") -> Any:
    """Return parameters as generation runs on them, on the mesh that they lie on: the layers one by one, matrices as Matrix.

    params: stacked as in a checkpoint; parameters that are in this form already are returned as they are. weights: how matrices
    are quantized. On one CPU, matrices that are not quantized share the memory of ``params``.
    """
    if isinstance(params["layers"], tuple):
        return params
    return layer_by_layer(tree_leaves_with_path(params), params, weights, mesh_of(params))


def layer_by_layer(
    arrays: Iterable[tuple[KeyPath, jax.Array]], like: Any, weights: Weights, mesh: jax.sharding.Mesh
) -> Any:
    """Return the form for generation of arrays that come with their paths, out of a checkpoint, each as soon as it is there.

    like: a tree with the structure of the checkpoint's, which may be quantized.
    """
    return _in_trees({path: _unstacked(path, w, weights, mesh) for path, w in arrays}, like)


def _in_trees(made: dict[KeyPath, Any], like: Any) -> Any:
    """What was made of each path, in the structure of ``like``, with a tree a layer."""
    params = tree_map_with_path(lambda path, _: made[path], like)
    trees, structure = jax.tree.flatten(params["layers"], is_leaf=lambda x: isinstance(x, tuple))
    return params | {"layers": tuple(jax.tree.unflatten(structure, layer) for layer in zip(*trees, strict=True))}


def _unstacked(path: KeyPath, w: jax.Array, weights: Weights, mesh: jax.sharding.Mesh) -> Any:
    """An array of a checkpoint in the form for generation: one of all layers becomes a tuple with one a layer.

    XLA on CPUs and GPUs copies a layer out of a stack before it multiplies. A TPU's compiler fetches a layer's matrix ahead of
    its product, but not out of a stack. On one CPU, layers are views of the same memory.
    """
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return _unstacked_on(w, path, weights, mesh)
    stack = jax.tree.map(np.asarray, _form(path, np.asarray(w), weights))
    return jax.device_put(_in_layers(path, stack), jax.NamedSharding(mesh, spec()), may_alias=True)


@functools.partial(jax.jit, static_argnames=("path", "weights", "mesh"))
def _unstacked_on(w: jax.Array, path: KeyPath, weights: Weights, mesh: jax.sharding.Mesh) -> Any:
    form = _in_layers(path, _form(path, w, weights))
    shardings = tree_map_with_path(lambda inner, x: _sharding((*path, *inner), x, mesh), form)
    return jax.lax.with_sharding_constraint(form, shardings)


def _in_layers(path: KeyPath, form: Any) -> Any:
    if key_name(path[0]) != "layers":
        return form
    return tuple(jax.tree.map(lambda x, i=i: x[i], form) for i in range(len(jax.tree.leaves(form)[0])))


def _form(path: KeyPath, w: Any, weights: Weights) -> Any:
    """A checkpoint's array as a Matrix whose parts are stacked; embeddings, norms and the parts of a Matrix as they are."""
    name = key_name(path[-1])
    if name not in AXES or name == "tok_embeddings":
        return w
    inputs, stacked = 2 if name == "wo" else 1, name != "output"
    if weights != "auto":
        return _quantized(w, inputs, weights, stacked)
    if not stacked:
        return flat(w, inputs)
    outputs = w.reshape(*w.shape[:1], int(np.prod(w.shape[1 : 1 + inputs])), -1)
    return Matrix(outputs, None, w.shape[1:])


@functools.partial(jax.jit, static_argnames=("inputs", "weights", "stacked"))
def _quantized(w: jax.Array, inputs: int, weights: Weights, stacked: bool) -> Matrix:
    """A matrix, or a stack of them layer by layer. A program for each shape: several matrices share one."""
    return jax.lax.map(lambda w: quantize(w, inputs, weights), w) if stacked else quantize(w, inputs, weights)


def checkpoint_shapes(model: Llama, weights: Weights, dtype: Any = None) -> Any:
    """Return the shapes and types of a checkpoint's parameters, as generation reads them.

    Norms' weights are float32, all else is of the type that is computed in. weights: how the checkpoint's matrices are quantized.
    dtype: the type in which matrices, but not embeddings, are read, where it is another.
    """

    def typed(path: KeyPath, s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if is_norm(path):
            return s
        other = dtype is not None and key_name(path[-1]) != "tok_embeddings"
        return jax.ShapeDtypeStruct(s.shape, dtype if other else model.dtype)

    shapes = tree_map_with_path(typed, parameter_shapes(model))
    if weights == "auto":
        return shapes
    return jax.eval_shape(lambda params: tree_map_with_path(lambda path, w: _form(path, w, weights), params), shapes)


def generation_shapes(model: Llama, weights: Weights) -> Any:
    """Return the shapes and types of the parameters in the form for generation."""

    def form(params: Any) -> Any:
        arrays = ((path, _in_layers(path, _form(path, w, weights))) for path, w in tree_leaves_with_path(params))
        return _in_trees(dict(arrays), params)

    return jax.eval_shape(form, checkpoint_shapes(model, "auto"))


def generation_shardings(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return a NamedSharding for each array of a tree in the form for generation, or of a quantized checkpoint's."""
    return tree_map_with_path(lambda path, leaf: _sharding(path, leaf, mesh), shapes)


def _sharding(path: KeyPath, leaf: Any, mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """The sharding of the array at ``path``. Scales lie where their outputs do."""
    names = [key_name(key) for key in path]
    axes: tuple[str | None, ...] = next((AXES[name] for name in names if name in AXES), (None,) * leaf.ndim)
    if names[-1] == "scales":
        axes = (None, axes[-1])
    return jax.NamedSharding(mesh, spec(*("layers",) * (leaf.ndim - len(axes)), *axes))
