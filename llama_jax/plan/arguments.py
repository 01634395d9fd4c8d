"""The command line of plan: flags over a TOML file, the file over the defaults, and what of a training run counts."""

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path

from llama_jax.cli.configurations import find_config
from llama_jax.cli.flags import parse_flags, take_option
from llama_jax.cli.programs import typed
from llama_jax.config import Cache, Config, MeshArgs, Weights, load_toml
from llama_jax.errors import UserError
from llama_jax.plan.topology import EXAMPLES, Topology

DESCRIPTION = """Plan a run for a TPU slice that need not be there: does it fit, how fast can it be.

Ends with status 0 where the step fits, with 1 where it does not, and with 2 where the command is to be changed.

--config supplies what flags do not: a TOML file, or the name of a configuration that comes with the package."""
# Flags that count in one way of planning alone.
OF_DECODING = {"batch", "slots", "weights", "cache"}
OF_SEARCH = {"compiles"}
OF_TRAINING = {"tokens"}
NOT_OF_SEARCH = {"decode", "hlo", "output", "advice"}


@dataclasses.dataclass(frozen=True)
class PlanConfig(Config):
    """A training run, and what to plan of it."""

    topology: str = ""
    """The slice: version and grid, such as v5e:16x16, v5p:4x4x4 or v6e:8x8; 2xv5e:16x16 is two slices."""
    json: bool = False
    """Print one JSON object instead of text; what else is said goes to standard error."""
    hlo: str = ""
    """A file to write the compiled program's text to. Empty: none is written."""
    output: str = "plan.png"
    """A file for the picture of memory and time. Empty: none is drawn."""
    tokens: float | None = None
    """Tokens of the whole run, for days and chip-hours. None: as many as the configuration says."""
    advice: int = 3
    """Most compilations that look for settings that fit, where those that were asked for do not. 0: advice is estimated."""
    search: bool = False
    """Try meshes, sequences a chip and remat policies, and rank them."""
    compiles: int = 6
    """With --search: candidates that are compiled, the most promising first."""
    decode: bool = False
    """Plan decoding steps instead of training. The configuration's mesh and type are those of training and do not count; flags do."""
    batch: int = 8
    """With --decode: sequences that are decoded together."""
    slots: int = 2048
    """With --decode: tokens of a sequence's cache. By default at most the model's context."""
    weights: Weights = "auto"
    """With --decode: auto, the type that is computed in; int8, int4 or int4-64."""
    cache: Cache = "auto"
    """With --decode: keys and values: auto, the type that is computed in; int8."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A command line, read."""

    args: PlanConfig
    config: Config  # of args, without what only plan knows
    topology: Topology
    given: set[str]  # the flags on the command line
    stated: set[str]  # these, and the keys of the file
    file: Config | None  # None: no file was given
    notes: list[str]  # what was decided on the way


def read_request(argv: Sequence[str]) -> Request:
    """Read a command line. Raises UserError where it is wrong."""
    named, rest = take_option(list(argv), "--config")
    path, notes = find_config(named) if named else (None, [])
    file = load_toml(path) if path else None
    base, given = file or Config(), given_flags(rest)
    args = _parse(rest, base, given)
    if args.train.init_from:
        from llama_jax.checkpoint import Checkpoint  # orbax takes seconds

        # As in train.py: the checkpoint brings the model's shape.
        args = _parse(rest, dataclasses.replace(base, model=Checkpoint.find(args.train.init_from).args), given)
    if not args.topology.strip():
        raise UserError(f"--topology: expected a slice such as {EXAMPLES}, found none")
    _check(args, given)
    config = Config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Config)})
    return Request(args, config, Topology.parse(args.topology), given, given | stated_keys(path), file, notes)


def given_flags(argv: Sequence[str]) -> set[str]:
    """Names of the flags on a command line, spelled as fields: {"mesh.tensor", "hlo"}."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


def stated_keys(path: Path | None) -> set[str]:
    """Names of the keys that a TOML file states: {"data.vocab_size"}."""
    if path is None:
        return set()
    table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    return {f"{section}.{key}".replace("-", "_") for section, keys in table.items() for key in keys}


def _parse(argv: list[str], base: Config, given: set[str]) -> PlanConfig:
    """Flags over ``base``, of which does not count: for decoding, the mesh and the type; and what a flag decides otherwise."""
    default = PlanConfig(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    args = parse_flags(PlanConfig, argv, default, typed("plan"), DESCRIPTION)
    data, train, mesh = base.data, base.train, base.mesh
    if args.decode:
        train, mesh = dataclasses.replace(train, compute_dtype="auto"), MeshArgs()
    if "train.n_epochs" in given:
        train = dataclasses.replace(train, max_steps=None)
    if "data.vocab_size" in given:
        data = dataclasses.replace(data, tokenizer_model_path="")
    counts = dataclasses.replace(default, data=data, train=train, mesh=mesh)
    return args if counts == default else parse_flags(PlanConfig, argv, counts, typed("plan"), DESCRIPTION)


def _check(args: PlanConfig, given: set[str]) -> None:
    """Raise UserError on impossible values, and on flags that would be read by nobody."""
    for name in ("batch", "slots", "tokens", "compiles"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name}: expected a positive number, found {value}")
    if args.advice < 0:
        raise UserError(f"--advice: expected 0 or more, found {args.advice}")
    training = {flag for flag in given if flag.startswith("train.")} - {"train.compute_dtype", "train.init_from"}
    for flags, counts, expected in (
        (OF_DECODING, args.decode, "--decode beside it, found a plan for training; add --decode, or leave this out"),
        (OF_SEARCH, args.search, "--search beside it, found none; add --search, or leave this out"),
        (
            {name for name in NOT_OF_SEARCH if getattr(args, name)},
            not args.search,
            "no --search beside it, found it; plan what the search finds by itself",
        ),
        (
            OF_TRAINING | training,
            not args.decode,
            "flags of decoding beside --decode, found one of training; leave it out",
        ),
    ):
        if not counts and (unread := sorted(given & flags)):
            raise UserError(f"--{unread[0].replace('_', '-')}: expected {expected}")
