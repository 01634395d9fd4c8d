"""Tokens per second of loading alone: ``python benchmarks/loading.py``.

The batches of a run are read and dropped, as fast as they come: from a set in one file, from one of 10 GB in 1,000 shards
(files with holes, so that the disk holds none of it), and from a bucket in memory that takes a while for each answer, with
an empty and then with a full cache. Files are in the page cache, as those of a warm run are. Prints one JSON line for each
with the seconds to open it, the memory that it took, and how often it has the rate that a training step needs.
"""

import json
import os
import resource
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem

from llama_jax.cli.flags import parse_flags
from llama_jax.data import open_tokens
from llama_jax.data.batches import train_batches
from llama_jax.data.manifest import DOCUMENTS, SUMS, TOKENIZER, VERSION, Manifest, sha256, write_manifest
from llama_jax.data.stream import BLOCK_BYTES, checksums
from llama_jax.data.tokens import shard_names
from llama_jax.errors import run_command

VOCABULARY = 32_000


@dataclass(frozen=True)
class Arguments:
    """Sizes, and the rate to compare with."""

    batch_size: int = 16
    """Sequences a step."""
    length: int = 256
    """Tokens of a sequence."""
    seconds: float = 5.0
    """Seconds to read for, in each case."""
    megabytes: int = 200
    """Size of the set in one file, and of that in the bucket."""
    gigabytes: float = 10.0
    """Size of the set in shards."""
    shards: int = 1000
    """Number of its shards."""
    latency: float = 0.05
    """Seconds that the bucket takes for an answer."""
    step_rate: float = 2500.0
    """Tokens that the training step takes a second: those of the 15M stories model on two CPU cores."""


class Far(MemoryFileSystem):
    """A bucket in memory, far away."""

    protocol = "far"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    latency = 0.0

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("far://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """Return bytes of a file, after a while."""
        time.sleep(self.latency)
        return bytes(super().cat_file(path, start, end, **options))


def make_set(folder: Path, counts: list[int], sparse: bool) -> None:
    """Write prepared tokens of shards with so many tokens each: random ones, or zeros as holes."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    sums: list[int] = []
    for name, count in zip(shard_names("train", len(counts)), counts, strict=True):
        path = folder / name
        if sparse:
            path.touch()
            os.truncate(path, 2 * count)
            whole, rest = divmod(2 * count, BLOCK_BYTES)
            sums += [zlib.crc32(bytes(BLOCK_BYTES))] * whole + [zlib.crc32(bytes(rest))] * bool(rest)
        else:
            raw = random.integers(0, VOCABULARY, count).astype("<u2").tobytes()
            path.write_bytes(raw)
            sums += checksums(raw)
    for name, content in (("eval.bin", b""), (DOCUMENTS, b""), (TOKENIZER, b"a model"), (SUMS, np.array(sums, "<u4").tobytes())):  # fmt: skip
        (folder / name).write_bytes(content)
    none = {"train": 0, "eval": 0}
    write_manifest(folder, Manifest(
        version=VERSION, text_sha256=sha256(b""), train_size=1.0, separator="", tokenizer_sha256=sha256(b"a model"),
        trained_vocab_size=0, dtype="<u2", tokens={"train": sum(counts), "eval": 0}, text_bytes=none, documents=none,
        replaced_sequences=0, vocab_size=VOCABULARY, block_bytes=BLOCK_BYTES, made_by="benchmarks/loading.py",
        sha256={name: sha256((folder / name).read_bytes()) for name in (SUMS, DOCUMENTS)},
        shards={"train": counts if len(counts) > 1 else [], "eval": []},
    ))  # fmt: skip


def measure(name: str, address: str, args: Arguments, seed: int = 0) -> None:
    """Open a set, read batches of it for a while, and print the rates."""
    before, began = _memory(), time.perf_counter()
    tokens = open_tokens(address)
    opened = time.perf_counter() - began
    batches = train_batches(tokens.train, args.batch_size, args.length, seed, 0, 10**9)
    began, steps, first = time.perf_counter(), 0, 0.0
    while time.perf_counter() - began < args.seconds:
        next(batches)
        steps += 1
        first = first or time.perf_counter() - began
    rate = steps * args.batch_size * args.length / (time.perf_counter() - began)
    found = {
        "set": name, "tokens": tokens.train.size, "opened_seconds": round(opened, 3), "first_batch_seconds": round(first, 3),
        "tokens_per_second": round(rate), "times_the_step": round(rate / args.step_rate, 1), "memory_mb": round(_memory() - before),
    }  # fmt: skip
    print(json.dumps(found), flush=True)


def _memory() -> float:
    """Return the memory that the process has, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    """Measure all sets."""
    args = parse_flags(
        Arguments, sys.argv[1:], Arguments(), "benchmarks/loading.py", "Tokens per second of loading alone"
    )
    print(json.dumps({"cores": os.cpu_count()} | asdict(args)))
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        tokens = int(args.megabytes * 1e6 / 2)
        shard = int(args.gigabytes * 1e9 / 2 / args.shards)
        make_set(Path(place, "sharded"), [shard] * args.shards, sparse=True)
        measure(f"{args.shards:,} shards", f"{place}/sharded", args)
        make_set(Path(place, "one"), [tokens], sparse=False)
        measure("one file", f"{place}/one", args)
        fsspec.register_implementation("far", Far, clobber=True)
        make_set(Path(place, "uploaded"), [tokens // 10] * 10, sparse=False)
        for path in Path(place, "uploaded").iterdir():
            fsspec.filesystem("far").pipe(f"/bucket/tokens/{path.name}", path.read_bytes())
        Far.latency = args.latency
        measure("bucket, empty cache", "far://bucket/tokens", args)
        np.asarray(open_tokens("far://bucket/tokens").train)
        measure("bucket, full cache", "far://bucket/tokens", args, seed=1)


if __name__ == "__main__":
    run_command(main)
