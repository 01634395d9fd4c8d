"""The reader of tokenizer.json, by Hugging Face's tokenizers library, which decides what the ids are."""

import contextlib
import functools
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from llama_jax.errors import UserError, quoted
from llama_jax.tokenizers import borders
from llama_jax.tokenizers.files import is_plain_metaspace
from llama_jax.tokenizers.reader import Added
from llama_jax.tokenizers.table import Table, added_of, pieces_of
from llama_jax.tokenizers.tiktoken import byte_letters
from llama_jax.words import NOTHING, Encoded

# Candidate marks to encode a part after, where the whole text is not known; see borders.find_marks.
MARKS = (borders.NO_MARKS, ("\n", "a"), ("\n", "\n"), ("a\n", "a"))
# Expressions that split text so that a match never crosses a border (borders.BORDER): a run of white space that ends in
# a newline is one match, whatever follows, and a space can only begin one. GPT-2's is not of this kind.
LINES_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS = (r"| ?[^\s\p{L}\p{N}]+[\r\n]*|", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|")
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SAFE = {WORDS + digits + signs + LINES_END for digits in (r"\p{N}{1,3}", r"\p{N}") for signs in SIGNS}
SMOKE = (
    "",
    " ",
    "a",
    "  a\n b\t\r\n\n",
    "Once upon a time, 1234 \u00e9\u4e2d\U0001f98a\u0301\u200b",
    "\0\ufffd\u2581<s>",
)


class TableReader:
    """Reads a checked table (table.py) with the tokenizers library.

    Arguments:
        table: the content of tokenizer.json.
        name: the file's path, for errors.
        added: tokens that other files add. Those with the texts of the table's own are left out.
        flagged: tokens whose flags count before those of the table's own.
        named: texts that other files name as special tokens. Pieces of the vocabulary with these texts are such tokens.

    Raises UserError if the library refuses the table.
    """

    def __init__(
        self,
        table: Table,
        name: str,
        added: Sequence[Added] = (),
        named: Sequence[str] = (),
        flagged: Sequence[Added] = (),
    ):
        self._name = name
        table = _with_flags(table, flagged)
        wanted = {*named} - {token.text for token in added}
        special = [Added(i, piece) for i, piece in pieces_of(table).items() if piece in wanted] if wanted else []
        self._table = _without_chance(_with_added(table, [*added, *special], name))
        self._raw = json.dumps(self._table, ensure_ascii=False)
        self._library = self._open(specials=False)
        own = added_of(self._table)
        self._pieces = pieces_of(self._table) | {token.id: token.text for token in own}
        self._check_ids(own)
        self.vocab_size = max(self._pieces) + 1
        self.specials: Mapping[str, int] = {token.text: token.id for token in own}
        self._hidden = {token.id for token in own if token.special}
        self.unk_id = self._unknown()
        self.byte_ids = self._bytes()
        self._no_text = {*self._hidden, self.unk_id, *self.byte_ids}
        always = [token for token in own if not token.special]
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        self.divides = not any(token.get(flag) for token in self._table["added_tokens"] for flag in flags)
        # Whether a text that is cut at borders has the ids of the whole text.
        self.cuts_exactly = _cuts_exactly(self._table, self._pieces, always)
        self._marks = borders.find_marks(lambda text: self._encode([text]).ids.tolist(), MARKS) or borders.NO_MARKS
        del self._table, self._raw

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_with_specials"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._library.encode_special_tokens = True  # the library does not send it along

    def piece(self, token_id: int) -> str:
        """Return a token's entry; see Reader."""
        return self._pieces.get(token_id, "")

    def is_text(self, token_id: int) -> bool:
        """Return whether a token stands for text; see Reader."""
        return token_id in self._pieces and token_id not in self._no_text

    def encode(self, text: str, specials: bool) -> list[int]:
        """Return the ids of a whole text; see Reader."""
        if specials:
            with self._guarded():
                return list(self._with_specials.encode(text, add_special_tokens=False).ids)
        parts = list(borders.split_text(text, everywhere=False)) if self.cuts_exactly else [text]
        return self._encode_parts(parts, borders.starts_of(parts)).ids.tolist()

    def encode_batch(self, parts: Sequence[str], starts: Sequence[bool]) -> Encoded:
        """Return the ids of parts; see Reader."""
        return self._encode_parts(parts, starts)

    def _encode_parts(self, parts: Sequence[str], starts: Sequence[bool]) -> Encoded:
        return borders.encode_with_marks(
            self._encode, lambda mark: len(self._encode([mark]).ids), self._marks, parts, starts
        )

    def _encode(self, texts: list[str]) -> Encoded:
        with self._guarded():
            rows = [found.ids for found in self._library.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.array([len(row) for row in rows], np.int64)
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum()))
        return Encoded(ids, lengths) if rows else NOTHING

    def decode(self, ids: Sequence[int], specials: bool) -> str:
        """Return the text of ids; see Reader."""
        with self._guarded():
            return self._library.decode(ids, skip_special_tokens=not specials)

    def decode_part(self, ids: Sequence[int], start: bool) -> str:
        """Return the text of a part, without unknown tokens; see Reader."""
        known = [i for i in ids if i != self.unk_id]
        mark = self._encode([self._marks[0]]).ids.tolist() if self._marks[0] and not start else []
        return self.decode(mark + known, False).removeprefix(self.decode(mark, False))

    @functools.cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """The same tokenizer, which takes the texts of special tokens for these."""
        with self._guarded():
            other = tokenizers.Tokenizer.from_str(self._library.to_str())
        other.encode_special_tokens = False
        return other

    def _open(self, specials: bool) -> tokenizers.Tokenizer:
        with self._guarded(), _without_stderr():
            library = tokenizers.Tokenizer.from_str(self._raw)
            library.encode_special_tokens = not specials
            for text in SMOKE:
                ids = library.encode(text, add_special_tokens=False).ids
                library.decode(ids, skip_special_tokens=False)
        return library

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn errors and panics of the library into a UserError."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, MemoryError, UserError):
            raise
        except BaseException as error:  # a panic derives from BaseException
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"{self._name}: expected a tokenizer that the tokenizers library ({tokenizers.__version__}) reads, found "
                f"{quoted(' '.join(str(error).split()), 120)}; use another copy of the file"
            ) from None

    def _check_ids(self, own: Sequence[Added]) -> None:
        """Raise UserError if the library gives an added token another id than the table does."""
        for token in own:
            found = self._library.token_to_id(token.text)
            if found != token.id:
                raise UserError(
                    f"{self._name}: added_tokens: expected {quoted(token.text, 40)} to follow the vocabulary with id {found}, found "
                    f"id {token.id}; save the tokenizer again with transformers"
                )

    def _unknown(self) -> int:
        model = self._table["model"]
        text = model.get("unk_token")
        if isinstance(model.get("unk_id"), int):  # Unigram
            return model["unk_id"]
        found = self._library.token_to_id(text) if isinstance(text, str) else None
        return -1 if found is None else found

    def _bytes(self) -> list[int]:
        """Return the ids of single bytes: those of byte fallback, or of a byte-level vocabulary those above 0x7F."""
        ids = {piece: i for i, piece in self._pieces.items()}
        if self._table["model"].get("byte_fallback"):
            texts = [f"<0x{byte:02X}>" for byte in range(256)]
        else:
            texts = byte_letters()[0x80:] if is_bytewise(self._table) else []
        return sorted(ids[text] for text in texts if text in ids)


def is_bytewise(table: Mapping[str, Any]) -> bool:
    """Return whether a table's pieces are bytes, written as GPT-2's vocabulary writes them."""
    return "ByteLevel" in str(table.get("pre_tokenizer")) or "ByteLevel" in str(table.get("normalizer"))


def _with_added(table: Table, added: Sequence[Added], name: str) -> Table:
    """Return the table with tokens of other files behind its own. Raises UserError if their ids leave a gap."""
    if not added:
        return table
    own = added_of(table)
    taken = {token.text for token in own}
    pieces = pieces_of(table) | {token.id: token.text for token in own}
    texts = {*pieces.values()}
    more = []
    for token in sorted(added):
        if token.text in taken:
            continue
        if pieces.get(token.id) != token.text and (token.id in pieces or token.text in texts):
            raise UserError(
                f"{name}: expected {quoted(pieces.get(token.id, token.text), 40)} to have one id, found {quoted(token.text, 40)} with id {token.id} "
                "in the files next to it; save the tokenizer again with transformers"
            )
        more.append(token._asdict() | {"content": token.text})
    entries = [{key: value for key, value in token.items() if key != "text"} for token in more]
    return table | {"added_tokens": [*(table.get("added_tokens") or []), *entries]} if entries else table


def _with_flags(table: Table, flagged: Sequence[Added]) -> Table:
    """Return the table with the flags of ``flagged`` in place of its own."""
    flags = {token.text: token._asdict() for token in flagged}
    own = table.get("added_tokens") or []
    entries = [
        token | {k: v for k, v in flags.get(token["content"], {}).items() if k not in ("id", "text")} for token in own
    ]
    return table | {"added_tokens": entries} if entries else table


def _without_chance(table: Table) -> Table:
    """Return the table without what cuts, pads or changes ids at random, and with all flags of added tokens."""
    plain = {"special": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [plain | {"normalized": not token.get("special")} | token for token in table.get("added_tokens") or []]
    model = table["model"] | ({"dropout": None} if table["model"].get("dropout") else {})
    return table | {"model": model, "added_tokens": added, "truncation": None, "padding": None}


def _cuts_exactly(table: Table, pieces: Mapping[int, str], always: Sequence[Added]) -> bool:
    """Return whether no token crosses a border of borders.BORDER, judged by the pipeline and the pieces."""
    if any(
        token.lstrip or token.rstrip or token.single_word or borders.ACROSS.search(token.text + "a") for token in always
    ):
        return False
    first, then, model = table.get("normalizer"), table.get("pre_tokenizer"), table["model"]
    if model.get("type", "BPE") != "BPE":
        return False
    if is_bytewise(table):
        steps = then.get("pretokenizers", []) if isinstance(then, dict) else []
        return (
            first in (None, {"type": "NFC"})
            and len(steps) == 2
            and steps[0].get("type") == "Split"
            and steps[0].get("behavior") == "Isolated"
            and steps[0].get("invert") is False
            and (steps[0].get("pattern") or {}).get("Regex") in SAFE
            and steps[1].get("type") == "ByteLevel"
            and steps[1].get("add_prefix_space") is False
            and steps[1].get("use_regex") is False
        )
    return is_plain_metaspace(first, then) and not any(borders.ACROSS.search(piece) for piece in pieces.values())


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Keep the report of a panic, which the library writes past Python, out of standard error for the block."""
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError, AttributeError):  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
