"""Packing documents into windows: what holds for every list of lengths."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.packing import _best_fit, pack
from llama_jax.errors import UserError

SIZE = 20
LENGTHS = st.lists(st.integers(1, SIZE), max_size=60)


def first_fit(lengths: list[int], size: int) -> int:
    """The number of windows if each document goes into the first that holds it."""
    rooms: list[int] = []
    for length in lengths:
        at = next((i for i, room in enumerate(rooms) if room >= length), len(rooms))
        if at == len(rooms):
            rooms.append(size)
        rooms[at] -= length
    return len(rooms)


@given(LENGTHS)
def test_every_document_has_positions_of_its_own_in_one_window(lengths: list[int]) -> None:
    packing = pack(lengths, SIZE)
    taken = defaultdict(list)
    for length, window, start in zip(lengths, packing.window.tolist(), packing.start.tolist(), strict=True):
        taken[window] += range(start, start + length)
    assert sorted(taken) == list(range(packing.windows))
    for positions in taken.values():
        assert sorted(positions) == list(range(len(positions))) and len(positions) <= SIZE
    if lengths:
        assert packing.padding == pytest.approx(1 - sum(lengths) / (packing.windows * SIZE))


@given(LENGTHS)
def test_it_takes_no_more_windows_than_first_fit_and_is_the_same_again(lengths: list[int]) -> None:
    packing, again = pack(lengths, SIZE), pack(np.array(lengths, np.int64), SIZE)
    assert packing.windows <= first_fit(lengths, SIZE)
    np.testing.assert_array_equal(packing.window, again.window)
    np.testing.assert_array_equal(packing.start, again.start)


def test_the_least_room_that_holds_a_document_is_taken() -> None:
    packing = pack([12, 15, 5, 8], SIZE)
    assert packing.windows == 2 and packing.padding == 0
    assert packing.window[0] == packing.window[3] != packing.window[1] == packing.window[2]


def test_where_first_fit_is_better_it_is_taken() -> None:
    """Full windows whose documents come one window after the other: some of them the longest first cannot fill."""
    rng, better = np.random.default_rng(0), 0
    for _ in range(300):
        cuts = [np.diff([0, *sorted(rng.choice(np.arange(1, SIZE), 3, replace=False)), SIZE]) for _ in range(3)]
        lengths = np.concatenate(cuts)
        assert pack(lengths, SIZE).windows == 3 == first_fit(lengths.tolist(), SIZE)
        better += int(_best_fit(lengths, SIZE).max()) + 1 > 3
    assert better


@pytest.mark.parametrize(("lengths", "number"), [([3, 21, 4], 2), ([0], 1)])
def test_a_document_that_no_window_holds_is_named(lengths: list[int], number: int) -> None:
    with pytest.raises(UserError, match=rf"^document {number}: expected 1 to 20 tokens, found {lengths[number - 1]};"):
        pack(lengths, SIZE)


def test_a_million_documents_are_packed_almost_without_padding() -> None:
    lengths = np.minimum(1 + np.random.default_rng(0).geometric(1 / 300, size=1_000_000), 4096)
    packing = pack(lengths, 4096)
    assert packing.padding < 0.001
    filled = np.bincount(packing.window, lengths, packing.windows)
    assert filled.max() <= 4096 and filled.sum() == lengths.sum()
