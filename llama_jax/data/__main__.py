"""Prepare tokens ahead of training: ``python -m llama_jax.data prepare --filepath TEXT --tokenizer-model-path M --output DIR``."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from llama_jax.config import DataArgs
from llama_jax.data import load_data
from llama_jax.data.text import replacement_warning
from llama_jax.data.tokens import read_manifest
from llama_jax.errors import UserError, run_command
from llama_jax.flags import parse_flags
from llama_jax.storage import on_disk


@dataclass(frozen=True)
class PrepareArgs:
    """Encode a text once; train.py then takes the output folder as --data.filepath."""

    filepath: str = ""
    """A text file, a folder (its *.txt files, at any depth) or a glob."""
    tokenizer_model_path: str = ""
    """A SentencePiece model. Empty: a BPE vocabulary is trained on the text."""
    output: str = ""
    """The folder to write: train.bin, eval.bin, tokenizer.model, manifest.json."""
    vocab_size: int = DataArgs.vocab_size
    """Size of the vocabulary when a tokenizer is trained, in tokens."""
    separator: str = ""
    """What stands between two documents in a file. Empty: a file is a document."""
    train_size: float = DataArgs.train_size
    """Share of the text's bytes that trains."""
    workers: int = os.cpu_count() or 1
    """Threads that encode."""


def main() -> None:
    """Run the command line."""
    argv = sys.argv[1:]
    if argv[:1] != ["prepare"] and argv[:1] != ["--help"]:
        raise UserError(f"llama_jax.data: expected the command prepare, found {' '.join(argv[:1]) or 'none'}")
    args = parse_flags(
        PrepareArgs, argv[argv[:1] == ["prepare"] :], PrepareArgs(), "python -m llama_jax.data prepare", __doc__ or ""
    )
    for name in ("filepath", "output"):
        if not getattr(args, name):
            raise UserError(f"--{name}: expected a path, found none")
    if args.workers < 1:
        raise UserError(f"--workers: expected 1 or more, found {args.workers}")
    data_args = DataArgs(args.filepath, args.train_size, args.tokenizer_model_path, args.vocab_size, args.separator)
    data_args.check()
    if read_manifest(Path(args.filepath)) is not None:
        raise UserError(f"--filepath: expected a text, found tokens that are prepared already in {args.filepath}")
    output = on_disk(args.output, "--output")
    data = load_data(data_args, output, output / "tokenizer.model", workers=args.workers)
    manifest = data.tokens.manifest
    if manifest.replaced_sequences:
        print(replacement_warning(manifest.replaced_sequences), file=sys.stderr)
    print(
        f"{output}: {manifest.tokens['train']:,} tokens to train on, {manifest.tokens['eval']:,} held out, "
        f"vocabulary {data.tokenizer.vocab_size:,}"
    )


if __name__ == "__main__":
    run_command(main)
