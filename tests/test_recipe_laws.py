"""benchmarks/recipe_laws.py finds the laws that made its runs, and reads the runs' file."""

import dataclasses
import json
import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llama_jax.recipe.laws import Laws, TextLevel
from tests import commands
from tests.commands import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("scipy")
    return commands.script("benchmarks/recipe_laws.py")


def made_by(script: ModuleType, laws: Laws, noise: float) -> list[Any]:
    rng = random.Random(0)
    runs = []
    for number in range(6):
        level, unique = TextLevel(rng.uniform(1.5, 3), rng.uniform(1.5, 3)), 10 ** rng.uniform(4.5, 7)
        for _ in range(6):
            parameters, read = int(10 ** rng.uniform(5, 7)), unique * 10 ** rng.uniform(-0.5, 1)
            bits = laws.bits_per_byte(level, parameters, read, unique) * math.exp(rng.gauss(0, noise))
            runs.append(script.Run(str(number), level, parameters, read, unique, bits, 1e12))
    return runs


def test_the_fit_is_much_nearer_to_runs_of_other_laws_than_the_guess(script: ModuleType) -> None:
    true = dataclasses.replace(Laws(), share=0.8, floor=0.4, of_bytes=18.0)
    runs = made_by(script, true, noise=0.01)
    fitted = script.fit(runs)

    def far(laws: Laws) -> float:
        return sum(abs(script.residual(laws, run)) for run in runs) / len(runs)

    assert far(Laws()) > 0.05 and far(fitted) < 0.02
    apart = script.spread_of(runs, script.without_each(runs))
    assert set(apart) == {str(number) for number in range(6)} and max(map(len, apart.values())) == 6


def test_the_cost_of_a_rate_that_has_not_decayed_is_found_apart_from_how_runs_end(script: ModuleType) -> None:
    laws, rng = Laws(), random.Random(0)
    true = dataclasses.replace(laws, undecayed=0.3, undecayed_power=1.2)
    runs = []
    for run in made_by(script, laws, noise=0.2):
        away = run.bits / laws.bits_per_byte(run.level, run.parameters, run.read, run.unique)
        earlier = tuple(
            (
                share,
                away
                * math.exp(rng.gauss(0, 0.01))
                * true.bits_per_byte(run.level, run.parameters, share * run.read, run.unique, 1 - share),
            )
            for share in (0.25, 0.5, 0.75)
        )
        runs.append(run._replace(earlier=earlier))
    apart = script.excesses(laws, runs)
    assert {name: each.shape for name, each in apart.items()} == {str(number): (18, 2) for number in range(6)}
    found = script.fit_undecayed(laws, apart)
    assert (found.undecayed, found.undecayed_power) == pytest.approx((0.3, 1.2), rel=0.05)
    assert 0.005 < script.four_in_five(list(script.undecayed_sizes(laws, apart).values())) < 0.06


def test_the_way_back_to_frequencies_is_that_of_the_worst_evaluation_of_a_text(script: ModuleType) -> None:
    laws, runs = Laws(), []
    for run in made_by(script, laws, noise=0.0)[:3]:
        earlier = laws.bits_per_byte(run.level, run.parameters, 0.5 * run.read, run.unique, 0.5)
        runs.append(run._replace(earlier=((0.5, earlier * 1.1),), frequencies=1.21 * earlier))
    found, least = script.ways_back(runs, {"0": laws})
    assert found == {"0": pytest.approx(0.5)} and least == pytest.approx(math.log(1.21))


def test_runs_are_read_and_those_without_an_evaluation_are_left_out(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("The fox went to the river.\n" * 200)
    row = {
        "text": str(tmp_path / "my.txt"),
        "bytes": 5400,
        "flags": "--data.vocab-size 300",
        "parameters": 1000,
        "tokens": 500,
    }
    rows = [row | {"tflop": 0.1, "evals": [[5, 3.0], [10, 2.5]]}, row | {"tflop": 0.1, "evals": []}]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (run,) = script.read_runs(tmp_path / "runs.jsonl")
    assert run.earlier == ((0.5, 3.0),) and 1 < run.frequencies < 8
    assert (run.parameters, run.bits, run.flops) == (1000, 2.5, 1e11) and run.unique == pytest.approx(4860, abs=30)


def test_the_vocabulary_of_a_run_is_that_of_its_settings_as_the_records_have_them(script: ModuleType) -> None:
    records = [json.loads(line) for line in (ROOT / "benchmarks" / "records" / "laws.jsonl").read_text().splitlines()]
    given = [row for row in records if "data.vocab-size" in row["settings"]]
    assert given and all(script._vocab_size(row) == int(row["settings"]["data.vocab-size"]) for row in given)
    assert script._vocab_size({"flags": "--data.vocab-size 300"}) == 300 and script._vocab_size({}) == 1024


def test_records_whose_texts_are_not_here_are_refused_in_a_line(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="expected the path of a text under text, found 'the first nine tenths"):
        script.read_runs(ROOT / "benchmarks" / "records" / "laws.jsonl")
