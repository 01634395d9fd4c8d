"""What is expected of a run: its points are checked, and between them lie lines of logarithms."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.expected_args import ExpectedArgs

CURVE = ExpectedArgs((100, 200, 800), (2.0, 1.5, 1.0), (4.0, 3.0, 2.0), (8.0, 6.0, 4.0))


def test_points_are_met_and_nothing_is_known_before_the_first_or_after_the_last() -> None:
    CURVE.check()
    assert CURVE.at(100) == pytest.approx((2.0, 4.0, 8.0)) and CURVE.at(200) == pytest.approx((1.5, 3.0, 6.0))
    assert CURVE.at(800) == pytest.approx((1.0, 2.0, 4.0))
    assert CURVE.at(400) == pytest.approx((1.5**0.5, 6.0**0.5, 24.0**0.5)), "half of the way from 200 to 800"
    assert CURVE.at(99) is CURVE.at(801) is ExpectedArgs().at(0) is None


@given(st.integers(100, 799))
def test_a_falling_curve_falls_between_its_points_too(tokens: int) -> None:
    now, later = CURVE.at(tokens), CURVE.at(tokens + 1)
    assert now is not None and later is not None
    assert all(a >= b * (1 - 1e-12) for a, b in zip(now, later, strict=True))
    assert now.low < now.bits_per_byte < now.high


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": (100, 200)}, "expected.low: expected 2 numbers, one for each of expected.tokens, found 3"),
        (
            {"tokens": (100, 100, 800)},
            "expected.tokens: expected two numbers or more above 0, each above the one before",
        ),
        ({"tokens": (0, 100, 800)}, "expected.tokens: expected two numbers or more above 0"),
        ({"low": (0.0, 1.5, 1.0)}, "expected.low: expected numbers above 0, found 0.0"),
        ({"high": (8.0, 6.0, float("nan"))}, "expected.high: expected numbers above 0, found nan"),
        ({"low": (2.0, 3.5, 1.0)}, "expected.bits_per_byte: expected numbers from low to high, 3.5 to 6.0, found 3.0"),
        ({"parameters": -1}, "expected.parameters: expected 0"),
    ],
)
def test_points_that_are_no_curve_are_refused_in_a_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        dataclasses.replace(CURVE, **change).check()
    assert str(error.value).startswith(words)
