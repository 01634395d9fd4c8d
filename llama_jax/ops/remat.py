"""Rematerialisation: the activations of a block that the backward pass keeps, by their names in the forward pass."""

from typing import Any

import jax

from llama_jax.ops.attention import ATTENTION, CUDNN_FORWARD, OPERANDS
from llama_jax.ops.linear import PROJECTION
from llama_jax.train_args import Remat

# The residual stream between a block's attention and its feed-forward layer.
AFTER_ATTENTION = "after_attention"


def _keeping(*names: str) -> Any:
    """Keep values with one of these names, and the result of cuDNN's attention kernel, which cannot be named."""
    return jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(*names),
        lambda primitive, *_, **__: primitive.name == CUDNN_FORWARD,
    )


# Values that are not kept are recomputed.
POLICIES: dict[Remat, Any] = {
    "dots": _keeping(PROJECTION, ATTENTION),
    "attention": _keeping(*OPERANDS, ATTENTION, AFTER_ATTENTION),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[*OPERANDS, ATTENTION, AFTER_ATTENTION],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
