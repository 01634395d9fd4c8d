"""Model FLOPs per token, and the peak FLOP/s of devices."""

import jax

from llama_jax.build import count_parameters
from llama_jax.config import ModelArgs
from llama_jax.devices.chips import PEAK_FLOPS


def train_flops_per_token(args: ModelArgs) -> float:
    """Return the FLOPs of the forward and backward pass per token.

    6 x (parameters without the embedding) + 6 x L x T x N H for causal attention. Attention counts visible pairs only,
    half of the square; recomputation is not counted. For 7B at 4096 this is 42.9e9.
    """
    matrices = count_parameters(args) - args.vocab_size * args.dim
    return 6.0 * matrices + 6.0 * args.n_layers * args.max_seq_len * args.n_heads * args.head_width


def peak_flops(device: jax.Device) -> float | None:
    """Return the peak FLOP/s of a device, or None if it is not known (a CPU, for example)."""
    return PEAK_FLOPS.get(device.device_kind)
