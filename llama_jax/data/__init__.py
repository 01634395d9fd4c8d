"""Text to tokens, token files, batches, and the built-in stories.

``load_data`` is the way in: it finds the text, gets or trains the tokenizer, and maps the tokens.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_jax.config import DataArgs
from llama_jax.data.stories import story
from llama_jax.data.text import Corpus, find_files, separator_bytes
from llama_jax.data.tokens import TokenSet, open_tokens, prepare, read_manifest, sha256
from llama_jax.errors import UserError
from llama_jax.files import write_atomically
from llama_jax.tokenizer import Tokenizer, train_tokenizer

# A vocabulary is trained on at most this many bytes of text, spread over the whole.
VOCABULARY_BYTES = 30_000_000
STORY_SEPARATOR = "\n\n"
STORIES_SEED = 0


@dataclass(frozen=True)
class Data:
    """What a run reads. floor: the text's own entropy, in bits per byte, where it is known (the built-in stories)."""

    tokens: TokenSet
    tokenizer: Tokenizer
    source: str
    floor: float | None = None


def load_data(args: DataArgs, folder: Path, tokenizer_path: Path, workers: int | None = None) -> Data:
    """Tokens and tokenizer for a run whose files lie under ``folder``.

    The tokenizer is ``tokenizer_path`` if that exists (an earlier start of the run), else
    args.tokenizer_model_path, else trained on the training text; then it is saved as ``tokenizer_path``.
    Raises UserError where the text or the tokenizer cannot be had.
    """
    floor = None
    if not args.filepath:
        path, floor = write_stories(folder / "stories.txt", args.stories)
        paths, separator, source = [path], STORY_SEPARATOR, f"{args.stories:,} built-in stories"
    else:
        source, separator = args.filepath, args.separator
        prepared = Path(args.filepath)
        if read_manifest(prepared) is not None:
            return Data(open_tokens(prepared), _prepared_tokenizer(prepared, tokenizer_path), source)
        paths = find_files(args.filepath)
    corpus = Corpus(paths, separator_bytes(separator), args.train_size)
    tokenizer = _tokenizer(args, corpus, tokenizer_path)
    tokens = prepare(corpus, tokenizer, folder, workers or os.cpu_count() or 1)
    if tokens.manifest.tokens["train"] < 2:
        raise UserError(f"data.filepath: expected text to train on, found none in {args.filepath}")
    return Data(tokens, tokenizer, source, floor)


def write_stories(path: Path, count: int) -> tuple[Path, float]:
    """Write ``count`` built-in stories into a file beside ``path`` named for the count; returns it and their bits per byte."""
    path = path.with_name(f"{path.stem}-{count}{path.suffix}")
    stories = [story(STORIES_SEED, i) for i in range(count)]
    text = STORY_SEPARATOR.join(s.text for s in stories).encode()
    if not path.exists() or path.stat().st_size != len(text):
        write_atomically(path, text)
    return path, sum(s.bits for s in stories) / len(text)


def _tokenizer(args: DataArgs, corpus: Corpus, path: Path) -> Tokenizer:
    if path.exists():
        tokenizer = Tokenizer(path)
        if args.tokenizer_model_path and Tokenizer(args.tokenizer_model_path).model_bytes != tokenizer.model_bytes:
            raise UserError(
                f"data.tokenizer_model_path: expected the tokenizer that {path} holds, found another in "
                f"{args.tokenizer_model_path}; choose another --train.save-dir"
            )
        return tokenizer
    if args.tokenizer_model_path:
        return _save(Tokenizer(args.tokenizer_model_path), path)
    return train_tokenizer(_sentences(corpus), args.vocab_size, path)


def _prepared_tokenizer(prepared: Path, path: Path) -> Tokenizer:
    """Prepared tokens carry their tokenizer; the run keeps a copy."""
    tokenizer = Tokenizer(prepared / "tokenizer.model")
    manifest = read_manifest(prepared)
    if manifest is None or manifest.tokenizer_sha256 != sha256(tokenizer.model_bytes):
        raise UserError(
            f"{prepared}: expected the tokenizer.model that made these tokens, found another; prepare them again"
        )
    if path.exists() and Tokenizer(path).model_bytes != tokenizer.model_bytes:
        raise UserError(f"data.filepath: expected tokens of {path}, found tokens of another tokenizer in {prepared}")
    return _save(tokenizer, path)


def _save(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    write_atomically(path, tokenizer.model_bytes)
    return tokenizer


def _sentences(corpus: Corpus) -> Iterator[str]:
    """Training text for a vocabulary: all of it, or evenly spread parts of a large one."""
    stride = max(1, corpus.cut // VOCABULARY_BYTES)
    for i, part in enumerate(corpus.parts("train")):
        if i % stride == 0:
            yield part.text
