"""FLOPs of a model's tokens and of a step's update, and the peak FLOP/s of devices."""

import jax

from llama_jax.adapters import count_adapter
from llama_jax.build import count_parameters
from llama_jax.config import Config, ModelArgs, TrainArgs
from llama_jax.devices.chips import PEAK_FLOPS
from llama_jax.lora_args import LoraArgs
from llama_jax.training.muon import ITERATIONS, matrix_sizes


def train_flops_per_token(args: ModelArgs, lora: LoraArgs = LoraArgs(), parameters: int | None = None) -> float:
    """Return the FLOPs of the forward and backward pass per token.

    6 x (parameters without the embedding) + 6 x L x T x N H for causal attention. Attention counts visible pairs only,
    half of the square, or fewer with a sliding window; recomputation is not counted. Tied embeddings count once, as the
    output matrix. For 7B at 4096 this is 42.9e9. Frozen matrices have no gradient, so that with adapters they count 4
    times, and the adapters 6 times. ``parameters``: their number, which takes a moment to count. None: count them.
    """
    counted = count_parameters(args) if parameters is None else parameters
    matrices = counted - (0 if args.tie_embeddings else args.vocab_size * args.dim)
    products = 4.0 * matrices + 6.0 * count_adapter(args, lora) if lora.rank else 6.0 * matrices
    return products + 12.0 * args.n_layers * args.n_heads * args.head_width * keys_per_query(args)


def decode_flops(args: ModelArgs, sequences: int, slots: int) -> float:
    """Return the FLOPs of a decoding step: a token of each sequence, whose cache of ``slots`` tokens is full.

    2 x (parameters without the embedding) + 4 x L x keys x N H a sequence, with the keys that a sliding window leaves.
    """
    matrices = count_parameters(args) - (0 if args.tie_embeddings else args.vocab_size * args.dim)
    keys = min(slots, args.window or slots)
    return sequences * (2.0 * matrices + 4.0 * args.n_layers * args.n_heads * args.head_width * keys)


def update_flops(args: ModelArgs, train: TrainArgs) -> float:
    """Return the FLOPs of the products of one update: 0 of AdamW.

    Muon takes 5 iterations of 4 m^2 n + 2 m^3 a matrix of the layers, whose smaller side is m. For 7B this is 0.68e15.
    """
    if train.optimizer != "muon":
        return 0.0
    return ITERATIONS * args.n_layers * sum(4.0 * m * m * n + 2.0 * m**3 for m, n in matrix_sizes(args))


def step_flops(config: Config, tokens: int, steps: int = 1) -> float:
    """Return the FLOPs of a step of this many tokens, its update included, or of several with so many in all."""
    return tokens * train_flops_per_token(config.model, config.lora) + steps * update_flops(config.model, config.train)


def keys_per_query(args: ModelArgs) -> float:
    """Return the mean number of keys that a query sees: T / 2, or W - W^2 / 2T with a window of W of T positions."""
    seen = args.window or args.max_seq_len
    return seen * (1 - seen / (2 * args.max_seq_len))


def peak_flops(device: jax.Device) -> float | None:
    """Return the peak FLOP/s of a device, or None if it is not known (a CPU, for example)."""
    return PEAK_FLOPS.get(device.device_kind)
