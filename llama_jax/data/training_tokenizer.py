"""Trains a vocabulary ahead: ``python -m llama_jax.data train-tokenizer --filepath TEXT --output tokenizer.model``."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_jax.cli.flags import parse_flags
from llama_jax.cli.progress import bytes_text, working
from llama_jax.config import DataArgs
from llama_jax.data.finding import Text, find_text
from llama_jax.data.odd_bytes import replacement_warning
from llama_jax.data.reading import ReadingArgs, check_text, read_parts
from llama_jax.data.summary import skipped_warning
from llama_jax.data.tokens import find_prepared
from llama_jax.data.vocabulary import Sentences
from llama_jax.errors import UserError
from llama_jax.programs import typed
from llama_jax.storage.files import write_atomically
from llama_jax.storage.locations import on_disk
from llama_jax.tokenizer import Tokenizer, trained_model


@dataclass(frozen=True)
class TrainTokenizerArgs(ReadingArgs):
    """Train a BPE vocabulary on a text, as prepare and training do where none is given."""

    vocab_size: int = 32000
    """Vocabulary size, in tokens. A text with too few different pairs gives a smaller one."""
    output: str = ""
    """SentencePiece model to write, for example tokenizer.model. Another file there is never replaced."""
    train_size: float = DataArgs.train_size
    """Share of the text to train on, as in training. The rest is held out there, and has no part in the vocabulary.
    1: all of it, if the held-out text is one of its own."""


def main(argv: Sequence[str]) -> None:
    """Run the command line ``argv``."""
    program = f"{typed('data')} train-tokenizer"
    description = (
        f"Train a BPE vocabulary with LLaMA 2's settings: {program} --filepath TEXT --output tokenizer.model. "
        "Of a large text it takes a sample of 30 MB that is spread evenly. "
        "Then give the output as --tokenizer-model-path of prepare, or as --data.tokenizer-model-path of training."
    )
    train_vocabulary(parse_flags(TrainTokenizerArgs, argv, TrainTokenizerArgs(), program, description))


def train_vocabulary(args: TrainTokenizerArgs) -> None:
    """Write the vocabulary, and print what it was made of. Raises UserError, and changes nothing, if it cannot."""
    data_args = args.data_args(vocab_size=args.vocab_size, train_size=args.train_size)
    if not args.output:
        raise UserError("--output: expected a path, found none")
    output = on_disk(args.output, "--output")
    _check_free(output, args.vocab_size)
    if find_prepared(args.filepath) is not None:
        raise UserError(
            f"--filepath: expected a text, found tokens that are prepared already in {args.filepath}; their vocabulary is "
            "tokenizer.model there"
        )
    text = find_text(data_args, output.parent)
    check_text(text)
    sentences = Sentences(read.part for read in read_parts(text.corpus))
    lines = list(sentences)
    if not any(map(str.strip, lines)):
        found = "nothing but white space" if lines else "none"
        beside = " beside what is held out" if args.train_size < 1 else ""
        raise UserError(
            f"--filepath: expected text to train a vocabulary on, found {found} in {text.source}{beside}; give more text, or a "
            "larger --train-size"
        )
    with working(f"training a vocabulary of {args.vocab_size:,} tokens"):
        model = trained_model(lines, args.vocab_size)
    _report_oddities(text)
    is_new = _write(output, model)
    whole = "all" if sentences.taken == sentences.read else f"a sample of {bytes_text(sentences.taken)}"
    tokenizer = Tokenizer(output)
    if tokenizer.vocab_size < args.vocab_size:
        print(f"vocabulary: {args.vocab_size:,} was asked for, and the text has pairs for {tokenizer.vocab_size:,}")
    held_out = f"; {100 * (1 - args.train_size):.3g}% is held out" if args.train_size < 1 else ""
    print(f"trained on {whole} of {bytes_text(sentences.read)} of text{held_out}")
    print(f"{output}: {'' if is_new else 'holds this vocabulary already, '}{tokenizer.vocab_size:,} tokens")


def _check_free(output: Path, vocab_size: int) -> None:
    """Raise UserError if ``output`` certainly is something else than the vocabulary that is asked for."""
    if not output.exists():
        folder = next(folder for folder in output.absolute().parents if folder.exists())
        if not folder.is_dir():
            raise UserError(f"--output: expected a file in a folder, found that {folder} is a file; choose another")
        if not os.access(folder, os.W_OK):  # told before hours of reading
            raise UserError(
                f"--output: expected a folder that can be written, found that {folder} cannot; choose another --output"
            )
        return
    if output.is_dir():
        raise UserError(
            f"--output: expected a file to write, found the folder {output}; name a file in it, such as "
            f"{output / 'tokenizer.model'}"
        )
    try:
        size = Tokenizer(output).vocab_size
    except UserError:
        raise _is_taken(output, "something else than a vocabulary") from None
    if size > vocab_size:
        raise _is_taken(output, f"a vocabulary of {size:,} tokens")


def _write(output: Path, model: bytes) -> bool:
    """Write the model. Return whether it was not there. Raises UserError if something else is there by now."""
    if not output.exists():
        write_atomically(output, model)
        return True
    if output.read_bytes() != model:
        raise _is_taken(output, "another vocabulary")
    return False


def _is_taken(output: Path, found: str) -> UserError:
    return UserError(
        f"--output: expected a new file, or one with this vocabulary, found {found} in {output}; choose another --output, or "
        f"delete {output}"
    )


def _report_oddities(text: Text) -> None:
    """Print what was left out of the text, and what is odd about it."""
    corpus = text.corpus
    for line in (*text.notes, replacement_warning(corpus.replaced), skipped_warning(corpus.skipped)):
        if line:
            print(line, file=sys.stderr)
