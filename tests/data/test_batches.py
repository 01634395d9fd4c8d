"""Batches: a function of seed and step; every token a target, once an epoch; no padding in training."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.data.batches import EVAL_ROWS, Windows, eval_batches, train_batches, windows_of
from llama_jax.data.mixture import Mixed, Schedule


def stream_of(count: int) -> np.ndarray:
    """A stream whose tokens are their positions, counted from 1, so that padding (0) stands out."""
    return np.arange(1, count + 1, dtype=np.uint16)


def train(count: int, batch_size: int, length: int, seed: int, start: int, stop: int):
    return list(train_batches(stream_of(count), batch_size, length, seed, start, stop))


def equal(left, right) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True)
    )


@settings(max_examples=25)
@given(
    count=st.integers(2, 200),
    batch_size=st.integers(1, 5),
    length=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
    start=st.integers(0, 30),
)
def test_a_run_that_starts_at_any_step_reads_what_the_run_from_0_reads_there(count, batch_size, length, seed, start):
    whole = train(count, batch_size, length, seed, 0, start + 3)
    assert len(whole) == start + 3
    assert equal(train(count, batch_size, length, seed, start, start + 3), whole[start:])


def test_a_far_step_is_reached_without_reading_what_lies_before():
    # The run from 0 would read 10^12 batches first.
    assert equal(train(1000, 4, 16, 0, 10**12, 10**12 + 2), train(1000, 4, 16, 0, 10**12, 10**12 + 2))


def test_another_seed_gives_another_order():
    orders = [train(1000, 4, 16, seed, 0, 10) for seed in (0, 1, 2**32 - 1)]
    assert equal(orders[0], train(1000, 4, 16, 0, 0, 10))
    assert not any(equal(a, b) for a, b in itertools.combinations(orders, 2))


def test_the_order_is_shuffled_and_new_with_every_epoch_and_seed():
    assert Windows(stream_of(320), 16, 0).per_epoch == 20
    orders = {}
    for seed in (0, 7, 1000):
        first = np.concatenate([batch.inputs[:, 0] for batch in train(320, 4, 16, seed, 0, 15)]).reshape(3, 20)
        # Which window comes when, counted round the ring from the epoch's first, whatever the epoch's offset.
        orders[seed] = [tuple(((epoch - epoch[0]) % 320 // 16).tolist()) for epoch in first]
    every = [order for epochs in orders.values() for order in epochs]
    assert all(sorted(order) == list(range(20)) for order in every)
    assert len({*every, tuple(range(20))}) == 10


def test_an_epoch_begins_at_an_offset_of_its_own():
    first = np.concatenate([batch.inputs[:, 0] for batch in train(320, 4, 16, 0, 0, 25)]).astype(int).reshape(5, 20)
    assert len(set(first[:, 0] % 16)) > 1


@settings(max_examples=40)
@given(count=st.integers(2, 300), length=st.integers(1, 50), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
def test_every_token_is_a_target_in_every_epoch(count, length, seed, epoch):
    rows = windows_of(stream_of(count), length)
    batches = train(count, 1, length, seed, epoch * rows, (epoch + 1) * rows)
    targets, times = np.unique(np.concatenate([batch.targets.ravel() for batch in batches]), return_counts=True)
    assert targets.tolist() == list(range(1, count + 1))
    assert times.sum() == rows * length < count + length  # no more is read twice than fills the last window


@settings(max_examples=40)
@given(count=st.integers(2, 300), batch_size=st.integers(1, 5), length=st.integers(1, 50), seed=st.integers(0, 1000))
def test_training_rows_are_stretches_of_the_ring_without_padding(count, batch_size, length, seed):
    for inputs, targets, weights in train(count, batch_size, length, seed, 0, 4):
        assert inputs.shape == targets.shape == weights.shape == (batch_size, length)
        assert inputs.dtype == targets.dtype == np.int32 and weights.dtype == np.float32
        assert (weights == 1).all() and (inputs > 0).all() and (targets > 0).all()
        assert (targets == inputs % count + 1).all()
        assert (inputs[:, 1:] == targets[:, :-1]).all()


def test_a_text_shorter_than_a_window_trains():
    for inputs, targets, weights in train(3, 2, 16, 0, 0, 5):
        assert (targets == inputs % 3 + 1).all() and weights.all()


@pytest.mark.parametrize(
    ("count", "batch_size", "length", "steps"), [(320, 4, 16, 5), (321, 4, 16, 6), (2, 4, 16, 1), (64, 1, 16, 4)]
)
def test_an_epoch_takes_the_steps_that_cover_the_stream(count, batch_size, length, steps):
    assert -(-windows_of(stream_of(count), length) // batch_size) == steps


@settings(max_examples=100)
@given(count=st.integers(0, 300), batch_size=st.integers(1, 5), length=st.integers(1, 50))
def test_evaluation_predicts_every_token_but_the_first_exactly_once(count, batch_size, length):
    predicted = []
    for inputs, targets, weights in eval_batches(stream_of(count), batch_size, length):
        assert inputs.shape == targets.shape == weights.shape == (batch_size, length)
        assert inputs.dtype == targets.dtype == np.int32 and weights.dtype == np.float32
        counted = weights == 1
        assert (weights[~counted] == 0).all() and (targets[~counted] == 0).all()
        assert (targets[counted] == inputs[counted] + 1).all()
        assert counted.any()
        predicted += targets[counted].tolist()
    assert predicted == list(range(2, count + 1))


def predicted(count: int, batch_size: int, length: int, limit: int = 0) -> list[int]:
    """The targets that an evaluation counts."""
    batches = eval_batches(stream_of(count), batch_size, length, limit)
    return [target for _, targets, weights in batches for target in targets[weights == 1].tolist()]


@settings(max_examples=50)
@given(count=st.integers(2, 900), limit=st.integers(0, 20), length=st.integers(1, 9), sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)))  # fmt: skip
def test_an_evaluation_reads_the_same_tokens_whatever_the_batch_size(count, limit, length, sizes):
    assert predicted(count, sizes[0], length, limit) == predicted(count, sizes[1], length, limit)


@settings(max_examples=50)
@given(count=st.integers(2, 900), limit=st.integers(1, 20), batch_size=st.integers(1, 40))
def test_a_limited_evaluation_reads_so_many_groups_spread_over_the_text(count, limit, batch_size):
    group = EVAL_ROWS * 5
    groups = [list(range(start, min(start + group, count + 1))) for start in range(2, count + 1, group)]
    read = predicted(count, batch_size, 5, limit)
    places = [i for i, tokens in enumerate(groups) if tokens[0] in read]
    assert read == [token for i in places for token in groups[i]] and len(places) == min(limit, len(groups))
    gaps = np.diff(places)
    assert places[0] == 0 and (gaps > 0).all() and (len(gaps) == 0 or gaps.max() - gaps.min() <= 1)


@settings(max_examples=30)
@given(
    # Grain looks for the next of n windows in steps that are 65,536 / n on average: those of few windows are named below.
    sizes=st.lists(st.integers(40, 180), min_size=1, max_size=4),
    batch_size=st.sampled_from([4, 8]),
    changes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), max_size=2),
    seed=st.integers(0, 99),
    length=st.just(2),
)
@example(sizes=[2, 3, 90], batch_size=4, changes=[(3, 5)], seed=1, length=5)
@example(sizes=[6, 2], batch_size=8, changes=[(2, 1), (4, 9)], seed=7, length=3)
def test_a_mixture_reads_every_token_of_each_source_once_an_epoch_whoever_reads_which_rows(
    sizes, batch_size, changes, seed, length
):
    """Tokens of source i are above 1000 i. Weights change at some steps."""
    streams = {str(i): stream_of(size) + 1000 * i for i, size in enumerate(sizes)}
    weights = {name: i + 1.0 for i, name in enumerate(streams)}
    schedule, at = Schedule.of([], weights, 0, BatchSizes(batch_size)), 0
    for steps, weight in changes:
        at += steps
        schedule = Schedule.of(schedule.to_list(), weights | {"0": float(weight)}, at, BatchSizes(batch_size))
    stop = at + 40
    mixed = Mixed(streams, schedule)
    whole = list(train_batches(mixed, batch_size, length, seed, 0, stop))
    for count in (2, 4):  # processes
        parts = [
            list(train_batches(mixed, batch_size, length, seed, 3, 9, np.arange(i, batch_size, count)))
            for i in range(count)
        ]
        for step, batch in enumerate(whole[3:9]):
            rows = np.zeros_like(batch.inputs)
            for i in range(count):
                rows[i::count] = parts[i][step].inputs
            assert np.array_equal(rows, batch.inputs)
    rows = np.concatenate([batch.targets for batch in whole])
    for i, (name, stream) in enumerate(streams.items()):
        of_it = rows[(rows[:, 0] - 1) // 1000 == i]
        epoch = windows_of(stream, length)
        for first in range(0, len(of_it) - epoch + 1, epoch):
            assert set(of_it[first : first + epoch].ravel().tolist()) == set(stream.tolist())
        assert len(of_it) == schedule.rows_before(stop)[name]
