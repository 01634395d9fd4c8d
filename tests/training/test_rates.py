"""Learning rates: each schedule is its formula at every step, and the cosine is optax's as it always was."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import TrainArgs
from llama_jax.training.rates import decay_end, decay_start, learning_rate, stable_until, warmup_steps
from tests.training.test_resuming import records, train, undrawn  # noqa: F401


def rates(args: TrainArgs, steps: int) -> np.ndarray:
    return np.array([float(learning_rate(args, steps)(step)) for step in range(1, steps + 1)])


def literal(args: TrainArgs, step: int, steps: int, start: int) -> float:
    """A line up to lr, then lr until ``start``, then a line that ends at the last step."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    if step <= start:
        return args.lr
    return args.lr + (args.lr * args.min_lr_ratio - args.lr) * (step - start) / (steps - start)


@pytest.mark.parametrize(("warmup", "ratio", "steps"), [(10, 0.1, 50), (1, 0.0, 7), (0, 0.1, 20), (5, 1.0, 30)])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_wsd_stays_at_lr_and_falls_along_a_line_in_the_last_steps(
    warmup: int, ratio: float, steps: int, fraction: float
) -> None:
    args = TrainArgs(lr=3e-4, warmup_steps=warmup, min_lr_ratio=ratio, schedule="wsd", decay_fraction=fraction)
    start = max(warmup, steps - round(fraction * steps))
    assert decay_start(args, steps) == start
    expected = [literal(args, step, steps, start) for step in range(1, steps + 1)]
    np.testing.assert_allclose(rates(args, steps), expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(("warmup", "ratio", "steps"), [(10, 0.1, 50), (1, 0.0, 7), (0, 0.1, 20)])
def test_linear_falls_along_a_line_from_the_warm_up_to_the_last_step(warmup: int, ratio: float, steps: int) -> None:
    args = TrainArgs(lr=3e-4, warmup_steps=warmup, min_lr_ratio=ratio, schedule="linear")
    expected = [literal(args, step, steps, warmup) for step in range(1, steps + 1)]
    np.testing.assert_allclose(rates(args, steps), expected, rtol=1e-5, atol=1e-10)
    assert stable_until(args, steps) is None


def test_a_decay_begins_and_ends_where_it_is_told() -> None:
    args = TrainArgs(lr=1e-3, warmup_steps=10, min_lr_ratio=0.0, schedule="wsd", decay_from=40)
    assert decay_end(args) == 50, "where it makes up a fifth of all steps"
    assert decay_end(dataclasses.replace(args, decay_fraction=0.5)) == 80
    assert decay_end(dataclasses.replace(args, max_steps=200)) == 200
    for steps in (41, 50, 200):
        expected = [literal(args, step, steps, 40) for step in range(1, steps + 1)]
        np.testing.assert_allclose(rates(args, steps), expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(("warmup", "ratio", "steps"), [(10, 0.1, 50), (0, 0.0, 20), (100, 0.1, 5), (100, 0.1, 1)])
def test_the_cosine_is_bit_for_bit_that_of_runs_of_before(warmup: int, ratio: float, steps: int) -> None:
    args = TrainArgs(lr=3e-4, warmup_steps=warmup, min_lr_ratio=ratio)
    warmup = min(warmup, steps - 1)
    before = optax.warmup_cosine_decay_schedule(0.0 if warmup else 3e-4, 3e-4, warmup, steps, 3e-4 * ratio)
    assert rates(args, steps).tolist() == [float(before(step)) for step in range(1, steps + 1)]


@given(
    steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    fraction=st.floats(0.01, 1.0),
    start=st.integers(0, 80),
    longer=st.integers(0, 40),
)
def test_any_run_of_wsd_rises_stays_and_falls_and_a_longer_one_begins_alike(
    steps: int, warmup: int, fraction: float, start: int, longer: int
) -> None:
    args = TrainArgs(lr=1.0, warmup_steps=warmup, schedule="wsd", decay_fraction=fraction, decay_from=start)
    rise, fall = warmup_steps(args, steps), decay_start(args, steps)
    assert 0 <= rise <= fall < steps
    assert (stable_until(args, steps) is None) == (fall == 0 or fall < warmup)
    plan = dataclasses.replace(args, decay_from=0)
    now, then = (int(stable_until(plan, n) or 0) for n in (steps, steps + longer))
    assert now <= then
    for step in {1, now} - {0} if now else ():
        assert float(learning_rate(plan, steps)(step)) == float(learning_rate(plan, steps + longer)(step))


@pytest.mark.parametrize("changes", [{"schedule": "wsd", "decay_fraction": 0.5}, {"schedule": "linear"}])
def test_a_run_takes_its_steps_at_the_rates_of_its_schedule(changes: dict[str, Any], tmp_path: Path) -> None:
    out = train(tmp_path / "run", **changes, min_lr_ratio=0.0)
    args = TrainArgs(lr=1e-2, warmup_steps=1, min_lr_ratio=0.0, **changes)
    start = 4 if changes["schedule"] == "wsd" else 1
    expected = [literal(args, step, 8, start) for step in range(1, 9)]
    assert [record["lr"] for record in records(tmp_path / "run")] == pytest.approx(expected, abs=1e-9)
    stable = " until step 4" if start == 4 else ""
    assert f"learning rate 0.01 after a warm-up of 1 steps{stable}, then a line to 0 at step 8" in out
