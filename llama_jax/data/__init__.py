"""Text to tokens, token files, batches, and the built-in stories.

Start with ``load_data``: it finds the text, loads or trains the tokenizer, and opens the tokens.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llama_jax.chat.examples import chat_example
from llama_jax.cli.flags import unescape
from llama_jax.cli.progress import bytes_text, working
from llama_jax.config import DataArgs
from llama_jax.data.chat_records import PREFERENCES
from llama_jax.data.chats import Chats
from llama_jax.data.conversations import open_chats
from llama_jax.data.corpus import WithHeldOut
from llama_jax.data.finding import Text, as_before, find_text, is_chats, origin_of, write_stories
from llama_jax.data.manifest import MANIFEST, TOKENIZER, read_manifest, write_manifest
from llama_jax.data.mixing import load_mixture, open_mixture
from llama_jax.data.opened import AnyData, Data, MixedData
from llama_jax.data.origin import Origin, difference
from llama_jax.data.parts import AnyCorpus
from llama_jax.data.pretokenized import find_pretokenized, open_pretokenized, remarks
from llama_jax.data.shards import RefuseOthers, prepare
from llama_jax.data.text import Corpus, check_separator
from llama_jax.data.token_files import TokenFile
from llama_jax.data.tokens import TokenSet, find_prepared, open_tokens
from llama_jax.data.tuning_set import Talking, encode_chats, format_of, settings_of
from llama_jax.data.vocabulary import Sentences
from llama_jax.data.workers import Run, run_tasks
from llama_jax.errors import UserError, quoted
from llama_jax.storage.files import is_address, write_atomically
from llama_jax.tokenizer import Tokenizer, is_kept, keep_tokenizer, kept_tokenizer, train_tokenizer

__all__ = [
    "AnyData", "Data", "MixedData", "Origin", "Talking", "Text", "chat_example", "difference", "encode_text", "find_text", "load_data", "open_data", "open_tokens", "origin_of",
    "write_stories",
]  # fmt: skip


# Of the token files of other programs, so many tokens are shown.
SHOWN_TOKENS = 40
RESTORE = "restore it from model/ of a checkpoint, each of which has a copy"
NOT_PREFERENCES = (
    "data.{}: expected preferences (records with prompt, chosen and rejected), of which train.objective dpo learns, found "
    "{} in {}; give others, or leave --train.objective out"
)


def load_data(
    args: DataArgs,
    folder: Path,
    tokenizer_path: Path,
    workers: int | None = None,
    begun: bool = False,
    began_with: dict[str, Origin] | None = None,
    talking: Talking | None = None,
) -> AnyData:
    """Return the tokens and the tokenizer of a run, which are made first if needed.

    Arguments:
        args: the text, its tokenizer and the split.
        folder: where tokens are kept.
        tokenizer_path: where the tokenizer is kept.
        workers: number of encoding threads. None: one per core.
        begun: whether the run has begun. Such a run keeps its text and its tokenizer.
        began_with: what they were, by the names of the sources of a mixture. A single text has no name. None: as the
            manifest in ``folder`` says.
        talking: what the model brings to conversations. None: these are refused.

    Raises UserError if the text or the tokenizer cannot be found, or has changed since the run began.
    """
    known = began_with or {}

    def load(given: DataArgs, at: Path, has_begun: bool, origin: Origin | None) -> Data:
        of = f" of {given.filepath}" if args.mixture else ""
        return _load_one(given, at, tokenizer_path, workers, has_begun, origin, talking, of)

    if args.mixture:
        return load_mixture(args, folder, tokenizer_path, begun, known, load)
    if begun and known and "" not in known:
        raise UserError(
            f"data.mixture: expected the mixture that the run began with ({', '.join(known)}), found a single text; choose another "
            "--train.save-dir; there, --train.init-from goes on from this run's weights"
        )
    return load(args, folder, begun, known.get(""))


def _load_one(
    args: DataArgs,
    folder: Path,
    tokenizer_path: Path,
    workers: int | None,
    begun: bool,
    began_with: Origin | None,
    talking: Talking | None,
    of: str,
) -> Data:
    """Return the data of one text; see ``load_data``, and ``Text`` for ``of``."""
    if talking is not None and talking.preferences and (find_prepared(args.filepath) or find_pretokenized(args)):
        raise UserError(NOT_PREFERENCES.format("filepath", "tokens of a text", args.filepath))
    if (prepared := find_prepared(args.filepath)) is not None:
        data = _load_prepared(args, prepared, folder, tokenizer_path, begun, began_with)
    elif files := find_pretokenized(args):
        data = _load_pretokenized(args, files, folder, tokenizer_path, begun, began_with)
    else:
        text = replace(find_text(args, folder, begun), of=of)
        if talking is not None and is_chats(text):
            data = _load_chats(args, text, folder, tokenizer_path, begun, began_with, talking, workers)
        elif talking is not None and talking.preferences:
            found = "; ".join(["text", *text.notes])
            raise UserError(NOT_PREFERENCES.format("filepath", found, text.source))
        else:
            data = encode_text(args, text, folder, tokenizer_path, workers, begun, began_with)
    data.tokens.check_in_background()
    return data


def open_data(args: DataArgs, folder: Path, tokenizer_path: Path, talking: Talking | None = None) -> AnyData:
    """Open the data that another process's ``load_data`` made from the same arguments.

    It writes nothing and reads no text.

    Raises UserError if the data are missing because ``folder`` is not on a shared disk.
    """
    if args.mixture:
        return open_mixture(
            args, folder, tokenizer_path, lambda given, at: _open_one(given, at, tokenizer_path, talking)
        )
    return _open_one(args, folder, tokenizer_path, talking)


def _open_one(args: DataArgs, folder: Path, tokenizer_path: Path, talking: Talking | None) -> Data:
    if find_prepared(args.filepath) is not None:
        tokens = open_tokens(_without_home(args.filepath), args.cache_gb)
    elif files := find_pretokenized(args):
        tokens = open_pretokenized(args, files, read_manifest(folder))
    elif talking is not None and (manifest := read_manifest(folder)) is not None and manifest.chats is not None:
        tokenizer = kept_tokenizer(tokenizer_path)
        chat = format_of(args, tokenizer, talking, next(iter(manifest.chats.kinds)))
        source = args.filepath or f"{args.chats:,} built-in conversations"
        return Data(open_chats(folder), tokenizer, source, notes=chat.notes, chat=chat)
    else:
        tokens = open_tokens(folder)
    return Data(tokens, kept_tokenizer(tokenizer_path), args.filepath or f"{args.stories:,} built-in stories")


def encode_text(
    args: DataArgs,
    text: Text,
    folder: Path,
    tokenizer_path: Path,
    workers: int | None = None,
    begun: bool = False,
    began_with: Origin | None = None,
    others: RefuseOthers | None = None,
    run: Run = run_tasks,
) -> Data:
    """Encode a text into ``folder``, with a tokenizer at ``tokenizer_path``.

    See ``load_data``, and ``shards.prepare`` for ``others`` and ``run``.
    """
    known = _known(folder, begun, began_with)
    with working(f"reading {text.source}, {bytes_text(text.corpus.stored_bytes)}"):
        text.corpus.digest()
        if begun and known is not None:
            text = _check_text(known, text, args)
        else:
            _check_has_text(text)
            for corpus in _parts_of(text.corpus):
                if isinstance(corpus, Corpus):
                    check_separator(corpus, text.source)
    tokenizer = _tokenizer(args, text, tokenizer_path, known, begun)
    trained = 0 if args.tokenizer_model_path else args.vocab_size
    if begun and known is not None:
        trained = known.trained_vocab_size
    tokens = prepare(
        text.corpus, tokenizer, folder, workers or os.cpu_count() or 1, trained, text.source, known if begun else None,
        text.eval_source, others, run, text.of,
    )  # fmt: skip
    return Data(tokens, tokenizer, text.source, text.floor, text.notes)


def _load_chats(
    args: DataArgs,
    text: Text,
    folder: Path,
    tokenizer_path: Path,
    begun: bool,
    began_with: Origin | None,
    talking: Talking,
    workers: int | None,
) -> Data:
    """Return the data of conversations; see ``load_data``."""
    known = _known(folder, begun, began_with)
    if not args.tokenizer_model_path and not (begun and is_kept(tokenizer_path)):
        raise UserError(
            f"data.filepath: expected a checkpoint to tune on conversations, found none beside {text.source}; give --train.init-from, "
            "or the tokenizer of a new model (--data.tokenizer-model-path)"
        )
    with working(f"reading {text.source}, {bytes_text(text.corpus.stored_bytes)}"):
        text.corpus.digest()
    # A new run keeps its tokenizer once the conversations are encoded: one that is refused leaves nothing behind.
    tokenizer = _tokenizer(args, text, tokenizer_path, known, begun) if begun else Tokenizer(args.tokenizer_model_path)
    first = _parts_of(text.corpus)[0]
    assert isinstance(first, Chats)
    for part, key in zip(_parts_of(text.corpus), ("filepath", "eval_filepath"), strict=False):
        assert isinstance(part, Chats)
        if talking.preferences:
            _check_preferences(part, key)
    chat = format_of(args, tokenizer, talking, first.sources[0].chats)
    if begun and known is not None:
        settings = settings_of(args, chat, talking)
        _refuse(difference(known, replace(origin_of(text), chats=settings)))
    tokens = encode_chats(args, text, tokenizer, chat, talking, folder, workers)
    if not begun:
        _tokenizer(args, text, tokenizer_path, known, begun)
    if begun and known is not None:
        _refuse(difference(known, tokens.manifest.origin))
    return Data(tokens, tokenizer, text.source, notes=text.notes + chat.notes, chat=chat)


def _check_preferences(corpus: Chats, key: str) -> None:
    """Raise UserError if a file has no preferences. Where there are some, each record is looked at as it is read."""
    for file in corpus.sources:
        if file.chats != PREFERENCES:
            raise UserError(NOT_PREFERENCES.format(key, f"conversations ({file.chats})", file.name))


def _parts_of(corpus: AnyCorpus) -> list[AnyCorpus]:
    return [corpus.train, corpus.eval] if isinstance(corpus, WithHeldOut) else [corpus]


def _check_has_text(text: Text) -> None:
    """Raise UserError if the training part holds nothing but white space."""
    if not any(part.text.strip() for part in text.corpus.parts("train")):
        found = "nothing but white space" if any(True for _ in text.corpus.parts("train")) else "none"
        where = {"end": " before the held-out part", "documents": " beside the held-out documents"}
        raise UserError(
            f"data.filepath: expected text to train on, found {found} in {text.source}{where.get(text.corpus.held_out, '')}; "
            "give more text, or a larger data.train_size"
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
    if text.corpus.digest() != known.text_sha256 and args.filepath:
        for corpus in as_before(known, text, args):
            if corpus.digest() == known.text_sha256:
                return replace(text, corpus=corpus)
    _refuse(difference(known, replace(origin_of(text), trained_vocab_size=known.trained_vocab_size)))
    return text


def _refuse(found: str) -> None:
    """Raise UserError if ``found``, a description of how the text has changed, is not empty."""
    if found:
        raise UserError(
            f"data.filepath: expected the text, separator and train_size that the run began with, found that {found}; choose "
            "another --train.save-dir; there, --train.init-from goes on from this run's weights"
        )


def _tokenizer(args: DataArgs, text: Text, path: Path, known: Origin | None, begun: bool) -> Tokenizer:
    """Return the tokenizer that the user gives, the one at ``path`` if it still fits, or a new one."""
    given = Tokenizer(args.tokenizer_model_path) if args.tokenizer_model_path else None
    if (begun or _is_vocabulary_of(args, text.corpus, known)) and is_kept(path):
        try:
            kept = kept_tokenizer(path)
        except UserError as error:
            raise UserError(f"{error}; {RESTORE}" if begun else str(error)) from None
        if given is not None and given.digest != kept.digest:
            raise UserError(
                f"data.tokenizer_model_path: expected the tokenizer that {path} holds, found another in "
                f"{args.tokenizer_model_path}; choose another --train.save-dir"
            )
        if known is None or known.tokenizer_sha256 == kept.digest:
            return kept
        if begun:
            raise UserError(
                f"{path}: expected the tokenizer that the run began with, found another, or a damaged one; {RESTORE}"
            )
        print(
            f"warning: {path}: expected the tokenizer that made these tokens, found another: trained again", flush=True
        )
    if given is not None:
        made = keep_tokenizer(given, path)
    else:
        with working(f"training a vocabulary of {args.vocab_size:,} tokens"):
            made = train_tokenizer(Sentences(text.corpus.parts("train")), args.vocab_size, path)
    if begun and known is not None and known.tokenizer_sha256 not in ("", made.digest):
        path.unlink()
        raise UserError(
            f"{path}: expected the tokenizer that the run began with, found none, and a newly trained one differs; {RESTORE}"
        )
    return made


def _is_vocabulary_of(args: DataArgs, corpus: AnyCorpus, known: Origin | None) -> bool:
    """Return whether an earlier start trained its vocabulary on exactly this text and size."""
    return known is not None and (known.text_sha256, known.trained_vocab_size) == (corpus.digest(), args.vocab_size)


def _load_prepared(
    args: DataArgs, prepared: Path, folder: Path, path: Path, begun: bool, began_with: Origin | None
) -> Data:
    """Open tokens made by ``prepare``. The run gets copies of their tokenizer and manifest, out of ``prepared``."""
    where = _without_home(args.filepath)
    if (described := read_manifest(prepared)) is not None and described.chats is not None:
        raise UserError(
            f"data.filepath: expected a text or prepared tokens, found the conversations of a run, already encoded, in {where}; give the "
            f"file that they were made from, {described.source}"
        )
    tokens, tokenizer = open_tokens(where, args.cache_gb), kept_tokenizer(prepared / TOKENIZER)
    manifest = tokens.manifest
    if manifest.tokenizer_sha256 != tokenizer.digest:
        raise UserError(
            f"{where}: expected the tokenizer.model that made these tokens, found another; prepare them again"
        )
    asked_for = {
        "train_size": args.train_size, "separator": unescape(args.separator), "text_field": args.text_field,
        "eval_filepath": args.eval_filepath,
    }  # fmt: skip
    for name, asked in asked_for.items():
        made = manifest.eval_source if name == "eval_filepath" else getattr(manifest, name)
        if asked not in (made, getattr(DataArgs(), name)):
            raise UserError(
                f"data.{name}: expected {made!r}, with which the tokens in {where} were prepared, found {asked!r}; prepare them again"
            )
    others = [Tokenizer(args.tokenizer_model_path)] if args.tokenizer_model_path else []
    for other in [*others, *([kept_tokenizer(path)] if begun and is_kept(path) else [])]:
        if other.digest != tokenizer.digest:
            raise UserError(
                f"data.filepath: expected tokens of {other.model_path}, found tokens of another tokenizer in {where}; "
                "prepare the text with that one"
            )
    known = _known(folder, begun, began_with)
    if begun and known is not None:
        _refuse(difference(known, manifest.origin))
    write_atomically(folder / MANIFEST, (prepared / MANIFEST).read_bytes())
    return Data(tokens, keep_tokenizer(tokenizer, path), where, notes=tokens.notes)


def _without_home(filepath: str) -> str:
    """Return a path with a leading ~ expanded. An address stays as it is."""
    return filepath if is_address(filepath) else str(Path(filepath).expanduser())


def _load_pretokenized(
    args: DataArgs, files: Sequence[TokenFile], folder: Path, path: Path, begun: bool, began_with: Origin | None
) -> Data:
    """Open token files of other programs. The run gets a description of them, and a copy of their tokenizer."""
    known = _known(folder, begun, began_with)
    earlier = known if begun else None
    tokens = open_pretokenized(args, files, begun=earlier)
    if begun and known is not None:
        _refuse(difference(known, tokens.manifest.origin))
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, tokens.manifest)
    tokenizer = keep_tokenizer(Tokenizer(args.tokenizer_model_path), path)
    notes = (*remarks(args, files, earlier), _beginning(args.filepath, tokens, tokenizer))
    return Data(tokens, tokenizer, args.filepath, notes=notes)


def _beginning(source: str, tokens: TokenSet, tokenizer: Tokenizer) -> str:
    """Return the first tokens as text in a line. Nobody but a person can tell that it is the wrong tokenizer."""
    text = tokenizer.decode(tokens.train[:SHOWN_TOKENS].tolist(), specials=True)
    return f"{source}: with this tokenizer, its text begins {quoted(text, 160)}; if that makes no sense, name another"
