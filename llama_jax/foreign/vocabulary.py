"""Finds the tokenizer that belongs to a folder's weights, and reports files that contradict it.

The folder's own files are used if tokenizer.model and the tokenizer.json next to it hold the same pieces. Without them,
tokenizer.model is taken from the folder above, where Meta's downloads have it, unless the weights have another
vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_jax.config import ModelArgs
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.keys import read_json
from llama_jax.foreign.tokenizer_json import SPACE, merges, pipeline, why_not_written
from llama_jax.sentencepiece_settings import BPE, Settings
from llama_jax.tokenizer import Tokenizer
from llama_jax.tokenizers.files import ADDED, IDS, MODEL, TABLE
from llama_jax.tokenizers.names import CONFIG, MAP

# Files of other kinds of vocabularies.
OTHERS = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json", "tiktoken.model")
# LLaMA 3's file has 9 MB.
MAX_TABLE = 64_000_000
# More rows without a token are no padding: the tokenizer is another model's.
MOST_PADDING = 4096


def find_tokenizer(given: str, folder: Path) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer that ``given`` names, or else that of the weights in ``folder``, and warnings about it.

    Raises UserError if there is none, or none that is known to be the model's.
    """
    if given:
        tokenizer = Tokenizer(given)
    elif (folder / MODEL).is_file():
        tokenizer = _own(folder)
    elif (folder / TABLE).is_file():
        try:
            tokenizer = Tokenizer(folder)
        except (
            UserError
        ) as error:  # it names no EOS, perhaps; then the folder above may hold the same vocabulary with more
            if not any((place / MODEL).is_file() for place in _places_above(folder)):
                raise
            try:
                return _above(folder)
            except UserError:
                if any(table.get("eos_token") for table in _small_files(folder)[0].values()):
                    raise error from None  # it is something else that is wrong
                raise
        return tokenizer, [*_contradictions(folder, tokenizer), *tokenizer.notes]
    else:
        return _above(folder)
    return tokenizer, [
        *_contradictions(folder, tokenizer), *tokenizer.notes, *_two_files(given, folder, tokenizer)
    ]  # fmt: skip


def _own(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder with tokenizer.model: that alone if the files beside it cannot be read."""
    try:
        return Tokenizer(folder)
    except UserError:
        for name in (TABLE, CONFIG, MAP, ADDED):
            try:
                if (folder / name).is_file():
                    read_json(folder / name, MAX_TABLE)
            except UserError:  # it is no JSON, which the warnings tell
                return Tokenizer(folder / MODEL)
        raise


def _two_files(given: str, folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield how the tokenizer.json beside the weights differs from the tokenizer.model that is given or beside it.

    Raises UserError if two files of the folder have different vocabularies.
    """
    beside, model = folder / TABLE, tokenizer if given else None
    if not beside.is_file():
        return
    try:
        if model is None:
            model = tokenizer if tokenizer.is_sentencepiece else Tokenizer(folder / MODEL)
        if not model.is_sentencepiece:
            return
        pieces, rules = difference(read_json(beside, MAX_TABLE), model)
    except UserError as error:
        yield str(error)
        return
    if pieces and not given:
        raise UserError(
            f"{folder}: expected one vocabulary, found two: {pieces} in {TABLE}, which transformers reads, and in {MODEL}; "
            f"delete the wrong one, or give the path of one with --tokenizer"
        )
    if pieces or rules:
        used = given or tokenizer.model_path.name
        other = MODEL if used == TABLE else TABLE
        yield f"{folder / other} differs from {used}, which is used: {pieces or rules}"


def fit_vocabulary(args: ModelArgs, tokenizer: Tokenizer, folder: Path) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer of a model with ``args``, and what to tell if it has not a token per row of the embeddings.

    Rows behind the last token are padding. Added tokens without a row are left out. Raises UserError if other tokens
    have no row, or so many rows have no token that the tokenizer is another model's.
    """
    rows, tokens = args.vocab_size, tokenizer.vocab_size
    advice = "give the model's own tokenizer with --tokenizer"
    if rows < tokens:
        fitting = tokenizer.within(rows)
        return fitting, fitting.notes[len(tokenizer.notes) :]
    empty = int(tokenizer.absent(rows).sum())
    if empty > MOST_PADDING:
        raise UserError(
            f"{folder}: expected a token for each of the model's {rows:,} rows, or a few without, found {tokens:,} tokens in "
            f"{tokenizer.model_path}; {advice}"
        )
    if empty:
        return tokenizer, [f"{empty:,} of the model's {rows:,} rows have no token: they are padding, and never sampled"]
    return tokenizer, []


def difference(table: dict[str, Any], tokenizer: Tokenizer) -> tuple[str, str]:
    """Compare a tokenizer.json with ``tokenizer``.

    Return the pieces that differ and the splitting rule that differs, in words.

    A text is empty if there is no such difference. Tokens added after the vocabulary are ignored.
    """
    model = _dict(table.get("model"))
    numbered = {i: piece for piece, i in _dict(model.get("vocab")).items() if isinstance(i, int)}
    numbered |= {i: piece[0] for i, piece in enumerate(_list(model.get("vocab"), list)) if piece}
    numbered |= {
        token.get("id"): token.get("content")
        for token in _list(table.get("added_tokens"))
        if isinstance(token.get("id"), int)
    }
    wrong = [i for i in range(tokenizer.vocab_size) if numbered.get(i) != tokenizer.piece(i)]
    if wrong:
        first = f"{wrong[0]} is {quoted(numbered.get(wrong[0]), 30)} in one and {quoted(tokenizer.piece(wrong[0]), 30)} in the other"
        return f"{len(wrong):,} of {tokenizer.vocab_size:,} pieces differ ({first})", ""
    return "", next(_rules(table, model, tokenizer), "")


def _rules(table: dict[str, Any], model: dict[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield how a tokenizer.json with the same pieces splits text differently."""
    settings = Settings.of(tokenizer.model_bytes)
    kind = model.get("type", "BPE")
    if kind != {1: "Unigram", BPE: "BPE"}.get(settings.model_type):
        yield f"it is a {quoted(kind, 30)} model"
    elif not why_not_written(tokenizer):
        if bool(model.get("byte_fallback")) != settings.byte_fallback or model.get("ignore_merges"):
            yield "it encodes unknown characters differently"
        found = [
            pair if isinstance(pair, str) else " ".join(map(str, pair))
            for pair in _list(model.get("merges"), (str, list))
        ]
        expected = [" ".join(pair) for pair in merges(tokenizer)]
        scores = {tokenizer.piece(i): tokenizer.score(i) for i in range(tokenizer.vocab_size)}
        # For runs of spaces, which have equal scores, transformers lists the merges first.
        ranked = [scores.get(pair.replace(" ", ""), 0.0) for pair in found if pair.strip(f" {SPACE}")]
        if set(found) != set(expected) or ranked != sorted(ranked, reverse=True):
            yield "it merges pieces differently"
        if not _same_pipeline(table, settings):
            yield "it preprocesses spaces or characters differently"


def _same_pipeline(table: dict[str, Any], settings: Settings) -> bool:
    """Return whether text is preprocessed as in SentencePiece. Transformers has two ways to write the plain case."""
    ours = pipeline(settings)
    first, then = table.get("normalizer"), table.get("pre_tokenizer")
    if first == ours["normalizer"] and then is None:
        return True
    if settings.collapse:
        return False
    steps = ours["normalizer"]["normalizers"]
    if then is None:
        return first == steps[0] and len(steps) == 1
    metaspace = {"type": "Metaspace", "replacement": SPACE, "split": False}
    schemes = ("first", "always") if settings.dummy_prefix else ("never",)
    return first is None and any(then == metaspace | {"prepend_scheme": scheme} for scheme in schemes)


def _places_above(folder: Path) -> list[Path]:
    """Return the folder above, and the one above what a link points to."""
    return list(dict.fromkeys((folder.absolute().parent, folder.resolve().parent)))


def _above(folder: Path) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer of the folder above and warnings. Raises UserError if it belongs to another model."""
    found = [place / MODEL for place in _places_above(folder) if (place / MODEL).is_file()]
    beside = folder / TABLE
    if len({path.read_bytes() for path in found}) > 1:
        raise UserError(
            f"{folder}: expected one {MODEL} in the folder above, found others above the link and above what it points to; "
            "give the path of the right one with --tokenizer"
        )
    if beside.is_file():
        table = read_json(beside, MAX_TABLE)
        reason = f"no {MODEL} there or in the folder above"
        if found:
            tokenizer = Tokenizer(found[0])
            pieces, rules = (
                difference(table, tokenizer) if tokenizer.is_sentencepiece else ("it is of another kind", "")
            )
            if not pieces and not rules:
                note = f"{found[0]}, in the folder above, is used: it agrees with {TABLE} beside the weights"
                return tokenizer, [note, *_contradictions(folder, tokenizer)]
            reason = f"{found[0]}, in the folder above, to differ: {pieces or rules}"
        raise UserError(
            f"{folder}: expected {CONFIG} beside {TABLE} to name eos_token, found {TABLE} alone, and {reason}; copy the model's own "
            "files there, or give its tokenizer with --tokenizer"
        )
    others = [name for name in OTHERS if (folder / name).is_file()]
    kind = _text(_small_files(folder)[0].get(CONFIG, {}).get("tokenizer_class"))
    if kind is not None and "Llama" not in kind:
        others.append(f"tokenizer_class {quoted(kind, 40)} in {CONFIG}")
    if others:
        raise UserError(
            f"{folder}: expected {MODEL} or {TABLE}, found another kind of vocabulary ({', '.join(others)}); this project reads "
            f"{MODEL} and {TABLE}: if the model has one, give its path with --tokenizer"
        )
    if not found:
        raise UserError(
            f"{folder}: expected {MODEL} or {TABLE} there, or {MODEL} in the folder above, found none; give its path with --tokenizer"
        )
    tokenizer = Tokenizer(found[0])
    return tokenizer, [*_contradictions(folder, tokenizer)]


def _contradictions(folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield what the small files next to the weights say about BOS and EOS that the tokenizer does not do."""
    tables, errors = _small_files(folder)
    yield from errors
    if not tokenizer.is_sentencepiece:
        return  # the files decide; see Tokenizer.notes
    settings = tables.get(CONFIG, {})
    yield from _renamed(tables, tokenizer)
    if settings.get("add_bos_token") is False:
        yield f"{CONFIG} says add_bos_token false: transformers begins a text without BOS, this project with it"
    if settings.get("add_eos_token") is True:
        yield f"{CONFIG} says add_eos_token true: transformers ends a prompt with EOS, this project does not"
    for token, ours in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        for name, table in tables.items():
            text, number = _text(table.get(f"{token}_token")), table.get(f"{token}_token_id")
            ids = number if isinstance(number, list) else [] if number is None else [number]
            if text is not None and text != tokenizer.piece(ours):
                yield f"{name} has {token}_token {quoted(text, 30)}, the tokenizer {quoted(tokenizer.piece(ours), 30)}, which is used"
            used = "which is used" if token == "bos" else "which training adds; completions end with the file's"
            if ids and ids != [ours]:
                yield f"{name} has {token}_token_id {quoted(number, 40)}, the tokenizer {ours}, {used}"


def _renamed(tables: dict[str, dict[str, Any]], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the first token of each small file that has the number of another one in the vocabulary."""
    decoder = _dict(tables.get(CONFIG, {}).get("added_tokens_decoder"))
    listed = {int(i): _text(token) for i, token in decoder.items() if i.isdecimal() and len(i) < 9}
    plain = {i: text for text, i in tables.get(ADDED, {}).items() if type(i) is int and i >= 0}
    for name, tokens in ((CONFIG, listed), (ADDED, plain)):
        for i, text in tokens.items():
            if i < tokenizer.vocab_size and text is not None and text != tokenizer.piece(i):
                ours = quoted(tokenizer.piece(i), 30)
                yield f"{name} has {quoted(text, 30)} as token {i:,}, the tokenizer {ours}, which is used"
                break


def _small_files(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the files next to the weights that mention tokens, by name, and errors of those that cannot be read."""
    tables, errors = {}, []
    for name in (CONFIG, MAP, ADDED, *IDS):
        if (folder / name).is_file():
            try:
                tables[name] = read_json(folder / name, MAX_TABLE)
            except UserError as error:
                errors.append(str(error))
    return tables, errors


def _text(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any, kinds: type | tuple[type, ...] = dict) -> list[Any]:
    return [item for item in value if isinstance(item, kinds)] if isinstance(value, list) else []
