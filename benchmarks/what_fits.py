"""Plan every model for every slice that people rent, and write docs/what-fits.md with its picture.

python benchmarks/what_fits.py

First, plan's estimates fill all cells. Then the settings chosen for a cell are compiled by plan, in the order in which
people want them. Each compiled cell is a line of what-fits.jsonl in ``--records``, appended when it is done: a kill
loses one cell, and the same command goes on with what is missing. Each compiled cell corrects the estimates of the
others, so that what-fits-estimates.jsonl, the page and the picture are written anew at the end.

``--minutes 0`` compiles nothing and writes the page. ``--only h100 --only 13B`` compiles the cells whose names have these
words, in this order.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from what_fits_cells import (
    Answer,
    Cell,
    Known,
    Line,
    alike,
    all_cells,
    decoding_answer,
    estimates,
    is_decoding,
    near_lines,
    training_answer,
)
from what_fits_page import draw, page

import llama_jax
from llama_jax.cli.progress import duration
from llama_jax.devices.chips import GiB
from llama_jax.errors import UserError, quoted, run_command
from llama_jax.plan.gpus import PLUGINS
from llama_jax.plan.topology import Topology
from llama_jax.storage.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(llama_jax.__file__).parent
RECORDS = ROOT / "benchmarks" / "records"
# The files there: of compiled cells, and of the estimates of all cells.
COMPILED, ESTIMATES = "what-fits.jsonl", "what-fits-estimates.jsonl"
DOCS = ROOT / "docs"
# The exit statuses of plan with which it prints what it compiled.
DONE = (0, 1)
# What plan says where the machine has too little memory to compile.
TOO_LITTLE = "expected memory for the compiler"
Planner = Callable[[Cell, Answer], Line | str]


def versions(gpu: bool) -> dict[str, str]:
    """Return what decides a compiled step beside the sources: this package, JAX and the compiler."""
    names = ("jax", *(name.replace("_", "-") for name in PLUGINS)) if gpu else ("jax", "libtpu")
    found = {"llama_jax": llama_jax.__version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source() -> str:
    """Return a digest of the package's sources."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a file, none if there is no file. A last line that a kill has cut off is left out.

    Raises UserError if another line is none of this tool's.
    """
    text = path.read_text() if path.exists() else ""
    found = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            found.append(json.loads(line))
            found[-1]["cell"], found[-1]["asked"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--records: expected a cell a line, found something else in line {number} of {path}; put the line right, or delete it"
            ) from None
    return found


@contextmanager
def appending(path: Path) -> Iterator[IO[str]]:
    """Open a file of lines to append to, without what a kill has cut off. Raises UserError if another run writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--records: expected a file that nobody else writes, found {path} in use; wait for the other run, or give another folder"
            ) from None
        file.seek(0)
        text = file.read()
        if text and not text.endswith("\n"):
            print(f"{path}: the last line was cut off by a stop; its cell is compiled again", flush=True)
            file.truncate(len(text[: text.rfind("\n") + 1].encode()))
        yield file


def of_now(cells: Sequence[Cell], lines: Sequence[Line]) -> dict[str, Line]:
    """Return the last compiled line of each cell as it is declared now."""
    asked = {cell.name: cell.asked() for cell in cells}
    return {line["cell"]: line for line in lines if line["asked"] == asked.get(line["cell"])}


def check_versions(done: dict[str, Line], mix: bool) -> None:
    """Say whose versions made the lines that are there. Raises UserError if they are others and ``mix`` is off."""
    now = source()
    other: Counter[str] = Counter()
    for line in done.values():
        here = versions(Topology.parse(line["slice"]).is_gpu)
        theirs = line["versions"]
        differ = [f"{name} {theirs[name]}" for name in theirs if name in here and here[name] != theirs[name]]
        other.update([", ".join(differ)] if differ else [])
    if other:
        said = "; ".join(f"{count} with {what}" for what, count in other.items())
        if not mix:
            raise UserError(
                f"--records: expected cells that were compiled with {_text(versions(False))}, found {said}; give --mix to go on beside "
                "them, which the page will say, or another --records to begin anew"
            )
        print(f"--mix: {said} are kept, and the page says so", flush=True)
    changed = sum(line["source"] != now for line in done.values())
    if changed:
        print(
            f"{changed} of {len(done)} compiled cells are of other sources of llama_jax than these ({now}); they are kept, and the "
            "page counts them; delete their lines to compile them anew",
            flush=True,
        )


def _text(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def compile_cell(cell: Cell, answer: Answer) -> Line | str:
    """Compile a cell with the settings of an answer, in a process of its own. Return plan's JSON, or why there is none."""
    flags = [*shlex.split(cell.asked()), "--topology", cell.slice, "--json", "--output", ""]
    # For decoding plan lays out the mesh itself; the flags of the answer are those of sample.py.
    flags += [] if cell.task.weights else [*shlex.split(answer.flags), "--tokens", f"{cell.task.tokens:g}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "llama_jax.plan", *flags, "--advice", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode in DONE and done.stdout.strip():
        return dict(json.loads(done.stdout))
    return (done.stderr.strip().splitlines() or [f"plan ended with exit status {done.returncode}"])[-1]


def line_of(cell: Cell, answer: Answer, found: Line | str, expected: Answer) -> Line:
    """Return the line of a compiled cell. ``expected`` is what was expected of it before anything of it was compiled."""
    line: Line = {
        "cell": cell.name, "model": cell.model.name, "task": cell.task.name, "slice": cell.slice, "from": "compiled",
        "asked": cell.asked(), "flags": answer.flags, "room": int(cell.topology.chip.hbm_bytes),
    }  # fmt: skip
    if isinstance(found, str):
        line |= {"fits": None, "why": found, "bytes": 0, "step_seconds": None}
    else:
        line |= {
            "fits": found["fits"], "bytes": found["bytes_per_device"], "step_seconds": found["step_seconds"],
            "tokens_per_step": found["tokens_per_step"], "mesh": found["mesh"], "time": found["time"],
            "compile_seconds": round(found["compile_seconds"], 1),
        }  # fmt: skip
    line |= {
        "plain": {"bytes": answer.plain.bytes, "seconds": answer.plain.seconds},
        "expected": {"bytes": expected.expected.bytes, "seconds": expected.expected.seconds},
        "versions": versions(cell.topology.is_gpu), "source": source(),
    }  # fmt: skip
    return line


def compiled(cell: Cell, lines: Sequence[Line], compiles: int, planner: Planner) -> Line:
    """Compile a cell: the settings that are expected to be best, and where they do not fit, the next ones."""
    if cell.task.weights is not None:
        decoded = [one for one in lines if is_decoding(one) and one["fits"] is not None]
        answer = decoding_answer(cell, near_lines(decoded, cell.task.name, cell.topology))
        return line_of(cell, answer, planner(cell, answer), answer)
    known = [Known.of(one) for one in lines if one["fits"] is not None and not is_decoding(one)]
    known = alike(known, cell.task.name, cell.topology)
    first = training_answer(cell, known)
    answer, last, tried = first, None, set[str]()
    for _ in range(compiles):
        found = planner(cell, answer)
        line = line_of(cell, answer, found, first)
        if isinstance(found, str) or found["fits"]:
            return line
        smaller = last is None or not line["bytes"] or line["bytes"] < (last["bytes"] or line["bytes"] + 1)
        last, tried = line if smaller else last, tried | {answer.flags}
        known = [*known, Known.of(line)]
        answer = training_answer(cell, known)
        if answer.flags in tried:
            break
    assert last is not None
    return last


def missing_compilers(cells: Sequence[Cell]) -> dict[str, str]:
    """Return why cells cannot be compiled here, by their names."""
    why: dict[str, str] = {}
    if importlib.util.find_spec("libtpu") is None:
        why |= {cell.name: "libtpu, of the extra tpu" for cell in cells if not cell.topology.is_gpu}
    if not any(importlib.util.find_spec(name) for name in PLUGINS):
        why |= {
            cell.name: "XLA's compiler for NVIDIA GPUs, of the extra cuda" for cell in cells if cell.topology.is_gpu
        }
    return why


def said(cell: Cell, line: Line) -> str:
    """Return what is printed of a compiled cell."""
    room, verdict = f"{line['room'] / GiB:.2f} GiB", "fits" if line["fits"] else "DOES NOT FIT"
    if line["fits"] is None:
        return f"{cell.name}: not compiled: {line['why']}"
    step = f", {1e3 * line['step_seconds']:,.4g} ms" if line["step_seconds"] else ""
    return f"{cell.name}: {verdict}, {line['bytes'] / GiB:.2f} of {room}{step}, compiled in {duration(line['compile_seconds'])}"


def compile_missing(
    cells: Sequence[Cell],
    lines: list[Line],
    file: IO[str],
    minutes: float,
    compiles: int,
    planner: Planner = compile_cell,
) -> None:
    """Compile the cells that are missing, until the minutes are over, and append a line of each to the file and ``lines``."""
    done, began = {line["cell"] for line in lines}, time.monotonic()
    missing = [cell for cell in cells if cell.name not in done]
    for number, cell in enumerate(missing, 1):
        if (gone := time.monotonic() - began) >= 60 * minutes:
            print(
                f"{minutes:g} minutes are over: {len(missing) - number + 1} cells are left for the next run", flush=True
            )
            return
        rate = f", {3600 * (number - 1) / gone:.3g} cells an hour" if number > 1 else ""
        left = f", about {duration(gone / (number - 1) * (len(missing) - number + 1))} to go" if number > 1 else ""
        print(f"{number} of {len(missing)}{rate}{left}: compiling {cell.name}", flush=True)
        try:
            line = compiled(cell, lines, compiles, planner)
        except UserError as error:  # no mesh divides it, which the estimates say
            print(f"{cell.name}: left out: {error}", flush=True)
            continue
        if TOO_LITTLE in line.get("why", ""):  # this machine's fault, and none of the cell's
            print(f"{cell.name}: left for another run: {line['why']}", flush=True)
            continue
        lines.append(line)
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
        print(said(cell, line), flush=True)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--records", type=Path, default=RECORDS, help="folder of what-fits.jsonl and what-fits-estimates.jsonl"
    )
    parser.add_argument(
        "--docs", type=Path, help="folder of what-fits.md and what-fits.png; default: docs/, or beside other --records"
    )
    parser.add_argument(
        "--only",
        action="append",
        help="compile the cells whose names contain these words; given again, others after them",
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no cell after this time; 0: compile none"
    )
    parser.add_argument(
        "--compiles", type=int, default=4, help="compile at most so many settings of a cell until one fits"
    )
    parser.add_argument("--mix", action="store_true", help="go on beside cells that other versions compiled")
    args = parser.parse_args(argv)
    if not args.minutes >= 0 or args.compiles < 1:
        parser.error("--minutes and --compiles: expected 0 or more, and 1 or more, found less")
    # The page of the repository shows the records of the repository.
    args.docs = args.docs or (DOCS if args.records.resolve() == RECORDS else args.records)
    return args


def chosen_by(only: Sequence[str] | None, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells whose names contain these words, in their order, each once. None: all of them.

    Raises UserError if no name contains some of the words.
    """
    chosen: dict[Cell, None] = {}
    for words in only or [""]:
        found = [cell for cell in cells if words in cell.name]
        if not found:
            raise UserError(
                f"--only: expected words of a cell's name, such as '{cells[0].name}', found {quoted(words)}"
            )
        chosen |= dict.fromkeys(found)
    return list(chosen)


def main() -> None:
    """Fill all cells with estimates, compile those that are missing, and write the page."""
    args = arguments(sys.argv[1:])
    cells = all_cells()
    chosen = chosen_by(args.only, cells)
    path = args.records / COMPILED
    with appending(path) as file:
        there = read_lines(path)
        done = of_now(cells, there)
        print(f"{len(cells)} cells, {len(done)} of them compiled before, in {path}", flush=True)
        if other := {line["cell"] for line in there} - set(done):
            print(
                f"{len(other)} cells were compiled with other settings than now, which do not count: {'; '.join(sorted(other))}",
                flush=True,
            )
        check_versions(done, args.mix)
        absent = missing_compilers(chosen)
        for what, count in Counter(absent.values()).items():
            print(f"{count} cells wait for {what}, which is not installed here", flush=True)
        here, lines = [cell for cell in chosen if cell.name not in absent], list(done.values())
        if not (args.records / ESTIMATES).exists():  # it takes half a minute, and is done at the end anyway
            write(args, cells, lines)
        try:
            compile_missing(here, lines, file, args.minutes, args.compiles)
        finally:
            write(args, cells, lines)
    print(f"page: {args.docs / 'what-fits.md'}   picture: {args.docs / 'what-fits.png'}   lines: {path}")


def write(args: argparse.Namespace, cells: Sequence[Cell], lines: Sequence[Line]) -> None:
    """Write the estimates of all cells, the page and the picture, each whole or not at all."""
    done = of_now(cells, lines)
    began, found = time.monotonic(), []
    good = [line for line in done.values() if line["fits"] is not None]
    for number, line in enumerate(estimates(cells, good), 1):
        found.append(line)
        if number % 50 == 0:
            print(f"estimated {number} of {len(cells)} cells in {duration(time.monotonic() - began)}", flush=True)
    write_atomically(args.records / ESTIMATES, "".join(json.dumps(line) + "\n" for line in found))
    write_atomically(args.docs / "what-fits.md", page(cells, done, found))
    draw(cells, done, found, args.docs / "what-fits.png")


if __name__ == "__main__":
    run_command(main)
