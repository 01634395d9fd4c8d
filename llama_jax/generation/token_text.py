"""The bytes that a single token adds to a text, and how it is shown."""

import functools
import re
from collections.abc import Mapping

from llama_jax.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# SentencePiece's spelling of a token that stands for one byte.
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Return the bytes that a token adds behind other text. They are empty for a control token.

    The first token of a text may add less: SentencePiece drops the space that it begins with.
    """
    piece = tokenizer.piece(token_id)
    if (byte := BYTE.fullmatch(piece)) and token_id in _byte_ids(tokenizer):
        return bytes([int(byte[1], 16)])
    if not (tokenizer.is_text(token_id) or token_id in _byte_ids(tokenizer)):
        return b""
    text = tokenizer.decode_part([token_id], start=False)
    if REPLACEMENT not in text or REPLACEMENT in piece:
        return text.encode()
    # A part of a character, in a vocabulary that writes each byte as a character.
    alphabet = _byte_alphabet()
    return bytes(alphabet[char] for char in piece) if all(char in alphabet for char in piece) else b""


@functools.lru_cache(4)
def textless(tokenizer: Tokenizer) -> Mapping[str, int]:
    """Return the ids of the tokens that are no text of a completion, such as EOS, by their names."""
    return {name: i for name, i in tokenizer.specials.items() if name.strip() and not tokenizer.is_text(i)}


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return how a token is shown: its text, or its entry in the vocabulary if it has no whole characters."""
    found = token_bytes(tokenizer, token_id)
    try:
        return found.decode() or tokenizer.piece(token_id)
    except UnicodeDecodeError:
        return tokenizer.piece(token_id)


@functools.lru_cache(4)
def _byte_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(tokenizer.byte_ids)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's characters for bytes (encoder.py, bytes_to_unicode): Latin-1's visible ones, then 256 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}
