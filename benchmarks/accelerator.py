"""All that one accelerator is asked, in at most 12 minutes: ``python benchmarks/accelerator.py``.

The training step of a slice of the 7B shape, in bfloat16 and in the eight bits that the device multiplies, beside PyTorch's; decoding of
7B by kind of weights, a step of low-rank adapters beside a quantized base, and document masks: with random weights, made on the device. Each measurement has a process of its own, so that one
that fails is a line with its reason, and the next goes on; the most wanted come first, and what the time does not suffice for is
named. The results, a JSON file and a Markdown table beside it, are written after each; the same command goes on with what is missing.
``--toy`` rehearses all of it at toy sizes, on a CPU too.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import decode
import train_step
from accelerator_table import Entry, cells, table
from peers import worker

from llama_jax.cli.flags import parse_flags
from llama_jax.cli.progress import duration
from llama_jax.config import ModelArgs, Weights
from llama_jax.devices.chips import EIGHT_BIT_FLOPS, PEAK_FLOPS
from llama_jax.errors import UserError, quoted, run_command
from llama_jax.lora_args import LoraArgs
from llama_jax.storage.files import write_atomically
from llama_jax.train_args import Products

# Kinds of products in eight bits, of which the first is measured that the device is not known to lack.
EIGHT_BITS: tuple[Products, ...] = ("fp8", "int8")
PEERS = {"torch_compiled": "PyTorch's training step, compiled", "torch_eager": "PyTorch's training step"}
WEIGHTS: dict[Weights, str] = {"int8": "int8", "int4": "int4", "auto": "bfloat16"}
# A measurement may take so many times the seconds that are expected, and at least so many, then it is ended.
PATIENCE, LEAST_SECONDS = 3, 150
# Looking at a device takes no longer than this, unless something else holds it.
LOOK_SECONDS = 120
# Results can stand in one table if all of this is the same.
SAME = ("device", "backend", "driver", "jax", "jaxlib", "flax", "torch", "python", "cpu_cores", "commit", "toy")


@dataclass(frozen=True)
class Arguments:
    """Where results go, and how long it may take."""

    output: str = "runs/accelerator.json"
    """JSON file of the results. The table is written beside it, as .md."""
    minutes: float = 12.0
    """Minutes for all of this start. What does not fit is left out, and said."""
    toy: bool = False
    """Rehearse with toy sizes, as on a CPU. Their figures say nothing."""


@dataclass(frozen=True)
class Measurement:
    """What one process measures."""

    what: str
    """What is measured: "decoding, int8"."""
    seconds: int
    """Seconds that it may take in all, on an H100. They are guessed, until one has told."""
    args: decode.Arguments | train_step.Arguments
    rows: dict[str, tuple[str, ...]]
    """The rows of the table that it fills, each with those that it is compared with, of which the fastest counts."""
    runner: str = "jax"
    """Who takes the training steps."""
    needs_cuda: bool = True
    """Whether PyTorch counts as absent without CUDA, as everywhere but in a rehearsal."""


class Absent(Exception):
    """Something is not installed that a measurement needs, which is no failure."""


def eight_bit_kind(device: str) -> Products | None:
    """The kind of products in eight bits to measure on a device, by its device_kind. None: it has units for none."""
    known = device in PEAK_FLOPS
    return next((kind for kind in EIGHT_BITS if not known or device in EIGHT_BIT_FLOPS[kind]), None)


def measurements(toy: bool, device: str = "cpu") -> list[Measurement]:
    """All that is measured on a device of this device_kind, the most wanted first."""
    shape = ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000)
    decoding = decode.Arguments(compute_dtype="bfloat16", batches=(1, 32), model=shape)
    step = train_step.Arguments(
        batch_size=8, remat="dots", pairs=3, steps=10, peers=(), model=replace(shape, n_layers=4)
    )
    adapters = replace(
        step, batch_size=1, remat="none", steps=5, document_tokens=300, model=replace(shape, max_seq_len=2048),
        lora=LoraArgs(rank=16, base_weights="int4"), compute_dtype="bfloat16",
    )  # fmt: skip
    documents = 500
    if toy:
        small = ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=256, multiple_of=32, max_seq_len=128)
        decoding = replace(decoding, model=small, prompt_tokens=16, new_tokens=96, repeats=1, read_megabytes=1)
        step = replace(step, model=small, batch_size=2, steps=2)
        adapters = replace(adapters, model=small, steps=1, document_tokens=30)
        documents = 30

    def decoded(weights: Weights, seconds: int) -> Measurement:
        what, rows = f"decoding, {WEIGHTS[weights]}", dict[str, tuple[str, ...]]()
        for batch in decoding.batches:
            beside = row_name(f"decoding, {WEIGHTS['auto']}", batch)
            rows[row_name(what, batch)] = () if weights == "auto" else (beside,)
        return Measurement(what, seconds, replace(decoding, weights=weights), rows)

    def stepped(what: str, seconds: int, args: train_step.Arguments, *beside: str, runner: str = "jax") -> Measurement:
        return Measurement(what, seconds, args, {what: beside}, runner, needs_cuda=not toy)

    peers = {
        name: text for name, text in PEERS.items() if not (toy and name == "torch_compiled")
    }  # it takes a C++ compiler
    step, first, kind = replace(step, compute_dtype="bfloat16"), "training step, bfloat16", eight_bit_kind(device)
    eight = [stepped(f"training step, {kind}", 70, replace(step, products=kind), first)] if kind else []
    theirs, *others = (stepped(text, 80, step, runner=name) for name, text in peers.items())
    found = [
        stepped(first, 60, step, *peers.values()),
        *eight,
        decoded("auto", 80),
        decoded("int8", 90),
        decoded("int4", 100),
        theirs,
        stepped("QLoRA step of 7B, rank 16, int4", 90, adapters),
        stepped(f"{first}, document masks", 60, replace(step, document_tokens=documents), first),
        *others,
    ]
    return [replace(each, seconds=10) for each in found] if toy else found


def row_name(what: str, batch: int) -> str:
    """The row of a number of sequences."""
    return f"{what}, {batch} sequence{'s'[: batch > 1]}"


def main() -> None:
    """Measure what is missing, and write the results."""
    began = time.monotonic()
    args = parse_flags(Arguments, sys.argv[1:], Arguments(), "python benchmarks/accelerator.py", __doc__ or "")
    output = Path(args.output)
    if not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes: expected more than 0, found {args.minutes}")
    if output.suffix != ".json":
        raise UserError(f"--output: expected a name that ends in .json, found {quoted(args.output)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process that measures ends, too
    print("looking at the device ...", flush=True)
    now = conditions(args.toy)
    results = Results.open(output, now, measurements(args.toy, now["device"]))
    results.announce(args.minutes)
    measure_all(results, began + 60 * args.minutes)
    results.conclude()


def conditions(toy: bool) -> Entry:
    """What the results depend on. A process of its own looks, since one that has seen a GPU keeps a part of its memory."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # as train_step.py; the processes inherit it
    with worker(_look) as connection:
        try:
            if not connection.poll(LOOK_SECONDS):
                raise UserError(
                    f"device: expected one that answers within {LOOK_SECONDS} s, found none; end what else uses it, and start again"
                )
            device = connection.recv()
        except EOFError:
            raise UserError("device: expected one that JAX can use, found none; see above") from None
    if device["platform"] == "cpu" and not toy:
        raise UserError(
            "device: expected an accelerator, found a CPU alone; install jax for yours (docs/support.md), or rehearse with --toy"
        )
    packages = ("jax", "jaxlib", "flax", "torch")
    return {
        "toy": toy,
        **device,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _said("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        **{name: importlib.metadata.version(name) if importlib.util.find_spec(name) else None for name in packages},
    }


def _said(*command: str) -> str | None:
    """The first line that a program prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _look(connection: Connection) -> None:
    import jax

    from llama_jax.devices.absent_tpu import skip_absent_tpu
    from llama_jax.devices.memory import memory_of

    skip_absent_tpu("measuring")
    device, memory = jax.devices()[0], memory_of(jax.devices()[:1])
    connection.send({
        "platform": device.platform, "device": device.device_kind, "backend": device.client.platform_version,
        "memory_bytes": int(memory) if math.isfinite(memory) else None,
    })  # fmt: skip


@dataclass
class Results:
    """The results so far, in a file and a table."""

    path: Path
    found: Entry
    """The file's content: "conditions", and an entry with its "status" for each row."""
    wanted: list[Measurement]

    @classmethod
    def open(cls, path: Path, now: Entry, wanted: list[Measurement]) -> "Results":
        """Read the file, or write a new one, so that nothing is measured in vain where it cannot be written.

        Raises UserError if it is of other conditions, or something else.
        """
        if not path.exists():
            results = cls(path, {"benchmark": "accelerator", "conditions": now, "rows": {}}, wanted)
            results.write()
            return results
        try:
            found = json.loads(path.read_text())
            before, _ = dict(found["conditions"]), dict(found["rows"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: expected results of this script, found something else; choose another --output"
            ) from None
        for key in SAME:
            if before.get(key) != now.get(key):
                raise UserError(
                    f"{path}: expected results of {key} {now.get(key)}, found those of {before.get(key)}, which belong in another table; "
                    "choose another --output, or delete the file"
                )
        return cls(path, found, wanted)

    @property
    def beside(self) -> dict[str, tuple[str, ...]]:
        """All rows, each with those that it is compared with."""
        return {row: others for each in self.wanted for row, others in each.rows.items()}

    def missing(self, measurement: Measurement) -> list[str]:
        """The rows that are not measured yet."""
        return [row for row in measurement.rows if self.found["rows"].get(row, {}).get("status") != "measured"]

    def put(self, row: str, entry: Entry) -> None:
        """Add a row, write both files, and say so."""
        self.found["rows"][row] = entry | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.write()
        print(f"  {row}: {' '.join(filter(None, cells(entry)))}", flush=True)

    def write(self) -> None:
        """Write the results and the table."""
        write_atomically(self.path, json.dumps(self.found, indent=1) + "\n")
        write_atomically(self.path.with_suffix(".md"), table(self.found, self.beside))

    def announce(self, minutes: float) -> None:
        """Print what will be done, and how long each is expected to take."""
        about, missing = self.found["conditions"], {each.what: self.missing(each) for each in self.wanted}
        print(f"{about['device']}, jax {about['jax']}; at most {minutes:g} minutes, the most wanted first:")
        if self.found["rows"]:
            print(f"{self.path} has results of an earlier start: what was measured stays, the rest is tried again")
        for each in self.wanted:
            print(f"  {f'about {each.seconds} s' if missing[each.what] else 'measured':>12}  {each.what}")
        total = sum(each.seconds for each in self.wanted if missing[each.what])
        print(f"in all about {duration(total)}; guessed for an H100, and the first start compiles all", flush=True)

    def conclude(self) -> None:
        """Print the table, what is missing, and where the files are."""
        print("\n" + table(self.found, self.beside))
        missing = [row for each in self.wanted for row in self.missing(each)]
        if missing:
            print(f"not measured: {'; '.join(missing)}. The same command tries these again.")
        print(f"results: {self.path}   table: {self.path.with_suffix('.md')}")


Asked: TypeAlias = Callable[[Measurement, list[str], float], Iterable[tuple[str, Entry]]]


def measure_all(
    results: Results, end: float, ask: Asked | None = None, clock: Callable[[], float] = time.monotonic
) -> None:
    """Measure what is missing until ``end``, by ``clock``. What would take longer is left out, and what is shorter tried."""
    for number, each in enumerate(results.wanted, 1):
        rows, left = results.missing(each), end - clock()
        if not rows:
            continue
        if left < each.seconds:
            reason = f"about {each.seconds} s are needed, {max(0, left):.0f} s of the time were left"
            entries: Iterable[tuple[str, Entry]] = [(row, {"status": "left out", "reason": reason}) for row in rows]
        else:
            print(
                f"{number} of {len(results.wanted)}: {each.what}, about {each.seconds} s of {left:.0f} s left",
                flush=True,
            )
            entries = (ask or asked)(each, rows, min(left, max(LEAST_SECONDS, PATIENCE * each.seconds)))
        for row, entry in entries:
            results.put(row, entry)


def asked(measurement: Measurement, rows: list[str], limit: float) -> Iterator[tuple[str, Entry]]:
    """Have a process measure, and yield each row as it comes; at the latest after ``limit`` seconds those that failed."""
    end, rest = time.monotonic() + limit, list(rows)
    failure = {"status": "failed", "reason": f"ended after {limit:.0f} s, in which it was not done"}
    with worker(_serve, measurement, rows) as connection:
        while rest and connection.poll(max(0.0, end - time.monotonic())):
            try:
                row, entry = connection.recv()
            except (EOFError, OSError):
                failure["reason"] = "its process ended without a word, as one does that the system ends for its memory"
                break
            if row is None:
                failure = entry
                break
            rest.remove(row)
            yield row, entry
    yield from ((row, failure) for row in rest)


def _serve(measurement: Measurement, rows: list[str], connection: Connection) -> None:
    """Measure, and send each row; where that fails, no row and the reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the command, which ends this process
    try:
        for row, result in measured(measurement, rows):
            connection.send((row, result))
    except Absent as error:
        connection.send((None, {"status": "absent", "reason": str(error)}))
    except Exception as error:  # whatever it is, the next measurement goes on
        connection.send((None, failed(error)))


def failed(error: Exception) -> Entry:
    """The entry of a row that an error ended."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return {"status": "failed", "reason": quoted(reason, 240)[1:-1]}


def measured(measurement: Measurement, rows: list[str]) -> Iterator[tuple[str, Entry]]:
    """Measure in this process, and yield the entry of each row."""
    args = measurement.args
    if isinstance(args, train_step.Arguments):
        if measurement.runner != "jax":
            _check_torch(measurement.needs_cuda)
        yield measurement.what, {"status": "measured", **train_step.alone(measurement.runner, args)}
        return
    import jax

    from llama_jax.build import make_model
    from llama_jax.devices.absent_tpu import skip_absent_tpu
    from llama_jax.devices.compiling import use_compilation_cache

    skip_absent_tpu("measuring")
    use_compilation_cache()
    module = make_model(args.model, args.compute_dtype)
    params = decode.random_parameters(module, args.weights)
    readers = decode.memory_readers(jax.devices()[0].platform, args.read_megabytes)
    for batch in args.batches:
        if (row := row_name(measurement.what, batch)) not in rows:
            continue
        try:
            entry = {"status": "measured", **decode.measure(args, module, params, readers, batch)[1]}
        except Exception as error:  # another number of sequences may be measured with the same parameters
            entry = failed(error)
        yield row, entry


def _check_torch(needs_cuda: bool) -> None:
    if importlib.util.find_spec("torch") is None:
        raise Absent("torch is not installed")
    import torch

    if needs_cuda and not torch.cuda.is_available():
        raise Absent(f"torch {torch.__version__} finds no CUDA")


if __name__ == "__main__":
    run_command(main)
