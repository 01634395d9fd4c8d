"""Rematerialisation: what the backward pass finds kept of a block, by the names that the forward pass gives its values."""

from typing import Any

import jax

from llama_jax.attention import ATTENTION, CUDNN_FORWARD, OPERANDS
from llama_jax.config import Remat
from llama_jax.linear import PROJECTION

MIDDLE = "middle"  # of a block: the residual stream between attention and feed-forward


def _keeping(*names: str) -> Any:
    """Keep what has one of these names, and what cuDNN's attention kernel returns, which cannot be named."""
    return jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(*names),
        lambda primitive, *_, **__: primitive.name == CUDNN_FORWARD,
    )


# What is not kept is computed again.
POLICIES: dict[Remat, Any] = {
    "dots": _keeping(PROJECTION, ATTENTION),
    "attention": _keeping(*OPERANDS, ATTENTION, MIDDLE),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[*OPERANDS, ATTENTION, MIDDLE],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
