"""Parameters as generation runs on them: flat matrices, plain or quantized, laid over the mesh.

L layers, D dim, N query heads, K KV heads, H head_dim, F hidden, V vocab.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import Weights
from llama_jax.model import Llama, is_norm
from llama_jax.quantize import Matrix, quantize
from llama_jax.sharding import layers_apart, mesh_of, spec

# Logical axes (sharding.py) of the flat matrices; inputs are the first axis behind the layers.
AXES = {
    "wq": ("layers", "embed", "heads"),
    "wk": ("layers", "embed", "kv_heads"),
    "wv": ("layers", "embed", "kv_heads"),
    "wo": ("layers", "heads", "embed"),
    "w1": ("layers", "embed", "mlp"),
    "w3": ("layers", "embed", "mlp"),
    "w2": ("layers", "mlp", "embed"),
    "output": ("embed", "vocab"),
    "tok_embeddings": ("vocab", "embed"),
}


def serve(params: Any, weights: Weights = "auto", donate: bool = False) -> Any:
    """Parameters, stacked as in a checkpoint, as generation runs on them, on the mesh that they lie on; such as do already, as
    they are.

    donate: they are not needed any more; where there is not twice the memory, there is once. On a CPU, what is not quantized
    is the same memory.
    """
    if is_served(params):
        return params
    mesh = mesh_of(params)
    if weights == "auto" and _on_one_cpu(mesh):
        return apart(serving_form(jax.tree.map(np.asarray, params), weights), mesh)
    shapes = jax.eval_shape(lambda params: serving_form(params, weights), params)
    convert = jax.jit(
        serving_form,
        static_argnames="weights",
        out_shardings=serving_shardings(shapes, mesh),
        donate_argnames="params" if donate else None,
    )
    return apart(convert(params, weights=weights), mesh, donate)


def is_served(params: Any) -> bool:
    """Whether parameters are in the serving form."""
    return isinstance(params["output"], Matrix)


def _on_one_cpu(mesh: jax.sharding.Mesh) -> bool:
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def serving_form(params: Any, weights: Weights) -> Any:
    """Every matrix but the embeddings becomes a Matrix [L, inputs, outputs], quantized where ``weights`` says so.

    A TPU lays the two last axes of an array out in tiles, and multiplies no other form without copying it. Embeddings, of
    which a row a token is read, and norms stay as they are.
    """

    def flat(path: tuple[Any, ...], w: jax.Array) -> Any:
        name = path[-1].key
        if is_norm(path) or name == "tok_embeddings":
            return w
        if name == "output":
            return Matrix(w) if weights == "auto" else quantize(w, 1, weights)
        inputs = w.shape[1:-1] if name == "wo" else w.shape[1:2]
        w = w.reshape(w.shape[0], math.prod(inputs), -1)
        return Matrix(w) if weights == "auto" else jax.lax.map(lambda layer: quantize(layer, 1, weights), w)

    return jax.tree_util.tree_map_with_path(flat, params)


@functools.partial(jax.jit, static_argnames="model")
def dequantized(served: Any, model: Llama) -> Any:
    """The reverse of ``serve``: parameters stacked as in training, matrices with their values in the type that is computed in."""
    layers = served["layers"]
    if isinstance(layers, tuple):
        served = served | {"layers": jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *layers)}

    def value(shape: jax.ShapeDtypeStruct, w: Any) -> jax.Array:
        if not isinstance(w, Matrix):
            return w
        dequantize = Matrix.dequantized if w.values.ndim == 2 else jax.vmap(Matrix.dequantized)
        return dequantize(w).reshape(shape.shape).astype(shape.dtype)

    return jax.tree.map(value, stacked_shapes(model), served)


def stacked_shapes(model: Llama, dtype: Any = None) -> Any:
    """Shapes and types of the parameters as in a checkpoint: norms' weights float32, all else in the type that is computed in.

    dtype: of the matrices but the embeddings, where it is another.
    """
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]

    def typed(path: tuple[Any, ...], s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if is_norm(path):
            return s
        other = dtype is not None and path[-1].key != "tok_embeddings"
        return jax.ShapeDtypeStruct(s.shape, dtype if other else model.dtype)

    return jax.tree_util.tree_map_with_path(typed, shapes)


def served_shapes(model: Llama, weights: Weights) -> Any:
    """Shapes and types of the parameters in the serving form, its layers stacked: what a quantized checkpoint holds, too."""
    return jax.eval_shape(lambda params: serving_form(params, weights), stacked_shapes(model))


def serving_shardings(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """A NamedSharding for each array of a tree in the serving form. Scales lie where their outputs do."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> jax.NamedSharding:
        names = [getattr(part, "key", getattr(part, "name", "")) for part in path]
        axes: Sequence[str | None] = next((AXES[name] for name in names if name in AXES), (None,) * leaf.ndim)
        if names[-1] == "scales":
            axes = [*axes[:-2], None, axes[-1]]
        return jax.NamedSharding(mesh, spec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def apart(served: Any, mesh: jax.sharding.Mesh, donate: bool = False) -> Any:
    """The layers as a tuple where each is read faster by itself (sharding.layers_apart); on one CPU, of views of the same memory.

    donate: a stack goes as soon as its layers are there, so that memory holds but one of them twice.
    """
    if not layers_apart(mesh):
        return served
    if _on_one_cpu(mesh):
        served = jax.tree.map(np.asarray, served)
        layers = jax.tree.map(_unstacked, served["layers"])
        here = jax.NamedSharding(mesh, spec())
        return jax.device_put(served | {"layers": _of_each_layer(layers)}, here, may_alias=True)

    def split(stack: jax.Array, sharding: jax.NamedSharding) -> tuple[jax.Array, ...]:
        of_layer = jax.NamedSharding(mesh, jax.P(*sharding.spec[1:]))
        layers = jax.jit(_unstacked, out_shardings=of_layer)(stack)
        if donate:
            stack.delete()
        return layers

    layers = jax.tree.map(split, served["layers"], serving_shardings(served, mesh)["layers"])
    return served | {"layers": _of_each_layer(layers)}


def _unstacked(stack: Any) -> tuple[Any, ...]:
    return tuple(stack[i] for i in range(len(stack)))


def _of_each_layer(layers: Any) -> tuple[Any, ...]:
    """A tree of tuples as a tuple of trees."""
    count = len(jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, tuple))[0])
    return tuple(
        jax.tree.map(lambda of_layers, i=i: of_layers[i], layers, is_leaf=lambda x: isinstance(x, tuple))
        for i in range(count)
    )
