"""Loading: the order of batches over shards, for any number of processes and after any start, and what a large set takes."""

import contextlib
import dataclasses
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.loading import make_set
from llama_jax.data import open_tokens
from llama_jax.data.batches import OwnRows, train_batches
from llama_jax.data.stream import Shard, TokenStream, checksums


@dataclasses.dataclass(frozen=True)
class Part:
    """As much of a sharding as OwnRows asks for: the devices of one of several processes, each with rows and positions."""

    rows: int  # parts of the rows over all devices
    columns: int
    process: int
    processes: int

    def addressable_devices_indices_map(self, shape: tuple[int, int]) -> dict[int, tuple[slice, slice]]:
        parts = [
            (slice(shape[0] * r // self.rows, shape[0] * (r + 1) // self.rows), slice(0, shape[1] // self.columns))
            for r in range(self.rows)
            for _ in range(self.columns)
        ]
        own = len(parts) // self.processes
        return dict(enumerate(parts[own * self.process : own * (self.process + 1)]))


@contextlib.contextmanager
def in_shards(folder: Path, array: np.ndarray, cuts: list[int]) -> Iterator[TokenStream]:
    """A stream of several files with blocks of 64 bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_jax.data.stream.BLOCK_BYTES", 64)
        parts = np.split(array, sorted(cut % (len(array) + 1) for cut in cuts))
        for i, part in enumerate(parts):
            (folder / f"train-{i:05d}.bin").write_bytes(part.tobytes())
        sums = np.array([s for part in parts for s in checksums(part.tobytes())], "<u4")
        files = [Shard(folder / f"train-{i:05d}.bin", len(part)) for i, part in enumerate(parts)]
        yield TokenStream(files, array.dtype, 1 << 16, sums)


@pytest.mark.parametrize(
    "layout",
    [(1, 1, 1), (2, 1, 2), (4, 1, 2), (4, 2, 4), (8, 1, 4), (8, 1, 8), (4, 2, 8)],
    ids=lambda layout: f"{layout[0] * layout[1]} devices in {layout[2]} processes",
)
@settings(max_examples=3)
@given(
    count=st.integers(2, 500),
    cuts=st.lists(st.integers(0, 500), max_size=6),
    times=st.integers(1, 2),
    length=st.integers(1, 40),
    start=st.integers(0, 40),
)
def test_the_rows_of_all_processes_are_the_batch_of_one_at_any_step_after_any_start(
    tmp_path_factory: pytest.TempPathFactory,
    layout: tuple[int, int, int],
    count: int,
    cuts: list[int],
    times: int,
    length: int,
    start: int,
) -> None:
    rows, columns, processes = layout
    array, batch_size = np.arange(count, dtype="<u2"), 8 * times
    wanted = list(train_batches(array, batch_size, length, 3, 0, start + 2))[start:]
    with in_shards(tmp_path_factory.mktemp("shards"), array, cuts) as stream:
        found = np.full((2, batch_size, length), -1)
        for process in range(processes):
            own = OwnRows(Part(rows, columns, process, processes), batch_size, length).rows  # type: ignore[arg-type]
            for step, batch in enumerate(train_batches(stream, batch_size, length, 3, start, start + 2, own)):
                found[step, own] = batch.inputs
    assert all(np.array_equal(a, b.inputs) for a, b in zip(found, wanted, strict=True))


@settings(max_examples=20)
@given(
    count=st.integers(2, 400),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    batch_size=st.integers(1, 5),
    length=st.integers(1, 40),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 2),
)
def test_no_position_of_the_shards_is_missed_or_repeated_in_an_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    cuts: list[int],
    batch_size: int,
    length: int,
    seed: int,
    epoch: int,
) -> None:
    with in_shards(tmp_path_factory.mktemp("shards"), np.arange(count, dtype="<u2"), cuts) as stream:
        windows = -(-count // length)
        first, last = epoch * windows, (epoch + 1) * windows
        steps = range(first // batch_size, -(-last // batch_size))
        rows = [
            row
            for batch in train_batches(stream, batch_size, length, seed, steps.start, steps.stop)
            for row in batch.targets
        ][first - steps.start * batch_size :][:windows]
    targets, times = np.unique(np.concatenate(rows), return_counts=True)
    assert targets.tolist() == list(range(count))
    # The last window of the ring goes on into the first: only what fills it is read twice.
    assert times.sum() - count < length


def test_ten_gigabytes_in_a_thousand_shards_are_opened_by_little_work_and_memory(tmp_path: Path) -> None:
    """Files with holes. How long it takes is measured by benchmarks/loading.py."""
    make_set(tmp_path / "tokens", [5_000_000] * 1000, sparse=True)
    tracemalloc.start()
    tokens = open_tokens(tmp_path / "tokens")
    for batch in train_batches(tokens.train, 16, 256, 0, 10**6, 10**6 + 20):
        assert batch.inputs.shape == (16, 256)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tokens.train.size == 5 * 10**9 and len(tokens.train.shards) == 1000
    assert most < 50e6
