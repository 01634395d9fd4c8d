"""Train with every combination of settings, and compare what they reach.

python benchmarks/sweep.py --output sweeps/rates --vary train.lr=1e-3,2e-3,4e-3 --vary train.optimizer=adamw,muon \
    --seeds 3 -- --config configs/shakespeare.toml --data.filepath input.txt

What follows ``--`` are flags of train.py that all runs share. Runs are trained one after the other, each in a folder of
its own below the output. A finished run is a line of results.jsonl; it is not trained again, and a run that was stopped
goes on. Runs of other flags, or of files with another content, are others. One that diverges is a line without a result,
and the sweep goes on; one that cannot begin ends it. A field that is on or off is varied as train.nesterov=true,false.
``--random N`` trains N combinations drawn at random in place of all. The last lines are a table, best first, by
the median over the seeds of the last evaluation; sweep.png shows it over the first setting with numbers. Where the best
of these lies between two others, a parabola through the three in its logarithm says where the least loss would be.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError, run_command

ROOT = Path(__file__).resolve().parents[1]
Settings = dict[str, str]
# What train.py says of a run whose loss is not finite any more.
DIVERGED = "error: train: expected a finite "


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: our own flags, and those after ``--``, which are train.py's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument(
        "--vary", action="append", required=True, metavar="NAME=VALUE,VALUE", help="a field of train.py"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each combination, with seeds from 0")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="combinations to draw; 0: all")
    own, shared = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    if args.seeds < 1 or args.random < 0:
        parser.error("--seeds and --random: expected 1 or more, and 0 or more, found less")
    varied = list[str]()
    for each in args.vary:
        name, _, values = each.partition("=")
        if not name or not all(values.split(",")):
            parser.error(f"--vary: expected a field and its values, as train.lr=1e-3,2e-3, found {each}")
        varied.append(_spelled(name))
        if varied.count(varied[-1]) > 1:
            parser.error(f"--vary: expected each field once, with all its values, found {name} twice")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output: expected a folder or a new one, found a file, {args.output}")
    stated = [_spelled(flag.split("=")[0].removeprefix("--")) for flag in shared if flag.startswith("--")]
    for name in ("train.seed", "train.save-dir"):
        if name in (*varied, *stated):
            where = "--vary" if name in varied else "after --"
            parser.error(f"--{name}: expected none {where}, since each run has its own (--seeds), found one")
    for name in varied:
        if name in stated or f"{name.partition('.')[0]}.no-{name.partition('.')[2]}" in stated:
            parser.error(f"--{name}: expected it in --vary or after --, found it in both")
    return args, shared


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def combinations(vary: list[str], drawn: int = 0) -> list[Settings]:
    """Return all combinations of the values, or ``drawn`` of them at random, the same in every call."""
    values = {name: rest.split(",") for name, _, rest in (each.partition("=") for each in vary)}
    found = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    return random.Random(0).sample(found, drawn) if 0 < drawn < len(found) else found


def files_in(flags: Iterable[str], settings: Settings) -> dict[str, str]:
    """Return the files that the flags of a run name, each with the beginning of a checksum of what it holds.

    Of a folder it is one of the names, sizes and times of its files.
    """
    found = {}
    for word in (*(flag.partition("=")[2] or flag for flag in flags), *settings.values()):
        path = Path(word).expanduser()
        if path.is_file():
            with path.open("rb") as file:
                found[word] = hashlib.file_digest(file, "sha256").hexdigest()[:12]
        elif path.is_dir():
            stats = [(str(each), each.stat()) for each in sorted(path.rglob("*")) if each.is_file()]
            listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
            found[word] = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12]
    return found


def identity(settings: Settings, seed: int, shared: list[str]) -> dict[str, Any]:
    """Return what makes a run another one: its settings, its seed, and the flags and files that it shares."""
    return {"settings": settings, "seed": seed, "shared": shared, "files": files_in(shared, settings)}


def key_of(run: dict[str, Any]) -> str:
    """Return what ``identity`` says of a run or a result, as a text. Lines of earlier sweeps lack some of it."""
    return json.dumps([run.get(name) for name in ("settings", "seed", "shared", "files")])


def flags_of(settings: Settings) -> list[str]:
    """Return the flags of train.py for settings: ``--train.lr 1e-3``, and ``--train.no-nesterov`` for what is off."""
    found = []
    for name, value in settings.items():
        section, _, field = name.partition(".")
        on_or_off = {"true": [f"--{name}"], "false": [f"--{section}.no-{field}"]}
        found += on_or_off.get(value.lower(), [f"--{name}", value])
    return found


def train(run: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train one run, or go on with it, and return what it reached. Without a result, it has diverged."""
    flags = [*run["shared"], *flags_of(run["settings"]), "--train.seed", str(run["seed"])]
    known = [flags, run["files"]]
    folder = output / "runs" / hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--train.save-dir", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    diverged = done.returncode == 2 and DIVERGED in done.stdout
    if done.returncode and not diverged:
        why = f"{_text(run['settings'])}, seed {run['seed']}: train.py ended with exit status {done.returncode}, see above"
        print(done.stdout[-2000:], why, sep="\n", file=sys.stderr)
        raise SystemExit(done.returncode)
    if diverged:
        return {**run, "run": folder.name, "bits_per_byte": None, "why": done.stdout.strip().splitlines()[-1]}
    return {**run, "run": folder.name, **reached(folder)}


def reached(folder: Path) -> dict[str, Any]:
    """Return the last evaluation of a run, its steps and tokens, and the TFLOP and seconds of its steps."""
    from llama_jax.config import load_toml
    from llama_jax.training.flops import step_flops

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_loss" in line]
    if not evaluations:
        raise UserError(f"{folder}: expected evaluations, by which runs are compared, found none; hold text out")
    last = evaluations[-1]
    if last["eval_loss"] is not None and last["eval_bits_per_byte"] is None:
        raise UserError(f"{folder}: expected bits per byte, found none, as the tokenizer does not give the text back")
    config = load_toml(folder / "config.toml")
    tflop = step_flops(config, last["tokens"], last["step"]) / 1e12
    return {
        "bits_per_byte": last["eval_bits_per_byte"], "loss": last["eval_loss"], "step": last["step"],
        "tokens": last["tokens"], "tflop": float(f"{tflop:.4g}"), "seconds": round(last["run_step_seconds"], 1),
    }  # fmt: skip


def medians(results: Iterable[dict[str, Any]]) -> list[tuple[Settings, list[float], dict[str, Any]]]:
    """Return each combination with the bits per byte of its seeds and its first run, the best median first.

    A run that has diverged counts as infinite.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(json.dumps(result["settings"]), []).append(result)
    found = [(runs[0]["settings"], [bits(run) for run in runs], runs[0]) for runs in groups.values()]
    return sorted(found, key=lambda each: statistics.median(each[1]))


def by_first_number(results: list[dict[str, Any]]) -> tuple[str, dict[str, list[tuple[float, list[float]]]]]:
    """Return the first setting that is a number in all results, and of each of the other settings its points in order.

    A point is the setting's value and the bits per byte of the seeds. The name is empty if no setting is a number.
    """
    names = [name for name in results[0]["settings"] if all(_number(r["settings"][name]) is not None for r in results)]
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for settings, reached_, _ in medians(results) if names else ():
        others = _text({name: value for name, value in settings.items() if name != names[0]})
        lines.setdefault(others, []).append((_number(settings[names[0]]) or 0.0, reached_))
    return (names[0] if names else ""), {others: sorted(points) for others, points in lines.items()}


def optimum(points: list[tuple[float, float]]) -> tuple[float, float] | None:
    """Return where the least y would be, and it, by a parabola in log x through the least point and its neighbours.

    ``points`` are (x, y), ordered by x. None: the least is at an end, x is not positive, or y is not finite.
    """
    ys = [y for _, y in points]
    at = ys.index(min(ys))
    three = points[max(0, at - 1) : at + 2]
    if not 0 < at < len(points) - 1 or three[0][0] <= 0 or not all(math.isfinite(y) for _, y in three):
        return None
    (a, ya), (b, yb), (c, yc) = ((math.log(x), y) for x, y in three)
    left, right = (yb - ya) / (b - a), (yc - yb) / (c - b)
    bend = (right - left) / (c - a)
    if bend <= 0:
        return None
    best = (a + b - left / bend) / 2
    return math.exp(best), ya + left * (best - a) + bend * (best - a) * (best - b)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the runs and their medians over the first setting with numbers, a line for each of the other settings."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    name, lines = by_first_number(results)
    if not name:
        return
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for others, points in sorted(lines.items()):
        (line,) = axes.plot([x for x, _ in points], [statistics.median(y) for _, y in points], marker="o", label=others)
        for x, each in points:
            axes.plot([x] * len(each), each, ".", color=line.get_color(), alpha=0.4)
    axes.set(xlabel=name, ylabel="bits per byte, held out")
    if min(x for points in lines.values() for x, _ in points) > 0:
        axes.set_xscale("log")
    if any(lines):
        figure.legend(loc="outside upper center", fontsize="small")
    figure.savefig(path, dpi=120)


def bits(result: dict[str, Any]) -> float:
    """Return the held-out bits per byte of a result, infinite if its run diverged."""
    return math.inf if result["bits_per_byte"] is None else result["bits_per_byte"]


def known_results(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results. A last line that is cut short, as by a full disk, is taken off it."""
    if not file.exists():
        return []
    whole, _, torn = file.read_text().rpartition("\n")
    if torn:
        print(f"{file}: the last line is cut short; it is taken off, and its run told again", flush=True)
        file.write_text(whole + "\n" * bool(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _text(settings: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def main() -> None:
    """Train what is not done, then print the table and draw."""
    args, shared = arguments(sys.argv[1:])
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.jsonl"
    known = known_results(file)
    wanted = [identity(one, seed, shared) for one in combinations(args.vary, args.random) for seed in range(args.seeds)]
    done = {key_of(result): result for result in known}
    keys = [key_of(run) for run in wanted]
    missing = [(key, run) for key, run in zip(keys, wanted, strict=True) if key not in done]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done before, in {file}", flush=True)
    if left := len(known) - len({*keys} & {*done}):
        print(
            f"{left} others in it are of other flags, or of files with another content, and are left alone",
            flush=True,
        )
    for number, (key, run) in enumerate(missing, 1):
        result = done[key] = train(run, args.output)
        with file.open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        told = f"diverged: {result['why']}" if "why" in result else f"{bits(result):.4f} bits per byte"
        print(f"{number} of {len(missing)}: {_text(run['settings'])}, seed {run['seed']}: {told}", flush=True)
    results = [done[key] for key in keys]
    for settings, each, first in medians(results):
        spread = f" ({min(each):.4f} to {max(each):.4f})" if len(each) > 1 else ""
        cost = f", {first['tflop']} TFLOP, {first['seconds']} s" if "tflop" in first else ""
        middle = statistics.median(each)
        told = f"{middle:.4f}{spread} bits per byte" if math.isfinite(middle) else "diverged"
        print(f"{told}{cost}: {_text(settings)}")
    name, lines_ = by_first_number(results)
    for others, points in lines_.items():
        if found_ := optimum([(x, statistics.median(y)) for x, y in points]):
            print(f"best {name} by a parabola: {found_[0]:.3g}, {found_[1]:.4f} bits per byte{others and ': '}{others}")
    plot(results, args.output / "sweep.png")
    print(f"results: {file}   picture: {args.output / 'sweep.png'}   runs: {args.output / 'runs'}")


if __name__ == "__main__":
    run_command(main)
