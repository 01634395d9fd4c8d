"""Rematerialisation: what the backward pass finds kept of a block, by the names that the forward pass gives its values."""

from typing import Any

import jax

from llama_jax.config import Remat
from llama_jax.ops.attention import ATTENTION, CUDNN_FORWARD, OPERANDS
from llama_jax.ops.linear import PROJECTION

# The residual stream between a block's attention and its feed-forward layer.
AFTER_ATTENTION = "after_attention"


def _keeping(*names: str) -> Any:
    """Keep what has one of these names, and what cuDNN's attention kernel returns, which cannot be named."""
    return jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(*names),
        lambda primitive, *_, **__: primitive.name == CUDNN_FORWARD,
    )


# What is not kept is computed again.
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
