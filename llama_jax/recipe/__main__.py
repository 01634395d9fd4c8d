"""Choose the settings of a run: ``python -m llama_jax.recipe --data.filepath my.txt --minutes 30 --output my.toml``."""

import os
import sys
from collections.abc import Sequence

from llama_jax.errors import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line ``argv`` and make a recipe. None: that of this process."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word.partition("=")[0] == "--topology" for word in words):
        from llama_jax.plan.topology import ENVIRONMENT  # before JAX starts, which would look for a TPU

        os.environ.update(ENVIRONMENT)
    from llama_jax.recipe.command import run

    run(words)


if __name__ == "__main__":
    run_command(main)
