"""The search, with a compiler that is only counted."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_jax.config import Config, TrainArgs
from llama_jax.errors import UserError
from llama_jax.plan import Plan
from llama_jax.plan.calibration import REFUSED, Calibration, Compiled, Errors, errors, features_of
from llama_jax.plan.estimate import Candidate, training_bytes
from llama_jax.plan.picture import draw_search, is_picture
from llama_jax.plan.search import Search, error_rows, errors_summary, estimates_of, ranked, ratio
from llama_jax.plan.topology import Topology
from tests.plan.test_advice import SMALL, made
from tests.plan.test_estimate import SEVEN

TOPOLOGY = Topology.parse("v5e:2x2")
CONFIG = Config(SMALL, train=TrainArgs(batch_size=32))


class Schedule:
    """What stands for a compiled program that takes some seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds


def compiler(factor: Callable[[Candidate], tuple[float, float]]) -> Callable[[Candidate], Plan]:
    """A compiler whose bytes and seconds are those of the estimate, times two factors."""

    def compile_(c: Candidate) -> Plan:
        size, time = factor(c)
        plan = made(c.config, c.topology, size * training_bytes(c.config))
        schedule = None if plan.schedule is None else Schedule(time * c.seconds)
        return replace(plan, schedule=schedule)  # type: ignore[arg-type]

    return compile_


def searched(factor: float, compiles: int) -> tuple[list[Compiled], Search]:
    """What is found by a compiler that finds ``factor`` times the counted bytes, and the counted seconds."""
    search = Search.begin(CONFIG, TOPOLOGY)
    return list(search.run(compiles, compiler(lambda _: (factor, 1.0)))), search


def hidden(seed: int, features: np.ndarray) -> np.ndarray:
    """Factors [candidates] as a compiler may have them: of a policy, of each doubling, and without any reason."""
    random = np.random.default_rng(seed)
    deviations = np.array([0.3, *[0.1] * 4, *[0.05] * 5])
    logarithms = features @ (deviations * random.standard_normal(len(deviations)))
    return np.exp(logarithms + 0.02 * random.standard_normal(len(features)))


def test_where_the_estimate_holds_the_fastest_by_it_are_compiled() -> None:
    found, search = searched(1.0, 4)
    fitting = [c for c in search.possible if c.bytes <= TOPOLOGY.chip.hbm_bytes]
    assert found[0].candidate.seconds == min(c.seconds for c in fitting)
    fast = sorted(c.seconds for c in fitting)[11]
    assert all(c.plan.fits and c.candidate.seconds <= fast for c in found)
    assert len(search.possible) > search.fitting == len(fitting) > 12


def test_what_the_compiler_says_of_one_spares_the_others() -> None:
    first = searched(1.0, 1)[0][0].candidate
    factor = 1.2 * TOPOLOGY.chip.hbm_bytes / first.bytes
    found, _ = searched(factor, 4)
    assert not found[0].plan.fits and ratio(found) == pytest.approx(factor)
    assert len(found) == 4 and all(c.candidate.bytes < first.bytes for c in found[1:])
    assert any(c.plan.fits for c in found) and not ranked(found)[-1].plan.fits and ranked(found)[0].plan.fits


def test_what_is_smaller_than_estimated_is_compiled_though_its_estimate_does_not_fit() -> None:
    found, _ = searched(0.5, 12)
    too_large = [c for c in found if c.candidate.bytes > TOPOLOGY.chip.hbm_bytes]
    assert too_large and all(c.plan.fits for c in too_large)


def test_twelve_compiles_find_what_is_about_the_best_of_all_candidates() -> None:
    """The best is known here, since what the compiler would say of every candidate is made up."""
    config, medians = Config(SEVEN, train=TrainArgs(batch_size=1024)), list[tuple[float, float]]()
    search = Search.begin(config, Topology.parse("v5e:16x16"))
    for seed in range(6):
        sizes, times = hidden(seed, search.features), hidden(seed + 100, search.features)
        factors = {c.config: (a, b) for c, a, b in zip(search.possible, sizes, times, strict=True)}
        compile_ = compiler(lambda c, factors=factors: factors[c.config])  # type: ignore[misc]
        best = min(plan.seconds for c in search.possible if (plan := compile_(c)).fits)
        found = list(search.run(12, compile_))
        assert len(found) <= 12 and len({c.candidate.config for c in found}) == len(found)
        assert ranked(found)[0].plan.seconds <= 1.05 * best
        medians += [(before.median, after.median) for before, after in errors(found).values() if before and after]
    before, after = np.mean(medians, axis=0)
    assert len(medians) == 12 and after < 0.5 * before


def test_a_factor_that_all_plans_share_is_found_from_one_of_them() -> None:
    search = Search.begin(CONFIG, TOPOLOGY)
    first = search.possible[0]
    plan = compiler(lambda _: (0.5, 3.0))(first)
    before = Calibration.of([]).guesses(search.possible, search.features)
    assert [(g.bytes, g.seconds) for g in before] == [(c.bytes, c.seconds) for c in search.possible]
    (after,) = Calibration.of([Compiled(first, plan, before[0])]).guesses([first], features_of([first]))
    assert after.bytes == pytest.approx(0.5 * first.bytes, rel=0.01)
    assert after.seconds == pytest.approx(3.0 * first.seconds, rel=0.01)


def test_the_correction_is_the_ridge_regression_of_numpy_and_knows_best_what_it_has_seen() -> None:
    """The mode of the posterior is least squares with a row more for each weight."""
    search = Search.begin(CONFIG, TOPOLOGY)
    wanted = np.log(hidden(1, search.features))
    some = [0, 5, 9, 30]
    correction = Calibration.of(
        [
            Compiled(c, compiler(lambda c, i=i: (math.exp(wanted[i]), 1.0))(c), search.guesses([])[i])
            for i in some
            for c in [search.possible[i]]
        ]
    ).bytes
    deviations = np.array([1.0, *[0.1] * 4, *[0.03] * 5])
    rows = np.concatenate([search.features[some] / 0.02, np.diag(1 / deviations)])
    weights = np.linalg.lstsq(rows, np.concatenate([wanted[some] / 0.02, np.zeros(10)]), rcond=None)[0]
    assert correction.weights == pytest.approx(weights, abs=1e-6)
    spread = correction.deviations(search.features)
    assert max(spread[some]) < 0.03 < max(spread)


def test_a_refusal_that_names_no_bytes_counts_as_more_than_there_is() -> None:
    def refuse(c: Candidate) -> Plan:
        return replace(made(c.config, TOPOLOGY, 1e15), bytes=0)

    search = Search.begin(CONFIG, TOPOLOGY)
    found = list(search.run(3, refuse))
    (first, *_), room = found, TOPOLOGY.chip.hbm_bytes
    (after,) = Calibration.of([first]).guesses([first.candidate], features_of([first.candidate]))
    assert after.bytes == pytest.approx(REFUSED * room, rel=0.01)
    assert errors(found)["bytes"] == (None, None) and ratio(found) == 1


def test_errors_are_of_what_was_expected_before_the_compiler_spoke() -> None:
    assert Errors.of([(1.0, 2.0), (3.0, 2.0), (2.0, 2.0)]) == Errors(3, 0.5, 0.5)
    assert Errors.of([]) is None
    found, _ = searched(0.8, 3)
    before, after = errors(found)["bytes"]
    assert before is not None and after is not None and before.count == after.count == 2
    assert before.median == pytest.approx(0.25) and after.largest < 0.02
    assert found[0].expected.bytes == found[0].candidate.bytes
    said = error_rows(found)
    assert "bytes" in said[0][1] and "calibration 25.0%" in said[0][1] and "(2 candidate" in said[0][1]
    assert errors_summary(found)["bytes"]["estimated"] == {
        "count": 2,
        "median": before.median,
        "largest": before.largest,
    }
    assert estimates_of(found[0])["expected"]["bytes_per_device"] == found[0].candidate.bytes
    assert all("takes two" in text for _, text in error_rows(found[:1]))


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_a_search_is_drawn_with_what_does_not_fit(tmp_path: Path, factor: float) -> None:
    found, search = searched(factor, 3)
    draw_search(search, found, tmp_path / "search.png")
    assert is_picture((tmp_path / "search.png").read_bytes()[:4096])


@pytest.mark.parametrize("compiles", [1, 3])
def test_nothing_is_said_to_fit_or_not_before_the_smallest_was_compiled(compiles: int) -> None:
    found, search = searched(100.0, compiles)
    assert not any(c.plan.fits for c in found)
    assert min(search.possible, key=lambda c: c.bytes) in [c.candidate for c in found]


def test_candidates_that_the_compiler_fails_on_are_left_out() -> None:
    search = Search.begin(CONFIG, TOPOLOGY)
    assert list(search.run(3, lambda _: None)) == []


def test_a_batch_that_no_mesh_divides_is_told() -> None:
    with pytest.raises(UserError, match="found 3 sequences"):
        Search.begin(Config(SMALL, train=TrainArgs(batch_size=3)), Topology.parse("v5e:16x16"))
