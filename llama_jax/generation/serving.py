"""Converts parameters to the form for generation: separate layers, flat matrices, plain or quantized, on the mesh.

L layers, D dim, N query heads, K KV heads, H head_dim, F hidden, V vocab.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.tree_util import DictKey, KeyPath, SequenceKey, tree_leaves_with_path, tree_map_with_path

from llama_jax.checkpoint import key_name
from llama_jax.config import Weights
from llama_jax.devices.sharding import mesh_of, parameter_shapes, shards_of, spec
from llama_jax.model import Llama
from llama_jax.ops.parameters import AXES, is_vector
from llama_jax.ops.quantize import Matrix, flat, quantize

OUTPUT: KeyPath = (DictKey("output"),)


def for_generation(params: Any, weights: Weights = "auto") -> Any:
    """Convert parameters to the form for generation: a tree per layer, with matrices as Matrix, on the same mesh.

    params: stacked as in a checkpoint. Parameters that are already converted are returned unchanged. Tied embeddings
    remain one array, unless they are quantized: then they are kept, and the output matrix is their quantized copy.
    weights: the quantization of matrices. On one CPU, matrices that are not quantized share the memory of ``params``.
    """
    if isinstance(params["layers"], tuple):
        return params
    return layer_by_layer(tree_leaves_with_path(params), params, weights, mesh_of(params))


def layer_by_layer(
    arrays: Iterable[tuple[KeyPath, jax.Array]], like: Any, weights: Weights, mesh: jax.sharding.Mesh, dtype: Any = None
) -> Any:
    """Convert the arrays of a checkpoint to the form for generation, each as soon as it is read.

    arrays: each with its path in the checkpoint's tree. like: a tree of the same structure, which may be quantized.
    weights: the quantization of matrices. dtype: the type of embeddings. None: as they are. Returns the tree of
    converted arrays, on the mesh.
    """
    made: dict[KeyPath, Any] = {}
    copied = _is_copied(like, weights)
    for path, w in arrays:
        if key_name(path[-1]) == "tok_embeddings":
            if copied:
                made[OUTPUT] = _unstacked(OUTPUT, w.T, weights, mesh)
            w = w if dtype is None else w.astype(dtype)
        made[path] = _unstacked(path, w, weights, mesh)
    return _in_trees(made, like | {"output": like["tok_embeddings"]} if copied else like)


def _is_copied(params: Any, weights: Weights) -> bool:
    """Return whether generation needs an output matrix that is a copy of the embeddings, the only one in ``params``.

    Tied embeddings are looked up unquantized, as those of other models, so a quantized output matrix is another array.
    """
    return weights != "auto" and "output" not in params


def _with_output(params: Any, weights: Weights) -> Any:
    """Return parameters with the output matrix to quantize, even if they are tied."""
    return params | {"output": params["tok_embeddings"].T} if _is_copied(params, weights) else params


def stacked(arrays: Iterable[tuple[KeyPath, jax.Array]], like: Any, weights: Weights, mesh: jax.sharding.Mesh) -> Any:
    """Convert the arrays of a checkpoint to the form of a frozen base: matrices as Matrix, with layers stacked.

    The arguments are those of ``layer_by_layer``. Each array is converted as soon as it is read.
    """
    made: dict[KeyPath, Any] = {}
    copied = _is_copied(like, weights)
    for path, w in arrays:
        if copied and key_name(path[-1]) == "tok_embeddings":
            made[OUTPUT] = _stacked_on(w.T, OUTPUT, weights, mesh)
        made[path] = _stacked_on(w, path, weights, mesh)
    return tree_map_with_path(lambda path, _: made[path], like | {"output": like["tok_embeddings"]} if copied else like)


@functools.partial(jax.jit, static_argnames=("path", "weights", "mesh"))
def _stacked_on(w: jax.Array, path: KeyPath, weights: Weights, mesh: jax.sharding.Mesh) -> Any:
    form = _form(path, w, weights)
    shardings = tree_map_with_path(lambda inner, x: _sharding((*path, *inner), x, mesh), form)
    return jax.lax.with_sharding_constraint(form, shardings)


def _in_trees(made: dict[KeyPath, Any], like: Any) -> Any:
    """Return converted arrays in the structure of ``like``, but with a tree per layer.

    made: the converted array of each path. An array of all layers is a tuple with one per layer.
    """
    params = tree_map_with_path(lambda path, _: made[path], like)
    trees, structure = jax.tree.flatten(params["layers"], is_leaf=lambda x: isinstance(x, tuple))
    return params | {"layers": tuple(jax.tree.unflatten(structure, layer) for layer in zip(*trees, strict=True))}


def _unstacked(path: KeyPath, w: jax.Array, weights: Weights, mesh: jax.sharding.Mesh) -> Any:
    """Convert an array of a checkpoint to the form for generation. A stack of all layers becomes a tuple.

    From a stack, XLA on CPUs and GPUs would copy a layer before multiplying by it, and a TPU's compiler would not
    prefetch it. On one CPU, the layers are views of the same memory.
    """
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return _unstacking(path, jax.ShapeDtypeStruct(w.shape, w.dtype), weights, mesh)(w)
    stack = jax.tree.map(np.asarray, _form(path, np.asarray(w), weights))
    return jax.device_put(_in_layers(path, stack), jax.NamedSharding(mesh, spec()), may_alias=True)


@functools.cache
def _unstacking(
    path: KeyPath, shape: jax.ShapeDtypeStruct, weights: Weights, mesh: jax.sharding.Mesh
) -> Callable[[jax.Array], Any]:
    """Return the program that converts an array of a checkpoint, of this shape, to its form on the mesh."""

    def unstacked(w: jax.Array) -> Any:
        return _in_layers(path, _form(path, w, weights))

    def format_of(inner: KeyPath, part: jax.ShapeDtypeStruct) -> Format | jax.NamedSharding:
        names = (key for key in inner if not isinstance(key, SequenceKey))  # not the number of the layer
        return _format((*path, *names), part, mesh)

    formats = tree_map_with_path(format_of, jax.eval_shape(unstacked, shape))
    return jax.jit(unstacked, out_shardings=formats)


def _in_layers(path: KeyPath, form: Any) -> Any:
    if key_name(path[0]) != "layers":
        return form
    return tuple(jax.tree.map(lambda x, i=i: x[i], form) for i in range(len(jax.tree.leaves(form)[0])))


def _form(path: KeyPath, w: Any, weights: Weights) -> Any:
    """Return an array of a checkpoint as a Matrix, with its layers still stacked.

    Embeddings, norms, biases and the parts of a Matrix are returned unchanged.
    """
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
    """Quantize a matrix, or the layers of a stack one by one. Matrices of the same shape share a compiled program."""
    return jax.lax.map(lambda w: quantize(w, inputs, weights), w) if stacked else quantize(w, inputs, weights)


def checkpoint_shapes(model: Llama, weights: Weights, stored: Mapping[str, Any] | None = None) -> Any:
    """Return the shapes and types in which generation reads the parameters of a checkpoint.

    Weights of norms and biases are float32. All others have the model's dtype. weights: the quantization of the
    checkpoint. stored: the arrays of the checkpoint by name, in whose types to read tied embeddings, and matrices other
    than embeddings. None: in the model's.
    """

    def typed(path: KeyPath, s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if is_vector(path):
            return s
        array = (stored or {}).get("/".join(map(key_name, path)))
        if array is None or (key_name(path[-1]) == "tok_embeddings" and not model.args.tie_embeddings):
            return jax.ShapeDtypeStruct(s.shape, model.dtype)
        return jax.ShapeDtypeStruct(s.shape, array.dtype)

    shapes = tree_map_with_path(typed, parameter_shapes(model))
    if weights == "auto":
        return shapes

    def form(params: Any) -> Any:
        return tree_map_with_path(lambda path, w: _form(path, w, weights), _with_output(params, weights))

    return jax.eval_shape(form, shapes)


def generation_shapes(model: Llama, weights: Weights) -> Any:
    """Return the shapes and types of the parameters in the form for generation."""

    def form(params: Any) -> Any:
        params = _with_output(params, weights)
        arrays = ((path, _in_layers(path, _form(path, w, weights))) for path, w in tree_leaves_with_path(params))
        return _in_trees(dict(arrays), params)

    return jax.eval_shape(form, checkpoint_shapes(model, "auto"))


def stacked_shapes(model: Llama, weights: Weights) -> Any:
    """Return the shapes and types of the parameters in the form of ``stacked``."""

    def form(params: Any) -> Any:
        return tree_map_with_path(lambda path, w: _form(path, w, weights), _with_output(params, weights))

    return jax.eval_shape(form, checkpoint_shapes(model, "auto"))


def generation_shardings(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return a NamedSharding per array of a tree in the form for generation, or of a quantized checkpoint."""
    return tree_map_with_path(lambda path, leaf: _sharding(path, leaf, mesh), shapes)


def generation_formats(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return how each array of a tree in the form for generation lies on the mesh: its sharding and its layout."""
    return tree_map_with_path(lambda path, leaf: _format(path, leaf, mesh), shapes)


def _format(path: KeyPath, leaf: Any, mesh: jax.sharding.Mesh) -> Format | jax.NamedSharding:
    """Return the sharding of the array at ``path``, with a layout where a TPU would choose one that is slow.

    A TPU puts the axis last that needs the least padding. The inputs of an int4 matrix, in groups with a scale each,
    must not be last: the product would copy the matrix first. That takes a third of a step of 7B on v5e:2x2.
    """
    sharding = _sharding(path, leaf, mesh)
    if leaf.dtype != jnp.int4 or mesh.devices.flat[0].platform != "tpu":
        return sharding
    return Format(Layout(tuple(range(leaf.ndim))), sharding)


def _sharding(path: KeyPath, leaf: Any, mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """Return the sharding of the array at ``path``. The factors of adapters have one side of a matrix.

    Scales have both, unless the devices do not divide the groups of inputs that share one.
    """
    names = [key_name(key) for key in path]
    axes: tuple[str | None, ...] = next((AXES[name] for name in names if name in AXES), (None,) * leaf.ndim)
    if names[-1] == "b" or (names[-1] == "scales" and leaf.shape[-2] % shards_of(axes[0], mesh)):
        axes = (None, axes[-1])
    elif names[-1] == "a":
        axes = (axes[0], None)
    return jax.NamedSharding(mesh, spec(*("layers",) * (leaf.ndim - len(axes)), *axes))
