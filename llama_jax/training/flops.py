"""Model FLOPs, and the peak of the chips that they are measured against."""

import jax

from llama_jax.config import ModelArgs
from llama_jax.devices.chips import PEAK_FLOPS
from llama_jax.model import count_parameters


def train_flops_per_token(args: ModelArgs) -> float:
    """FLOPs of forward and backward a token: 6 x (parameters without the embedding) + 6 x L x T x D of causal attention.

    Attention is counted once a visible pair, half the square; recomputation is not counted. 7B at 4096: 42.9e9.
    """
    matrices = count_parameters(args) - args.vocab_size * args.dim
    return 6.0 * matrices + 6.0 * args.n_layers * args.max_seq_len * args.dim


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device, None where it is not known (a CPU, say)."""
    return PEAK_FLOPS.get(device.device_kind)
