"""Speed of turning text into tokens, beside bare SentencePiece: ``python benchmarks/encode.py --filepath TEXT``.

Both encode the same batches, in as many processes on as many cores. They run in turn, so that a machine that slows
down slows both. Ours begins each run without words (``first``) and then encodes the same text again (``again``), as if
it had seen all words of a corpus. Prints a JSON line for each kind of documents and number of processes, with medians;
ratios of CPU time, too, in which others on the machine count less.
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import sentencepiece as spm

from llama_jax.cli.flags import parse_flags
from llama_jax.data.stories import stories
from llama_jax.errors import UserError, run_command
from llama_jax.tokenizer import Tokenizer, split_text, train_tokenizer

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from peers import PAUSE, ratio, worker

KINDS = ("long", "lines")
# What python -m llama_jax.data prepare encodes at once.
BATCH_CHARS = 1 << 22
# Built-in stories that are encoded if no text is given.
STORIES = 12_000


@dataclass(frozen=True)
class Arguments:
    """What is encoded, and how often."""

    filepath: str = ""
    """A text in UTF-8. Default: built-in stories."""
    tokenizer_model_path: str = ""
    """A SentencePiece model. Default: one trained on the text's first 2 million characters."""
    vocab_size: int = 32000
    """Entries of the vocabulary that is trained."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes, a core each."""
    pairs: int = 5
    """Runs of each that are measured."""


def main() -> None:
    """Measure and print."""
    args = parse_flags(Arguments, sys.argv[1:], Arguments(), "python benchmarks/encode.py", __doc__ or "")
    if min(args.pairs, *args.processes) < 1:
        raise UserError("--pairs and --processes: expected 1 or more, found less")
    with tempfile.TemporaryDirectory() as folder:
        text, model = _inputs(args, Path(folder))
        for kind, processes in itertools.product(KINDS, args.processes):
            print(json.dumps(_measure(args, kind, processes, text, model)), flush=True)


def _inputs(args: Arguments, folder: Path) -> tuple[Path, Path]:
    """Return the paths of the text and of the tokenizer, made in ``folder`` if they are not given."""
    text = Path(args.filepath or folder / "stories.txt")
    if not args.filepath:
        text.write_text("\n".join(story.text for story in itertools.islice(stories(seed=0), STORIES)))
    if args.tokenizer_model_path:
        return text, Path(args.tokenizer_model_path)
    sample = text.read_text(encoding="utf-8")[:2_000_000]
    return text, train_tokenizer([sample], args.vocab_size, folder / "tokenizer.model").model_path


def _measure(args: Arguments, kind: str, processes: int, text: Path, model: Path) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"bare": [], "first": [], "again": []}
    cpu_seconds: dict[str, list[float]] = {run: [] for run in seconds}
    with contextlib.ExitStack() as stack:
        teams = {
            name: [stack.enter_context(worker(_serve, name, kind, text, model, i, processes)) for i in range(processes)]
            for name in ("bare", "ours")
        }
        facts = {name: [connection.recv() for connection in team] for name, team in teams.items()}
        for _ in range(args.pairs):
            for run in seconds:
                time.sleep(PAUSE)
                wall, cpu = _run(run, teams["bare" if run == "bare" else "ours"])
                seconds[run].append(wall)
                cpu_seconds[run].append(cpu)
    if facts["bare"] != facts["ours"]:
        raise AssertionError("the ids of the two differ")
    total = sum(size for size, _ in facts["ours"])
    rates = {name: round(total / statistics.median(times) / 1e6, 1) for name, times in seconds.items()}
    return {
        "benchmark": "encode",
        "documents": kind,
        "processes": processes,
        "megabytes_per_second": rates,
        **_ratios("ratio", seconds),
        **_ratios("cpu_ratio", cpu_seconds),
        "bytes": total,
        "pairs": args.pairs,
        "cores": os.cpu_count(),
        "sentencepiece": importlib.metadata.version("sentencepiece"),
    }


def _ratios(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for run in ("first", "again"):
        pairs = zip(seconds["bare"], seconds[run], strict=True)
        found |= ratio(f"{name}_{run}", [bare / ours for bare, ours in pairs])
    return found


def _run(run: str, team: list[Connection]) -> tuple[float, float]:
    """Return the seconds until all processes have encoded their batches, and the CPU seconds of all."""
    began = time.perf_counter()
    for connection in team:
        connection.send(run)
    cpu = sum(connection.recv() for connection in team)
    return time.perf_counter() - began, cpu


def _serve(name: str, kind: str, text: Path, model: Path, number: int, processes: int, connection: Connection) -> None:
    """Encode this process's batches whenever asked. First send their bytes of text and a hash of their ids."""
    with contextlib.suppress(AttributeError, OSError):  # where a process can be held to a core
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, [cores[number % len(cores)]])
    batches = list(_batches(text.read_text(encoding="utf-8"), kind))[number::processes]
    encoder = Bare(model) if name == "bare" else Ours(model)
    size = sum(len(part.encode()) for batch in batches for part in batch)
    connection.send((size, hash(tuple(encoder.ids(batches)))))
    while True:
        encoder.prepare(connection.recv())
        began = time.process_time()
        for batch in batches:
            encoder.encode(batch)
        connection.send(time.process_time() - began)


def _batches(text: str, kind: str) -> Iterator[list[str]]:
    """Yield documents in batches: lines, or texts as long as prepare makes them of a long document."""
    batch: list[str] = []
    chars = 0
    for part in text.splitlines(keepends=True) if kind == "lines" else split_text(text):
        batch.append(part.rstrip("\n") if kind == "lines" else part)
        chars += len(part)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class Bare:
    """SentencePiece, on one thread."""

    def __init__(self, model: Path):
        self._sp = spm.SentencePieceProcessor(model_file=str(model))

    def prepare(self, run: str) -> None:
        """Do nothing: it has no memory."""

    def encode(self, batch: list[str]) -> list[list[int]]:
        """Encode."""
        return self._sp.encode(batch, num_threads=1)

    def ids(self, batches: list[list[str]]) -> Iterator[int]:
        """Yield the ids of all batches."""
        return (i for batch in batches for row in self.encode(batch) for i in row)


class Ours:
    """What prepare uses."""

    def __init__(self, model: Path):
        self._model = model
        self._tokenizer = Tokenizer(model)

    def prepare(self, run: str) -> None:
        """Forget all words for a first run."""
        if run == "first":
            self._tokenizer = Tokenizer(self._model)

    def encode(self, batch: list[str]) -> Any:
        """Encode."""
        return self._tokenizer.encode_batch(batch, [True] * len(batch))

    def ids(self, batches: list[list[str]]) -> Iterator[int]:
        """Yield the ids of all batches."""
        return (i for batch in batches for i in self.encode(batch)[0].tolist())


if __name__ == "__main__":
    run_command(main)
