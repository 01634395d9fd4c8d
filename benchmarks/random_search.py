"""Compare a recipe with the best of a random search in the same budget of FLOPs, run by run.

python benchmarks/random_search.py --filepath my.txt --flops 3e12 --output searches/my

The search draws shape, context, vocabulary, batch, rate, and weight decay, each from a range that people try, and trains
each draw for as many steps as the budget holds. The recipe's run is trained like the others. A finished run is a line of
results.jsonl, and is not trained again; a run that was stopped goes on. The last line is one JSON object: ``ratio`` is the
recipe's bits per byte over the least of the draws, ``within`` says whether the recipe's lie in its own interval. FLOPs are
compared and not minutes, so that other work on the machine does not matter.
"""

import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.cli.flags import parse_flags
from llama_jax.config import Config, ModelArgs
from llama_jax.errors import UserError, run_command
from llama_jax.recipe.choose import heads_for
from llama_jax.training.flops import step_flops

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from sweep import ROOT, Settings, bits, identity, key_of, known_results, train

# What is drawn. Rates are drawn by their logarithm.
CHOICES: dict[str, tuple[Any, ...]] = {
    "model.dim": (64, 96, 128, 192, 256, 384),
    "model.n_layers": (2, 3, 4, 6, 8),
    "model.max_seq_len": (64, 128, 256, 512),
    "data.vocab_size": (512, 1024, 2048, 4096),
    "train.weight_decay": (0.1, 0.3, 1.0),
}
BATCH_TOKENS = (512, 1024, 2048, 4096, 8192)
RATES = 5e-4, 8e-3
# A draw with fewer steps than this in its budget is drawn again: nobody would train it.
FEWEST_STEPS = 100


@dataclass(frozen=True)
class Arguments:
    """What is trained, and how often."""

    filepath: str = ""
    """A text, as of --data.filepath."""
    output: str = ""
    """Folder of the runs and results."""
    flops: float = 3e12
    """Floating point operations of each run."""
    runs: int = 20
    """Draws of the random search."""
    seed: int = 0
    """Seed of the draws."""


def main() -> None:
    """Train what is not done, then print what was found."""
    args = parse_flags(Arguments, sys.argv[1:], Arguments(), "python benchmarks/random_search.py", __doc__ or "")
    if args.runs < 1 or args.flops <= 0:
        raise UserError("--runs and --flops: expected 1 or more, and more than 0, found less")
    if not (args.filepath and args.output):
        raise UserError("--filepath and --output: expected a text and a folder, found none; give both")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    announced = recipe(args, output)
    file = output / "results.jsonl"
    known = {key_of(result): result for result in known_results(file)}
    wanted = [identity(settings, 0, shared) for settings, shared in wanted_runs(args, output)]
    print(
        f"{len(wanted)} runs, the recipe's first; {sum(key_of(run) in known for run in wanted)} of them are done",
        flush=True,
    )
    found = []
    for number, run in enumerate(wanted):
        result = known.get(key_of(run))
        if result is None:
            result = train(run, output)
            with file.open("a") as lines:
                lines.write(json.dumps(result) + "\n")
        found.append(result)
        what = ", ".join(f"{name.partition('.')[2]} {value}" for name, value in run["settings"].items()) or "recipe"
        print(f"{number} of {args.runs}: {bits(result):.4f} bits per byte: {what}", flush=True)
    print(json.dumps(summary(announced, found)))


def recipe(args: Arguments, output: Path) -> dict[str, Any]:
    """Write the recipe, if it is not there, and return what it announced.

    Raises UserError if the folder has the recipe of another text or budget.
    """
    said, asked = output / "recipe.json", {"filepath": args.filepath, "flops": args.flops}
    if not said.exists():
        command = [
            sys.executable,
            "-m",
            "llama_jax.recipe",
            "--data.filepath",
            args.filepath,
            "--flops",
            str(args.flops),
        ]
        done = subprocess.run(
            [*command, "--output", str(output / "recipe.toml")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.returncode)
        said.write_text(json.dumps(asked | json.loads(done.stdout.splitlines()[-1])))
    found: dict[str, Any] = json.loads(said.read_text())
    if (known := {name: found[name] for name in asked}) != asked:
        raise UserError(f"{said}: expected a search of {asked}, found one of {known}; give another --output")
    return found


def wanted_runs(args: Arguments, output: Path) -> Iterator[tuple[Settings, list[str]]]:
    """Yield the settings and the shared flags of the recipe's run, then of each draw."""
    yield {}, ["--config", str(output / "recipe.toml"), "--train.eval-iters", "0"]
    shared = ["--config", "tiny", "--data.filepath", args.filepath]
    drawn = random.Random(args.seed)
    for _ in range(args.runs):
        settings = next(filter(None, (draw(drawn, args.flops) for _ in range(1000))), None)
        if settings is None:
            raise UserError(f"--flops: expected enough for {FEWEST_STEPS} steps, found {args.flops:g}; give more")
        yield settings, shared


def draw(drawn: random.Random, flops: float) -> Settings | None:
    """Return settings that take so many FLOPs, or None if they hold too few steps."""
    fields = {name: drawn.choice(values) for name, values in CHOICES.items()}
    rate = math.exp(drawn.uniform(*map(math.log, RATES)))
    batch = drawn.choice(BATCH_TOKENS) // fields["model.max_seq_len"]
    shape = {name.partition(".")[2]: value for name, value in fields.items() if name.startswith("model.")}
    fields["model.n_heads"] = heads_for(shape["dim"])
    model = ModelArgs(**shape, n_heads=fields["model.n_heads"], vocab_size=fields["data.vocab_size"], multiple_of=32)
    steps = int(flops / step_flops(Config(model), batch * model.max_seq_len))
    if batch < 1 or steps < FEWEST_STEPS:
        return None
    fields |= {
        "train.batch_size": batch, "train.lr": f"{rate:.2g}", "train.max_steps": steps, "train.warmup_steps": steps // 20,
        "train.eval_interval": steps, "train.save_interval": steps, "train.eval_iters": 0,
    }  # fmt: skip
    return {name.replace("_", "-"): str(value) for name, value in fields.items()}


def summary(announced: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the recipe's bits per byte beside those of the draws, of which ``found`` has the recipe's run first."""
    ours, *others = map(bits, found)
    low, high = announced["low"], announced["high"]
    return {
        "recipe": ours, "best": min(others), "ratio": round(ours / min(others), 4), "draws": sorted(others),
        "expected": announced["expected_bits_per_byte"], "low": low, "high": high, "within": low <= ours <= high,
        "tflop": found[0].get("tflop"), "tflop_of_draws": [result.get("tflop") for result in found[1:]],
    }  # fmt: skip


if __name__ == "__main__":
    run_command(main)
