"""Text to tokens, token files, batches, and the built-in stories.

``load_data`` is the way in: it finds the text, gets or trains the tokenizer, and maps the tokens.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_jax.config import DataArgs
from llama_jax.data.stories import story
from llama_jax.data.text import Corpus, find_files, separator_bytes
from llama_jax.data.tokens import Manifest, TokenSet, open_tokens, prepare, read_manifest, sha256, write_manifest
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

    @property
    def origin(self) -> dict[str, Any]:
        """What the tokens were made of, as a run and its checkpoints keep it."""
        manifest = asdict(self.tokens.manifest)
        return {
            name: manifest[name] for name in ("text_sha256", "tokenizer_sha256", "train_size", "separator", "tokens")
        }


def load_data(
    args: DataArgs, folder: Path, tokenizer_path: Path, workers: int | None = None, begun: bool = False
) -> Data:
    """Tokens and tokenizer for a run whose files lie under ``folder``; the tokenizer is kept as ``tokenizer_path``.

    A run that has ``begun`` keeps its text and its tokenizer. Raises UserError where these are others now, or where the text
    or the tokenizer cannot be had.
    """
    prepared = Path(args.filepath).expanduser()
    if args.filepath and read_manifest(prepared) is not None:
        return _load_prepared(args, prepared, folder, tokenizer_path, begun)
    floor = None
    if not args.filepath:
        path, floor = write_stories(folder / "stories.txt", args.stories)
        paths, separator, source = [path], STORY_SEPARATOR, f"{args.stories:,} built-in stories"
    else:
        paths, separator, source = find_files(args.filepath), args.separator, args.filepath
    corpus = Corpus(paths, separator_bytes(separator), args.train_size)
    if next(corpus.parts("train"), None) is None:
        raise UserError(f"data.filepath: expected text to train on, found none in {source} before the held-out part")
    digest = corpus.digest()
    known = read_manifest(folder)
    _check_text(digest, known, begun)
    tokenizer = _tokenizer(args, corpus, tokenizer_path, begun or _is_vocabulary_of(args, digest, known))
    trained = 0 if args.tokenizer_model_path else args.vocab_size
    tokens = prepare(corpus, tokenizer, folder, workers or os.cpu_count() or 1, trained)
    return Data(tokens, tokenizer, source, floor)


def open_data(args: DataArgs, folder: Path, tokenizer_path: Path) -> Data:
    """What another process's ``load_data`` made of the same arguments: nothing is written, nor the text read.

    Raises UserError where it is not there: ``folder`` is not on a disk that the processes share.
    """
    prepared = Path(args.filepath).expanduser()
    source = prepared if args.filepath and read_manifest(prepared) is not None else folder
    return Data(open_tokens(source), Tokenizer(tokenizer_path), args.filepath or f"{args.stories:,} built-in stories")


def write_stories(path: Path, count: int) -> tuple[Path, float]:
    """Write ``count`` built-in stories into a file beside ``path`` named for the count; returns it and their bits per byte."""
    path = path.with_name(f"{path.stem}-{count}{path.suffix}")
    stories = [story(STORIES_SEED, i) for i in range(count)]
    text = STORY_SEPARATOR.join(s.text for s in stories).encode()
    if not path.exists() or path.stat().st_size != len(text):
        write_atomically(path, text)
    return path, sum(s.bits for s in stories) / sum(len(s.text) for s in stories)


def _check_text(digest: str, known: Manifest | None, begun: bool) -> None:
    if begun and known is not None and known.text_sha256 != digest:
        raise UserError(
            "data.filepath: expected the text, separator and train_size that the run began with, found others; "
            "choose another --train.save-dir, or go on from this run's weights with --train.init-from"
        )


def _is_vocabulary_of(args: DataArgs, digest: str, known: Manifest | None) -> bool:
    """Whether an earlier start trained its vocabulary for just this text and size."""
    return known is not None and (known.text_sha256, known.trained_vocab_size) == (digest, args.vocab_size)


def _tokenizer(args: DataArgs, corpus: Corpus, path: Path, keep: bool) -> Tokenizer:
    """The one that the user gives, the one at ``path`` if it is to be kept, or a new one."""
    given = Tokenizer(args.tokenizer_model_path) if args.tokenizer_model_path else None
    if keep and path.exists():
        kept = Tokenizer(path)
        if given is not None and given.model_bytes != kept.model_bytes:
            raise UserError(
                f"data.tokenizer_model_path: expected the tokenizer that {path} holds, found another in "
                f"{args.tokenizer_model_path}; choose another --train.save-dir"
            )
        return kept
    return train_tokenizer(_sentences(corpus), args.vocab_size, path) if given is None else _save(given, path)


def _load_prepared(args: DataArgs, prepared: Path, folder: Path, path: Path, begun: bool) -> Data:
    """Tokens that ``prepare`` made, with their own tokenizer; the run keeps a copy of it, and of the manifest."""
    tokens, tokenizer = open_tokens(prepared), Tokenizer(prepared / "tokenizer.model")
    manifest = tokens.manifest
    if manifest.tokenizer_sha256 != sha256(tokenizer.model_bytes):
        raise UserError(
            f"{prepared}: expected the tokenizer.model that made these tokens, found another; prepare them again"
        )
    for name in ("train_size", "separator"):
        asked, made = getattr(args, name), getattr(manifest, name)
        if asked not in (made, getattr(DataArgs(), name)):
            raise UserError(
                f"data.{name}: expected {made!r}, as the tokens in {prepared} were prepared, found {asked!r}; prepare them again"
            )
    others = [Path(args.tokenizer_model_path)] if args.tokenizer_model_path else []
    for other in [*others, *([path] if begun and path.exists() else [])]:
        if Tokenizer(other).model_bytes != tokenizer.model_bytes:
            raise UserError(
                f"data.filepath: expected tokens of {other}, found tokens of another tokenizer in {prepared}; "
                "prepare the text with that one"
            )
    _check_text(manifest.text_sha256, read_manifest(folder), begun)
    write_manifest(folder, manifest)
    return Data(tokens, _save(tokenizer, path), str(prepared))


def _save(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    write_atomically(path, tokenizer.model_bytes)
    return tokenizer


def _sentences(corpus: Corpus) -> Iterator[str]:
    """Training text for a vocabulary: all of it, or evenly spread parts of a large one."""
    stride = max(1, corpus.cut // VOCABULARY_BYTES)
    for i, part in enumerate(corpus.parts("train")):
        if i % stride == 0:
            yield part.text
