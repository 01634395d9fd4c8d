"""Pretrain a LLaMA 2 model: ``python train.py`` for the built-in stories, ``python train.py my.txt`` for any text."""

import sys

from llama_jax.cli.stopping import StopSignals
from llama_jax.errors import run_command


def main() -> None:
    """Read the configuration, then train."""
    with StopSignals(at_exit=True) as signals:  # from here on, before anything is imported that takes a while
        from llama_jax.training.command import read_command
        from llama_jax.training.loop import train

        config, notes = read_command(sys.argv[1:])
        train(config, signals, notes)


if __name__ == "__main__":
    run_command(main)
