"""Batches. The batch of step s depends only on the seed and s.

Each process reads only the rows that its devices hold.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import grain
import jax
import numpy as np

from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.data.conversations import Conversations, PackedRow, PairRow, Stream
from llama_jax.data.mixture import Mixed
from llama_jax.data.stream import Tokens

# Evaluation reads windows in groups of this many consecutive ones.
EVAL_ROWS = 16


class Batch(NamedTuple):
    """A batch for next-token prediction of B rows of T tokens: inputs up to a position predict its target."""

    inputs: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T]
    weights: np.ndarray  # float32 [B, T]: 1 if the target counts in the loss, 0 at padding


class PackedBatch(NamedTuple):
    """A batch whose rows hold documents, each of which is a sequence of its own (document_mask.py)."""

    inputs: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T]
    weights: np.ndarray  # float32 [B, T]
    segments: np.ndarray  # int32 [B, T]: the document of each input, which inputs of others do not see
    positions: np.ndarray  # int32 [B, T]: the position of each input in its document


class PairBatch(NamedTuple):
    """A batch for preferences: rows hold pairs of answers to a prompt, each answer with its prompt as a document.

    Pair p of a row is of the segments 2p, the chosen answer, and 2p + 1, the rejected one. Padding is of the next one.
    """

    inputs: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T]
    weights: np.ndarray  # float32 [B, T]: 1 at tokens of a chosen answer, -1 at those of a rejected one, else 0
    segments: np.ndarray  # int32 [B, T]
    positions: np.ndarray  # int32 [B, T]
    reference: np.ndarray  # float32 [B, T]: the log-likelihood of each target by the reference; NaN where weights are 0


AnyBatch = TypeVar("AnyBatch", Batch, PackedBatch, PairBatch)


class OwnRows:
    """The rows of a [B, T] batch that this process's devices hold, in full or in part."""

    def __init__(self, sharding: jax.sharding.Sharding, batch_size: int, length: int):
        self._sharding, self._shape = sharding, (batch_size, length)
        held = sharding.addressable_devices_indices_map(self._shape).values()
        self.rows = np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in held if index]))

    def assemble(self, batch: AnyBatch) -> AnyBatch:
        """Build the arrays of the whole batch, over all devices, from this process's rows: [rows, T] -> [B, T]."""
        return cast(AnyBatch, jax.tree.map(self._assemble, batch))

    def _assemble(self, array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return array[np.searchsorted(self.rows, np.arange(self._shape[0])[index[0]]), index[1]]

        return jax.make_array_from_callback(self._shape, self._sharding, part)


class Windows:
    """The training stream in windows of ``length`` tokens, in a new order every epoch.

    The stream is a ring. Each epoch starts at its own random offset and goes around once, so no token is dropped or
    padded, and a text shorter than a window works, too.
    """

    def __init__(self, stream: Tokens, length: int, seed: int):
        self._stream, self._length, self._seed = stream, length, seed
        self.per_epoch = windows_of(stream, length)

    def row(self, index: int, window: int) -> np.ndarray:
        """Return the ``length`` + 1 tokens of a window, int32, in the epoch of row ``index`` of the run."""
        epoch = index // self.per_epoch
        offset = int(np.random.default_rng((self._seed, epoch)).integers(len(self._stream)))
        start = (offset + window * self._length) % len(self._stream)
        row = self._stream[start : start + self._length + 1]
        # Continue at the start of the ring, repeatedly if the text is shorter than a window.
        if len(row) <= self._length:
            around = self._stream[: self._length + 1]
            row = np.concatenate([row, np.resize(around, self._length + 1 - len(row))])
        return row.astype(np.int32)


class Sequences:
    """The conversations of a run in sequences of ``length`` positions, each read once an epoch; see Conversations."""

    def __init__(self, conversations: Conversations, length: int):
        self._conversations, self._length = conversations, length
        self.per_epoch = windows_of(conversations, length)

    def row(self, index: int, window: int) -> PackedRow | PairRow:
        """Return a sequence. The number of the run's row does not matter."""
        return self._conversations.row(self._length, window)


class _Rows:
    """The rows of a run: ``rows[i]`` is the i-th, int32 [length + 1] of a text, or a sequence of conversations."""

    def __init__(self, source: Stream | Mixed, length: int, seed: int):
        streams = source.streams if isinstance(source, Mixed) else {"": source}
        self._schedule = source.schedule if isinstance(source, Mixed) else None
        self._rows = {}
        for name, stream in streams.items():
            windows: Sequences | Windows
            if isinstance(stream, Conversations):
                windows = Sequences(stream, length)
            else:
                windows = Windows(stream, length, seed)
            self._rows[name] = _order(windows.per_epoch, seed).map_with_index(windows.row)

    def __getitem__(self, index: int) -> np.ndarray | PackedRow | PairRow:
        name, number = ("", index) if self._schedule is None else self._schedule.place(index)
        row: np.ndarray | PackedRow | PairRow = self._rows[name][number]
        return row


def _order(count: int, seed: int) -> Any:
    """Return the windows of a stream in the order in which a run reads them, epoch after epoch."""
    # Grain's order of epoch e with seed s is that of epoch e + 1 with seed s - 1, so hash the seed.
    order = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(count).shuffle(seed=order).repeat()


def train_windows(
    source: Stream | Mixed, sizes: BatchSizes, length: int, seed: int, stop: int
) -> dict[str, np.ndarray]:
    """Return the windows of each stream that steps 1 to ``stop`` read, in ascending order. A single one has no name."""
    if isinstance(source, Mixed):
        streams, rows = source.streams, source.schedule.rows_before(stop)
    else:
        streams, rows = {"": source}, {"": sizes.rows(stop)}
    found = {}
    for name, stream in streams.items():
        count, read = windows_of(stream, length), rows.get(name, 0)
        order = _order(count, seed)
        found[name] = np.arange(count) if read >= count else np.sort([int(order[i]) for i in range(read)]).astype(int)
    return found


def train_batches(
    source: Stream | Mixed,
    batch_size: int,
    length: int,
    seed: int,
    start: int,
    stop: int,
    own: np.ndarray | None = None,
    bos_id: int = -1,
    before: int | None = None,
) -> Iterator[Batch | PackedBatch | PairBatch]:
    """Yield the batches of steps ``start`` to ``stop`` - 1, only rows ``own`` of each (None: all).

    Of each stream, every window is read once an epoch, in a new order each time. Threads of grain read ahead. Batches
    with conversations are packed; ``bos_id`` begins the documents of a text among them. ``before`` rows of the run come
    before those of step ``start``. None: as many as if all steps had ``batch_size``.
    """
    rows = _Rows(source, length, seed)
    own = np.arange(batch_size) if own is None else own
    skipped = 0 if before is None else before - start * batch_size
    steps = grain.MapDataset.range(start, stop).map(
        lambda s: _stacked([rows[skipped + s * batch_size + int(r)] for r in own], bos_id)
    )
    streams = source.streams.values() if isinstance(source, Mixed) else [source]
    readers = max(getattr(stream, "readers", 2) for stream in streams)  # more of them if each waits for an answer
    options = grain.ReadOptions(num_threads=readers, prefetch_buffer_size=max(8, readers))
    yield from steps.to_iter_dataset(options)


def _stacked(rows: Sequence[np.ndarray | PackedRow | PairRow], bos_id: int = -1) -> Batch | PackedBatch | PairBatch:
    """Return rows as a batch: a packed one if any of them is a sequence of conversations. Pairs are all or none."""
    if isinstance(rows[0], PairRow):
        return PairBatch(*(np.stack(column) for column in zip(*rows, strict=True)))
    if any(isinstance(row, PackedRow) for row in rows):
        packed = [row if isinstance(row, PackedRow) else _with_documents(row, bos_id) for row in rows]  # type: ignore[arg-type]
        return PackedBatch(*(np.stack(column) for column in zip(*packed, strict=True)))
    tokens = np.stack(rows)  # type: ignore[arg-type]
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones(tokens[:, 1:].shape, np.float32))


def _with_documents(tokens: np.ndarray, bos_id: int) -> PackedRow:
    batch = Batch(tokens[None, :-1], tokens[None, 1:], np.ones((1, len(tokens) - 1), np.float32))
    return PackedRow(*(array[0] for array in with_documents(batch, bos_id)))


def with_documents(batch: Batch, bos_id: int) -> PackedBatch:
    """Return the batch with segments and positions, and with weight 0 for each target that begins another document."""
    begins = batch.inputs == bos_id
    index = np.arange(batch.inputs.shape[1], dtype=np.int32)
    first = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    segments = np.cumsum(begins, axis=1, dtype=np.int32)
    weights = batch.weights * (batch.targets != bos_id)
    return PackedBatch(batch.inputs, batch.targets, weights, segments, index - first)


def windows_of(stream: Stream, length: int) -> int:
    """Return the number of rows of ``length`` tokens that go around a stream once, or hold all its conversations."""
    if isinstance(stream, Conversations):
        return max(1, stream.sequences(length))
    return max(1, -(-len(stream) // length))


def eval_windows(stream: Stream, length: int, limit: int = 0) -> np.ndarray:
    """Return the windows of a held-out stream that an evaluation reads. ``limit`` is that of ``eval_batches``."""
    whole = stream.sequences(length) if isinstance(stream, Conversations) else max(0, -(-(len(stream) - 1) // length))
    groups = -(-whole // EVAL_ROWS)
    if not 0 < limit < groups:
        return np.arange(whole)
    chosen = np.arange(limit) * groups // limit
    windows = (chosen[:, None] * EVAL_ROWS + np.arange(EVAL_ROWS)).ravel()
    return windows


def batches_of(
    stream: Conversations, windows: np.ndarray, batch_size: int, length: int, own: np.ndarray
) -> Iterator[PackedBatch | PairBatch]:
    """Yield the sequences ``windows`` of conversations in batches, only rows ``own`` of each. The last is padded.

    A window behind the last sequence is padding, too.
    """
    known = stream.sequences(length)
    for first in range(0, len(windows), batch_size):
        wanted = [int(windows[r]) if r < len(windows) else known for r in first + own]
        rows = [stream.row(length, window) if window < known else stream.padding(length) for window in wanted]
        yield cast(PackedBatch | PairBatch, _stacked(rows))


def eval_batches(
    stream: Stream, batch_size: int, length: int, limit: int = 0, own: np.ndarray | None = None
) -> Iterator[Batch | PackedBatch | PairBatch]:
    """Yield the stream in order, with each token but the first predicted once. The end is padded.

    Of conversations it yields their sequences in order, all of which are complete.

    ``limit`` is the maximum number of groups of EVAL_ROWS windows, spread evenly over the stream; they are the same for
    every ``batch_size``. 0: all groups. ``own`` are the rows of each batch to read. None: all.
    """
    own = np.arange(batch_size) if own is None else own
    windows = eval_windows(stream, length, limit)
    if isinstance(stream, Conversations):
        yield from batches_of(stream, windows, batch_size, length, own)
        return
    count = len(stream) - 1
    for first in range(0, len(windows), batch_size):
        rows = first + own
        # Windows after the last one are padding.
        starts = np.where(rows < len(windows), windows[np.minimum(rows, len(windows) - 1)] * length, count + 1)
        tokens = np.zeros((len(starts), length + 1), np.int32)
        for row, start in zip(tokens, starts.tolist(), strict=True):
            part = stream[start : start + length + 1]
            row[: len(part)] = part
        held = (starts[:, None] + np.arange(1, length + 1) < len(stream)).astype(np.float32)
        yield Batch(tokens[:, :-1], tokens[:, 1:], held)
