"""How Flax modules declare their parameters, and what is known of a parameter by its place in the tree."""

from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax

from llama_jax.ops.quantize import Weight


def weight(module: nn.Module, name: str, std: float, **axes: int) -> Weight:
    """Return the matrix ``name`` of a module. ``axes`` are its sizes by logical axis (devices/sharding.py lays axes over the mesh).

    It is initialised in float32 from N(0, std^2). Generation may hold it in another form of the same shape (quantize.py). Initial embeddings are N(0, 1), other matrices N(0, 1 / fan-in) (PaLM paper, section 5). The feed-forward layers' output
    is divided by the square root of the number of terms in the residual stream, 2 L, so that its variance does not grow
    with depth (GPT-2 paper, section 2.3); attention's is not, for a mean over positions is small already.
    Raises ValueError where the parameter has another shape.
    """
    return _parameter(module, name, nn.initializers.normal(std), axes)


def norm_weight(module: nn.Module, name: str, dim: int) -> jax.Array:
    """Return the weight ``name`` of an RMSNorm, float32 [D]. It is initialised with ones."""
    return cast(jax.Array, _parameter(module, name, nn.initializers.ones, {"norm": dim}))


def _parameter(module: nn.Module, name: str, init: nn.initializers.Initializer, axes: dict[str, int]) -> Weight:
    shape = tuple(axes.values())
    if not module.has_variable("params", name):
        return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, tuple(axes)), shape))
    given = cast(Weight, module.get_variable("params", name))
    if given.shape != shape:
        raise ValueError(f"{name}: expected the shape {shape}, found {given.shape}")
    return given


def one_by_one(layers: Any) -> tuple[Any, ...]:
    """Return the layers' parameters as a tuple of trees, one a layer. Stacked ones are taken apart."""
    if isinstance(layers, tuple):
        return layers
    return tuple(jax.tree.map(lambda w, i=i: w[i], layers) for i in range(len(jax.tree.leaves(layers)[0])))


def is_norm(path: Sequence[Any]) -> bool:
    """Whether a parameter, by its path in the tree, is an RMSNorm's weight; all others are matrices."""
    return "norm" in path[-1].key
