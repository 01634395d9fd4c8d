"""Packs documents into windows: which documents share a sequence, so that little of it is padding.

Finding the fewest windows is too slow for many documents. Best fit, the longest document first, comes within a few.
"""

import bisect
import collections
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_jax.errors import UserError


@dataclass(frozen=True)
class Packing:
    """The place of each document: window ``window[i]``, from position ``start[i]`` on. Both are int64 [documents]."""

    window: np.ndarray
    start: np.ndarray
    windows: int
    padding: float
    """The share of all positions that hold no document."""


def pack(lengths: Sequence[int] | np.ndarray, size: int) -> Packing:
    """Assign every document to a window of ``size`` tokens. Equal ``lengths`` always give the same result.

    It takes no more windows than first fit in the order of ``lengths``, and about n log n time for n documents. Raises
    UserError on a document that is empty or longer than a window.
    """
    given = np.asarray(lengths, np.int64)
    for i in np.flatnonzero((given < 1) | (given > size))[:1].tolist():
        raise UserError(f"document {i + 1}: expected 1 to {size:,} tokens, found {given[i]:,}; cut it, or leave it out")
    window = _best_fit(given, size)
    windows = _count(window)
    # No packing takes fewer than these: all tokens must have room, and of documents over half a window no two share one.
    fewest = max(-(-int(given.sum()) // size), int(np.count_nonzero(2 * given > size)))
    if windows > fewest and _count(other := _first_fit(given, size)) < windows:
        window, windows = other, _count(other)
    padding = 1 - float(given.sum()) / (windows * size) if windows else 0.0
    return Packing(window, _starts(given, window), windows, padding)


def _best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """Assign each document, the longest first, to the window with the least room that holds it."""
    window = np.zeros(len(lengths), np.int64)
    rooms: list[int] = []  # sorted, each once; the windows that have so much room
    of_room: dict[int, list[int]] = collections.defaultdict(list)
    count = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        at = bisect.bisect_left(rooms, length)
        room = rooms[at] if at < len(rooms) else size
        if at < len(rooms):
            window[i] = of_room[room].pop()
            if not of_room[room]:
                del rooms[at]
        else:
            window[i] = count
            count += 1
        if left := room - length:
            if not of_room[left]:
                bisect.insort(rooms, left)
            of_room[left].append(int(window[i]))
    return window


def _first_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """Assign each document to the first window that holds it, with a tree of the most room among windows."""
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    most = [size] * (2 * leaves)
    window = np.zeros(len(lengths), np.int64)
    for i, length in enumerate(lengths.tolist()):
        node = 1
        while node < leaves:
            node = 2 * node + (most[2 * node] < length)
        window[i] = node - leaves
        most[node] -= length
        while node := node // 2:
            most[node] = max(most[2 * node], most[2 * node + 1])
    return window


def _starts(lengths: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Return each document's first position. Those of a window follow each other in their own order."""
    order = np.argsort(window, kind="stable")
    before = np.cumsum(lengths[order]) - lengths[order]
    first = np.searchsorted(window[order], window[order])  # the first document of each document's window
    start = np.empty_like(lengths)
    start[order] = before - before[first]
    return start


def _count(window: np.ndarray) -> int:
    return int(window.max(initial=-1)) + 1
