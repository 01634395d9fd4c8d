"""Chooses held-out documents by a hash of their text."""

import hashlib
from typing import Any

# The key of the hash that chooses held-out documents. Another key would choose others.
KEY = b"llama-jax: held out"


def hash_of(document: bytes) -> Any:
    """Return the hash of a document's text, to which more can be added."""
    return hashlib.blake2b(document, digest_size=8, key=KEY)


def is_held_out(document: Any, train_size: float) -> bool:
    """Return whether the document with the hash ``document`` is among the 1 - ``train_size`` that are held out."""
    return int.from_bytes(document.digest(), "big") >= train_size * 2**64
