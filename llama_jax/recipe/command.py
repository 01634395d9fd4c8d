"""The command ``python -m llama_jax.recipe``: reads the flags, makes a recipe, writes it, prints a JSON line."""

import dataclasses
import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from llama_jax.cli.configurations import check_no_config, find_config, stated_keys
from llama_jax.cli.flags import given_flags, parse_flags, take_option
from llama_jax.config import Config, load_toml, to_toml
from llama_jax.errors import UserError
from llama_jax.programs import typed
from llama_jax.recipe.choose import DECIDED, Budget, Choice, Unit
from llama_jax.recipe.making import make_recipe
from llama_jax.recipe.telling import Rows, table
from llama_jax.storage.files import write_atomically
from llama_jax.storage.locations import on_disk

DESCRIPTION = """Choose the settings of a run for a text and a budget, and say what loss to expect.

Give one of --minutes, --tokens, --flops and --parameters. Settings that you give, by flags or in --config, are kept.
The last line on standard output is one JSON object."""
BUDGETS: tuple[Unit, ...] = ("minutes", "tokens", "flops", "parameters")
# The line above the settings, by which a recipe is known again that nobody has changed.
SEAL = "# sha256 of the lines below: "


@dataclasses.dataclass(frozen=True)
class RecipeConfig(Config):
    """The arguments of recipe: those of a training run, and what it may take."""

    minutes: float | None = None
    """Minutes that the run may take on this machine, whose speed is measured, or on --topology."""
    tokens: float | None = None
    """Tokens that the run may read, those of all epochs."""
    flops: float | None = None
    """FLOPs of training that the run may take, by the count that a run announces, such as 1.6e13."""
    parameters: float | None = None
    """Parameters that the model may have, about."""
    topology: str = ""
    """TPU slice or GPUs to plan for, as plan takes them, such as v5e:4x4 or h100:8. Empty: this machine."""
    output: str = ""
    """File for the settings, in TOML. Empty: print them."""


def run(argv: Sequence[str]) -> None:
    """Run the command line ``argv``. Raises UserError if it is wrong, or if no recipe can be made."""
    named, rest = take_option(list(argv), "--config")
    path, notes = find_config(named) if named else (None, [])
    default = load_toml(path) if path else Config()
    base = RecipeConfig(**{field.name: getattr(default, field.name) for field in dataclasses.fields(Config)})
    args = parse_flags(RecipeConfig, rest, base, typed("recipe"), DESCRIPTION)
    given = fields_given(rest) | frozenset(stated_keys(path))
    if args.train.minutes is not None:
        raise UserError("train.minutes: expected --minutes, which recipe takes, found it; it is a flag of train")
    budget = _budget(args)
    if not (args.data.filepath or args.data.mixture):
        raise UserError("data.filepath: expected a text, found none; give --data.filepath my.txt")
    if "data.filepath" in given and not args.data.as_text:
        check_no_config(args.data.filepath)
    if args.topology and args.distributed != Config().distributed:
        raise UserError("distributed: expected none beside --topology, found some; leave it out")
    config = Config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Config)})
    output, replaces = _check_output(args.output) if args.output else (None, False)
    choice, rows = make_recipe(config, given, budget, args.topology)
    print(table([("", note) for note in notes] + rows), flush=True)
    content = recipe_text(choice, rows, given, shlex.join([*typed("recipe").split(), *argv]), args.output or "my.toml")
    if output is None:
        print(f"\n{content}")
    else:
        write_atomically(output, content)
        again = "; it replaces an earlier recipe that nobody had changed" if replaces else ""
        print(
            table(
                [
                    (
                        "written",
                        f"{args.output}{again}; train by it: {typed('train')} --config {shlex.quote(args.output)}",
                    )
                ]
            )
        )
    print(json.dumps(summary(choice)), flush=True)


def fields_given(argv: Sequence[str]) -> frozenset[str]:
    """Return the fields that the flags of a command line give: {"train.lr"}."""
    sections = {field.name for field in dataclasses.fields(Config)}
    found = {flag.replace(".no_", ".") for flag in given_flags(argv)}
    return frozenset(flag for flag in found if flag.partition(".")[0] in sections)


def _budget(args: RecipeConfig) -> Budget:
    """Return the budget. Raises UserError unless exactly one is given, and it is a positive number."""
    given = [unit for unit in BUDGETS if getattr(args, unit) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{unit}" for unit in given) or "none"
        raise UserError(
            f"--minutes: expected one of {', '.join(f'--{unit}' for unit in BUDGETS)}, found {found}; give one"
        )
    amount = float(getattr(args, given[0]))
    if not 0 < amount < math.inf:
        raise UserError(f"--{given[0]}: expected a number above 0, found {amount:g}")
    return Budget(given[0], amount, f"--{given[0]} {amount:g}")


def summary(choice: Choice) -> dict[str, float]:
    """Return the last line of the command, as scripts read it."""
    return {
        "parameters": choice.parameters,
        "tokens": choice.tokens,
        "steps": choice.steps,
        "expected_bits_per_byte": round(choice.expected, 4),
        "low": round(choice.low, 4),
        "high": round(choice.high, 4),
    }


def recipe_text(choice: Choice, rows: Rows, given: frozenset[str], made_by: str, name: str) -> str:
    """Return the settings as TOML, with comments that say how they were found, and how to train by them."""
    told = [f"#   {line}" for line in table(rows).splitlines()]
    head = ["# A recipe for one text and one budget, made by", "#", f"#   {made_by}", "#", *told, "#"]
    head += [
        "# Train by it, in the folder in which it was made:",
        "#",
        f"#   {typed('train')} --config {shlex.quote(name)}",
        "#",
    ]
    body = to_toml(choice.config, lambda field: field in DECIDED or field in given or field == "data.filepath")
    digest = hashlib.sha256(body.encode()).hexdigest()
    return "\n".join([*head, SEAL + digest, "", body])


def _check_output(name: str) -> tuple[Path, bool]:
    """Return where to write, and whether an earlier recipe is there that nobody has changed.

    Raises UserError if something else is there, or if there is no such folder.
    """
    path = on_disk(name, "--output")
    if not path.parent.is_dir():
        raise UserError(f"--output: expected a file in a folder, found no folder {path.parent}; create it first")
    if not path.exists():
        return path, False
    if not path.is_file():
        raise UserError(f"--output: expected a new file, found a folder in {name}; choose another name")
    text = path.read_text(errors="replace")
    _, mark, rest = text.partition(SEAL)
    digest, _, body = rest.partition("\n\n")
    if not mark or hashlib.sha256(body.encode()).hexdigest() != digest:
        found = "a recipe that was changed by hand" if mark else "another file"
        raise UserError(
            f"--output: expected a new file, or a recipe as it was made, found {found} in {name}; choose another name"
        )
    return path, True
