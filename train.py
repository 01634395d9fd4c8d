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
    source = Path(path) if path else DEFAULT_CONFIG
    config = load_toml(source)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, save_dir=config.train.save_dir or f"runs/{source.stem}")
    )
    init_from, _ = take_option(argv, "--train.init-from")
    if init_from or config.train.init_from:
        from llama_jax.checkpoint import Checkpoint

        # The checkpoint brings the model's shape; flags may still change what does not alter its parameters.
        config = dataclasses.replace(config, model=Checkpoint.find(init_from or config.train.init_from).args)
    config = parse_flags(
        Config, argv, config, "train.py", f"{__doc__}\n\n--config FILE.toml supplies what flags do not."
    )
    config.check()

    from llama_jax.training.loop import train

    train(config)


def take_option(argv: list[str], name: str) -> tuple[str, list[str]]:
    """The value of ``--name VALUE`` or ``--name=VALUE`` (hyphens or underscores), and the arguments without it."""
    for i, argument in enumerate(argv):
        key, equals, value = argument.partition("=")
        if key.replace("_", "-") != name:
            continue
        if equals:
            return value, argv[:i] + argv[i + 1 :]
        if i + 1 == len(argv):
            raise UserError(f"{name}: expected a path, found none")
        return argv[i + 1], argv[:i] + argv[i + 2 :]
    return "", argv


if __name__ == "__main__":
    run_command(main)
