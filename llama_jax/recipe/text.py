"""Counts a text: its bytes, what a vocabulary makes of them, and how predictable it is. Large ones are sampled."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llama_jax.cli.progress import working
from llama_jax.config import DataArgs
from llama_jax.data.corpus import WithHeldOut
from llama_jax.data.finding import find_text, is_chats
from llama_jax.data.manifest import TOKENIZER
from llama_jax.data.parts import AnyCorpus, Part, Unit
from llama_jax.data.pretokenized import find_pretokenized, open_pretokenized
from llama_jax.data.stream import TokenStream
from llama_jax.data.token_files import JoinedStream
from llama_jax.data.tokens import TokenSet, find_prepared, open_tokens, spread
from llama_jax.data.vocabulary import Sentences
from llama_jax.errors import UserError
from llama_jax.recipe.laws import TextLevel
from llama_jax.recipe.level import compressed_level, counted_level, frequency_level
from llama_jax.tokenizer import Tokenizer, kept_tokenizer, train_tokenizer

# At most so many bytes are read of a text to train on and of a held-out one, in pieces spread over it.
SAMPLE_BYTES, HELD_OUT_BYTES, PIECE_BYTES = 1 << 21, 1 << 18, 1 << 17
# The vocabularies to choose from: the power of two nearest to so many times the square root of the text's bytes.
SMALLEST, LARGEST, BY_ROOT = 512, 32_768, 2.5
# A sample of tokens is decoded in so many pieces.
TOKENS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Counted:
    """The numbers that are known of a text before training."""

    source: str
    train_bytes: float
    vocab_size: int
    """Tokens of the vocabulary. Of a small text they may be fewer than data.vocab_size, which it cannot fill."""
    bytes_per_token: float
    level: TextLevel
    sampled: int
    """Bytes that were read to count the text."""
    trains: int = 0
    """data.vocab_size of the vocabulary that training makes of the text. 0: a tokenizer is given."""
    eval_tokens: float = 0.0
    notes: tuple[str, ...] = ()
    frequencies: float = math.inf
    """Bits per byte of the held-out text for who knows how often each token occurs, and nothing of what precedes it."""

    @property
    def train_tokens(self) -> float:
        """The number of tokens to train on, about."""
        return self.train_bytes / self.bytes_per_token


@dataclass(frozen=True)
class _Sample:
    """Parts of a text to train on and of a held-out one, and how many bytes both have in all."""

    train: list[Part]
    eval: list[Part]
    train_bytes: float
    eval_bytes: float
    whole: bool = False
    """Whether all of the text to train on is in the sample."""


def count_text(args: DataArgs, vocab_is_given: bool, within: float) -> Counted:
    """Count the text that ``args`` name.

    vocab_is_given: data.vocab_size is kept. Else a vocabulary serves the text, or the bytes that a run reads if these
    are fewer, ``within``.

    Raises UserError if there is no such text, if nothing can be trained on it, or if it is conversations or a mixture.
    """
    if args.mixture:
        raise UserError("data.mixture: expected one text for a recipe, found a mixture; give one with --data.filepath")
    with tempfile.TemporaryDirectory() as folder, working(f"counting {args.filepath or 'the built-in stories'}"):
        if (prepared := find_prepared(args.filepath)) is not None:
            tokens = open_tokens(Path(args.filepath).expanduser() if prepared.exists() else prepared, args.cache_gb)
            return _of_tokens(args, tokens, kept_tokenizer(prepared / TOKENIZER))
        if files := find_pretokenized(args):
            return _of_tokens(args, open_pretokenized(args, files), Tokenizer(args.tokenizer_model_path))
        text = find_text(args, Path(folder))
        if is_chats(text):
            raise UserError(
                f"data.filepath: expected a text for a recipe, found conversations in {text.source}; they tune a model that is "
                "trained: --train.init-from"
            )
        sample = _sample_of(text.corpus)
        if not any(part.text.strip() for part in sample.train):
            raise UserError(f"data.filepath: expected text to train on, found none in {text.source}; give more text")
        if args.tokenizer_model_path:
            tokenizer = Tokenizer(args.tokenizer_model_path)
        else:
            size = args.vocab_size if vocab_is_given else vocabulary_for(min(sample.train_bytes, within))
            tokenizer = train_tokenizer(Sentences(sample.train), size, Path(folder) / TOKENIZER)
            args = replace(args, vocab_size=size)
    counted = _counted(args, text.source, sample, tokenizer)
    return replace(counted, notes=text.notes + counted.notes)


def vocabulary_for(train_bytes: float) -> int:
    """Return the size of a vocabulary for so many bytes of text: 2,048 for a megabyte, 32,768 from 90 MB on."""
    size = SMALLEST
    while size < LARGEST and 2 * size * size <= BY_ROOT**2 * train_bytes:  # up to the geometric mean with its double
        size *= 2
    return size


def _counted(args: DataArgs, source: str, sample: _Sample, tokenizer: Tokenizer) -> Counted:
    """Return what is known of a text, by a sample of it and a tokenizer."""
    train, held_out = _joined(sample.train), _joined(sample.eval)
    notes: tuple[str, ...] = ()
    seen = _encoded(tokenizer, sample.train)
    ids, per_token = _encoded(tokenizer, sample.eval) if sample.eval else seen
    if not held_out:
        cut = int(0.9 * len(train))
        train, held_out = train[:cut], train[cut:]
        notes = ("nothing is held out, so the loss is that which the last tenth of the sample would have",)
    trains = 0 if args.tokenizer_model_path else args.vocab_size
    vocab_size = tokenizer.vocab_size if sample.whole or not trains else trains
    if vocab_size < trains:
        notes += (f"the text cannot fill a vocabulary of {trains:,} tokens, and gets one of {vocab_size:,}",)
    level = TextLevel(counted_level(train, held_out), compressed_level(train, held_out))
    return Counted(
        source, sample.train_bytes, vocab_size, per_token, level,
        int(_size(sample.train) + _size(sample.eval)), trains, sample.eval_bytes / per_token, notes,
        frequency_level(seen[0], ids, tokenizer.vocab_size) / per_token,
    )  # fmt: skip


def _encoded(tokenizer: Tokenizer, parts: Sequence[Part]) -> tuple[np.ndarray, float]:
    """Return the ids of parts, and how many bytes a token of them has."""
    ids, _ = tokenizer.encode_batch([part.text for part in parts], [part.starts for part in parts])
    marks = sum(part.starts + part.ends for part in parts)  # BOS and EOS
    return np.asarray(ids), sum(part.size for part in parts) / max(1, len(ids) + marks)


def _joined(parts: Sequence[Part]) -> bytes:
    return "".join(part.text for part in parts).encode(errors="replace")


def _sample_of(corpus: AnyCorpus) -> _Sample:
    """Read a sample of a text: all of a small one, else pieces that are spread evenly over it."""
    if isinstance(corpus, WithHeldOut):
        apart = [(corpus.train, "train", corpus.train, 1.0), (corpus.eval, "train", corpus.eval, 1.0)]
    else:
        share = corpus.train_size
        apart = [(corpus, "train", corpus, share), (corpus, "eval", corpus, 1 - share)]
    if corpus.held_out == "documents":  # one reading finds documents of both splits
        parts, whole = _parts(corpus, corpus.units(PIECE_BYTES), ("train", "eval"), SAMPLE_BYTES)
        read = [(parts["train"], whole), (parts["eval"], whole)]
    else:
        read = []
        for (each, split, _, _), most in zip(apart, (SAMPLE_BYTES, HELD_OUT_BYTES), strict=True):
            units = [unit for unit in each.units(PIECE_BYTES) if unit.split in ("", split)]
            parts, whole = _parts(each, units, (split,), most)
            read.append((parts[split], whole))
    sizes = [
        _size(parts) if whole else each.text_bytes * share
        for (parts, whole), (_, _, each, share) in zip(read, apart, strict=True)
    ]
    return _Sample(read[0][0], read[1][0], sizes[0], sizes[1], read[0][1])


def _size(parts: Sequence[Part]) -> float:
    return float(sum(part.size for part in parts))


def _parts(
    corpus: AnyCorpus, units: Sequence[Unit], splits: Sequence[str], most: int
) -> tuple[dict[str, list[Part]], bool]:
    """Return about ``most`` bytes of parts by split, out of units spread over all, and whether they are all."""
    found: dict[int, list[tuple[str, Part]]] = {}
    size = 0
    for i in spread(len(units)) if units else ():
        if size >= most:
            break
        found[i] = list(corpus.read(units[i], splits))
        size += sum(part.size for _, part in found[i])
    read = [pair for i in sorted(found) for pair in found[i]]
    return {split: [part for of, part in read if of == split] for split in splits}, len(found) == len(units)


def _of_tokens(args: DataArgs, tokens: TokenSet, tokenizer: Tokenizer) -> Counted:
    """Return what is known of tokens that are prepared: a sample of them is decoded."""
    if tokens.manifest.chats is not None:
        raise UserError(f"data.filepath: expected a text for a recipe, found conversations in {args.filepath}")

    train, held_out = (
        list(_decoded(stream, tokenizer, most))
        for stream, most in ((tokens.train, SAMPLE_BYTES), (tokens.eval, HELD_OUT_BYTES))
    )
    known = tokens.manifest.text_bytes
    _, per_token = _encoded(tokenizer, held_out or train)
    sizes = [float(known[split] or tokens.manifest.tokens[split] * per_token) for split in ("train", "eval")]
    given = replace(args, tokenizer_model_path=args.tokenizer_model_path or "its own")
    return _counted(given, args.filepath, _Sample(train, held_out, sizes[0], sizes[1]), tokenizer)


def _decoded(stream: TokenStream | JoinedStream, tokenizer: Tokenizer, most: int) -> Iterator[Part]:
    """Yield the text of pieces of a stream of tokens, about ``most`` bytes, spread over it."""
    pieces = -(-stream.size // TOKENS_AT_ONCE)
    count = min(pieces, max(1, most // (4 * TOKENS_AT_ONCE)))
    for i in range(count):
        start = i * pieces // count * TOKENS_AT_ONCE
        text = tokenizer.decode(stream[start : start + TOKENS_AT_ONCE].tolist())
        yield Part(text, len(text.encode(errors="replace")), False, False)
