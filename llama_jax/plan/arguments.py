"""The command line of plan: flags override a TOML file, which overrides the defaults."""

import dataclasses
from collections.abc import Sequence

from llama_jax.cli.configurations import find_config, shipped, stated_keys
from llama_jax.cli.flags import given_flags, parse_flags, take_option
from llama_jax.config import Cache, Config, MeshArgs, Weights, load_toml
from llama_jax.errors import UserError
from llama_jax.plan.topology import EXAMPLES, Topology
from llama_jax.programs import named as program_named
from llama_jax.programs import typed
from llama_jax.training.deciding import decide

DESCRIPTION = """Plan a run for a TPU slice, or for GPUs, that you need not have: does it fit, and how fast can it be?

The exit status is 0 if the step fits, 1 if it does not, and 2 if the command must be changed.

--config gives settings; flags override them. It is a TOML file, or the name of a configuration in the package."""
# Flags that matter in only one way of planning.
OF_DECODING = {"batch", "slots", "weights", "cache"}
OF_SEARCH = {"compiles"}
OF_TRAINING = {"tokens", "data.document_mask"}
NOT_OF_SEARCH = {"decode", "hlo", "advice"}


@dataclasses.dataclass(frozen=True)
class PlanConfig(Config):
    """The arguments of plan: a training run, and what to plan of it."""

    topology: str = ""
    """TPU slice: version and grid, such as v5e:16x16, v5p:4x4x4, v6e:8x8 or v7x:2x2x1. 2xv5e:16x16 stands for two
    slices. Or GPUs of one host: h100:1 to h100:8, whose compiler is in the extra cuda."""
    json: bool = False
    """Print one JSON object instead of text. Other messages go to standard error."""
    hlo: str = ""
    """File for the compiled program's text. Empty: do not write it."""
    output: str = "plan.png"
    """File for the picture of memory and time, with --search of all candidates. Empty: do not draw it."""
    tokens: float | None = None
    """Tokens of the whole run, to compute days and chip-hours. None: as the configuration says."""
    advice: int = 3
    """If the step does not fit, compile up to this many other settings to find some that do. 0: only estimate them."""
    search: bool = False
    """Try meshes, sequences per chip and remat policies, and rank them."""
    compiles: int = 12
    """With --search: number of candidates to compile, the most promising first by what those before have shown."""
    decode: bool = False
    """Plan decoding steps instead of training.
    The file's [mesh] and train.compute_dtype are for training and are ignored. Flags are not."""
    batch: int = 8
    """With --decode: number of sequences decoded together."""
    slots: int = 2048
    """With --decode: cache size per sequence, in tokens. Default: at most the model's context."""
    weights: Weights = "auto"
    """With --decode: quantization of the matrices: int8, int4 or int4-64. auto: none."""
    cache: Cache = "auto"
    """With --decode: quantization of keys and values: int8. auto: none."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed command line."""

    args: PlanConfig
    config: Config  # the part of args that is not only plan's
    topology: Topology
    given: set[str]  # the flags on the command line
    stated: set[str]  # the flags and the keys of the file
    file: Config | None  # None if no file was given
    notes: list[str]  # what was decided


def read_request(argv: Sequence[str]) -> Request:
    """Read a command line. Raises UserError if it is wrong."""
    named, rest = take_option(list(argv), "--config")
    path, notes = find_config(named) if named else (None, [])
    file = load_toml(path) if path else None
    base, given = file or Config(), given_flags(rest)
    args = _parse(rest, base)
    if args.train.init_from:
        from llama_jax.convert.once import model_arguments  # imported here, because orbax takes seconds

        # As in train.py, the model's shape comes from the checkpoint, and settings from a configuration for tuning.
        if not args.decode:
            base, more = _as_tuned(args, base, named, given | stated_keys(path))
            notes = notes + more
        args = _parse(rest, dataclasses.replace(base, model=model_arguments(args.train.init_from)))
    if not args.topology.strip():
        raise UserError(f"--topology: expected a slice such as {EXAMPLES}, found none")
    _check(args, given)
    names = [field.name for field in dataclasses.fields(Config)]
    config, more = decide(Config(**{name: getattr(args, name) for name in names}), given)
    args = dataclasses.replace(args, **{name: getattr(config, name) for name in names})
    return Request(args, config, Topology.parse(args.topology), given, given | stated_keys(path), file, notes + more)


def _as_tuned(args: PlanConfig, base: Config, named: str | None, stated: set[str]) -> tuple[Config, list[str]]:
    """Return the settings with which train.py would start from a checkpoint, and notes."""
    from llama_jax.training.command import (
        is_tuning,
        tuning_settings,
        with_tuning_rates,
    )  # imported here, as orbax above

    tuning = shipped(tuning_settings(args))
    if named is None:
        return load_toml(tuning), [
            f"no --config: settings of {tuning.stem}, as {program_named('train')} has them, and the flags"
        ]
    return (with_tuning_rates(base, load_toml(tuning), stated) if is_tuning(args) else base), []


def _parse(argv: list[str], base: Config) -> PlanConfig:
    """Read flags over ``base``, without the settings of ``base`` that do not apply.

    For decoding these are the mesh and the data type.
    """
    default = PlanConfig(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    args = parse_flags(PlanConfig, argv, default, typed("plan"), DESCRIPTION)
    if not args.decode:
        return args
    train = dataclasses.replace(base.train, compute_dtype="auto")
    return parse_flags(
        PlanConfig, argv, dataclasses.replace(default, train=train, mesh=MeshArgs()), typed("plan"), DESCRIPTION
    )


def _check(args: PlanConfig, given: set[str]) -> None:
    """Raise UserError on impossible values, and on flags that have no effect."""
    for name in ("batch", "slots", "tokens", "compiles"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name}: expected a positive number, found {value}")
    if args.decode and (adapters := sorted(flag for flag in given if flag.startswith("lora."))):
        raise UserError(
            f"--{adapters[0].replace('_', '-')}: expected flags of decoding beside --decode, found one of training; leave it out: an "
            "adapter is merged into plain matrices"
        )
    if args.train.minutes is not None and args.train.max_steps is None:
        raise UserError(
            f"train.minutes: expected a run whose steps are known, found minutes; {typed('recipe')} --topology {args.topology} "
            f"--minutes {args.train.minutes:g} --data.filepath {args.data.filepath or 'my.txt'} chooses them"
        )
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
