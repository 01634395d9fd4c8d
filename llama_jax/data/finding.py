"""Finds the text that settings name, and its held-out text, and tells how each is read. Nothing is encoded yet."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llama_jax.cli.progress import working
from llama_jax.config import DataArgs
from llama_jax.data.beside import is_describing
from llama_jax.data.built_in_chats import write_chats
from llama_jax.data.chats import Chats
from llama_jax.data.corpus import Records, WithHeldOut, corpus_of
from llama_jax.data.corpus_file import CorpusFile
from llama_jax.data.manifest import MANIFEST, UNFINISHED
from llama_jax.data.origin import Origin
from llama_jax.data.parts import AnyCorpus
from llama_jax.data.places import Place
from llama_jax.data.sources import files_as_before, find_files
from llama_jax.data.stories import story
from llama_jax.data.text import Corpus, separator_bytes
from llama_jax.errors import UserError, quoted
from llama_jax.storage.files import write_atomically

STORY_SEPARATOR = "\n\n"
STORIES_SEED = 0


@dataclass(frozen=True)
class Text:
    """A text whose files were found and not yet read.

    ``eval_source`` is a held-out text of its own, as the user named it. ``of`` is what progress says of a source of a
    mixture, such as " of web.jsonl".
    """

    corpus: AnyCorpus
    source: str
    floor: float | None = None
    notes: tuple[str, ...] = ()
    eval_source: str = ""
    of: str = ""


def is_chats(text: Text) -> bool:
    """Return whether a text is conversations, which training alone reads."""
    return isinstance(text.corpus.train if isinstance(text.corpus, WithHeldOut) else text.corpus, Chats)


def find_text(args: DataArgs, folder: Path, begun: bool = False) -> Text:
    """Return the text that ``args`` name. Built-in stories are first written to a file under ``folder``.

    A run that has ``begun`` accepts its text even if it looks like something else. Raises UserError if there is no
    text, or if options contradict what it is.
    """
    if not args.filepath and args.chats:
        return _built_in_chats(args, folder, begun)
    if not args.filepath:
        for name in ("eval_filepath", "text_field"):
            if getattr(args, name):
                raise UserError(
                    f"data.{name}: expected none with the built-in stories, found {quoted(getattr(args, name))}; name a text"
                )
        # The settings of such a run tell the stories' own separator.
        if separator_bytes(args.separator) not in (b"", STORY_SEPARATOR.encode()) and not begun:
            raise UserError(
                f"data.separator: expected none with the built-in stories, found {quoted(args.separator)}; name a text"
            )
        with working(f"writing {args.stories:,} stories"):
            path, floor = write_stories(folder / "stories.txt", args.stories)
        corpus = Corpus([path], separator_bytes(STORY_SEPARATOR), args.train_size)
        return Text(corpus, f"{args.stories:,} built-in stories", floor)
    if "-" in (args.filepath, args.eval_filepath):
        raise UserError(
            "data.filepath: expected a path, found -; prepare alone reads standard input (./- is a file of that name)"
        )
    _check_finished(Path(args.filepath).expanduser())
    try:
        return _found_text(args, args.as_text)
    except UserError:
        if not begun:
            raise
        return _found_text(args, as_text=True)


def _built_in_chats(args: DataArgs, folder: Path, begun: bool) -> Text:
    """Write the built-in conversations to files under ``folder``, and return them as a text with its held-out text."""
    for name in ("eval_filepath", "text_field"):
        if getattr(args, name):
            raise UserError(
                f"data.{name}: expected none with the built-in conversations, found {quoted(getattr(args, name))}; name a file"
            )
    with working(f"writing {args.chats:,} conversations"):
        train, held_out = write_chats(folder, args.chats)
    found = find_text(replace(args, filepath=str(train), eval_filepath=str(held_out)), folder, begun)
    return replace(found, source=f"{args.chats:,} built-in conversations")


def _found_text(args: DataArgs, as_text: bool, by_name: bool = True) -> Text:
    """Find the text of ``args``, and its held-out text if it has one of its own. See ``find_files`` on ``by_name``."""
    if not args.eval_filepath:
        corpus, notes = _corpus_of(args, args.filepath, "data.filepath", args.train_size, as_text, by_name)
        _check_options(args, [corpus])
        return Text(corpus, args.filepath, notes=notes)
    if args.train_size not in (DataArgs.train_size, 1.0):
        raise UserError(
            f"data.train_size: expected none beside data.eval_filepath, which is all that is held out, found {args.train_size}; "
            "leave one of the two out"
        )
    corpus, notes = _corpus_of(args, args.filepath, "data.filepath", 1.0, as_text, by_name)
    held_out, more = _corpus_of(args, args.eval_filepath, "data.eval_filepath", 1.0, as_text, by_name)
    _check_options(args, [corpus, held_out])
    if isinstance(corpus, Chats) != isinstance(held_out, Chats):
        words = ["conversations" if isinstance(each, Chats) else "text" for each in (corpus, held_out)]
        raise UserError(
            f"data.eval_filepath: expected {words[0]}, as data.filepath has, found {words[1]} in {args.eval_filepath}"
        )
    trained_on = {*map(_file_at, corpus.places)}
    both = [place.name for place in held_out.places if _file_at(place) in trained_on]
    if both:
        more += (
            f"warning: {args.eval_filepath}: {len(both):,} of {len(held_out.places):,} held-out files are also trained on "
            f"({os.path.basename(both[0])}{', ...' * (len(both) > 1)}), so that the held-out loss is too low; leave them out of one",
        )
    return Text(WithHeldOut(corpus, held_out), args.filepath, None, notes + more, args.eval_filepath)


def _file_at(place: Place) -> str:
    """Return the name by which a file is known, whichever path or link leads to it."""
    return place.name if place.is_remote else os.path.realpath(place.name)


def _corpus_of(
    args: DataArgs, filepath: str, key: str, train_size: float, as_text: bool, by_name: bool
) -> tuple[AnyCorpus, tuple[str, ...]]:
    """Return the corpus of a path or an address, and lines about what was left out."""
    files, found = find_files(filepath, key, as_text, args.text_field, by_name)
    notes = tuple(f"{filepath}: {note}" for note in found)
    if any(file.chats for file in files):
        return _chats_of(args, files, key, train_size), notes
    return corpus_of(files, separator_bytes(args.separator), train_size, args.bad_records == "skip", as_text), notes


def _chats_of(args: DataArgs, files: list[CorpusFile], key: str, train_size: float) -> Chats:
    """Return the corpus of files of conversations. Raises UserError if there are texts among them."""
    if texts := [file.name for file in files if not file.chats]:
        chats = next(file.name for file in files if file.chats)
        raise UserError(
            f"{key}: expected texts or conversations, found both: {texts[0]} is text, {chats} has conversations; give them apart, or "
            "as sources of --data.mixture"
        )
    return Chats(files, train_size, args.bad_records == "skip")


def _check_options(args: DataArgs, corpora: list[AnyCorpus]) -> None:
    """Raise UserError on options for records with plain text, and the other way round."""
    if args.text_field and not any(corpus.text_field for corpus in corpora):
        raise UserError(
            f"data.text_field: expected records, such as JSON lines or parquet, found plain text in {args.filepath}; leave it out"
        )
    if args.separator and any(isinstance(corpus, Records) for corpus in corpora):
        raise UserError(
            f"data.separator: expected none, as a record is a document, found {quoted(args.separator)} beside {args.filepath}; leave it out"
        )


def as_before(known: Origin, text: Text, args: DataArgs) -> Iterator[AnyCorpus]:
    """Yield other ways to read the text of a run that has begun: as plain text, and as earlier versions did."""
    if known.text_field:
        return
    found = [text]
    with contextlib.suppress(UserError):
        found.append(_found_text(args, as_text=True))
    with contextlib.suppress(UserError):
        found.append(_found_text(args, args.as_text, by_name=False))
    for each in found:
        yield from (each.corpus, cut_at_end(each).corpus)
    if not known.files and isinstance(text.corpus, Corpus):
        yield replace(text.corpus, paths=files_as_before(args.filepath), by_documents=False)


def cut_at_end(text: Text) -> Text:
    """Return a text whose end is held out, as earlier versions held out that of several plain texts."""
    corpus = text.corpus
    if isinstance(corpus, Corpus) and corpus.by_documents:
        return replace(text, corpus=replace(corpus, by_documents=False))
    return text


def origin_of(text: Text) -> Origin:
    """Return the origin of the tokens that a text would give, without the tokenizer and the tokens."""
    corpus = text.corpus
    return Origin(
        text.source, corpus.files, corpus.digest(), corpus.train_size, corpus.separator.decode(),
        text_field=corpus.text_field, held_out=corpus.held_out, eval_source=text.eval_source, eval_files=corpus.eval_files,
    )  # fmt: skip


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
    if not (unfinished or any(folder.glob("train.bin*"))):
        return
    if not all(is_describing(path.name) for path in folder.rglob("*.txt")):
        return
    if unfinished:
        raise UserError(
            f"data.filepath: expected a text or prepared tokens, found unfinished tokens in {folder}: prepare is still running "
            "there, or was stopped; run it again, or merge its parts"
        )
    raise UserError(
        f"data.filepath: expected a text or prepared tokens, found token files without {MANIFEST} in {folder}: they are "
        "unfinished, or another program made them; name their tokenizer (--data.tokenizer-model-path), or give the original text"
    )
