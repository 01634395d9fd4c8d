"""Declares the parameters of Flax modules, splits stacked layers, and tells vectors from matrices."""

from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax.ops.quantize import Weight, transposed

# Logical axes (devices/sharding.py) of the inputs and outputs of matrices. The embeddings have a row per token.
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


def weight(module: nn.Module, name: str, std: float, **axes: int) -> Weight:
    """Return the matrix ``name`` of a module. ``axes`` gives the size of each of its logical axes, in order.

    devices/sharding.py maps logical axes to the mesh. The matrix is initialised in float32 from N(0, std^2).
    Generation may hold it in another form of the same shape (quantize.py). Raises ValueError if a parameter is given
    that has another shape.

    Initial embeddings are N(0, 1), other matrices N(0, 1 / fan-in) (PaLM paper, section 5). Tied embeddings are
    N(0, 1 / D), because they are the output matrix too, and with N(0, 1) logits would have a deviation of sqrt(D).
    Either way a fresh model's loss is about ln V + 1/2. The output matrix of a feed-forward layer is also divided by
    the square root of the number of terms in the residual stream, 2 L, so that the variance does not grow with depth
    (GPT-2 paper, section 2.3). The output matrix of attention is not, because a mean over positions is already small.
    """
    return _parameter(module, name, nn.initializers.normal(std), axes)


def output_weight(module: nn.Module, table: Weight, tied: bool) -> Weight:
    """Return the output matrix [D, V] of a module with the embeddings ``table`` [V, D], which is the table if ``tied``.

    A quantized model has an output matrix of its own even then, because its embeddings are not quantized.
    """
    V, D = table.shape
    if tied and not module.has_variable("params", "output"):
        return transposed(cast(jax.Array, table))
    return weight(module, "output", D**-0.5, embed=D, vocab=V)


def norm_weight(module: nn.Module, name: str, dim: int) -> jax.Array:
    """Return the weight ``name`` of an RMSNorm, float32 [D], initialised with ones."""
    return cast(jax.Array, _parameter(module, name, nn.initializers.ones, {"norm": dim}))


def bias(module: nn.Module, name: str, has: bool, **axes: int) -> jax.Array | None:
    """Return the bias ``name`` of a product, float32, initialised with zeros. None if the model has none.

    ``axes`` gives the size of each of its logical axes, in order.
    """
    return cast(jax.Array, _parameter(module, name, nn.initializers.zeros, axes)) if has else None


def _parameter(module: nn.Module, name: str, init: nn.initializers.Initializer, axes: dict[str, int]) -> Weight:
    shape = tuple(axes.values())
    if not module.has_variable("params", name):
        return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, tuple(axes)), shape, jnp.float32))
    given = cast(Weight, module.get_variable("params", name))
    if given.shape != shape:
        raise ValueError(f"{name}: expected the shape {shape}, found {given.shape}")
    return given


def one_by_one(layers: Any) -> tuple[Any, ...]:
    """Return the layers' parameters as a tuple of trees, one per layer. Stacked parameters are split."""
    if isinstance(layers, tuple):
        return layers
    return tuple(jax.tree.map(lambda w, i=i: w[i], layers) for i in range(len(jax.tree.leaves(layers)[0])))


def is_vector(path: Sequence[Any]) -> bool:
    """Return whether the parameter at ``path`` in the tree is the weight of an RMSNorm or a bias.

    All others are matrices.
    """
    return "norm" in path[-1].key or "bias" in path[-1].key
