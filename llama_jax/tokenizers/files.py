"""Finds the files of a tokenizer, and what they say: which reader, which tokens are added, which are BOS and EOS.

The files decide in this order. A folder with tokenizer.model alone is SentencePiece's (or tiktoken's, told by its
content). With a tokenizer.json beside it, SentencePiece's model is read unless the tokenizer.json has tokens that the
model lacks: then it is the fine-tune's, and is read in its place.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError, quoted
from llama_jax.storage.locations import children, location, user_errors
from llama_jax.tokenizers import tiktoken
from llama_jax.tokenizers.names import (
    CONFIG,
    DECODER,
    MAP,
    OWN_RULES,
    listed_texts,
    names_of,
    order_of,
    text_of,
    texts_in,
)
from llama_jax.tokenizers.reader import Added
from llama_jax.tokenizers.table import MAX_BYTES, MAX_ID, Table, added_by_decoder, added_of, parse_object
from llama_jax.words import SPACE_MARK

MODEL, TABLE, ADDED = "tokenizer.model", "tokenizer.json", "added_tokens.json"
# What a checkpoint keeps of a tokenizer. The last two only where nothing else names BOS and EOS.
KEPT = (MODEL, TABLE, CONFIG, MAP, ADDED)
IDS = ("generation_config.json", "config.json")
TOKENS = ("bos", "eos")


@dataclass(frozen=True)
class Files:
    """The files of a tokenizer, by name, and where they are."""

    place: Path
    """The file or folder that opens this tokenizer again."""
    path: Path
    """The file that holds the vocabulary."""
    main: str
    """The name under which a checkpoint keeps it."""
    contents: Mapping[str, bytes]
    tables: Mapping[str, Table]
    """Those in JSON, read."""


def read_files(path: str | Path) -> Files:
    """Read the tokenizer at ``path``: a file, or a folder of them. Raises UserError if there is none."""
    place = location(path)
    with user_errors(place, "read"):
        if found := [child for child in children(place) if child.name in (*KEPT, *IDS)]:
            return _in_folder(place, {child.name: child for child in found})
        if place.is_dir():
            raise UserError(f"{path}: expected a tokenizer ({MODEL} or {TABLE}), found a folder with neither")
        content = _read(place, str(path))
    if content.lstrip()[:1] != b"{":
        return Files(place, place, MODEL, {MODEL: content}, {})
    beside = {child.name: child for child in children(place.parent) if child.name in (*KEPT[2:], *IDS)}
    return _in_folder(place, {**beside, TABLE: place})


def _in_folder(place: Path, paths: dict[str, Path]) -> Files:
    """Read the tokenizer's files among those of a folder. ``place`` opens them again."""
    if MODEL not in paths and TABLE not in paths:
        raise UserError(f"{place}: expected a tokenizer ({MODEL} or {TABLE}), found {', '.join(sorted(paths))} alone")
    contents = {name: _read(paths[name], str(paths[name])) for name in KEPT if name in paths}
    tables = {name: parse_object(raw, str(paths[name])) for name, raw in contents.items() if name != MODEL}
    if set(contents) == {MODEL}:
        return Files(paths[MODEL], paths[MODEL], MODEL, contents, {})
    main = MODEL if MODEL in contents else TABLE
    files = Files(place, paths[main], main, contents, tables)
    if TABLE in contents and main == MODEL and _has_more(files):
        files = Files(place, paths[TABLE], TABLE, contents, tables)
    if files.main == TABLE and _id_of(files, "eos", None) is None:
        for name in IDS:  # the first that says what EOS is comes along
            if name in paths:
                raw = _read(paths[name], str(paths[name]))
                more = replace(
                    files, contents={**contents, name: raw}, tables={**tables, name: parse_object(raw, name)}
                )
                if _id_of(more, "eos", None) is not None:
                    return more
    return files


def _read(path: Path, name: str) -> bytes:
    """Return the content of a file of at most MAX_BYTES. Raises a UserError that names ``name``."""
    with user_errors(path, "read"):
        try:
            with path.open("rb") as file:
                content: bytes = file.read(MAX_BYTES + 1)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise UserError(f"{name}: expected a tokenizer ({MODEL} or {TABLE}), found no such file") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{name}: expected a tokenizer of up to {MAX_BYTES:,} bytes, found a larger file; use another")
    return content


def _has_more(files: Files) -> bool:
    """Return whether tokenizer.json, or a file with it, has tokens that tokenizer.model lacks."""
    if tiktoken.is_tiktoken(files.contents[MODEL]):
        return True  # the table has the names of the special tokens, which the model lacks
    size = _pieces_in(files.contents[MODEL])
    return any(token.id >= size for token in [*added_of(files.tables[TABLE]), *more_tokens(files)])


def _pieces_in(model: bytes) -> int:
    """Return the number of pieces of a SentencePiece model. Raises ``UserError`` if it is none."""
    from llama_jax.tokenizers.sentencepiece import loaded

    return int(loaded(model, MODEL).vocab_size())


def more_tokens(files: Files) -> list[Added]:
    """Return the tokens that the files next to the vocabulary add to it."""
    listed = flagged_tokens(files) if DECODER in files.tables.get(CONFIG, {}) else []
    known = {token.text for token in listed}
    plain = files.tables.get(ADDED, {})
    named = {text for table in files.tables.values() for text in texts_in(table)}
    return listed + [
        # transformers takes the tokens of this file for special if the tokenizer uses them as such.
        Added(i, text, special=text in named)
        for text, i in plain.items()
        if type(i) is int and 0 <= i < MAX_ID and text and text not in known
    ]


def flagged_tokens(files: Files) -> list[Added]:
    """Return added tokens with the flags that count: of tokenizer_config.json if it lists any, else of tokenizer.json.

    transformers adds these once more, and those with a name as special.
    """
    config, names = files.tables.get(CONFIG, {}), {*names_of(files.tables, {}).values()}
    listed = added_by_decoder(config) if DECODER in config else added_of(files.tables.get(TABLE, {}))
    return [token._replace(special=token.special or token.text in names) for token in listed]


def behind_specials(files: Files) -> tuple[bool, bool]:
    """Return how transformers goes on behind a special token: without a space mark, and without one before a space.

    tokenizer.json says so by its Metaspace, or else tokenizer_config.json by ``legacy``.
    """
    if TABLE not in files.tables:
        return files.tables.get(CONFIG, {}).get("legacy") is False, False
    then = files.tables[TABLE].get("pre_tokenizer")
    if not isinstance(then, dict) or then.get("type") != "Metaspace":
        return False, False
    return then.get("prepend_scheme", "always") != "always", True


def named_specials(files: Files) -> list[str]:
    """Return the texts that the files next to the vocabulary name as special tokens, as far as a text may hold them.

    transformers takes them for special tokens although the vocabulary may have them as ordinary pieces. A pad_token is
    one only if it is written in brackets: some models fill rows up with an ordinary piece, such as "!".
    """
    tables = [files.tables.get(name, {}) for name in (CONFIG, MAP)]
    found = [text for table in tables for which in (*TOKENS, "unk") if (text := text_of(table.get(f"{which}_token")))]
    listed = [text for table in tables for text in listed_texts(table)]
    filling = [text for table in tables for text in texts_in(table) if re.fullmatch(r"<.+>|\[.+\]", text)]
    return list(dict.fromkeys(found + listed + filling))


def without_id(files: Files, known: Callable[[str], bool]) -> list[str]:
    """Return a line if the files name special tokens that have no id. ``known`` says whether a text has one."""
    lines = []
    for name in (CONFIG, MAP):
        table = files.tables.get(name, {})
        if files.main == MODEL:  # whose own BOS and EOS count
            table = {key: value for key, value in table.items() if key not in ("bos_token", "eos_token")}
        lost = [text for text in dict.fromkeys(texts_in(table)) if not known(text)]
        if lost:
            shown = ", ".join(quoted(text, 30) for text in lost[:4]) + (f" and {len(lost) - 4} more" * (len(lost) > 4))
            lines.append(
                f"{name} names {shown}, which no file gives an id: transformers adds such tokens behind the vocabulary, here they "
                "are text; save the tokenizer again with transformers if they are needed"
            )
    return lines[:1]


def decoding_told(files: Files) -> list[str]:
    """Return a line if transformers takes spaces out of the text of ids, which this project leaves as it is."""
    kind = files.tables[TABLE]["model"].get("type", "BPE")  # of BPE it ignores the key
    if files.tables.get(CONFIG, {}).get("clean_up_tokenization_spaces") is not True or kind == "BPE":
        return []
    return [
        f'{CONFIG} says clean_up_tokenization_spaces: transformers writes " ," as ",", here texts keep their spaces'
    ]


def named_ids(files: Files, ids: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
    """Return the ids of "bos" and "eos" that the files name, and what is worth telling.

    ids: the ids of all tokens by their texts.
    """
    found = {which: _id_of(files, which, ids) for which in TOKENS}
    told = [
        f"{which.upper()} is {quoted(text, 40)}, as {name} says"
        for which, named in found.items()
        if named
        for _, text, name in [named]
    ]
    return {which: named[0] for which, named in found.items() if named is not None}, told


def pipeline_told(files: Files) -> list[str]:
    """Return a line if transformers 5 replaces the rules of tokenizer.json, by its class, with others than these."""
    table, kind = files.tables[TABLE], files.tables.get(CONFIG, {}).get("tokenizer_class")
    first, then = table.get("normalizer"), table.get("pre_tokenizer")
    if kind not in OWN_RULES or "ByteLevel" in f"{first} {then}" or is_plain_metaspace(first, then):
        return []
    return [
        f"{CONFIG} says tokenizer_class {kind}, for which transformers 5 puts rules of its own in the place of the normalizer and "
        f"pre_tokenizer of {TABLE}: its ids are others; here those of the file count, as with PreTrainedTokenizerFast"
    ]


def is_plain_metaspace(first: Any, then: Any) -> bool:
    """Return whether text is only given space marks, as by transformers for LLaMA 2's vocabulary, in either way.

    first, then: the normalizer and the pre_tokenizer of a table.
    """
    if first is None:
        return isinstance(then, dict) and then.get("type") == "Metaspace" and then.get("replacement") == SPACE_MARK
    steps = first.get("normalizers") if isinstance(first, dict) and first.get("type") == "Sequence" else [first]
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    return then is None and steps in ([prepend, replace], [replace])


def _id_of(files: Files, which: str, ids: Mapping[str, int] | None) -> tuple[int, str, str] | None:
    """Return the id of BOS or EOS, its text, and the file that names it. Without ``ids``, any id will do."""
    for name in order_of(files.tables):
        text = text_of(files.tables.get(name, {}).get(f"{which}_token"))
        if text and (ids is None or text in ids):
            return (-1 if ids is None else ids[text]), text, name
    texts = {i: text for text, i in (ids or {}).items()}
    for name in IDS:
        number = files.tables.get(name, {}).get(f"{which}_token_id")
        first = number[0] if isinstance(number, list) and number else number
        if type(first) is int and (ids is None or first in texts):
            return first, texts.get(first, ""), name
    return None


def begins_with_bos(files: Files, bos: str) -> bool | None:
    """Return whether transformers puts BOS before a text, as the files say. None: they do not say."""
    stated = files.tables.get(CONFIG, {}).get("add_bos_token")
    if isinstance(stated, bool):
        return stated
    before, _ = around(files)
    if before:
        return True if before[0] == bos else None
    return False if _has_template(files.tables.get(TABLE, {}).get("post_processor")) else None


def said_by(files: Files) -> str:
    """Return what says whether BOS begins a text, for ``begins_with_bos`` that knows."""
    stated = isinstance(files.tables.get(CONFIG, {}).get("add_bos_token"), bool)
    return f"add_bos_token in {CONFIG}" if stated else f"the post_processor of {TABLE}"


def around(files: Files) -> tuple[list[str], list[str]]:
    """Return the special tokens that the post-processor of tokenizer.json puts before and behind a text."""
    return _around(files.tables.get(TABLE, {}).get("post_processor"))


def other_ends(files: Files, ours: list[str]) -> list[str]:
    """Return a line if the post-processor, which transformers obeys, puts other tokens than ``ours`` around a text."""
    before, behind = around(files)
    if TABLE not in files.tables or (before, behind) == (ours, []):
        return []
    shown = [" and ".join(quoted(text, 30) for text in texts) or "nothing" for texts in (before, behind, ours)]
    return [
        f"by the post_processor of {TABLE}, transformers 5 puts {shown[0]} before a text and {shown[1]} behind it; this project "
        f"puts {shown[2]} before it, and nothing behind it"
    ]


def _around(processor: Any) -> tuple[list[str], list[str]]:
    if not isinstance(processor, dict):
        return [], []
    if processor.get("type") == "Sequence":
        pairs = [_around(step) for step in _listed(processor.get("processors"))]
        # In the library, later steps do not go around what the first has put there.
        return next((pair for pair in pairs if pair != ([], [])), ([], []))
    if processor.get("type") in ("RobertaProcessing", "BertProcessing"):
        first, last = (_listed(processor.get(key))[:1] for key in ("cls", "sep"))
        return [str(text) for text in first], [str(text) for text in last]
    steps = [step for step in _listed(processor.get("single")) if isinstance(step, dict)]
    texts = [special.get("id") if isinstance(special := step.get("SpecialToken"), dict) else None for step in steps]
    place = next((i for i, step in enumerate(steps) if "Sequence" in step), len(steps))
    return [str(text) for text in texts[:place] if text], [str(text) for text in texts[place + 1 :] if text]


def _has_template(processor: Any) -> bool:
    """Return whether a post-processor says what stands around a text, be it nothing, as files of transformers 5 do."""
    steps = [processor, *_listed(processor.get("processors"))] if isinstance(processor, dict) else []
    return any(isinstance(step, dict) and _listed(step.get("single")) for step in steps)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
