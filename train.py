"""Pretrain a LLaMA 2 model: ``python train.py`` for the built-in stories, ``--data.filepath my.txt`` for any text."""

import dataclasses
import sys
from pathlib import Path

from llama_jax.config import Config, load_toml
from llama_jax.errors import run_command
from llama_jax.flags import parse_flags, take_option

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


if __name__ == "__main__":
    run_command(main)
