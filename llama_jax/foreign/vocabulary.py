"""Finds the tokenizer that belongs to a folder's weights, and reports files that contradict it.

The folder's own tokenizer.model is used if the tokenizer.json next to it holds the same pieces. Without one,
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

MODEL, TABLE, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
# Files of other kinds of vocabularies.
OTHERS = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json", "tiktoken.model")
# LLaMA 3's file has 9 MB.
MAX_TABLE = 200_000_000


def find_tokenizer(given: str, folder: Path) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer that ``given`` names, or else that of the weights in ``folder``, and warnings about it.

    Raises UserError if there is none, or none that is known to be the model's.
    """
    own, beside = folder / MODEL, folder / TABLE
    if not given and not own.is_file():
        return _above(folder)
    tokenizer = Tokenizer(given or own)
    warnings = [*_contradictions(folder, tokenizer)]
    if not beside.is_file():
        return tokenizer, warnings
    try:
        pieces, rules = difference(read_json(beside, MAX_TABLE), tokenizer)
    except UserError as error:
        return tokenizer, [*warnings, str(error)]
    if pieces and not given:
        raise UserError(
            f"{folder}: expected one vocabulary, found two: {pieces} in {TABLE}, which transformers reads, and in {MODEL}; "
            f"delete the wrong one, or give the path of one for sentencepiece with --tokenizer"
        )
    if pieces or rules:
        warnings.append(f"{beside} differs from {given or MODEL}, which is used: {pieces or rules}")
    return tokenizer, warnings


def check_vocabulary(args: ModelArgs, tokenizer: Tokenizer, folder: Path) -> None:
    """Raise UserError if the tokenizer and the model's embeddings differ in size."""
    if args.vocab_size == tokenizer.vocab_size:
        return
    advice = "give the model's own tokenizer with --tokenizer"
    added = sorted({(i, text) for i, text in _added_tokens(folder) if i >= tokenizer.vocab_size})
    if args.vocab_size > tokenizer.vocab_size and added:
        advice = (
            f"the other rows are of added tokens ({', '.join(quoted(text, 30) for _, text in added[:4])}), which this project does "
            f"not support: remove them with transformers' model.resize_token_embeddings({tokenizer.vocab_size}), and save it"
        )
    raise UserError(
        f"{folder}: expected the {tokenizer.vocab_size:,} rows of {tokenizer.model_path}, found {args.vocab_size:,} "
        f"embeddings; {advice}"
    )


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


def _above(folder: Path) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer of the folder above and warnings. Raises UserError if it belongs to another model."""
    places = dict.fromkeys((folder.absolute().parent, folder.resolve().parent))
    found = [place / MODEL for place in places if (place / MODEL).is_file()]
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
            pieces, rules = difference(table, tokenizer)
            if not pieces and not rules:
                note = f"{found[0]}, in the folder above, is used: it agrees with {TABLE} beside the weights"
                return tokenizer, [note, *_contradictions(folder, tokenizer)]
            reason = f"{found[0]}, in the folder above, to differ: {pieces or rules}"
        raise UserError(
            f"{folder}: expected {MODEL} beside the weights, found {TABLE} alone, {_kind(table)}, and {reason}; {_way_on(table)}"
        )
    others = [name for name in OTHERS if (folder / name).is_file()]
    kind = _text(_small_files(folder)[0].get(CONFIG, {}).get("tokenizer_class"))
    if kind is not None and "Llama" not in kind:
        others.append(f"tokenizer_class {quoted(kind, 40)} in {CONFIG}")
    if others:
        raise UserError(
            f"{folder}: expected {MODEL}, found another kind of vocabulary ({', '.join(others)}); this project reads "
            "only SentencePiece's: if the model has one, give its path with --tokenizer"
        )
    if not found:
        raise UserError(
            f"{folder}: expected {MODEL} there or in the folder above, found none; give its path with --tokenizer"
        )
    tokenizer = Tokenizer(found[0])
    return tokenizer, [*_contradictions(folder, tokenizer)]


def _is_bytewise(table: dict[str, Any]) -> bool:
    return "ByteLevel" in str(table.get("pre_tokenizer"))


def _kind(table: dict[str, Any]) -> str:
    size = len(_dict(_dict(table.get("model")).get("vocab")))
    return f"{'a byte-level vocabulary, as LLaMA 3 has,' if _is_bytewise(table) else 'a vocabulary'} of {size:,} pieces"


def _way_on(table: dict[str, Any]) -> str:
    if _is_bytewise(table):
        return "this project reads only SentencePiece's vocabularies: use a model that has one, such as LLaMA 2"
    return f"give the path of the model's own {MODEL} with --tokenizer: often it is in the model that this one was tuned from"


def _contradictions(folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield what the small files next to the weights say about BOS and EOS that the tokenizer does not do."""
    tables, errors = _small_files(folder)
    yield from errors
    settings = tables.get(CONFIG, {})
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


def _small_files(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the files next to the weights that mention tokens, by name, and errors of those that cannot be read."""
    tables, errors = {}, []
    for name in (CONFIG, "special_tokens_map.json", "generation_config.json", "config.json"):
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


def _added_tokens(folder: Path) -> Iterator[tuple[int, str]]:
    """Yield the tokens, with ids, that the files of ``folder`` add to a vocabulary."""
    for name in (TABLE, CONFIG, "added_tokens.json"):
        try:
            table = read_json(folder / name, MAX_TABLE)
        except UserError:
            continue
        yield from ((t["id"], _text(t) or "") for t in _list(table.get("added_tokens")) if isinstance(t.get("id"), int))
        decoder = _dict(table.get("added_tokens_decoder"))
        yield from ((int(i), _text(t) or "") for i, t in decoder.items() if i.isdecimal() and len(i) < 12)
        yield from ((i, text) for text, i in table.items() if name == "added_tokens.json" and isinstance(i, int))
