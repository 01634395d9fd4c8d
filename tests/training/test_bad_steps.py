"""Losses and gradients that are not finite, and spikes: skipped, counted, or the run's end; and remembered in checkpoints."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llama_jax
from llama_jax.checkpoint import Checkpoint
from llama_jax.config import Config, DataArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import Batch
from llama_jax.errors import UserError
from llama_jax.training import bad_steps, loop, samples, steps
from llama_jax.training.bad_steps import MEAN_STEPS, MOST_SKIPPED, LossHistory, judge
from llama_jax.training.clock import TIMES
from llama_jax.training.step import StepMetrics, make_optimizer

NAN = float("nan")
ARGS = TrainArgs(lr=0.1, warmup_steps=2, max_steps=20, spike_factor=2.0, bad_steps="skip")
PARAMS = {"w": jnp.array([[1.0, -2.0]]), "norm": jnp.ones(2)}
GRADS = {"w": jnp.array([[0.3, -0.4]]), "norm": jnp.array([0.1, -0.2])}


def states_after(args: TrainArgs, losses: list[float], norms: dict[int, float] | None = None) -> list[tuple[Any, Any]]:
    """Parameters and the optimizer's state after each of the steps with these losses, and gradient norms of 1 but for ``norms``."""
    optimizer = make_optimizer(args, 20)
    params, state, found = PARAMS, optimizer.init(PARAMS), []
    for i, loss in enumerate(losses):
        norm = (norms or {}).get(i, 1.0)
        grads = jax.tree.map(lambda g, n=norm, i=i: g * n * (i + 1), GRADS)
        updates, state = optimizer.update(grads, state, params, loss=jnp.float32(loss), grad_norm=jnp.float32(norm))
        params = optax.apply_updates(params, updates)
        found.append((params, state))
    return found


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def schedule_count(state: Any) -> int:
    (found,) = (s.count for s in jax.tree.leaves(state, is_leaf=is_schedule) if is_schedule(s))
    return int(found)


def is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)


@pytest.mark.parametrize(
    ("loss", "norm"), [(NAN, 1.0), (float("inf"), 1.0), (4.0, NAN), (4.0, float("inf")), (9.0, 1.0)]
)
def test_a_skipped_step_changes_neither_parameters_nor_moments_and_takes_its_place_in_the_schedule(
    loss: float, norm: float
) -> None:
    (before, state_before), (after, state_after), (_, state_later) = states_after(ARGS, [4.0, loss, 4.0], {1: norm})
    np.testing.assert_array_equal(flat(before), flat(after))
    assert schedule_count(state_before) + 1 == schedule_count(state_after) == schedule_count(state_later) - 1
    *inner_before, _ = state_before
    *inner_after, history = state_after
    moments = [
        [leaf for leaf in jax.tree.leaves(inner, is_leaf=is_schedule) if not is_schedule(leaf)]
        for inner in (inner_before, inner_after)
    ]
    assert len(moments[0]) == 5  # two moments of two parameters, and the count that corrects their bias
    np.testing.assert_array_equal(flat(moments[0]), flat(moments[1]))
    assert (int(history.bad_steps), int(history.skipped_steps), int(history.skipped_in_a_row)) == (1, 1, 1)
    assert int(state_later[-1].skipped_in_a_row) == 0 and int(state_later[-1].skipped_steps) == 1


def test_good_steps_are_those_of_a_run_that_does_not_look() -> None:
    losses = [4.0, 5.0, 3.0]
    looking, not_looking = (
        states_after(a, losses)[-1][0] for a in (ARGS, dataclasses.replace(ARGS, spike_factor=0.0, bad_steps="stop"))
    )
    np.testing.assert_array_equal(flat(looking), flat(not_looking))


def test_counting_takes_a_spike_and_skips_what_is_not_finite() -> None:
    count = dataclasses.replace(ARGS, bad_steps="count")
    taken, ignored = (
        states_after(count, [4.0, 9.0]),
        states_after(dataclasses.replace(ARGS, spike_factor=0.0), [4.0, 9.0]),
    )
    np.testing.assert_array_equal(flat(taken[-1][0]), flat(ignored[-1][0]))
    history = taken[-1][1][-1]
    assert (int(history.bad_steps), int(history.skipped_steps), int(history.is_bad)) == (1, 0, 1)
    found = states_after(count, [4.0, 4.0], {1: NAN})
    np.testing.assert_array_equal(flat(found[0][0]), flat(found[1][0]))
    assert int(found[1][1][-1].skipped_steps) == 1


def test_a_spike_is_measured_against_the_mean_of_the_good_losses_before_it() -> None:
    losses = [4.0, 5.0, 9.1, NAN, 3.0, 8.1, 7.9]  # means before: none, 4, 4.5, 4.5, 4.5, 4, 4
    found = [int(state[-1].is_bad) for _, state in states_after(ARGS, losses)]
    assert found == [0, 0, 1, 1, 0, 1, 0]
    history = states_after(ARGS, losses)[-1][1][-1]
    assert float(history.mean) == pytest.approx(np.mean([4, 5, 3, 7.9]), rel=1e-6)


def test_the_mean_forgets_losses_of_long_ago() -> None:
    history = LossHistory.empty()
    after = jax.jit(bad_steps._after)
    for loss in [10.0] * MEAN_STEPS + [1.0] * 5 * MEAN_STEPS:
        history = after(history, jnp.float32(loss), jnp.bool(False), jnp.bool(False))
    assert float(history.mean) == pytest.approx(1 + 9 * np.exp(-5), rel=0.01)


def history(**counts: int) -> LossHistory:
    given = {"mean": np.float32(4.0), "good_steps": 7, "is_bad": 1, "skipped_in_a_row": 0} | counts
    return LossHistory(**{name: given.get(name, 0) for name in LossHistory._fields})  # type: ignore[arg-type]


def test_the_bad_step_that_ends_a_run_is_named_with_its_loss_its_mean_and_the_last_checkpoint() -> None:
    good = StepMetrics(4.0, 1.0, history(is_bad=0))  # type: ignore[arg-type]
    stop = dataclasses.replace(ARGS, bad_steps="stop")
    for metrics, words in (
        (StepMetrics(NAN, 1.0, history()), ["finite loss", "nan", "step 12", "step 9"]),  # type: ignore[arg-type]
        (StepMetrics(4.0, NAN, history()), ["finite gradient norm", "nan", "step 12", "step 9"]),  # type: ignore[arg-type]
        (StepMetrics(9.5, 1.0, history()), ["up to 8", "2 times", "9.5", "step 12", "step 9"]),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError) as error:
            judge(stop, [good, metrics, good], 11, 9)
        assert all(word in str(error.value) for word in words), error.value


def test_a_run_that_skips_step_after_step_ends() -> None:
    many = [StepMetrics(NAN, 1.0, history(skipped_in_a_row=i)) for i in range(1, MOST_SKIPPED + 1)]  # type: ignore[arg-type]
    assert len(judge(ARGS, many[:-1], 1, 0)) == MOST_SKIPPED - 1
    with pytest.raises(UserError, match=f"up to step {MOST_SKIPPED}"):
        judge(ARGS, many, 1, 0)


# Whole runs, whose batches are spoilt at chosen steps: a weight that is not finite makes the loss so.

MODEL = ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=16)
RUN = TrainArgs(
    lr=1e-2, warmup_steps=1, max_steps=8, batch_size=4, eval_interval=4, eval_iters=1, log_interval=1, save_interval=1
)
Spoil = Callable[[int, Batch], Batch]


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Callable[[Spoil], None]:
    def set_spoil(spoil: Spoil) -> None:
        def batches(*args: Any) -> Iterator[Batch]:
            for step, batch in enumerate(original(*args), args[4] + 1):
                yield spoil(step, batch)

        monkeypatch.setattr(steps, "train_batches", batches)

    original = steps.train_batches
    monkeypatch.setattr(samples, "show", lambda *_, **__: None)
    monkeypatch.setattr(samples, "draw_losses", lambda *_: None)
    return set_spoil


def train(folder: Path, **changes: Any) -> str:
    """What a run in ``folder`` prints."""
    text = folder.parent / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran to the sea\n" * 100)
    args = dataclasses.replace(RUN, save_dir=str(folder), **changes)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        loop.train(Config(MODEL, DataArgs(str(text), vocab_size=280), args))
    return out.getvalue()


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line, parse_constant=pytest.fail).items() if k not in TIMES} for line in lines]


def parameters(folder: Path, step: int) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(llama_jax.load(str(folder / "checkpoints" / str(step))).params)]


def not_finite_at(*bad: int) -> Spoil:
    return lambda step, batch: batch._replace(weights=batch.weights * np.float32(NAN)) if step in bad else batch


def test_a_run_skips_the_bad_step_says_so_and_goes_on(tmp_path: Path, spoilt: Any) -> None:
    spoilt(not_finite_at(3))
    out = train(tmp_path / "run", bad_steps="skip")
    found = records(tmp_path / "run")
    assert [r["skipped_steps"] for r in found] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert found[2]["train_loss"] is None and found[2]["grad_norm"] is None
    assert found[-1]["train_loss"] < found[0]["train_loss"]
    assert all(np.isfinite(leaf).all() for leaf in parameters(tmp_path / "run", 8))
    assert "step 3: loss nan" in out and "skipped" in out
    assert "bad steps: 1 of 8, of which 1 were skipped" in out


def test_a_run_that_stops_at_a_bad_step_leaves_the_checkpoint_before_it(tmp_path: Path, spoilt: Any) -> None:
    spoilt(not_finite_at(3))
    with pytest.raises(UserError, match=r"finite loss, found nan at step 3; .* the last checkpoint, step 2"):
        train(tmp_path / "run")
    spoilt(lambda step, batch: batch)
    train(tmp_path / "run")  # with what was wrong put right, it goes on
    assert records(tmp_path / "run")[-1]["step"] == 8


class Killed(Exception):
    pass


def test_a_run_killed_after_bad_steps_goes_on_with_the_same_numbers(tmp_path: Path, spoilt: Any) -> None:
    # A spike is what rises by a thousandth: which steps are bad hangs on every loss before.
    choice: Any = {"bad_steps": "skip", "spike_factor": 1.001}
    spoilt(not_finite_at(3))
    train(tmp_path / "whole", **choice)

    def kill_at_6(step: int, batch: Batch) -> Batch:
        if step == 6:
            raise Killed
        return not_finite_at(3)(step, batch)

    spoilt(kill_at_6)
    with pytest.raises(Killed):
        train(tmp_path / "killed", **choice)
    spoilt(not_finite_at(3))
    train(tmp_path / "killed", **choice)
    found = records(tmp_path / "killed")
    assert found == records(tmp_path / "whole") and found[-1]["bad_steps"] >= 1
    for a, b in zip(parameters(tmp_path / "killed", 8), parameters(tmp_path / "whole", 8), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_from_before_losses_were_remembered_goes_on(
    tmp_path: Path, spoilt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt(lambda step, batch: batch)
    train(tmp_path / "new")
    save = steps._save

    def save_as_before(run: Any, state: Any, step: int, eval_loss: float | None) -> None:
        save(run, state.replace(opt_state=state.opt_state[:-1]), step, eval_loss)

    def kill_at_4(step: int, batch: Batch) -> Batch:
        if step == 4:
            raise Killed
        return batch

    spoilt(kill_at_4)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(steps, "_save", save_as_before)
        train(tmp_path / "old")
    before, now = (
        Checkpoint.find(tmp_path / name / "checkpoints" / step) for name, step in (("old", "3"), ("new", "8"))
    )
    assert now.arrays("state").keys() - before.arrays("state").keys() == {f"2/{name}" for name in LossHistory._fields}
    spoilt(lambda step, batch: batch)
    train(tmp_path / "old")
    assert records(tmp_path / "old") == records(tmp_path / "new")
