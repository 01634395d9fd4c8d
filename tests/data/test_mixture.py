"""Mixtures: exact shares over any stretch, the same rows after every resume, nothing of a source repeated or missed."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.data.mixture import LONGEST_PERIOD, Schedule, Stretch, order_of, parts_of
from llama_jax.errors import UserError

WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40).map(lambda n: n / 20), min_size=1)


@given(parts=st.lists(st.integers(1, 60), min_size=1, max_size=7))
def test_every_beginning_of_a_period_has_each_share_to_less_than_a_row(parts: list[int]) -> None:
    order, period = order_of(tuple(parts)), sum(parts)
    counts = np.cumsum(order[:, None] == np.arange(len(parts)), axis=0)
    wanted = np.arange(1, period + 1)[:, None] * np.array(parts) / period
    assert np.abs(counts - wanted).max() < 1
    assert counts[-1].tolist() == parts


@given(weights=WEIGHTS, batch_size=st.integers(1, 9), start=st.integers(0, 30), length=st.integers(1, 60))
def test_any_stretch_of_steps_has_each_share_to_less_than_two_rows(weights, batch_size, start, length) -> None:
    schedule = Schedule((Stretch(0, weights),), BatchSizes(batch_size))
    rows = range(start * batch_size, (start + length) * batch_size)
    counts = collections.Counter(schedule.place(row).source for row in rows)
    for name, weight in weights.items():
        assert abs(counts[name] - len(rows) * weight / sum(weights.values())) < 2


@given(starts=st.lists(st.tuples(st.integers(0, 12), WEIGHTS), min_size=1, max_size=6), batch_size=st.integers(1, 7))
def test_a_source_is_read_row_after_row_whatever_weights_later_starts_bring(starts, batch_size) -> None:
    """Each start goes on from some step, perhaps one before the last start."""
    known, read, at = [], [], 0
    for step, weights in starts:
        at = min(step, at)  # where the newest checkpoint is
        schedule = Schedule.of(known, weights, at, BatchSizes(batch_size))
        known = schedule.to_list()
        del read[at * batch_size :]
        end = at + 8
        read += [schedule.place(row) for row in range(at * batch_size, end * batch_size)]
        assert [schedule.place(row) for row in range(len(read))] == read  # what was read stays as it was
        assert schedule.rows_before(end) == {n: c for n, c in _counts(read, schedule).items()}
        at = end
    for name in {place.source for place in read}:
        numbers = [place.number for place in read if place.source == name]
        assert numbers == list(range(len(numbers)))


def _counts(read, schedule):
    counts = {name: 0 for stretch in schedule.stretches for name in stretch.weights}
    for place in read:
        counts[place.source] += 1
    return counts


def test_equal_weights_go_on_in_the_same_period() -> None:
    first = Schedule.of([], {"a": 0.7, "b": 0.3}, 0, BatchSizes(4))
    again = Schedule.of(first.to_list(), {"a": 0.7, "b": 0.3}, 17, BatchSizes(4))
    assert again == first
    changed = Schedule.of(first.to_list(), {"a": 0.5, "b": 0.5}, 17, BatchSizes(4))
    assert [s.step for s in changed.stretches] == [0, 17]
    back = Schedule.of(changed.to_list(), {"a": 0.7, "b": 0.3}, 9, BatchSizes(4))  # from a checkpoint before the change
    assert back == first


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ({"a": 0.7, "b": 0.3}, {"a": 7, "b": 3}),
        ({"a": 70.0, "b": 30.0}, {"a": 7, "b": 3}),
        ({"a": 1.0}, {"a": 1}),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1, "b": 1, "c": 1}),
        ({"a": 0.333, "b": 0.667}, {"a": 333, "b": 667}),
    ],
)
def test_periods_are_as_short_as_the_weights_allow(weights, parts) -> None:
    assert parts_of(weights) == parts


def test_weights_with_many_digits_are_rounded_and_one_that_is_nothing_is_refused() -> None:
    parts = parts_of({"a": 0.123456789, "b": 0.5, "c": 0.3765432})
    assert sum(parts.values()) == LONGEST_PERIOD and parts["b"] == pytest.approx(0.5 * LONGEST_PERIOD, abs=1)
    with pytest.raises(UserError, match=r"data\.mixture: expected at least one of 100,000 rows .* of b"):
        parts_of({"a": 1.0, "b": 1.23456789e-9})
