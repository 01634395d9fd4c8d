"""Inspects a corpus: ``python -m llama_jax.data inspect --filepath TEXT [--tokenizer-model-path M] [--json]``."""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np

from llama_jax.cli.flags import parse_flags
from llama_jax.cli.progress import Progress
from llama_jax.config import DataArgs
from llama_jax.data.chats import Chats, count_chats, text_of_chats
from llama_jax.data.counting import HEAD_TOKENS, Documents, Texts, Tokens
from llama_jax.data.finding import Text, find_text
from llama_jax.data.lost import Losses
from llama_jax.data.manifest import TOKENIZER, read_manifest
from llama_jax.data.parts import SPLITS
from llama_jax.data.pretokenized import find_pretokenized, open_pretokenized
from llama_jax.data.reading import Read, ReadingArgs, check_text, files_of, read_parts
from llama_jax.data.rendering import draw_lengths, text_of
from llama_jax.data.report import Encoded, Report, report_of_text, report_of_tokens
from llama_jax.data.stream import TokenStream
from llama_jax.data.summary import skipped_warning
from llama_jax.data.token_files import JoinedStream
from llama_jax.data.tokens import TokenSet, find_prepared, open_tokens
from llama_jax.errors import UserError, quoted
from llama_jax.programs import typed
from llama_jax.storage.files import is_address
from llama_jax.storage.locations import on_disk
from llama_jax.tokenizer import Tokenizer, is_kept, kept_tokenizer

# Limits of a batch, which is encoded at once: parts and bytes.
PARTS_AT_ONCE, BYTES_AT_ONCE = 2048, 1 << 22
# Tokens that are read at once.
TOKENS_AT_ONCE = 1 << 20
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class InspectArgs(ReadingArgs):
    """Count what a corpus holds, all of it: nothing is held out. A folder of prepared tokens can be inspected, too."""

    tokenizer_model_path: str = ""
    """Path of a tokenizer (a file, or a folder of its files), by which tokens are counted. Empty: count bytes alone."""
    json: bool = False
    """Print one JSON object on standard output, and all else on standard error."""
    picture: str = ""
    """Picture of the lengths of the documents to draw, a file named *.png. Empty: none."""
    seed: int = 0
    """Seed of the random documents."""


def main(argv: Sequence[str]) -> None:
    """Run the command line ``argv``."""
    program = f"{typed('data')} inspect"
    description = (
        f"Say what a corpus holds, and what looks wrong with it: {program} --filepath TEXT --tokenizer-model-path M. "
        "It prints documents, bytes, tokens, their lengths, exact copies, the scripts of its characters, the longest documents and "
        "some random ones. Warnings go to standard error."
    )
    args = parse_flags(InspectArgs, argv, InspectArgs(), program, description)
    data_args = args.data_args(train_size=1.0, tokenizer_model_path=args.tokenizer_model_path)
    picture = _picture_path(args.picture) if args.picture else None
    # With --json, standard output is for the report alone.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        if (chats := _chats_of(data_args)) is not None:
            found = count_chats(chats)
        else:
            found, report = None, inspect(data_args, args.seed)
    if found is not None:
        print(json.dumps(found) if args.json else text_of_chats(found, data_args.filepath), flush=True)
        return
    for line in (*report.notes, *(f"warning: {warning}" for warning in report.warnings)):
        print(line, file=sys.stderr)
    print(json.dumps(report.to_dict()) if args.json else text_of(report), flush=True)
    if picture is not None:  # after the report, which a failure must not cost
        _draw(picture, report, sys.stderr if args.json else sys.stdout)


def _draw(picture: Path, report: Report, stream: TextIO) -> None:
    if report.documents is None:
        print(f"warning: {picture}: not drawn, as no lengths are known", file=sys.stderr)
        return
    draw_lengths(picture, report)
    print(f"lengths drawn in {picture}", file=stream)


def inspect(args: DataArgs, seed: int = 0) -> Report:
    """Return the report about the corpus, or the tokens, that ``args`` name.

    Raises UserError if there is none, if it cannot be read, or if it has no document.
    """
    if (prepared := find_prepared(args.filepath)) is not None:
        where = args.filepath if is_address(args.filepath) else prepared
        return _inspect_tokens(args, open_tokens(where), _tokenizer_of(args, prepared), seed)
    if files := find_pretokenized(args):
        return _inspect_tokens(args, open_pretokenized(args, files), Tokenizer(args.tokenizer_model_path), seed)
    tokenizer = Tokenizer(args.tokenizer_model_path) if args.tokenizer_model_path else None
    return _inspect_text(find_text(args, Path()), tokenizer, seed)


def _chats_of(args: DataArgs) -> Chats | None:
    """Return the corpus of conversations that ``args`` name, None if they name something else."""
    if find_prepared(args.filepath) is not None or find_pretokenized(args):
        return None
    corpus = find_text(replace(args, bad_records="skip"), Path()).corpus
    return corpus if isinstance(corpus, Chats) else None


def _picture_path(name: str) -> Path:
    """Return where to draw. Raises UserError if something else than a picture is there."""
    path = on_disk(name, "--picture")
    if path.suffix.lower() != ".png":
        raise UserError(f"--picture: expected a name that ends in .png, found {name}; name it so")
    if path.exists() and not (path.is_file() and _begins(path, len(PNG)) == PNG):
        raise UserError(f"--picture: expected a new file, or a picture to replace, found something else in {path}")
    if not path.parent.is_dir():
        raise UserError(f"--picture: expected a file in a folder, found no folder {path.parent}; create it first")
    return path


def _begins(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def _inspect_text(text: Text, tokenizer: Tokenizer | None, seed: int) -> Report:
    corpus = text.corpus
    check_text(text)
    texts = Texts(Documents(seed))
    encoded = None
    if tokenizer is not None:
        encoded = Encoded(tokenizer, Tokens(tokenizer.vocab_size), Losses(tokenizer, corpus.text_bytes))
    for batch in _batches(read_parts(corpus)):
        parts = [read.part for read in batch]
        lengths = [part.size for part in parts]
        if encoded is not None:
            lengths = encoded.add(parts)
        texts.add(parts, [(read.file, read.record) for read in batch], lengths)
    if not texts.documents.count:
        why = f" ({skipped_warning(corpus.skipped)})" if skipped_warning(corpus.skipped) else ""
        raise UserError(
            f"data.filepath: expected text, found no document in {text.source}{why}; give a text, or its field"
        )
    return report_of_text(text, files_of(corpus), texts, encoded, seed)


def _batches(reads: Iterable[Read]) -> Iterator[list[Read]]:
    """Yield the parts of a text in their order, some at a time."""
    batch: list[Read] = []
    size = 0
    for read in reads:
        batch.append(read)
        size += read.part.size
        if len(batch) >= PARTS_AT_ONCE or size >= BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenizer_of(args: DataArgs, prepared: Path) -> Tokenizer:
    """Return the tokenizer of prepared tokens. Raises UserError if options contradict them."""
    for name in ("separator", "text_field"):
        if getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')}: expected none, as {args.filepath} holds tokens, found {quoted(getattr(args, name))}; leave it out"
            )
    path = prepared / TOKENIZER
    is_ours = is_kept(path) or not args.tokenizer_model_path
    tokenizer = kept_tokenizer(path) if is_ours else Tokenizer(args.tokenizer_model_path)
    given = Tokenizer(args.tokenizer_model_path) if args.tokenizer_model_path else tokenizer
    manifest = read_manifest(prepared)
    if manifest is not None and {t.digest for t in (tokenizer, given)} != {manifest.tokenizer_sha256}:
        raise UserError(
            f"--tokenizer-model-path: expected the tokenizer that made the tokens in {args.filepath}, found another; leave it out"
        )
    return tokenizer


def _inspect_tokens(args: DataArgs, tokens: TokenSet, tokenizer: Tokenizer, seed: int) -> Report:
    manifest = tokens.manifest
    documents = Documents(seed) if any(manifest.documents.values()) else None
    encoded = Encoded(tokenizer, Tokens(tokenizer.vocab_size))
    is_paired = tokenizer.bos_id == tokenizer.eos_id and not manifest.made_by
    with Progress("reading", sum(manifest.tokens.values()), "tokens") as progress:
        for file, split in enumerate(SPLITS):
            record = 0
            for ids, starts, ends in _documents(getattr(tokens, split), tokenizer.bos_id, is_paired):
                row = ids[(ids != tokenizer.bos_id) & (ids != tokenizer.eos_id)]
                encoded.tokens.add(row)
                progress.update(len(ids))
                if documents is None:
                    continue
                if starts:
                    record += 1
                    documents.start(file, record, row[:HEAD_TOKENS].tolist())
                documents.extend(len(row), row.tobytes())
                if ends:
                    documents.end()
    return report_of_tokens(args.filepath, manifest, documents, encoded, seed)


def _documents(stream: TokenStream, bos_id: int, is_paired: bool) -> Iterator[tuple[np.ndarray, bool, bool]]:
    """Yield pieces of the documents of a stream, integers [tokens], and whether each begins and ends a document.

    A document begins where the stream does, where an index of its files says so, or else with BOS. ``is_paired``: the
    tokenizer has one mark for both ends of a document.
    """
    known = stream.starts if isinstance(stream, JoinedStream) else None
    seen = 0
    waiting: tuple[np.ndarray, bool] | None = None
    for start in range(0, stream.size, TOKENS_AT_ONCE):
        block = stream[start : start + TOKENS_AT_ONCE]
        begins = (
            np.flatnonzero(block == bos_id)
            if known is None
            else known[(known >= start) & (known < start + len(block))] - start
        )
        seen, begins = seen + len(begins), begins[seen % 2 :: 2] if is_paired else begins
        firsts = {0} if start == 0 else set()
        firsts.update(begins.tolist())
        for first, last in itertools.pairwise(sorted(firsts | {0, len(block)})):
            if waiting is not None:
                yield *waiting, first in firsts
            waiting = block[first:last], first in firsts
    if waiting is not None:
        yield *waiting, True
