"""``train.py --train.minutes``: the choice of a recipe and its training in one step, and the stored choice later."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from llama_jax.cli.configurations import find_config, stated_keys
from llama_jax.cli.flags import take_option
from llama_jax.config import Config
from llama_jax.recipe.choose import DECIDED, Budget
from llama_jax.recipe.command import fields_given
from llama_jax.recipe.making import make_recipe
from llama_jax.recipe.telling import table
from llama_jax.training.command import read_command
from llama_jax.training.opening import settings_before
from llama_jax.training.run_folder import RunFolder
from llama_jax.training.settings import check_same


def read_with_recipe(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """Return the configuration of train.py's command line, and notes, as ``read_command`` does.

    With --train.minutes, what the person did not give is chosen, and printed. A run that has begun goes on with what
    was chosen then. Raises UserError if the command line is wrong, or if it asks for other minutes than the run has.
    """
    began = time.perf_counter()
    config, notes = read_command(argv, check=False)
    if config.train.minutes is None:
        config.check()
        return config, notes
    given = _given(argv)
    folder = RunFolder(config.train.save_dir)
    stored = settings_before(folder, config.train.checkpoint_dir)
    if stored is not None:
        check_same(stored, config, folder.path, "train", "minutes")
        what = f"the recipe of {config.train.minutes:g} minutes that the run in {folder.path} began with; nothing is measured anew"
        return _as_stored(config, stored, given), [*notes, what]
    # Without --config, the settings of a file are those of tiny.toml, which no person gave.
    base = config if take_option(list(argv), "--config")[0] else _plain(config, given)
    budget = Budget("minutes", config.train.minutes, f"--train.minutes {config.train.minutes:g}")
    choice, rows = make_recipe(base, given, budget, began=began)
    print(
        table([("recipe", f"of {config.train.minutes:g} minutes; what you give by flags or --config is kept"), *rows]),
        flush=True,
    )
    return choice.config, notes


def _given(argv: Sequence[str]) -> frozenset[str]:
    """Return the fields that the person gave by flags, or in a file."""
    named, rest = take_option(list(argv), "--config")
    found = fields_given(rest)
    return found if named is None else found | frozenset(stated_keys(find_config(named)[0]))


def _plain(config: Config, given: frozenset[str]) -> Config:
    """Return a configuration with defaults in place of what is not given."""
    keep = given | {"train.save_dir", "data.filepath"}
    return _with(config, Config(), lambda name: name not in keep)


def _as_stored(config: Config, stored: Config, given: frozenset[str]) -> Config:
    """Return a configuration with what a recipe decided for the run, but for what is given now."""
    return _with(config, stored, lambda name: name in DECIDED and name not in given)


def _with(config: Config, other: Config, chosen: Callable[[str], bool]) -> Config:
    """Return a configuration with the chosen fields of another one."""
    for section in ("model", "data", "train", "expected"):
        now, then = getattr(config, section), getattr(other, section)
        names = [field.name for field in dataclasses.fields(now) if chosen(f"{section}.{field.name}")]
        config = replace(config, **{section: replace(now, **{name: getattr(then, name) for name in names})})
    return config
