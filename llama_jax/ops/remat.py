"""Rematerialisation: the activations of a block that the backward pass keeps, by their names in the forward pass."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.ops.attention import CUDNN_FORWARD, OPERANDS
from llama_jax.ops.blocks import ATTENTION
from llama_jax.ops.eight_bit import SCALES, EightBit
from llama_jax.ops.parameters import AXES
from llama_jax.train_args import layer_policies

# The residual stream between a block's attention and its feed-forward layer.
AFTER_ATTENTION = "after_attention"
# The products of a layer are named after their matrices.
PRODUCTS = tuple(name for name in AXES if name.startswith("w"))


def kept_values(name: str) -> tuple[str, ...]:
    """Return the names of the values that a policy keeps, or offloads. Of cuDNN's kernel see ``policy_of``."""
    attention = (*OPERANDS, ATTENTION, AFTER_ATTENTION)
    known = {"dots": (*PRODUCTS, ATTENTION), "attention": attention, "offload": attention, "full": ()}
    return known.get(name, tuple(name.split(",")))


def policy_of(name: str) -> Any:
    """Return jax.checkpoint's policy of this name, or that which keeps the values of some names, joined by commas.

    Values that are not kept are recomputed.
    """
    if name == "offload":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(kept_values(name)),
            offload_src="device",
            offload_dst="pinned_host",
        )
    if name == "full":
        return jax.checkpoint_policies.nothing_saveable
    # cuDNN's attention kernel has a result that cannot be named.
    return jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(*kept_values(name), SCALES),
        lambda primitive, *_, **__: primitive.name == CUDNN_FORWARD,
    )


def told_of(remat: str, platform: str) -> str:
    """Return what to say of ``remat`` on a platform, such as "cpu": nothing, unless it offloads in vain there."""
    if platform == "cpu" and remat.partition(":")[0] == "offload":
        return f"train.remat {remat} saves nothing on a CPU, whose memory is the host's: attention does the same with fewer copies"
    return ""


def over_layers(
    layer: Callable[[jax.Array, Any], jax.Array], x: jax.Array, stack: Any, remat: str, unroll: int
) -> jax.Array:
    """Return x after all layers, each of which keeps for the backward pass what ``remat`` says.

    layer: takes x and the weights of a layer. stack: the weights of all, stacked. unroll: how many layers the compiled
    body of the loop has.
    """
    layers = len(jax.tree.leaves(stack)[0])
    others = jax.tree.leaves(stack, is_leaf=lambda each: isinstance(each, EightBit))
    # A stack of frozen quantized matrices in another shape would be a copy of it.
    frozen = any(jnp.issubdtype(each.dtype, jnp.integer) for each in others if not isinstance(each, EightBit))
    size = 1 if frozen else unroll
    for name, first, end in layer_policies(remat, layers):
        part = stack if end - first == layers else jax.tree.map(operator.itemgetter(slice(first, end)), stack)
        if name == "none":
            x = jax.lax.scan(lambda x, weights: (layer(x, weights), None), x, part, unroll=min(unroll, end - first))[0]
        else:
            kept = jax.checkpoint(layer, policy=policy_of(name), prevent_cse=False)
            x = _over_groups(kept, x, part, math.gcd(end - first, size))
    return x


def _over_groups(layer: Callable[[jax.Array, Any], jax.Array], x: jax.Array, stack: Any, size: int) -> jax.Array:
    """Return x after all layers, in a loop over groups of them. The loop's own unrolling would copy what is kept."""
    if size == 1:
        return jax.lax.scan(lambda x, weights: (layer(x, weights), None), x, stack)[0]

    def group(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        leaves, structure = jax.tree.flatten(weights)
        for one in zip(*map(jnp.unstack, leaves), strict=True):
            x = layer(x, jax.tree.unflatten(structure, one))
        return x, None

    return jax.lax.scan(group, x, jax.tree.map(lambda w: w.reshape(-1, size, *w.shape[1:]), stack))[0]
