"""The search, with a compiler that is only counted."""

import pytest

from llama_jax.config import Config, TrainArgs
from llama_jax.errors import UserError
from llama_jax.plan import Plan
from llama_jax.plan.estimate import Candidate, training_bytes
from llama_jax.plan.search import Search, ranked, ratio
from llama_jax.plan.topology import Topology
from tests.plan.test_advice import SMALL, made

TOPOLOGY = Topology.parse("v5e:2x2")
CONFIG = Config(SMALL, train=TrainArgs(batch_size=32))


def searched(factor: float, compiles: int) -> tuple[list[tuple[Candidate, Plan]], Search]:
    """What is found by a compiler that finds ``factor`` times the counted bytes."""
    search = Search.begin(CONFIG, TOPOLOGY)
    found = list(search.run(compiles, lambda c: made(c.config, TOPOLOGY, factor * training_bytes(c.config))))
    return found, search


def test_the_fastest_by_the_count_are_compiled() -> None:
    found, search = searched(1.0, 4)
    assert [c for c, _ in found] == search.promising[:4] and all(plan.fits for _, plan in found)
    assert search.possible > search.fitting > 4
    assert [c.seconds for c in search.promising] == sorted(c.seconds for c in search.promising)


def test_what_the_compiler_says_of_one_spares_the_others() -> None:
    first = Search.begin(CONFIG, TOPOLOGY).promising[0]
    factor = 1.2 * TOPOLOGY.chip.hbm_bytes / first.bytes
    found, search = searched(factor, 4)
    assert not found[0][1].fits and ratio(found) == pytest.approx(factor)
    assert len(found) == 4 and all(c.bytes < first.bytes for c, _ in found[1:])
    assert [c for c, _ in found] != search.promising[:4] and any(plan.fits for _, plan in found)
    assert ranked(found)[-1] == found[0]


@pytest.mark.parametrize("compiles", [1, 3])
def test_nothing_is_said_to_fit_or_not_before_the_smallest_was_compiled(compiles: int) -> None:
    found, search = searched(100.0, compiles)
    assert not any(plan.fits for _, plan in found)
    assert min(search.promising, key=lambda c: c.bytes) in [c for c, _ in found]


def test_candidates_that_the_compiler_fails_on_are_left_out() -> None:
    search = Search.begin(CONFIG, TOPOLOGY)
    assert list(search.run(3, lambda _: None)) == []


def test_a_batch_that_no_mesh_divides_is_told() -> None:
    with pytest.raises(UserError, match="found 3 sequences"):
        Search.begin(Config(SMALL, train=TrainArgs(batch_size=3)), Topology.parse("v5e:16x16"))
