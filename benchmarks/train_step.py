"""Tokens per second of the training step against the same LLaMA in PyTorch: ``python benchmarks/train_step.py``.

All take the same shapes in float32, clip, and update with AdamW; each in a process of its own, as its users would run it.
They run in turn, so that a machine that slows down slows all; the peer is the better of eager and compiled. Prints one JSON
line with the medians and the median of the pairs' ratios.
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import jax
import numpy as np
import torch

from llama_jax.config import MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import Batch
from llama_jax.errors import run_command
from llama_jax.flags import parse_flags
from llama_jax.runtime import keep_freed_memory, make_model
from llama_jax.sharding import batch_sharding, make_mesh
from llama_jax.training.step import compile_train_step, init_state, make_optimizer

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from peers import PAUSE, ratio, worker
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
    args = parse_flags(Arguments, sys.argv[1:], Arguments(), "python benchmarks/train_step.py", __doc__ or "")
    seconds: dict[str, list[float]] = {name: [] for name in RUNNERS}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(worker(_serve, name, args)) for name in RUNNERS}
        for pair in range(-1, args.pairs):
            for name, peer_process in workers.items():
                time.sleep(PAUSE)
                peer_process.send(args.steps)
                taken = peer_process.recv()
                if pair >= 0:  # the first warms up
                    seconds[name].append(taken)
    total = args.steps * args.batch_size * args.seq_len
    rate = {name: total / statistics.median(times) for name, times in seconds.items()}
    peer = max(("torch_eager", "torch_compiled"), key=lambda name: rate[name])
    ratios = [theirs / ours for ours, theirs in zip(seconds["jax"], seconds[peer], strict=True)]
    result = {
        "benchmark": "train_step",
        "tokens_per_second": {name: round(value) for name, value in rate.items()},
        "peer": peer,
        **ratio("ratio", ratios),
        "shapes": vars(args),
        "dtype": "float32",
        "threads": os.cpu_count(),
        "jax": importlib.metadata.version("jax"),
        "torch": importlib.metadata.version("torch"),
    }
    print(json.dumps(result))


def _serve(name: str, args: Arguments, connection: Connection) -> None:
    """Take steps when their number is sent, and answer with the seconds that they took."""
    model = ModelArgs(
        dim=args.dim, n_layers=args.n_layers, n_heads=args.n_heads, vocab_size=args.vocab_size,
        multiple_of=32, max_seq_len=args.seq_len,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, (args.batch_size, args.seq_len + 1), np.int32)
    run = RUNNERS[name](model, tokens)
    while True:
        steps = connection.recv()
        began = time.perf_counter()
        run(steps)
        connection.send(time.perf_counter() - began)


def jax_runner(args: ModelArgs, tokens: np.ndarray) -> Callable[[int], None]:
    """A function that takes so many steps, set up as train.py does."""
    keep_freed_memory()
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


RUNNERS: dict[str, Callable[[ModelArgs, np.ndarray], Callable[[int], None]]] = {
    "jax": jax_runner,
    "torch_eager": functools.partial(torch_runner, compiled=False),
    "torch_compiled": functools.partial(torch_runner, compiled=True),
}

if __name__ == "__main__":
    run_command(main)
