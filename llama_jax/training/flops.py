"""Model FLOPs, and the peaks of chips that they are measured against."""

import jax

from llama_jax.config import ModelArgs
from llama_jax.model import count_parameters

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets, by the device_kind that JAX reports.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def train_flops_per_token(args: ModelArgs) -> float:
    """FLOPs of forward and backward a token: 6 x (parameters without the embedding) + 6 x L x T x D of causal attention.

    Attention is counted once a visible pair, half the square; recomputation is not counted. 7B at 4096: 42.9e9.
    """
    matrices = count_parameters(args) - args.vocab_size * args.dim
    return 6.0 * matrices + 6.0 * args.n_layers * args.max_seq_len * args.dim


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device, None where it is not known (a CPU, say)."""
    return PEAK_FLOPS.get(device.device_kind)
