"""Tokens per second of the training step against the same LLaMA in PyTorch: ``python benchmarks/train_step.py``.

Both take the same shapes in float32, clip, and update with AdamW. They run in turn, a pair at a time, so that a machine
that slows down slows both; PyTorch is the better of eager and compiled. Prints one JSON line with the medians and the
median of the pairs' ratios.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import torch

from llama_jax.config import MeshArgs, ModelArgs, TrainArgs, parse_flags
from llama_jax.data.batches import Batch
from llama_jax.errors import run_command
from llama_jax.runtime import keep_freed_memory, make_model
from llama_jax.sharding import batch_sharding, make_mesh
from llama_jax.training.step import compile_train_step, init_state, make_optimizer

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from torch_llama import TorchLlama


@dataclass(frozen=True)
class Arguments:
    """Shapes and repetitions; the defaults are the 15M stories model."""

    dim: int = 288
    """Width."""
    n_layers: int = 6
    """Blocks."""
    n_heads: int = 6
    """Query heads."""
    vocab_size: int = 32000
    """Vocabulary, in tokens."""
    seq_len: int = 256
    """Positions of a sequence."""
    batch_size: int = 16
    """Sequences a step."""
    pairs: int = 7
    """Pairs of runs that are measured."""
    steps: int = 2
    """Steps in a run."""


def main() -> None:
    """Measure and print."""
    keep_freed_memory()
    args = parse_flags(Arguments, sys.argv[1:], Arguments(), "python benchmarks/train_step.py", __doc__ or "")
    model = ModelArgs(
        dim=args.dim, n_layers=args.n_layers, n_heads=args.n_heads, vocab_size=args.vocab_size,
        multiple_of=32, max_seq_len=args.seq_len,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, (args.batch_size, args.seq_len + 1), np.int32)
    runners = {
        "jax": jax_runner(model, tokens),
        "torch_eager": torch_runner(model, tokens, compiled=False),
        "torch_compiled": torch_runner(model, tokens, compiled=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for pair in range(-1, args.pairs):
        for name, run in runners.items():
            began = time.perf_counter()
            run(args.steps)
            if pair >= 0:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    total = args.steps * args.batch_size * args.seq_len
    rate = {name: total / statistics.median(times) for name, times in seconds.items()}
    peer = max(("torch_eager", "torch_compiled"), key=lambda name: rate[name])
    ratios = [theirs / ours for ours, theirs in zip(seconds["jax"], seconds[peer], strict=True)]
    result = {
        "benchmark": "train_step",
        "tokens_per_second": {name: round(value) for name, value in rate.items()},
        "peer": peer,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "shapes": vars(args),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "jax": jax.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


def jax_runner(args: ModelArgs, tokens: np.ndarray) -> Callable[[int], None]:
    """A function that takes so many steps."""
    train = TrainArgs(batch_size=len(tokens))
    module, mesh = make_model(args, "float32"), make_mesh(MeshArgs())
    optimizer = make_optimizer(train, 1000)
    batch = jax.device_put(
        Batch(tokens[:, :-1], tokens[:, 1:], np.ones(tokens[:, 1:].shape, np.float32)), batch_sharding(mesh)
    )
    step = compile_train_step(module, optimizer, mesh, 1, batch)
    state = init_state(module, optimizer, mesh, seed=0)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    return run


def torch_runner(args: ModelArgs, tokens: np.ndarray, compiled: bool) -> Callable[[int], None]:
    """The same in PyTorch."""
    train = TrainArgs()
    torch.manual_seed(0)
    model = TorchLlama(args)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)
    forward = torch.compile(model) if compiled else model
    inputs, targets = torch.from_numpy(tokens[:, :-1].copy()).long(), torch.from_numpy(tokens[:, 1:].copy()).long()

    def run(steps: int) -> None:
        for _ in range(steps):
            loss = forward(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        loss.item()

    return run


if __name__ == "__main__":
    run_command(main)
