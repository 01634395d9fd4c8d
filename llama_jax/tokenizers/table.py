"""tokenizer.json, read and checked before the tokenizers library sees it.

The library reads any table that its types allow, and some of them take it all memory, forever, or end in a panic. So a
file has a size that tokenizers have, a type and a range at each place that matters, and no expression that blows up.
"""

import collections
import json
from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.errors import UserError, quoted
from llama_jax.storage.files import check_downloaded
from llama_jax.tokenizers.patterns import why_refused
from llama_jax.tokenizers.reader import Added

# Gemma's and LLaMA 4's files have 30 MB, with 1.3 million commas and half a million brackets. What is made of a file
# within these bounds takes less than 1 GB.
MAX_BYTES, MAX_COMMAS, MAX_BRACKETS = 48_000_000, 2_000_000, 1_000_000
MAX_PIECES, MAX_ID = 600_000, 10_000_000
# The most characters of all pieces of a Unigram model, which the library puts into a tree, and of all added tokens.
MAX_TREE, MAX_ADDED, MAX_ADDED_CHARS = 2_000_000, 100_000, 1_000_000
# The most steps of a part of the pipeline, and how many times longer it may make a text.
MAX_STEPS, MAX_GROWTH = 32, 256
PIPELINE = ("normalizer", "pre_tokenizer", "decoder")
Table = dict[str, Any]


def parse_object(raw: bytes, name: str) -> Table:
    """Return the JSON object in a file. Raises a UserError that names ``name`` if there is none, or it is too large."""
    check_downloaded(raw, name)
    if raw.count(b",") > MAX_COMMAS or raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
        raise UserError(f"{name}: expected a tokenizer's JSON, found one with millions of values; use another file")
    twice: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> Table:
        found = dict(items)
        if len(found) < len(items):
            seen: set[str] = set()
            twice.extend(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return found

    try:
        table = json.loads(raw, object_pairs_hook=pairs)
    except (ValueError, RecursionError, MemoryError) as error:
        advice = "use another file, for this one is JSON lines" if "Extra data" in str(error) else "download it again"
        raise UserError(f"{name}: expected a JSON object, found {quoted(str(error))}; {advice}") from None
    if not isinstance(table, dict):
        raise UserError(f"{name}: expected a JSON object, found another value; use another file")
    if twice:
        raise UserError(f"{name}: {quoted(twice[0], 40)}: expected the key once, found it twice; delete one of them")
    return table


def check_table(table: Table, name: str) -> None:
    """Raise a UserError that names ``name`` if the library should not read a table."""
    model = table.get("model")
    if not isinstance(model, dict):
        raise UserError(
            f"{name}: model: expected the vocabulary of a tokenizer, found {_shown(model)}; use another file"
        )
    _check_vocabulary(model, name)
    _check_added(table, name)
    for part in PIPELINE:
        _check_pipeline(table.get(part), part, name)


def pieces_of(table: Table) -> dict[int, str]:
    """Return the pieces of a checked table's model by their ids."""
    vocab = table["model"]["vocab"]
    return (
        {i: piece for piece, i in vocab.items()} if isinstance(vocab, dict) else {i: p[0] for i, p in enumerate(vocab)}
    )


def added_of(table: Mapping[str, Any]) -> list[Added]:
    """Return the tokens that a table adds to its model, those that can be read."""
    found = table.get("added_tokens")
    tokens = (
        _added(token.get("id"), token)
        for token in (found if isinstance(found, list) else [])
        if isinstance(token, dict)
    )
    return [token for token in tokens if token is not None]


def added_by_decoder(config: Mapping[str, Any]) -> list[Added]:
    """Return the tokens that tokenizer_config.json adds to a vocabulary, as ``added_tokens_decoder``."""
    decoder = config.get("added_tokens_decoder")
    items = decoder.items() if isinstance(decoder, dict) else ()
    tokens = (
        _added(int(i) if i.isdecimal() and len(i) < 9 else None, token) for i, token in items if isinstance(token, dict)
    )
    return [token for token in tokens if token is not None]


def _added(number: Any, token: Table) -> Added | None:
    text = token.get("content")
    if type(number) is not int or not 0 <= number < MAX_ID or not isinstance(text, str) or not text:
        return None
    flags = {flag: token.get(flag) is True for flag in ("special", "lstrip", "rstrip", "single_word")}
    return Added(number, text, **flags, normalized=token.get("normalized", not flags["special"]) is True)


def _check_vocabulary(model: Table, name: str) -> None:
    vocab = model.get("vocab")
    where = f"{name}: model.vocab"
    if isinstance(vocab, list | dict) and len(vocab) > MAX_PIECES:
        raise UserError(f"{where}: expected up to {MAX_PIECES:,} pieces, found {len(vocab):,}; use another file")
    if isinstance(vocab, list):  # Unigram
        if not all(
            isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and type(p[1]) in (int, float) for p in vocab
        ):
            raise UserError(f"{where}: expected pieces with scores, found others; use another copy of the file")
        if (size := sum(len(piece) for piece, _ in vocab)) > MAX_TREE:
            raise UserError(
                f"{where}: expected pieces of up to {MAX_TREE:,} characters, found {size:,}; use another file"
            )
        ids: set[Any] = {*range(len(vocab))}
    elif isinstance(vocab, dict):
        ids = {*vocab.values()} if all(type(i) is int for i in vocab.values()) else set()
        wrong = next(((p, i) for p, i in vocab.items() if type(i) is not int or not 0 <= i < MAX_ID), None)
        if wrong is not None:
            raise UserError(
                f"{where}: expected ids from 0 to {MAX_ID - 1:,}, found {_shown(wrong[1])} for {quoted(wrong[0], 40)}; use another "
                "copy of the file"
            )
        if len(ids) < len(vocab):
            seen: dict[int, str] = {}
            first, second = next((seen[i], p) for p, i in vocab.items() if seen.setdefault(i, p) != p)
            raise UserError(
                f"{where}: expected one piece per id, found {quoted(first, 40)} and {quoted(second, 40)} with the same; use another copy "
                "of the file"
            )
    else:
        raise UserError(f"{where}: expected the pieces of a vocabulary, found {_shown(vocab)}; use another file")
    if not ids:
        raise UserError(f"{where}: expected the pieces of a vocabulary, found none; use another file")
    if model.get("type") in (None, "BPE") and not isinstance(model.get("merges"), list):
        raise UserError(f"{name}: model.merges: expected a list, found {_shown(model.get('merges'))}; use another file")


def _check_added(table: Table, name: str) -> None:
    found = table.get("added_tokens")
    if found is None:
        return
    where = f"{name}: added_tokens"
    if not isinstance(found, list) or len(found) > MAX_ADDED:
        raise UserError(
            f"{where}: expected a list of up to {MAX_ADDED:,} tokens, found {_shown(found)}; use another file"
        )
    tokens = [_added(token.get("id"), token) if isinstance(token, dict) else None for token in found]
    for token, entry in zip(tokens, found, strict=True):
        if token is None:
            raise UserError(
                f"{where}: expected tokens with an id from 0 to {MAX_ID - 1:,} and a text, found {_shown(entry)}; use another file"
            )
    known = [token for token in tokens if token is not None]
    if (size := sum(len(token.text) for token in known)) > MAX_ADDED_CHARS:
        raise UserError(f"{where}: expected up to {MAX_ADDED_CHARS:,} characters, found {size:,}; use another file")
    for what, values in (("ids", [token.id for token in known]), ("texts", [token.text for token in known])):
        if len(set(values)) < len(values):
            twice = next(value for value, count in collections.Counter(values).items() if count > 1)
            raise UserError(f"{where}: expected different {what}, found {quoted(twice, 40)} twice; delete one")


def _check_pipeline(steps: Any, part: str, name: str) -> None:
    """Raise UserError if a part of the pipeline has too many steps or takes forever, or if it makes texts huge."""
    growth = 1
    for count, step in enumerate(_steps(steps), 1):
        growth *= _growth(step)
        if count > MAX_STEPS or growth > MAX_GROWTH:
            raise UserError(
                f"{name}: {part}: expected a few steps that keep a text's length, found more; use another file"
            )
        if step.get("type") == "FixedLength" and not (type(step.get("length")) is int and step["length"] > 0):
            raise UserError(
                f"{name}: {part}: length: expected 1 or more, found {_shown(step.get('length'))}; use another file"
            )
        pattern = step.get("pattern")
        expression = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(expression, str) and (reason := why_refused(expression)):
            raise UserError(
                f"{name}: {part}: expected an expression that takes little time, found {quoted(expression, 60)}: {reason}; use another file"
            )


def _steps(value: Any) -> Iterator[Table]:
    """Yield the steps of a part of the pipeline, those of sequences one by one."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield found
        inner = found.values() if isinstance(found, dict) else found
        waiting += [item for item in inner if isinstance(item, dict | list)] if isinstance(found, dict | list) else []


def _growth(step: Table) -> int:
    """Return how many times longer a step may make a text."""
    content, pattern = step.get("content"), step.get("pattern")
    if step.get("type") == "Prepend":
        return 1 + (len(str(step.get("prepend"))) > 16) * MAX_GROWTH
    if step.get("type") == "Replace" and isinstance(content, str):
        of = pattern.get("String") if isinstance(pattern, dict) else None
        return max(1, -(-len(content) // len(of)) if isinstance(of, str) and of else len(content) + 1 if content else 1)
    return 2 if step.get("type") == "ByteLevel" else 1


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else quoted(value, 40)
