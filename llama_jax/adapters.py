"""The low-rank adapters of a model (LoRA: Hu et al., 2021): their shapes, first values, and their place in the model.

An adapter is a tree like the parameters, of the targets alone. Each target is {"a": [inputs, rank], "b": [rank,
outputs]} in float32; those of layers are stacked on a leading axis, as in a checkpoint. The frozen base is a tree of
the whole model in which every matrix is a Matrix (ops/quantize.py).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import ModelArgs
from llama_jax.devices.sharding import spec
from llama_jax.errors import UserError
from llama_jax.lora_args import LoraArgs, Target
from llama_jax.ops.parameters import AXES
from llama_jax.ops.quantize import Adapted
from llama_jax.seeds import random_key

# Where the matrices are in the tree of parameters.
PLACES: dict[Target, tuple[str, ...]] = {
    "wq": ("layers", "attention", "wq"),
    "wk": ("layers", "attention", "wk"),
    "wv": ("layers", "attention", "wv"),
    "wo": ("layers", "attention", "wo"),
    "w1": ("layers", "feed_forward", "w1"),
    "w2": ("layers", "feed_forward", "w2"),
    "w3": ("layers", "feed_forward", "w3"),
    "output": ("output",),
}


def sides(args: ModelArgs, name: Target) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a matrix."""
    sizes = {
        "embed": args.dim,
        "heads": args.n_heads * args.head_width,
        "kv_heads": args.kv_heads * args.head_width,
        "mlp": args.hidden_width,
        "vocab": args.vocab_size,
    }
    inputs, outputs = AXES[name]
    return sizes[inputs], sizes[outputs]


def check_targets(args: ModelArgs, lora: LoraArgs) -> None:
    """Raise UserError if the model lacks a target, or the rank exceeds that of a target."""
    if args.tie_embeddings and "output" in lora.targets:
        raise UserError(
            "lora.targets: expected matrices of the layers, since the output matrix of this model is its embeddings, found output; "
            "leave it out"
        )
    for name in lora.targets:
        if lora.rank > (most := min(sides(args, name))):
            raise UserError(
                f"lora.rank: expected up to {most}, the smaller side of {name}, found {lora.rank}; choose a smaller one"
            )


def adapter_shapes(args: ModelArgs, lora: LoraArgs, mesh: jax.sharding.Mesh | None = None) -> Any:
    """Return the shapes of an adapter, with their shardings if there is a mesh.

    Inputs and outputs are spread over the devices as those of the base are. The rank is not spread.
    """
    tree: dict[str, Any] = {}
    for name in lora.targets:
        (inputs, outputs), (in_axis, out_axis) = sides(args, name), AXES[name]
        layers, axis = ((args.n_layers,), ("layers",)) if len(PLACES[name]) > 1 else ((), ())
        factors = {
            "a": ((*layers, inputs, lora.rank), (*axis, in_axis, "rank")),
            "b": ((*layers, lora.rank, outputs), (*axis, "rank", out_axis)),
        }
        _put(tree, PLACES[name], {key: _shape(shape, axes, mesh) for key, (shape, axes) in factors.items()})
    return tree


def init_adapter(args: ModelArgs, lora: LoraArgs, seed: int) -> Any:
    """Return the first values of an adapter: a is uniform within 1 / sqrt(inputs), b is zero.

    So the adapted model begins as its base. These are the values of PEFT (kaiming_uniform_ with a = sqrt(5)).
    """
    shapes = adapter_shapes(args, lora)
    tree: dict[str, Any] = {}
    for name in lora.targets:
        a, b = (at(shapes, PLACES[name])[key] for key in ("a", "b"))
        key = jax.random.fold_in(random_key(seed), _number(name))
        bound = a.shape[-2] ** -0.5
        first = jax.random.uniform(key, a.shape, jnp.float32, -bound, bound)
        _put(tree, PLACES[name], {"a": first, "b": jnp.zeros(b.shape, jnp.float32)})
    return tree


def joined(base: Any, adapter: Any, lora: LoraArgs, args: ModelArgs, keys: jax.Array | None = None) -> Any:
    """Return the parameters of the adapted model: ``base`` with each target as Adapted.

    base: with stacked layers or, in the form for generation, with a tree per layer. keys: a random key per row of a
    batch, [B], from which dropout follows. None: there is no dropout.
    """
    if isinstance(base["layers"], tuple):
        return _joined_one_by_one(base, adapter, lora)
    tree = _copied(base)
    for name in lora.targets:
        place, factors = PLACES[name], at(adapter, PLACES[name])
        of_matrix = None
        if keys is not None and lora.dropout:
            of_matrix = _folded(keys, jnp.asarray(_number(name)))
            if len(place) > 1:
                of_matrix = jax.vmap(lambda layer, k=of_matrix: _folded(k, layer))(jnp.arange(args.n_layers))
        dropout = lora.dropout if of_matrix is not None else 0.0
        weight = Adapted(at(base, place), factors["a"], factors["b"], of_matrix, lora.scale, dropout)
        _put(tree, place, weight)
    return tree


def _joined_one_by_one(base: Any, adapter: Any, lora: LoraArgs) -> Any:
    """Return ``joined`` of a base with a tree per layer."""

    def place_in(tree: Any, place: tuple[str, ...], factors: Any, layer: int | None) -> None:
        a, b = (factors[key] if layer is None else factors[key][layer] for key in ("a", "b"))
        _put(tree, place, Adapted(at(tree, place), a, b, None, lora.scale))

    layers = tuple(_copied(layer) for layer in base["layers"])
    tree = {**base, "layers": layers}
    for name in lora.targets:
        first, *rest = PLACES[name]
        factors = at(adapter, PLACES[name])
        for i, layer in enumerate(layers if rest else ()):
            place_in(layer, tuple(rest), factors, i)
        if not rest:
            place_in(tree, (first,), factors, None)
    return tree


@functools.partial(jax.jit, static_argnames=("scale", "dtype"))
def merged(w: jax.Array, factors: Any, scale: float, dtype: Any) -> jax.Array:
    """Return w + scale a b, computed in float32 and rounded once to ``dtype``. w may be a stack of layers."""
    product = jnp.matmul(factors["a"], factors["b"], precision="highest", preferred_element_type=jnp.float32)
    return (w.astype(jnp.float32) + scale * product.reshape(w.shape)).astype(dtype)


def row_keys(seed: int, step: jax.Array, rows: jax.Array) -> jax.Array:
    """Return a random key for each row of a step's batch: int [B] -> keys [B]. Rows are numbered within the batch."""
    key = jax.random.fold_in(random_key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def count_adapter(args: ModelArgs, lora: LoraArgs) -> int:
    """Return the number of an adapter's parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter_shapes(args, lora)))


def at(tree: Any, place: tuple[str, ...]) -> Any:
    """Return what is at ``place`` in a tree of dicts."""
    for key in place:
        tree = tree[key]
    return tree


def _number(name: Target) -> int:
    """Return a number of the matrix, from which its random numbers follow."""
    return list(PLACES).index(name)


def _folded(keys: jax.Array, number: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _shape(shape: tuple[int, ...], axes: tuple[str, ...], mesh: jax.sharding.Mesh | None) -> jax.ShapeDtypeStruct:
    sharding = None if mesh is None else jax.NamedSharding(mesh, spec(*axes))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def _copied(tree: Any) -> Any:
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _put(tree: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    *path, last = place
    for key in path:
        tree = tree.setdefault(key, {})
    tree[last] = value
