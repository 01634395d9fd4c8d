"""Batches: what the training step reads at step s is a function of the seed and s, and of nothing else."""

from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np


class Batch(NamedTuple):
    """Next-token prediction: at each position, ``inputs`` up to there predict ``targets``. B rows of T tokens."""

    inputs: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T]
    weights: np.ndarray  # float32 [B, T]: 1 where the target counts in the loss, 0 at padding


class Windows:
    """The training stream in windows of ``length`` tokens, in an order that is new every epoch.

    The stream is a ring: an epoch begins at an offset of its own and goes round once, so that no token is dropped, none
    is padding, and a text shorter than a window works too.
    """

    def __init__(self, stream: np.ndarray, length: int, seed: int):
        self._stream, self._length, self._seed = stream, length, seed
        self.per_epoch = max(1, -(-len(stream) // length))

    def row(self, index: int, window: int) -> np.ndarray:
        """The ``length`` + 1 tokens of a window in the epoch that row ``index`` of the run belongs to."""
        epoch = index // self.per_epoch
        offset = int(np.random.default_rng((self._seed, epoch)).integers(len(self._stream)))
        start = (offset + window * self._length) % len(self._stream)
        row = self._stream[start : start + self._length + 1]
        if len(row) <= self._length:
            row = np.take(self._stream, np.arange(start, start + self._length + 1), mode="wrap")
        return row.astype(np.int32)


def train_batches(
    stream: np.ndarray, batch_size: int, length: int, seed: int, start: int, stop: int
) -> Iterator[Batch]:
    """Batches of steps ``start`` to ``stop`` - 1, read ahead by threads of grain."""
    windows = Windows(stream, length, seed)
    epochs = max(1, -(-stop * batch_size // windows.per_epoch))
    # Grain orders epoch e of seed s as epoch e + 1 of seed s - 1: keep the seeds far from each other.
    order = int(np.random.SeedSequence(seed).generate_state(1)[0])
    rows = grain.MapDataset.range(windows.per_epoch).shuffle(seed=order).repeat(epochs).map_with_index(windows.row)
    steps = rows.batch(batch_size).slice(slice(start, stop))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    for tokens in steps.to_iter_dataset(options):
        yield Batch(tokens[:, :-1], tokens[:, 1:], np.ones(tokens[:, 1:].shape, np.float32))


def steps_per_epoch(stream: np.ndarray, batch_size: int, length: int) -> int:
    """Optimizer steps that read the whole stream once."""
    return -(-Windows(stream, length, 0).per_epoch // batch_size)


def eval_batches(stream: np.ndarray, batch_size: int, length: int, limit: int = 0) -> Iterator[Batch]:
    """The stream in order, each token but the first predicted once; the last window and batch are filled with padding.

    limit: most batches to read, spread evenly over the stream. 0: all of them.
    """
    count = len(stream) - 1
    rows = max(0, -(-count // length))
    batches = -(-rows // batch_size)
    chosen = range(batches) if not limit or limit >= batches else [i * batches // limit for i in range(limit)]
    for i in chosen:
        starts = np.arange(i * batch_size, (i + 1) * batch_size)[:, None] * length
        positions = starts + np.arange(length + 1)
        tokens = np.where(positions < len(stream), np.take(stream, np.minimum(positions, count)), 0).astype(np.int32)
        yield Batch(tokens[:, :-1], tokens[:, 1:], (positions[:, 1:] < len(stream)).astype(np.float32))
