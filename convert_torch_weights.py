"""Convert LLaMA weights: ``python convert_torch_weights.py --input llama-2-7b --output checkpoints/llama-2-7b``."""

import sys

from llama_jax.cli.flags import parse_flags
from llama_jax.convert import ConvertArgs, convert
from llama_jax.errors import run_command


def main() -> None:
    """Parse and convert."""
    convert(parse_flags(ConvertArgs, sys.argv[1:], ConvertArgs(), "python convert_torch_weights.py", __doc__ or ""))


if __name__ == "__main__":
    run_command(main)
