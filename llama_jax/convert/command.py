"""The command line of the converter."""

from collections.abc import Sequence

from llama_jax.cli.flags import parse_flags, refuse_empty
from llama_jax.convert import ConvertArgs, convert
from llama_jax.programs import typed


def main(argv: Sequence[str]) -> None:
    """Read the command line, then convert."""
    program = typed("convert")
    description = f"Convert LLaMA weights: {program} --input llama-2-7b --output checkpoints/llama-2-7b"
    args = parse_flags(ConvertArgs, argv, ConvertArgs(), program, description)
    refuse_empty(argv, args, ("base", "tokenizer", "chat_template"))
    convert(args)
