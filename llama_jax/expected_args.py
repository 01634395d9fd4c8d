"""The settings that say which held-out loss to expect of a run: a recipe writes them."""

import bisect
import dataclasses
import math
from typing import NamedTuple

from llama_jax.fields import HUGE, POSITIVE, check_fields, expect


class Expected(NamedTuple):
    """A held-out loss to expect, in bits per byte, and the interval around it."""

    low: float
    bits_per_byte: float
    high: float


@dataclasses.dataclass(frozen=True)
class ExpectedArgs:
    """The held-out loss to expect at points of a run, in bits per byte.

    A recipe writes it. It is drawn in losses.png, and a run that leaves it says so. It changes nothing else.
    """

    tokens: tuple[int, ...] = ()
    """Tokens that the run has read at each point, in order. The last point is the end of the run.
    Empty: nothing is expected."""
    low: tuple[float, ...] = ()
    """Lower end of the interval at each point."""
    bits_per_byte: tuple[float, ...] = ()
    """Expected loss at each point."""
    high: tuple[float, ...] = ()
    """Upper end of the interval at each point."""
    parameters: int = 0
    """Parameters of the model that this is expected of. 0: of any model."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))

    def check(self) -> None:
        """Raise UserError on impossible values."""
        check_fields(self, "expected.", {"parameters": (0, HUGE)})
        count = len(self.tokens)
        for name in ("low", "bits_per_byte", "high"):
            values, key = getattr(self, name), f"expected.{name}"
            expect(len(values) == count, key, f"{count} numbers, one for each of expected.tokens", len(values))
            for value in values:
                expect(POSITIVE[0] <= value <= POSITIVE[1], key, "numbers above 0", value)
        rising = all(a < b for a, b in zip((0, *self.tokens), self.tokens, strict=False))
        expect(
            count != 1 and rising,
            "expected.tokens",
            "two numbers or more above 0, each above the one before",
            self.tokens,
        )
        for low, middle, high in zip(self.low, self.bits_per_byte, self.high, strict=True):
            expect(
                low <= middle <= high, "expected.bits_per_byte", f"numbers from low to high, {low} to {high}", middle
            )

    def at(self, tokens: int) -> Expected | None:
        """Return what to expect after ``tokens``, by lines between the logarithms of the points.

        None: that is before the first point, or after the last one.
        """
        if not self.tokens or not self.tokens[0] <= tokens <= self.tokens[-1]:
            return None
        i = min(bisect.bisect_right(self.tokens, tokens), len(self.tokens) - 1)
        before, after = self.tokens[i - 1], self.tokens[i]
        share = math.log(tokens / before) / math.log(after / before)
        return Expected(
            *(row[i - 1] ** (1 - share) * row[i] ** share for row in (self.low, self.bits_per_byte, self.high))
        )
