"""Opens token files of other programs as the tokens of a run, once their ids are known to fit the tokenizer."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llama_jax.cli.progress import working
from llama_jax.config import DataArgs
from llama_jax.data.beside import names_of
from llama_jax.data.manifest import UNFINISHED, VERSION, Manifest
from llama_jax.data.origin import Origin
from llama_jax.data.parts import SPLITS, HeldOut
from llama_jax.data.token_files import Examined, JoinedStream, TokenFile, by_split, cut_at, examined, find_token_files
from llama_jax.data.tokens import TokenSet
from llama_jax.errors import UserError
from llama_jax.storage.files import is_address
from llama_jax.tokenizer import Tokenizer


def find_pretokenized(args: DataArgs) -> list[TokenFile]:
    """Return the token files of other programs that ``args`` name, none if they name something else.

    Raises UserError if there are some, and options say nothing about their tokenizer or contradict them.
    """
    folder = Path(args.filepath).expanduser()
    unfinished = folder.is_dir() and (not args.tokenizer_model_path or (folder / UNFINISHED).exists())
    if not args.filepath or args.as_text or unfinished or is_address(args.filepath):
        return []
    files = find_token_files(args.filepath)
    if not files:
        return []
    if not args.tokenizer_model_path:
        raise UserError(
            f"data.tokenizer_model_path: expected the tokenizer of the token files in {args.filepath}, found none; name its model, "
            "or give the original text"
        )
    for name in ("separator", "text_field"):
        if getattr(args, name):
            raise UserError(
                f"data.{name}: expected none, as {args.filepath} holds tokens, found {getattr(args, name)!r}; leave it out"
            )
    return files


def open_pretokenized(
    args: DataArgs, files: Sequence[TokenFile], manifest: Manifest | None = None, begun: Origin | None = None
) -> TokenSet:
    """Open token files without a copy. Their ids are read once, unless their ``manifest`` is known.

    ``begun`` is the origin of the tokens of a run that has begun with them, perhaps by an earlier version.

    Raises UserError if an id is outside the tokenizer's vocabulary.
    """
    parts = _split(args, files, begun if manifest is None else manifest.origin)
    if manifest is not None:
        return TokenSet(parts.train, parts.eval, manifest)
    tokenizer = Tokenizer(args.tokenizer_model_path)
    with working(f"reading the tokens of {args.filepath}"):
        train, held_out = (examined(stream, tokenizer.bos_id) for stream in (parts.train, parts.eval))
    _check_ids(args, tokenizer, train, held_out)
    text = repr([[file.sha256 for file in found.files] for found in (train, held_out)])
    at_end = parts.how == "end"
    return TokenSet(
        parts.train,
        parts.eval,
        Manifest(
            version=VERSION,
            text_sha256=hashlib.sha256(text.encode()).hexdigest(),
            train_size=args.train_size,
            separator="",
            tokenizer_sha256=tokenizer.digest,
            trained_vocab_size=0,
            dtype=parts.train.dtype.str,
            tokens={"train": parts.train.size, "eval": parts.eval.size},
            text_bytes=dict.fromkeys(SPLITS, 0),
            documents={"train": train.documents, "eval": held_out.documents},
            replaced_sequences=0,
            source=args.filepath,
            text_files=train.files + held_out.files * at_end,
            vocab_size=tokenizer.vocab_size,
            largest_id={"train": train.largest, "eval": held_out.largest},
            held_out=parts.how,
            eval_source=parts.eval_source,
            eval_files=() if at_end else held_out.files,
            made_by=", ".join(sorted({file.program for file in files})),
        ),
    )


def remarks(args: DataArgs, files: Sequence[TokenFile], begun: Origin | None = None) -> list[str]:
    """Return what to tell of the token files: which are not read, and which are also held out."""
    parts = _split(args, files, begun)
    used = {file.path for file in (*parts.files, *parts.held_out)}
    unread = [file.path.name for file in files if file.path not in used]
    both = {file.path.resolve() for file in parts.files} & {file.path.resolve() for file in parts.held_out}
    lines = []
    if unread:
        lines.append(f"{args.filepath}: not read, as their names say that they are held out: {names_of(unread)}")
    if both and parts.how == "own":
        names = names_of(sorted(path.name for path in both))
        lines.append(
            f"warning: {args.eval_filepath}: also trained on, so that the held-out loss is too low: {names}; leave them out of one"
        )
    return lines


class _Parts(NamedTuple):
    """The tokens to train on and those that are held out, of which files, how these were chosen, and their name."""

    train: JoinedStream
    eval: JoinedStream
    files: Sequence[TokenFile]
    held_out: Sequence[TokenFile]
    how: HeldOut
    eval_source: str


def _split(args: DataArgs, files: Sequence[TokenFile], known: Origin | None = None) -> _Parts:
    """Return the tokens to train on and those that are held out. Raises UserError if options contradict the files.

    Of a run that earlier versions began, whose tokens' origin is ``known``, they are what they were then.
    """
    now = _chosen(args, files, by_name=True)
    if known is None or _is_of(now, known):
        return now
    before = _chosen(args, files, by_name=False)
    return before if _is_of(before, known) else now


def _is_of(parts: _Parts, known: Origin) -> bool:
    return parts.how == known.held_out and {"train": parts.train.size, "eval": parts.eval.size} == known.tokens


def _chosen(args: DataArgs, files: Sequence[TokenFile], by_name: bool) -> _Parts:
    """Return the parts of the files, ``by_name`` as today.

    Earlier versions had held-out files only beside one that is named train, and trained on all files where others were
    given to be held out.
    """
    how: HeldOut = "given"
    named, held_out = by_split(files), list[TokenFile]()
    rest = [*named.get("train", []), *named.get("", [])]
    if args.eval_filepath:
        how, held_out = "own", find_token_files(args.eval_filepath)
        if not held_out:
            raise UserError(
                f"data.eval_filepath: expected token files, as data.filepath has, found none in {args.eval_filepath}; give some, "
                "or leave it out"
            )
        files = rest if rest and by_name else files
    elif "train" in named or (rest and by_name):
        held_out = named.get("validation") or named.get("test") or []
        files = rest if held_out else files
    if not held_out:
        return _Parts(*cut_at(files, args.train_size), files, files, "end", "")
    names = ", ".join(file.path.name for file in held_out[:3]) + (", ..." if len(held_out) > 3 else "")
    if args.train_size not in (DataArgs.train_size, 1.0):
        raise UserError(
            f"data.train_size: expected none, as {args.eval_filepath or names} is held out, found {args.train_size}; leave it out"
        )
    train, other = (JoinedStream([(file, 0, file.count) for file in part]) for part in (files, held_out))
    return _Parts(train, other, files, held_out, how, args.eval_filepath or names)


def _check_ids(args: DataArgs, tokenizer: Tokenizer, *found: Examined) -> None:
    """Raise UserError if an id is not one of the tokenizer's."""
    largest, smallest = max(each.largest for each in found), min(each.smallest for each in found)
    if largest == 0:
        raise UserError(
            f"data.filepath: expected token ids, found nothing but 0 in {args.filepath}; download or make it again"
        )
    if smallest < 0 or largest >= tokenizer.vocab_size:
        raise UserError(
            f"data.tokenizer_model_path: expected the tokenizer of {args.filepath}, found ids from {smallest} to {largest:,} there "
            f"and a vocabulary of {tokenizer.vocab_size:,} in {args.tokenizer_model_path}; name the tokenizer that made the tokens"
        )
