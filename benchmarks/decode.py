"""Speed of generation, and the share of the memory's bandwidth that it uses: ``python benchmarks/decode.py``.

A model of random weights reads prompts and goes on, as sample.py has it do. A step reads all matrices once, however many rows it
has; what share that is of what the device can read is measured in the same run. ``--peers`` measures others in turn with it,
so that a machine that slows down slows all: Hugging Face's generate on PyTorch, in a process of its own, and llama2.c where
``--llama2c`` names its binary. Prints a JSON line a batch size, with medians.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.build import make_model
from llama_jax.cli.flags import parse_flags
from llama_jax.config import Cache, MeshArgs, ModelArgs, SampleArgs, Weights
from llama_jax.devices.compiling import use_compilation_cache
from llama_jax.devices.sharding import make_mesh, parameter_shardings
from llama_jax.errors import UserError, quoted, run_command
from llama_jax.generation.decode import CHUNK, Row, generate_chunks
from llama_jax.generation.passes import slot_bytes
from llama_jax.generation.serving import for_generation
from llama_jax.generation.stats import step_bytes
from llama_jax.model import Llama
from llama_jax.ops.cache import CACHE_DTYPES
from llama_jax.ops.parameters import is_vector
from llama_jax.seeds import random_key
from llama_jax.train_args import DType

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from peers import PAUSE, ratio, worker

# What is read to measure the bandwidth: rows of so many float32 values, 64 KiB; so often in a row; so many times.
READ_COLUMNS, READ_CALLS, READ_REPEATS = 16384, 4, 3


@dataclass(frozen=True)
class Arguments:
    """Shapes and repetitions; the defaults are the 110M model."""

    batches: tuple[int, ...] = (1, 8, 32)
    """Numbers of rows."""
    weights: Weights = "auto"
    """Matrices, as of sample.py."""
    cache: Cache = "auto"
    """Keys and values, as of sample.py."""
    compute_dtype: DType = "auto"
    """Type of activations and matmuls, as of sample.py. Hugging Face's model computes in the same."""
    prompt_tokens: int = 128
    """Tokens of a prompt."""
    new_tokens: int = 128
    """Tokens that are made of each."""
    repeats: int = 3
    """Measurements, of which medians are taken."""
    read_megabytes: int = 512
    """MiB that are read to measure the bandwidth; more than the caches hold."""
    peers: bool = False
    """Whether Hugging Face's generate is measured too, and llama2.c."""
    llama2c: str = ""
    """With --peers: the built program, run, of llama2.c. It has one row, without a prompt, in float32."""
    llama2c_tokenizer: str = ""
    """The tokenizer.bin of llama2.c."""
    model: ModelArgs = ModelArgs(vocab_size=32000)


class Speed(NamedTuple):
    """Seconds of one measurement."""

    first: float  # to the first token
    step: float  # of a token of every row, behind the first ones


class Reader(NamedTuple):
    """A way to read memory, or to copy it."""

    run: Callable[[], Any]  # it may return before it is done
    bytes: int  # that are read and written


class Rate(NamedTuple):
    """Bytes a second that are read from memory and written to it, and how."""

    value: float
    kind: str


def main() -> None:
    """Measure and print."""
    args = parse_flags(Arguments, sys.argv[1:], Arguments(), "python benchmarks/decode.py", __doc__ or "")
    _check(args)
    use_compilation_cache()
    module = make_model(args.model, args.compute_dtype)
    params = random_parameters(module, args.weights)
    readers = memory_readers(jax.devices()[0].platform, args.read_megabytes)
    with contextlib.ExitStack() as stack:
        huggingface = stack.enter_context(_huggingface(args, str(module.dtype))) if args.peers else None
        llama2c = stack.enter_context(llama2c_runner(args)) if args.llama2c else None
        for batch in args.batches:
            theirs: list[Speed] = []
            tokens_per_second: list[float] = []

            def peers(repeat: int, batch: int = batch, theirs: Any = theirs, rates: Any = tokens_per_second) -> None:
                if huggingface is not None:
                    time.sleep(PAUSE)
                    huggingface.send(batch)
                    theirs += [_certain(huggingface.recv())][: repeat + 1]
                if llama2c is not None and batch == 1:
                    time.sleep(PAUSE)
                    rates += [llama2c()][: repeat + 1]

            ours, result = measure(args, module, params, readers, batch, peers)
            if theirs:
                result["huggingface"] = _huggingface_result(args, batch, ours, theirs)
            if tokens_per_second:
                pairs = zip(ours, tokens_per_second, strict=True)
                ratios = [1 / (speed.step * rate_of_theirs) for speed, rate_of_theirs in pairs]
                result["llama2.c"] = {
                    "decode_tokens_per_second": round(statistics.median(tokens_per_second), 1),
                    **ratio("decode_ratio", ratios),
                }
            print(json.dumps(result), flush=True)


def measure(
    args: Arguments,
    module: Llama,
    params: Any,
    readers: dict[str, "Reader"],
    batch: int,
    peers: Callable[[int], None] = lambda repeat: None,
) -> tuple[list[Speed], dict[str, Any]]:
    """Return the speeds of all repeats with so many rows, and the result; ``peers`` is called after each repeat."""
    ours: list[Speed] = []
    rates: list[Rate] = []
    for repeat in range(-1, args.repeats):
        time.sleep(PAUSE)
        speed = generate(module, params, args, batch)
        rates += measure_bandwidth(readers)
        if repeat >= 0:  # the first compiles
            ours.append(_certain(speed))
        peers(repeat)
    return ours, _result(args, module, params, batch, ours, rates)


def _certain(speed: Speed) -> Speed:
    if speed.step <= 0:
        raise UserError(
            "--new-tokens: expected steps that take longer than the first token's time varies, found shorter ones; give more, or a larger model"
        )
    return speed


def _check(args: Arguments) -> None:
    args.model.check()
    if args.model.vocab_size < 4:
        raise UserError(f"--model.vocab-size: expected 4 or more, found {args.model.vocab_size}")
    if not args.batches or min(args.batches) < 1:
        raise UserError(f"--batches: expected numbers of rows from 1 on, found {quoted(args.batches)}")
    if min(args.repeats, args.prompt_tokens, args.read_megabytes) < 1:
        raise UserError("--repeats, --prompt-tokens and --read-megabytes: expected 1 or more, found less")
    if args.new_tokens < 2 * CHUNK or args.new_tokens % CHUNK:
        raise UserError(f"--new-tokens: expected a multiple of {CHUNK}, from {2 * CHUNK} on, found {args.new_tokens}")
    context, needed = args.model.max_seq_len, args.prompt_tokens + args.new_tokens
    if needed > context:
        raise UserError(f"--model.max-seq-len: expected {needed} or more, prompt and new tokens, found {context}")
    if args.llama2c and not args.peers:
        raise UserError("--llama2c: expected --peers beside it, found none")
    for name in ("llama2c", "llama2c_tokenizer"):
        if args.llama2c and not Path(getattr(args, name)).is_file():
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: expected a file, found none at {getattr(args, name)!r}; build llama2.c first")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if args.peers and missing:
        raise UserError(f"--peers: expected torch and transformers, found no {missing[0]}; pip install -e '.[test]'")


def random_parameters(module: Llama, weights: Weights) -> Any:
    """Parameters in the form for generation (serving.py), on one device."""

    def make(key: jax.Array) -> Any:
        params = nn.unbox(module.init(key, jnp.zeros((1, 1), jnp.int32)))["params"]
        return jax.tree_util.tree_map_with_path(
            lambda path, w: w if is_vector(path) else w.astype(module.dtype), params
        )

    mesh = make_mesh(MeshArgs(data=1), jax.devices()[:1])
    shardings = parameter_shardings(module, mesh)
    return for_generation(jax.jit(make, out_shardings=shardings)(random_key(0)), weights)


def prompts(args: Arguments, batch: int) -> np.ndarray:
    """Random token ids, int32 [batch, prompt_tokens], none of them special."""
    shape = batch, args.prompt_tokens
    return np.random.default_rng(0).integers(3, args.model.vocab_size, shape, np.int32)


def generate(module: Llama, params: Any, args: Arguments, batch: int) -> Speed:
    """Read prompts and make tokens, the likeliest ones: first a single one, then, from the start again, all."""
    rows: list[Row] = [(ids.tolist(), SampleArgs(temperature=0.0), 0) for ids in prompts(args, batch)]

    def seconds(new_tokens: int, steps: int) -> float:
        began = time.perf_counter()
        for _ in generate_chunks(module, params, rows, new_tokens, steps, CACHE_DTYPES[args.cache]):
            pass
        return time.perf_counter() - began

    # Not from chunk to chunk: while one is looked at, the next is on its way, or done.
    first = seconds(1, 1)
    return Speed(first, (seconds(args.new_tokens, CHUNK) - first) / (args.new_tokens - 1))


def _result(
    args: Arguments, module: Llama, params: Any, batch: int, ours: list[Speed], rates: list[Rate]
) -> dict[str, Any]:
    rate = max(rates)
    first = statistics.median(speed.first for speed in ours)
    step = statistics.median(speed.step for speed in ours)
    read = step_bytes(params, cached_bytes(args, module, batch))
    device = jax.devices()[0]
    return {
        "benchmark": "decode",
        "device": device.device_kind,
        "threads": os.cpu_count(),
        "jax": importlib.metadata.version("jax"),
        "batch": batch,
        "weights": args.weights,
        "cache": args.cache,
        "compute_dtype": str(module.dtype),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        # With the first token comes the step that it is fed in.
        "prefill_tokens_per_second": round(batch * args.prompt_tokens / max(first - step, 1e-9), 1),
        "first_token_seconds": round(first, 4),
        "decode_tokens_per_second": round(batch / step, 1),
        "bytes_read_a_step": read,
        "bandwidth_used": round(read / step),
        "bandwidth_measured": round(rate.value),
        "bandwidth_measured_by": rate.kind,
        "bandwidth_by_way": {
            way: round(max(r.value for r in rates if r.kind == way)) for way in {r.kind: 0 for r in rates}
        },
        "bandwidth_ratio": round(read / step / rate.value, 3),
        "repeats": args.repeats,
        "model": asdict(args.model),
    }


def cached_bytes(args: Arguments, module: Llama, batch: int) -> int:
    """Bytes of the cache that hold tokens, in the middle of the measured steps."""
    return batch * mean_filled(args) * slot_bytes(module, CACHE_DTYPES[args.cache])


def mean_filled(args: Arguments) -> int:
    """Tokens of a row that the cache holds in the middle of the measured steps."""
    return args.prompt_tokens + args.new_tokens // 2


def memory_readers(platform: str, megabytes: int) -> dict[str, Reader]:
    """Ways to read so many MiB of float32 values, by what they do. A copy reads and writes them."""
    rows = megabytes * (1 << 20) // (4 * READ_COLUMNS)
    matrix = jax.block_until_ready(jnp.ones((rows, READ_COLUMNS), jnp.float32))
    row, column = jnp.ones((1, rows), jnp.float32), jnp.ones((READ_COLUMNS, 1), jnp.float32)
    total, sums, product = jax.jit(jnp.sum), jax.jit(functools.partial(jnp.sum, axis=1)), jax.jit(jnp.matmul)
    copy = jax.jit(jnp.negative)  # a plain copy might be none
    size = 4 * rows * READ_COLUMNS
    readers = {
        "sum": Reader(lambda: total(matrix), size),
        "sums of rows": Reader(lambda: sums(matrix), size),
        "row by matrix": Reader(lambda: product(row, matrix), size),
        "matrix by column": Reader(lambda: product(matrix, column), size),
        "copy": Reader(lambda: copy(matrix), 2 * size),
    }
    if platform == "cpu":
        threads = os.cpu_count() or 1
        pool, parts = ThreadPoolExecutor(threads), np.array_split(np.asarray(matrix), threads)
        readers["a maximum a thread"] = Reader(lambda: list(pool.map(np.max, parts)), size)
    return readers


def measure_bandwidth(readers: dict[str, Reader]) -> list[Rate]:
    """How fast memory is read and copied, several times in each way."""
    rates = []
    for kind, reader in readers.items():
        jax.block_until_ready(reader.run())
        for _ in range(READ_REPEATS):
            began = time.perf_counter()
            # One after the other, so that what a call costs is hidden behind the one before.
            jax.block_until_ready([reader.run() for _ in range(READ_CALLS)])
            rates.append(Rate(READ_CALLS * reader.bytes / (time.perf_counter() - began), kind))
    return rates


@contextlib.contextmanager
def _huggingface(args: Arguments, dtype: str) -> Iterator[Connection]:
    """A process that is sent a number of rows, has Hugging Face's generate make tokens of them, and answers with the Speed."""
    with worker(_serve, args, dtype) as connection:
        try:
            connection.recv()  # it is ready
            yield connection
        except EOFError:
            raise UserError(
                "--peers: expected an answer of Hugging Face's generate, found that it failed; see above"
            ) from None


def _serve(args: Arguments, dtype: str, connection: Connection) -> None:
    run = huggingface_runner(args, dtype)
    connection.send(None)
    while True:
        connection.send(run(connection.recv()))


def huggingface_runner(args: Arguments, dtype: str) -> Callable[[int], Speed]:
    """The same with Hugging Face's LLaMA on PyTorch, with random weights too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = args.model
    config = LlamaConfig(
        hidden_size=shape.dim, num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab_size, intermediate_size=shape.hidden_width,
        rms_norm_eps=shape.norm_eps, max_position_embeddings=shape.max_seq_len, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model: Any = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None  # rows go on to the end

    def seconds(ids: torch.Tensor, new_tokens: int) -> float:
        began = time.perf_counter()
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0
        )  # fmt: skip
        assert made.tolist() and made.shape[1] == ids.shape[1] + new_tokens
        return time.perf_counter() - began

    def run(batch: int) -> Speed:
        ids = torch.from_numpy(prompts(args, batch)).long().to(device)
        first = seconds(ids, 1)
        return Speed(first, (seconds(ids, args.new_tokens) - first) / (args.new_tokens - 1))

    return run


def _huggingface_result(args: Arguments, batch: int, ours: list[Speed], theirs: list[Speed]) -> dict[str, Any]:
    first = statistics.median(speed.first for speed in theirs)
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "prefill_tokens_per_second": round(batch * args.prompt_tokens / first, 1),
        "first_token_seconds": round(first, 4),
        "decode_tokens_per_second": round(batch / statistics.median(speed.step for speed in theirs), 1),
        **ratio("first_token_ratio", [their.first / our.first for our, their in pairs]),
        **ratio("decode_ratio", [their.step / our.step for our, their in pairs]),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
    }


@contextlib.contextmanager
def llama2c_runner(args: Arguments) -> Iterator[Callable[[], float]]:
    """A function that has llama2.c make tokens of a model of the same shape, and returns how many a second."""
    # It has no prompt: with so many steps its cache holds on average as many tokens as ours.
    steps = min(2 * mean_filled(args), args.model.max_seq_len)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.bin"
        write_llama2c(path, args.model)
        flags = ["-z", args.llama2c_tokenizer, "-t", "0", "-n", str(steps), "-i", ""]
        command = [os.path.abspath(args.llama2c), str(path), *flags]

        def run() -> float:
            environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
            told = re.search(r"achieved tok/s: ([\d.]+)", done.stderr)
            if done.returncode or told is None:
                found = quoted(done.stderr.strip())
                raise UserError(f"{args.llama2c}: expected 'achieved tok/s', found status {done.returncode}, {found}")
            return float(told[1])

        yield run


def write_llama2c(path: Path, args: ModelArgs) -> None:
    """A model of random weights in llama2.c's first format: seven int32, then float32 values, matrices [outputs, inputs]."""
    rng = np.random.default_rng(0)
    L, D, F, V = args.n_layers, args.dim, args.hidden_width, args.vocab_size
    queries, keys = args.n_heads * args.head_width, args.kv_heads * args.head_width
    with path.open("wb") as file:
        # A negative vocabulary: the output is not the embeddings.
        header = [D, F, L, args.n_heads, args.kv_heads, -V, args.max_seq_len]
        file.write(np.array(header, np.int32).tobytes())

        def write(layers: int, outputs: int, inputs: int) -> None:
            for _ in range(layers):
                file.write((rng.standard_normal((outputs, inputs), np.float32) * inputs**-0.5).tobytes())

        def write_same(value: float, *shape: int) -> None:
            file.write(np.full(shape, value, np.float32).tobytes())

        write(1, V, D)
        write_same(1, L, D)
        for outputs, inputs in ((queries, D), (keys, D), (keys, D), (D, queries)):
            write(L, outputs, inputs)
        write_same(1, L, D)
        for outputs, inputs in ((F, D), (D, F), (F, D)):
            write(L, outputs, inputs)
        write_same(1, D)
        write_same(0, args.max_seq_len, args.head_width)  # two tables that it does not read
        write_same(0, 3, D)  # special tokens, of which BOS would end the text, are never the likeliest
        write(1, V - 3, D)


if __name__ == "__main__":
    run_command(main)
