"""Model FLOPs per token, and the peak FLOP/s of devices."""

import jax

from llama_jax.adapters import count_adapter
from llama_jax.build import count_parameters
from llama_jax.config import ModelArgs
from llama_jax.devices.chips import PEAK_FLOPS
from llama_jax.lora_args import LoraArgs


def train_flops_per_token(args: ModelArgs, lora: LoraArgs = LoraArgs()) -> float:
    """Return the FLOPs of the forward and backward pass per token.

    6 x (parameters without the embedding) + 6 x L x T x N H for causal attention. Attention counts visible pairs only,
    half of the square; recomputation is not counted. For 7B at 4096 this is 42.9e9.
    Frozen matrices have no gradient, so that with adapters they count 4 times, and the adapters 6 times.
    """
    matrices = count_parameters(args) - args.vocab_size * args.dim
    products = 4.0 * matrices + 6.0 * count_adapter(args, lora) if lora.rank else 6.0 * matrices
    return products + 6.0 * args.n_layers * args.max_seq_len * args.n_heads * args.head_width


def peak_flops(device: jax.Device) -> float | None:
    """Return the peak FLOP/s of a device, or None if it is not known (a CPU, for example)."""
    return PEAK_FLOPS.get(device.device_kind)
