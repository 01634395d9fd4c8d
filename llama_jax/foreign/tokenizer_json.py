"""Hugging Face's tokenizer.json for a SentencePiece BPE model, written so that it encodes like SentencePiece.

The parts of the pipeline are documented in huggingface/tokenizers (Normalizers, Models, Decoders), SentencePiece's
settings in its sentencepiece_model.proto. Only settings that the tests compare with the library itself are written.
Each file is also checked on hard texts by ``Reader``, a second implementation that reads the table.

Special tokens are not listed as added tokens, because the library would then take "<s>" in a text for the token.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

from llama_jax.errors import quoted
from llama_jax.sentencepiece_settings import BPE, UNUSED, USER_DEFINED, Settings, piece_types
from llama_jax.tokenizer import Tokenizer
from llama_jax.tokenizers import tiktoken

SPACE = "\u2581"  # SentencePiece's mark of a space
# Patterns for SentencePiece's remove_extra_whitespaces: leading spaces, repeated spaces, trailing marks.
LEADING, REPEATED, TRAILING = r"\A +", " {2,}", SPACE + r"+\z"
ACROSS = re.compile(rf"[^\s{SPACE}]{SPACE}|\n[^\s{SPACE}]")
HARD_TEXTS = (
    "", " ", "  ", "   ", "a", " a", "a ", "  a  b  ", "\t", "\ta\t", "\n", "\n\n", "a\nb", "a \n b", "\r\n", "\0", "a\0b",
    "Once upon a time, there was.", "def f(x):\n    return  x\n", "1234567890", "3.14", "ÀÉÎõü", "e\u0301", "\ufb01 \u2460  \uff46\uff55", "\u00a0", "a\u3000b",
    "日本語の文章", "한국어", "العربية", "हिन्दी", "🦊", "👩‍👩‍👧", "\u200b", "\ufeff", "\ufffd", "\U0010ffff",
    SPACE, f"{SPACE}{SPACE}a", f"a{SPACE}", f" {SPACE} ", "<0x41>", "<unk>", "<s>", "</s>", "a<s>b</s>", "⁇", " ⁇ ", "ab" * 40, "a" * 99, "x " * 30,
)  # fmt: skip


def why_not_written(tokenizer: Tokenizer) -> str:
    """Say why no tokenizer.json encodes like ``tokenizer``. Empty if one does."""
    settings, types = Settings.of(tokenizer.model_bytes), piece_types(tokenizer.model_bytes)
    pieces = {i: tokenizer.piece(i) for i in range(tokenizer.vocab_size)}
    merged = [i for i, piece in pieces.items() if tokenizer.is_text(i) and len(piece) > 1 and piece.strip(SPACE)]
    others = [piece for i, piece in pieces.items() if not tokenizer.is_text(i)]
    reasons = {
        "it is no BPE model": settings.model_type != BPE,
        "it normalizes characters": settings.charsmap,
        "it marks spaces behind words, or not at all": settings.suffix or not settings.escape,
        "it has user-defined symbols": USER_DEFINED in types,
        "it has unused pieces": UNUSED in types,
        # tokenizer.py encodes long texts in parts, cut where such a piece may be (split_text).
        "it has pieces across spaces or lines": any(ACROSS.search(pieces[i]) for i in merged),
        "pieces of it have equal scores": len({tokenizer.score(i) for i in merged}) != len(merged),
        "it has no unknown token": tokenizer.unk_id < 0,
        "a control token is a single character": any(len(piece) == 1 for piece in others),
        "it lists a piece twice": len(set(pieces.values())) != len(pieces),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def tokenizer_json(tokenizer: Tokenizer) -> tuple[dict[str, Any] | None, str]:
    """Return the table of tokenizer.json, or None and the reason why none encodes like ``tokenizer``."""
    reason = why_not_written(tokenizer)
    if reason:
        return None, reason
    table = _table(tokenizer)
    reader = Reader(table)
    for text in itertools.chain(HARD_TEXTS, _own_texts(tokenizer)):
        if reader.encode(text) != tokenizer.encode(text, bos=False):
            return None, f"it encodes {quoted(text, 40)} differently"
    return table, ""


def tiktoken_json(tokenizer: Tokenizer) -> tuple[dict[str, Any] | None, str]:
    """Return the table of tokenizer.json for LLaMA 3's tokenizer.model, which puts BOS first. There always is one."""
    table = tiktoken.table_of(tokenizer.model_bytes, str(tokenizer.model_path))
    return table | {"post_processor": _bos_first(tokenizer.piece(tokenizer.bos_id), tokenizer.bos_id)}, ""


def pipeline(settings: Settings) -> dict[str, Any]:
    """Return the part of the table that preprocesses text."""
    collapse = [
        {"type": "Replace", "pattern": {"Regex": LEADING}, "content": ""},
        {"type": "Replace", "pattern": {"Regex": REPEATED}, "content": " "},
    ]
    steps = [
        *(collapse if settings.collapse else []),
        *([{"type": "Prepend", "prepend": SPACE}] if settings.dummy_prefix else []),
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        *([{"type": "Replace", "pattern": {"Regex": TRAILING}, "content": ""}] if settings.collapse else []),
    ]  # fmt: skip
    return {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}


def merges(tokenizer: Tokenizer) -> list[list[str]]:
    """Return all pairs of pieces that form a piece, the best piece first, as SentencePiece merges them.

    SentencePiece merges the leftmost of equal ones. LLaMA 2's runs of spaces are equal, so they grow from the left, and
    the longest left part comes first.
    """
    scores = {tokenizer.piece(i): tokenizer.score(i) for i in range(tokenizer.vocab_size) if tokenizer.is_text(i)}
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, -cut, left, right))
    return [[left, right] for _, _, left, right in sorted(found)]


class Reader:
    """Encodes text by a tokenizer.json table, like the tokenizers library."""

    def __init__(self, table: dict[str, Any]):
        model = table["model"]
        self._steps = table["normalizer"]["normalizers"]
        self._ids: dict[str, int] = model["vocab"]
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
        self._unknown: str = model["unk_token"]
        self._bytes: bool = model["byte_fallback"]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without BOS."""
        for step in self._steps:
            text = _normalized(text, step)
        symbols = list(self._symbols(text))
        while pairs := [
            (self._ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in self._ranks
        ]:
            _, i = min(pairs)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        return [self._ids[symbol] for symbol in symbols]

    def _symbols(self, text: str) -> Iterator[str]:
        """Yield characters of the vocabulary, and others as bytes or, for a run of them, as one unknown token."""
        was_unknown = False
        for char in text:
            is_unknown = char not in self._ids and not self._bytes
            if char in self._ids:
                yield char
            elif self._bytes:
                yield from (f"<0x{byte:02X}>" for byte in char.encode())
            elif not was_unknown:
                yield self._unknown
            was_unknown = is_unknown


def _normalized(text: str, step: dict[str, Any]) -> str:
    if step["type"] == "Prepend":
        return step["prepend"] + text if text else text
    pattern = step["pattern"]
    if "String" in pattern:
        return text.replace(pattern["String"], step["content"])
    return re.sub(pattern["Regex"].replace(r"\z", r"\Z"), step["content"], text)


def _own_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts made of the vocabulary: pieces in several orders, with and without spaces, and control tokens."""
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    step = max(len(pieces) // 300, 1)
    some = pieces[::step]
    for group in (some, some[::-1], [p for pair in zip(some, some[::-1], strict=True) for p in pair]):
        for start in range(0, len(group), 12):
            joined = "".join(group[start : start + 12])
            yield joined
            yield joined.replace(SPACE, " ")
    yield from (" " * count for count in range(70))
    yield from (f"a{pieces[i]} {pieces[i]}b" for i in range(tokenizer.vocab_size) if not tokenizer.is_text(i))


def _bos_first(bos: str, bos_id: int) -> dict[str, Any]:
    """Return the post-processor that puts BOS before a text."""
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }  # fmt: skip


def _table(tokenizer: Tokenizer) -> dict[str, Any]:
    settings = Settings.of(tokenizer.model_bytes)
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    leading = 1_000_000 if settings.collapse else int(settings.dummy_prefix)  # spaces that decoding drops
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        **pipeline(settings),
        "post_processor": _bos_first(pieces[tokenizer.bos_id], tokenizer.bos_id),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": leading, "stop": 0}] if leading else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[tokenizer.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": settings.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges(tokenizer),
        },
    }  # fmt: skip
