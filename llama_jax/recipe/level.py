"""How predictable a text is by itself: the bits per byte of its held-out part without a trained model.

Texts differ in this more than good and bad models of one text do. Two measures are taken. One counts what follows short
contexts, and knows no repetition over a distance; a compressor lives on repetition. What a trained model reaches lies
near a mean of both, whose weight is fitted. They take about two seconds a megabyte, with the same result everywhere.
"""

import lzma
import math

import numpy as np

# A byte is predicted from up to so many before it. Seven and the byte itself would fit into 64 bits.
ORDER = 5


def compressed_level(train: bytes, held_out: bytes) -> float:
    """Return the bits per byte that ``held_out`` adds to ``train`` when LZMA compresses both together."""
    sizes = [
        len(lzma.compress(text, lzma.FORMAT_RAW, filters=_filters(len(train) + len(held_out))))
        for text in (train, train + held_out)
    ]
    return 8 * max(1, sizes[1] - sizes[0]) / len(held_out)


def _filters(size: int) -> list[dict[str, int]]:
    return [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": max(1 << 16, size)}]


def counted_level(train: bytes, held_out: bytes) -> float:
    """Return the bits per byte of ``held_out`` by the counts of bytes after each context in ``train``.

    Contexts of 0 to ORDER bytes are mixed as by Witten and Bell (1991, method C): a context in which c bytes were seen,
    t different ones, gives c / (c + t) of the probability to what followed it, and the rest to the shorter context.
    Both texts must have at least a byte.
    """
    probability = np.full(len(held_out), 1 / 256)
    seen, asked = _bytes_of(train), _bytes_of(held_out)
    for length in range(ORDER + 1):
        grams, times = np.unique(_grams(seen, length), return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        total, kinds = np.add.reduceat(times, first), np.diff(first, append=len(grams))
        wanted = _grams(asked, length)
        of_gram = _looked_up(grams, times, wanted)
        of_context, different = (_looked_up(contexts, each, wanted >> np.uint64(8)) for each in (total, kinds))
        mixed = (of_gram + different * probability) / np.maximum(1, of_context + different)
        probability = np.where(of_context > 0, mixed, probability)
    return float(-np.log2(probability).mean())


def frequency_level(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Return the bits per token of ``held_out`` by how often each token occurs in ``train``, both integers [tokens].

    Each token of the vocabulary counts a half more, as those do that do not occur (Krichevsky and Trofimov, 1981).
    """
    times = np.bincount(train, minlength=vocab_size) + 0.5
    return float(-np.log2(times / times.sum())[held_out].mean()) if len(held_out) else math.inf


def _bytes_of(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8).astype(np.uint64)


def _grams(text: np.ndarray, length: int) -> np.ndarray:
    """Return each byte below the ``length`` bytes before it, in a number: uint64 [bytes]. Zeros precede the text."""
    found = text.copy()
    for back in range(1, min(length, len(text) - 1) + 1):
        found[back:] |= text[:-back] << np.uint64(8 * back)
    return found


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the values of ``wanted`` in a table with sorted ``keys``, 0 for those that it lacks."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
