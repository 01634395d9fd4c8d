"""Tokens per second of the training step against the same LLaMA in PyTorch: ``python benchmarks/train_step.py``.

All take the same shapes, clip, and update float32 parameters with AdamW; each in a process of its own, as its users would run
it. They run in turn, so that a machine that slows down slows all; the peer is the faster of those that are asked for. Prints
one JSON line with the medians and the median of the pairs' ratios; on a known accelerator also the model FLOPs utilisation.
With ``--lora.rank`` it is the step of low-rank adapters, and the peer is Hugging Face's PEFT.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.build import make_model
from llama_jax.cli.flags import parse_flags
from llama_jax.config import MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import Batch, with_documents
from llama_jax.devices.absent_tpu import skip_absent_tpu
from llama_jax.devices.chips import PEAK_FLOPS
from llama_jax.devices.memory import keep_freed_memory, memory_in_use, return_freed_memory
from llama_jax.devices.sharding import batch_sharding, make_mesh
from llama_jax.errors import UserError, run_command
from llama_jax.lora_args import LoraArgs
from llama_jax.model import Llama
from llama_jax.seeds import random_key
from llama_jax.train_args import AttentionKernel, DType, Optimizer, Products, Remat
from llama_jax.training import eight_bits
from llama_jax.training.adapting import Adapting
from llama_jax.training.flops import peak_flops, train_flops_per_token
from llama_jax.training.step import compile_train_step, init_state, make_optimizer

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from peers import PAUSE, ratio, worker

Peer = Literal["torch_eager", "torch_compiled"]
BOS = 1  # what a document begins with


@dataclass(frozen=True)
class Arguments:
    """Shapes and repetitions; the defaults are the 15M stories model."""

    batch_size: int = 16
    """Sequences a step."""
    compute_dtype: DType = "auto"
    """Type of activations and matmuls, as of train.py. PyTorch computes in the same, by autocast."""
    products: Products = "float"
    """Our products with the layers' matrices, as of train.py. PyTorch's are of compute_dtype."""
    remat: Remat = "none"
    """What our backward pass computes again, as of train.py. PyTorch keeps all."""
    attention: AttentionKernel = "auto"
    """Our attention, as of train.py. PyTorch has its own fused one."""
    peers: tuple[Peer, ...] = ("torch_eager", "torch_compiled")
    """Whom to measure beside us."""
    optimizer: Optimizer = "adamw"
    """Our optimizer, as of train.py. PyTorch's is AdamW."""
    pairs: int = 7
    """Pairs of runs that are measured."""
    steps: int = 2
    """Steps in a run."""
    document_tokens: int = 0
    """Tokens of each document, with --peers None: attention stays inside them. 0: one text, without a document mask."""
    lora: LoraArgs = LoraArgs()
    model: ModelArgs = ModelArgs(dim=288, n_layers=6, n_heads=6, vocab_size=32000, multiple_of=32, max_seq_len=256)


class Runner(NamedTuple):
    """Something that takes steps."""

    run: Callable[[int], None]  # so many, to their end
    memory: Callable[[], int | None]  # the most bytes that were in use
    facts: dict[str, Any]


def main() -> None:
    """Measure and print."""
    args = parse_flags(Arguments, sys.argv[1:], Arguments(), "python benchmarks/train_step.py", __doc__ or "")
    check(args)
    seconds: dict[str, list[float]] = {name: [] for name in ("jax", *args.peers)}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(worker(_serve, name, args)) for name in seconds}
        facts = {name: connection.recv() for name, connection in workers.items()}
        memory: dict[str, int | None] = {}
        for pair in range(-1, args.pairs):
            for name, connection in workers.items():
                time.sleep(PAUSE)
                connection.send(args.steps)
                taken, memory[name] = connection.recv()
                if pair >= 0:  # the first warms up
                    seconds[name].append(taken)
    print(json.dumps(result_of(args, seconds, memory, facts["jax"])))


def alone(name: str, args: Arguments) -> dict[str, Any]:
    """Measure one of RUNNERS in this process, without the others: the same result, and the seconds of a step."""
    args = replace(args, peers=())
    check(args)
    runner = RUNNERS[name](args, tokens_of(args))
    seconds: list[float] = []
    for pair in range(-1, args.pairs):
        began = time.perf_counter()
        runner.run(args.steps)
        seconds += [time.perf_counter() - began][: pair + 1]  # the first warms up
    result = result_of(args, {name: seconds}, {name: runner.memory()}, runner.facts)
    return result | {"step_seconds": round(statistics.median(seconds) / args.steps, 5)}


def check(args: Arguments) -> None:
    """Raise UserError on shapes and repetitions that cannot be measured."""
    args.model.check()
    if min(args.batch_size, args.pairs, args.steps) < 1:
        raise UserError("--batch-size, --pairs and --steps: expected 1 or more, found less")
    args.lora.check()
    if args.lora.base_weights != "auto" and args.peers:
        raise UserError(
            "--peers: expected none beside --lora.base-weights, which they lack, found some; give --peers None"
        )
    if args.document_tokens < 0 or (args.document_tokens and args.peers):
        raise UserError(
            "--document-tokens: expected 0, or 1 or more without peers, who lack the mask, found else; give --peers None"
        )
    least = BOS + 2 if args.document_tokens else 1
    if args.model.vocab_size < least:
        raise UserError(f"--model.vocab-size: expected {least} or more, found {args.model.vocab_size}")
    if args.products != "float" and args.lora.rank:
        raise UserError(f"--products: expected float beside --lora.rank, found {args.products}; leave it out")
    if args.optimizer == "muon" and args.lora.rank:
        raise UserError("--optimizer: expected adamw or adafactor beside --lora.rank, found muon")


def result_of(
    args: Arguments, seconds: dict[str, list[float]], memory: dict[str, int | None], facts: dict[str, Any]
) -> dict[str, Any]:
    """Return what is printed: seconds of each run and bytes of memory by name, and what a runner says of itself."""
    total = args.steps * args.batch_size * args.model.max_seq_len
    rate = {name: total / statistics.median(times) for name, times in seconds.items()}
    result: dict[str, Any] = {"benchmark": "train_step", "tokens_per_second": {k: round(v) for k, v in rate.items()}}
    facts = dict(facts)
    peak = facts.pop("peak_flops")
    if peak is not None:
        flops = train_flops_per_token(args.model, args.lora)
        result["mfu"] = {name: round(value * flops / peak, 3) for name, value in rate.items()}
    if args.peers:
        peer = max(args.peers, key=lambda name: rate[name])
        ratios = [theirs / ours for ours, theirs in zip(seconds["jax"], seconds[peer], strict=True)]
        result |= {"peer": peer, **ratio("ratio", ratios)}
    asked = {k: v for k, v in asdict(args).items() if k not in ("attention", "compute_dtype", "peers")}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch") if importlib.util.find_spec(name)}
    return result | {"memory_bytes": memory, **facts, **asked, "threads": os.cpu_count(), **versions}


def _serve(name: str, args: Arguments, connection: Connection) -> None:
    """Take steps when their number is sent, and answer with the seconds that they took, and the memory."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # on a GPU, which the peers need too
    runner = RUNNERS[name](args, tokens_of(args))
    connection.send(runner.facts)
    while True:
        steps = connection.recv()
        began = time.perf_counter()
        runner.run(steps)
        connection.send((time.perf_counter() - began, runner.memory()))


def tokens_of(args: Arguments) -> np.ndarray:
    """Random token ids, int32 [batch_size, positions + 1]; with documents, a BOS begins each."""
    shape = args.batch_size, args.model.max_seq_len + 1
    tokens = np.random.default_rng(0).integers(
        BOS + 1 if args.document_tokens else 0, args.model.vocab_size, shape, np.int32
    )
    if args.document_tokens:
        tokens[:, :: args.document_tokens] = BOS
    return tokens


def jax_runner(args: Arguments, tokens: np.ndarray) -> Runner:
    """Set up as train.py does."""
    skip_absent_tpu("measuring")
    keep_freed_memory()
    train = TrainArgs(batch_size=len(tokens), optimizer=args.optimizer, products=args.products)
    mesh = make_mesh(MeshArgs(data=1), jax.devices()[:1])
    eight_bits.check_units(args.products, mesh.devices.flat[0])
    masked = bool(args.document_tokens)
    module = make_model(args.model, args.compute_dtype, args.remat, args.attention, mesh, document_mask=masked)
    adapting = Adapting(args.lora, args.lora.base_weights) if args.lora.rank else None
    module = module if adapting is None else adapting.suited(module)
    optimizer = make_optimizer(train, 1000)
    read = Batch(tokens[:, :-1], tokens[:, 1:], np.ones(tokens[:, 1:].shape, np.float32))
    batch = jax.device_put(with_documents(read, BOS) if masked else read, batch_sharding(mesh))
    began = time.perf_counter()
    step = compile_train_step(module, optimizer, mesh, 1, batch, adapting, eight=eight_bits.asked(train))
    compiled_in = time.perf_counter() - began
    planned = step.memory_analysis()
    state = init_state(module, optimizer, mesh, 0, None, adapting)
    frozen = () if adapting is None else (random_base(module, mesh, adapting),)
    device = mesh.devices.flat[0]
    return_freed_memory()

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch, *frozen)
        jax.block_until_ready(metrics)

    return Runner(
        run,
        lambda: memory_in_use([device]),
        {
            "device": device.device_kind,
            "peak_flops": peak_flops(device),
            "compute_dtype": module.dtype.name,
            "attention": module.kernel,
            "compile_seconds": round(compiled_in, 1),
            # Without what making the first values took.
            "memory_by_compiler": planned and planned.argument_size_in_bytes + planned.temp_size_in_bytes,
        },
    )


def random_base(module: Llama, mesh: jax.sharding.Mesh, adapting: Adapting) -> Any:
    """Return a frozen base of random values, made on the device, a layer at a time."""

    def values(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.randint(key, shape, -7, 8, jnp.int8).astype(dtype)
        return (0.02 * jax.random.normal(key, shape)).astype(dtype)

    def make(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        first, *rest = like.shape
        if len(rest) < 2:
            return values(key, like.shape, like.dtype)
        return jax.lax.map(lambda key: values(key, tuple(rest), like.dtype), jax.random.split(key, first))

    likes, structure = jax.tree.flatten(adapting.base_shapes(module, mesh))
    keys = jax.random.split(random_key(0), len(likes))
    made = [
        jax.jit(make, static_argnums=1, out_shardings=like.sharding)(key, like)
        for key, like in zip(keys, likes, strict=True)
    ]
    return jax.tree.unflatten(structure, made)


def torch_runner(args: Arguments, tokens: np.ndarray, compiled: bool) -> Runner:
    """The same in PyTorch."""
    import torch
    from torch_llama import TorchLlama

    train, cuda = TrainArgs(), torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    bfloat16 = args.compute_dtype == "bfloat16" or (args.compute_dtype == "auto" and cuda)
    torch.manual_seed(0)
    if cuda:
        torch.set_float32_matmul_precision("high")  # as XLA's products of float32 there
    with device:
        if args.lora.rank:
            from peft_llama import PeftLlama

            model: torch.nn.Module = PeftLlama(args.model, args.lora)
        else:
            model = TorchLlama(args.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)
    forward = torch.compile(model) if compiled else model
    ids = torch.from_numpy(tokens).long().to(device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def run(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss = forward(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, train.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        loss.item()

    def memory() -> int:
        return torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    kind = torch.cuda.get_device_name() if cuda else "cpu"
    return Runner(
        run,
        memory,
        {"device": kind, "peak_flops": PEAK_FLOPS.get(kind), "compute_dtype": "bfloat16" if bfloat16 else "float32"},
    )


RUNNERS: dict[str, Callable[[Arguments, np.ndarray], Runner]] = {
    "jax": jax_runner,
    "torch_eager": functools.partial(torch_runner, compiled=False),
    "torch_compiled": functools.partial(torch_runner, compiled=True),
}

if __name__ == "__main__":
    run_command(main)
