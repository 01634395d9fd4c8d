"""Text to tokens, token files, batches, and the built-in stories.

Start with ``load_data``: it finds the text, loads or trains the tokenizer, and opens the tokens.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llama_jax.cli.flags import unescape
from llama_jax.cli.progress import bytes_text, working
from llama_jax.config import DataArgs
from llama_jax.data.encode import prepare
from llama_jax.data.origin import Origin, difference
from llama_jax.data.sources import files_as_before, find_files
from llama_jax.data.stories import story
from llama_jax.data.text import Corpus, check_separator, separator_bytes
from llama_jax.data.tokens import MANIFEST, UNFINISHED, TokenSet, open_tokens, read_manifest, sha256
from llama_jax.errors import UserError
from llama_jax.storage.files import write_atomically
from llama_jax.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "Data", "Origin", "Text", "difference", "encode_text", "find_text", "load_data", "open_data", "open_tokens", "write_stories",
]  # fmt: skip

# A vocabulary is trained on at most this many bytes, spread evenly over the text.
VOCABULARY_BYTES = 30_000_000
STORY_SEPARATOR = "\n\n"
STORIES_SEED = 0


@dataclass(frozen=True)
class Data:
    """The data of a run.

    ``floor`` is the entropy of the text in bits per byte, if it is known (the built-in stories). ``notes`` are lines to
    print about what was left out and other surprises.
    """

    tokens: TokenSet
    tokenizer: Tokenizer
    source: str
    floor: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """A text whose files were found and not yet read."""

    corpus: Corpus
    source: str
    floor: float | None = None
    notes: tuple[str, ...] = ()


def load_data(
    args: DataArgs,
    folder: Path,
    tokenizer_path: Path,
    workers: int | None = None,
    begun: bool = False,
    began_with: Origin | None = None,
) -> Data:
    """Return the tokens and the tokenizer of a run, which are made first if needed.

    Arguments:
        args: the text, its tokenizer and the split.
        folder: where tokens are kept.
        tokenizer_path: where the tokenizer is kept.
        workers: number of encoding threads. None: one per core.
        begun: whether the run has begun. Such a run keeps its text and its tokenizer.
        began_with: what they were. None: as the manifest in ``folder`` says.

    Raises UserError if the text or the tokenizer cannot be found, or has changed since the run began.
    """
    prepared = Path(args.filepath).expanduser()
    if args.filepath and read_manifest(prepared) is not None:
        data = _load_prepared(args, prepared, folder, tokenizer_path, begun, began_with)
    else:
        text = find_text(args, folder, begun)
        data = encode_text(args, text, folder, tokenizer_path, workers, begun, began_with)
    data.tokens.check_in_background()
    return data


def open_data(args: DataArgs, folder: Path, tokenizer_path: Path) -> Data:
    """Open the data that another process's ``load_data`` made from the same arguments.

    It writes nothing and reads no text.

    Raises UserError if the data are missing because ``folder`` is not on a shared disk.
    """
    prepared = Path(args.filepath).expanduser()
    source = prepared if args.filepath and read_manifest(prepared) is not None else folder
    return Data(open_tokens(source), Tokenizer(tokenizer_path), args.filepath or f"{args.stories:,} built-in stories")


def find_text(args: DataArgs, folder: Path, begun: bool = False) -> Text:
    """Return the text that ``args`` name. Built-in stories are first written to a file under ``folder``.

    A run that has ``begun`` accepts its text even if it looks like something else. Raises UserError if there is no
    text.
    """
    if not args.filepath:
        with working(f"writing {args.stories:,} stories"):
            path, floor = write_stories(folder / "stories.txt", args.stories)
        corpus = Corpus([path], separator_bytes(STORY_SEPARATOR), args.train_size)
        return Text(corpus, f"{args.stories:,} built-in stories", floor)
    as_text = args.as_text or begun
    _check_finished(Path(args.filepath).expanduser())
    paths, notes = find_files(args.filepath, as_text=as_text)
    corpus = Corpus(paths, separator_bytes(args.separator), args.train_size, any_bytes=as_text)
    return Text(corpus, args.filepath, notes=tuple(f"{args.filepath}: {note}" for note in notes))


def encode_text(
    args: DataArgs,
    text: Text,
    folder: Path,
    tokenizer_path: Path,
    workers: int | None = None,
    begun: bool = False,
    began_with: Origin | None = None,
) -> Data:
    """Encode a text into ``folder``, with a tokenizer at ``tokenizer_path``; see ``load_data``."""
    known = _known(folder, begun, began_with)
    with working(f"reading {text.source}, {bytes_text(text.corpus.bytes)}"):
        text.corpus.digest()
        if begun and known is not None:
            text = _check_text(known, text, args)
        else:
            _check_has_text(text)
            check_separator(text.corpus, text.source)
    tokenizer = _tokenizer(args, text, tokenizer_path, known, begun)
    trained = 0 if args.tokenizer_model_path else args.vocab_size
    expected = known if begun else None
    tokens = prepare(text.corpus, tokenizer, folder, workers or os.cpu_count() or 1, trained, text.source, expected)
    return Data(tokens, tokenizer, text.source, text.floor, text.notes)


def write_stories(path: Path, count: int) -> tuple[Path, float]:
    """Write ``count`` built-in stories to a file next to ``path`` named by the count.

    Return it and their bits per byte.
    """
    path = path.with_name(f"{path.stem}-{count}{path.suffix}")
    stories = [story(STORIES_SEED, i) for i in range(count)]
    text = STORY_SEPARATOR.join(s.text for s in stories).encode()
    if not path.exists() or path.read_bytes() != text:
        write_atomically(path, text)
    return path, sum(s.bits for s in stories) / sum(len(s.text) for s in stories)


def _check_finished(folder: Path) -> None:
    """Raise UserError on a folder that holds tokens without a manifest, and no text."""
    unfinished = (folder / UNFINISHED).exists()
    if not (unfinished or any(folder.glob("train.bin*"))) or any(folder.rglob("*.txt")):
        return
    if unfinished:
        raise UserError(
            f"data.filepath: expected a text or prepared tokens, found unfinished tokens in {folder}: prepare is still running "
            "there, or was stopped; run it again"
        )
    raise UserError(
        f"data.filepath: expected a text or prepared tokens, found token files without {MANIFEST} in {folder}: they are "
        "unfinished, or another program made them; give the original text"
    )


def _check_has_text(text: Text) -> None:
    """Raise UserError if the training part holds nothing but white space."""
    parts = list(itertools.islice(text.corpus.parts("train"), 1))
    if not parts or not any(part.text.strip() for part in text.corpus.parts("train")):
        found = "nothing but white space" if parts else "none"
        raise UserError(
            f"data.filepath: expected text to train on, found {found} in {text.source} before the held-out part; give more text, "
            "or a larger data.train_size"
        )


def _known(folder: Path, begun: bool, began_with: Origin | None) -> Origin | None:
    """Return the origin of the tokens of an earlier start, or None."""
    if begun and began_with is not None:
        return began_with
    try:
        manifest = read_manifest(folder)
    except UserError:
        if begun:
            raise  # the manifest was the only record of the run's text
        return None
    if manifest is not None:
        return manifest.origin
    if begun:
        print(
            f"warning: {folder / MANIFEST}: expected a description of the run's text, found no such file; it is unknown whether "
            "the text has changed",
            flush=True,
        )
    return None


def _check_text(known: Origin, text: Text, args: DataArgs) -> Text:
    """Return the text of a run that has begun. Raises UserError if it has changed."""
    corpus = text.corpus
    if not known.files and args.filepath and corpus.digest() != known.text_sha256:
        before = replace(corpus, paths=files_as_before(args.filepath))
        if before.digest() == known.text_sha256:
            return replace(text, corpus=before)
    now = Origin(
        text.source, corpus.files, corpus.digest(), corpus.train_size, corpus.separator.decode(),
        trained_vocab_size=known.trained_vocab_size,
    )  # fmt: skip
    _refuse(difference(known, now))
    return text


def _refuse(found: str) -> None:
    """Raise UserError if ``found``, a description of how the text has changed, is not empty."""
    if found:
        raise UserError(
            f"data.filepath: expected the text, separator and train_size that the run began with, found that {found}; choose "
            "another --train.save-dir, or go on from this run's weights with --train.init-from"
        )


def _tokenizer(args: DataArgs, text: Text, path: Path, known: Origin | None, begun: bool) -> Tokenizer:
    """Return the tokenizer that the user gives, the one at ``path`` if it still fits, or a new one."""
    given = Tokenizer(args.tokenizer_model_path) if args.tokenizer_model_path else None
    if (begun or _is_vocabulary_of(args, text.corpus, known)) and path.exists():
        kept = Tokenizer(path)
        if given is not None and given.model_bytes != kept.model_bytes:
            raise UserError(
                f"data.tokenizer_model_path: expected the tokenizer that {path} holds, found another in "
                f"{args.tokenizer_model_path}; choose another --train.save-dir"
            )
        if known is None or known.tokenizer_sha256 == sha256(kept.model_bytes):
            return kept
        if begun:
            raise UserError(
                f"{path}: expected the tokenizer that the run began with, found another, or a damaged one; restore it from a "
                "checkpoint, each of which has a copy"
            )
        print(
            f"warning: {path}: expected the tokenizer that made these tokens, found another: trained again", flush=True
        )
    if given is not None:
        made = _save(given, path)
    else:
        with working(f"training a vocabulary of {args.vocab_size:,} tokens"):
            made = train_tokenizer(_sentences(text.corpus), args.vocab_size, path)
    if begun and known is not None and known.tokenizer_sha256 not in ("", sha256(made.model_bytes)):
        path.unlink()
        raise UserError(
            f"{path}: expected the tokenizer that the run began with, found none, and a newly trained one differs; restore it "
            "from a checkpoint, each of which has a copy"
        )
    return made


def _is_vocabulary_of(args: DataArgs, corpus: Corpus, known: Origin | None) -> bool:
    """Return whether an earlier start trained its vocabulary on exactly this text and size."""
    return known is not None and (known.text_sha256, known.trained_vocab_size) == (corpus.digest(), args.vocab_size)


def _load_prepared(
    args: DataArgs, prepared: Path, folder: Path, path: Path, begun: bool, began_with: Origin | None
) -> Data:
    """Open tokens made by ``prepare``. The run gets copies of their tokenizer and manifest."""
    tokens, tokenizer = open_tokens(prepared), Tokenizer(prepared / "tokenizer.model")
    manifest = tokens.manifest
    if manifest.tokenizer_sha256 != sha256(tokenizer.model_bytes):
        raise UserError(
            f"{prepared}: expected the tokenizer.model that made these tokens, found another; prepare them again"
        )
    for name, asked in (("train_size", args.train_size), ("separator", unescape(args.separator))):
        made = getattr(manifest, name)
        if asked not in (made, getattr(DataArgs(), name)):
            raise UserError(
                f"data.{name}: expected {made!r}, with which the tokens in {prepared} were prepared, found {asked!r}; prepare them again"
            )
    others = [Path(args.tokenizer_model_path)] if args.tokenizer_model_path else []
    for other in [*others, *([path] if begun and path.exists() else [])]:
        if Tokenizer(other).model_bytes != tokenizer.model_bytes:
            raise UserError(
                f"data.filepath: expected tokens of {other}, found tokens of another tokenizer in {prepared}; "
                "prepare the text with that one"
            )
    known = _known(folder, begun, began_with)
    if begun and known is not None:
        _refuse(difference(known, manifest.origin))
    write_atomically(folder / MANIFEST, (prepared / MANIFEST).read_bytes())
    return Data(tokens, _save(tokenizer, path), str(prepared))


def _save(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    write_atomically(path, tokenizer.model_bytes)
    return tokenizer


def _sentences(corpus: Corpus) -> Iterator[str]:
    """Yield the text to train a vocabulary on: all of it, or evenly spread parts if it is large."""
    stride = max(1, corpus.cut // VOCABULARY_BYTES)
    for i, part in enumerate(corpus.parts("train")):
        if i % stride == 0:
            yield part.text
