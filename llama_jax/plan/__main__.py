"""Plan a run for a TPU slice that need not be there: ``python -m llama_jax.plan --config FILE.toml --topology v5e:16x16``."""

import dataclasses
import json
import os
import sys
from pathlib import Path

from llama_jax.config import Cache, Config, Weights, load_toml
from llama_jax.errors import UserError, run_command
from llama_jax.files import write_atomically
from llama_jax.flags import parse_flags, take_option
from llama_jax.plan.topology import ENVIRONMENT, EXAMPLES, Topology


@dataclasses.dataclass(frozen=True)
class PlanConfig(Config):
    """A training run, and what to plan of it."""

    topology: str = ""
    """The slice: version and grid, such as v5e:16x16, v5p:4x4x4 or v6e:8x8; 2xv5e:16x16 is two slices."""
    json: bool = False
    """Print one JSON object instead of text."""
    hlo: str = ""
    """A file to write the compiled program's text to. Empty: none is written."""
    output: str = "plan.png"
    """A file for the picture of memory and time. Empty: none is drawn."""
    tokens: float = 2e12
    """Tokens of the whole run, for days and chip-hours."""
    search: bool = False
    """Try meshes, sequences a chip and remat policies, and rank them."""
    compiles: int = 6
    """Candidates of a search that are compiled, the most promising first."""
    decode: bool = False
    """Plan decoding steps instead of training."""
    batch: int = 8
    """Sequences that are decoded together."""
    slots: int = 2048
    """Tokens of a sequence's cache when decoding."""
    weights: Weights = "auto"
    """Of decoding: auto, the type that is computed in; int8, int4 or int4-64."""
    cache: Cache = "auto"
    """Keys and values of decoding: auto, the type that is computed in; int8."""


def main() -> None:
    """Read the configuration, then plan."""
    os.environ.update(ENVIRONMENT)
    path, argv = take_option(sys.argv[1:], "--config")
    base = load_toml(path) if path else Config()
    default = PlanConfig(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    description = f"{__doc__}\n\n--config FILE.toml supplies what flags do not."
    args = parse_flags(PlanConfig, argv, default, "python -m llama_jax.plan", description)
    if not args.topology:
        raise UserError(f"--topology: expected a slice such as {EXAMPLES}, found none")
    _check(args)
    run(args, Topology.parse(args.topology))


def run(args: PlanConfig, topology: Topology) -> None:
    """Compile, then say what was found, and write what was asked for."""
    from llama_jax.plan import plan_decoding, plan_training, report
    from llama_jax.plan.picture import draw
    from llama_jax.plan.search import search

    config = Config(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Config)})
    if args.search:
        search(config, topology, args.compiles, args.tokens, args.json)
        return
    _announce(args, "compiling for the slice: a minute or two")
    if args.decode:
        plan = plan_decoding(config, topology, args.batch, args.slots, args.weights, args.cache)
        found = report.decode_summary(plan, args.batch, args.slots)
        text = report.decoding_text(plan, args.batch, args.slots)
    else:
        plan = plan_training(config, topology)
        found, text = report.summary(plan, args.tokens), report.training_text(plan, args.tokens)
    print(json.dumps(found) if args.json else text)
    if args.hlo and plan.schedule is not None:
        write_atomically(Path(args.hlo), plan.text)
        _announce(args, f"the program's text: {args.hlo}")
    if args.output:
        draw(plan, Path(args.output))
        _announce(args, f"a picture: {args.output}")


def _announce(args: PlanConfig, text: str) -> None:
    if not args.json:
        print(f"{'':>10}  {text}", flush=True)


def _check(args: PlanConfig) -> None:
    for name in ("batch", "slots", "tokens", "compiles"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name}: expected a positive number, found {getattr(args, name)}")


if __name__ == "__main__":
    run_command(main)
