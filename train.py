"""Pretrain a LLaMA 2 model: ``python train.py`` for the built-in stories, ``--data.filepath my.txt`` for any text."""

import dataclasses
import sys
from pathlib import Path

from llama_jax.config import Config, load_toml, parse_flags
from llama_jax.errors import UserError, run_command

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny.toml"


def main() -> None:
    """Read the configuration, then train."""
    path, argv = take_option(sys.argv[1:], "--config")
    source = DEFAULT_CONFIG if path is None else Path(path)
    base = load_toml(source)
    config = parse(argv, base)
    train = dataclasses.replace(config.train, save_dir=config.train.save_dir or f"runs/{source.stem}")
    if train.init_from:
        from llama_jax.training.run_folder import starting_model

        # The checkpoint brings the model's shape; flags may still change what does not alter its parameters.
        config = parse(argv, dataclasses.replace(base, model=starting_model(train)))
    config = dataclasses.replace(config, train=train)
    config.check()

    from llama_jax.training.loop import train as run

    run(config)


def parse(argv: list[str], default: Config) -> Config:
    """Flags over ``default``."""
    description = f"{__doc__}\n\n--config FILE.toml supplies what flags do not."
    return parse_flags(Config, argv, default, "python train.py", description)


def take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of ``--name VALUE`` or ``--name=VALUE``, None where it is not given, and the arguments without it."""
    for i, argument in enumerate(argv):
        key, equals, value = argument.partition("=")
        if key == name:
            rest = i + 1 if equals else i + 2
            value = value if equals else "".join(argv[i + 1 : i + 2])
            if not value or value.startswith("--"):
                raise UserError(f"{name}: expected a TOML file, found none; see configs/ for examples")
            return value, argv[:i] + argv[rest:]
    return None, argv


if __name__ == "__main__":
    run_command(main)
