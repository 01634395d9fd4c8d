"""LLaMA 3's tokenizer.model: a line per token, its bytes in base64 and its rank. It becomes a tokenizer.json's table.

Special tokens and the pattern that splits text are those of Meta's code (llama3, llama/tokenizer.py). The library's BPE
merges by pairs, where this file ranks pieces. Both give the same ids if the pairs are ordered by the ranks of what they
form, as the tests compare.
"""

import base64
import binascii
import re
from typing import Any

from llama_jax.errors import UserError, quoted

MAX_BYTES, MAX_LINES = 32_000_000, 2_000_000
LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?")
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPECIALS = 256


def is_tiktoken(content: bytes) -> bool:
    """Return whether a file looks like a vocabulary of tiktoken."""
    return LINE.match(content[:400].lstrip()) is not None


def special_texts() -> list[str]:
    """Return the texts of the special tokens that follow the vocabulary, in the order of their ids."""
    named = {0: BOS, 1: EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
    reserved = iter(range(SPECIALS))
    return [named.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(SPECIALS)]


def table_of(content: bytes, name: str) -> dict[str, Any]:
    """Return the table of a vocabulary. Raises a UserError that names ``name`` if it is not whole."""
    pieces = _pieces(content, name)
    letters = byte_letters()
    spelled = ["".join(letters[byte] for byte in piece) for piece in pieces]
    if not {*letters} <= {*spelled}:
        raise UserError(f"{name}: expected a token for each of the 256 bytes, found one without; download it again")
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    specials = [
        {"id": len(pieces) + i, "content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
        for i, text in enumerate(special_texts())
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytewise]},
        "post_processor": None,
        "decoder": bytewise | {"use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {piece: i for i, piece in enumerate(spelled)}, "merges": merges(spelled),
        },
    }  # fmt: skip


def merges(pieces: list[str]) -> list[list[str]]:
    """Return the pairs of pieces that form a piece, in the order of what they form, then of their own ranks."""
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    found: list[list[str]] = []
    for piece in pieces:
        if len(piece) > 1:
            pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
            found += [[a, b] for _, _, a, b in sorted(known)]
    return found


def byte_letters() -> list[str]:
    """Return the character by which a byte-level vocabulary (GPT-2's and later) writes each byte.

    Bytes that print as a character of their own in Latin-1 are that character; the others follow from U+0100.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def _pieces(content: bytes, name: str) -> list[bytes]:
    """Return the tokens in the order of their ranks."""
    if len(content) > MAX_BYTES or content.count(b"\n") > MAX_LINES:
        raise UserError(f"{name}: expected a tiktoken vocabulary of up to {MAX_LINES:,} tokens, found a larger file")
    found: dict[int, bytes] = {}
    seen: set[bytes] = set()
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            if LINE.fullmatch(line) is None:
                raise ValueError
            text, rank = line.split()
            piece = base64.b64decode(text, validate=True)
            if len(rank) > 8 or int(rank) in found or piece in seen or not piece or len(piece) > 1024:
                raise ValueError
        except (ValueError, binascii.Error):
            raise UserError(
                f"{name}: line {number}: expected a new token in base64 and its rank, found {quoted(line, 60)}; download it again"
            ) from None
        found[int(rank)] = piece
        seen.add(piece)
    gap = next((rank for rank in range(len(found)) if rank not in found), None)
    if gap is not None:
        raise UserError(
            f"{name}: expected the ranks 0 to {len(found) - 1:,}, found none with {gap:,}; download it again"
        )
    return [found[rank] for rank in range(len(found))]
