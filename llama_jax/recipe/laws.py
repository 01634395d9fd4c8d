"""The laws: what loss a run reaches, as a function of its model, of the text that it reads, and of how often it does.

They have the form of Hoffmann et al. (2022, "Training Compute-Optimal Large Language Models") with the repeated data
of Muennighoff et al. (2023, "Scaling Data-Constrained Language Models"), and a term for learning a text by heart.
benchmarks/recipe_laws.py fits the constants, and prints them in the form of ``Laws``.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TextLevel:
    """How predictable a text is by itself, in bits per byte of its held-out part (level.py)."""

    counted: float
    compressed: float


@dataclass(frozen=True)
class Laws:
    """The constants of the laws. N: parameters; U: bytes of text to train on; D: bytes that a run reads.

    bits per byte = level x (floor + of_size / N^size_power + of_bytes / E^bytes_power + by_heart x N / U x R^2), where
    R = D / U - 1 counts repetitions, E = U + U x worth x (1 - exp(-R / worth)) the bytes as fresh ones, E = D without
    repetition, and the level is counted^share x compressed^(1 - share).

    While the learning rate is still at a share r of its peak, the loss is exp(undecayed x r^undecayed_power) times as
    high as that of a run that ends there. D and E are then of the bytes read so far.
    """

    share: float = 0.8314
    floor: float = 0.4306
    of_size: float = 26.93
    size_power: float = 0.3223
    of_bytes: float = 12.78
    bytes_power: float = 0.2816
    worth: float = 22.61
    by_heart: float = 1.821e-05
    undecayed: float = 0.1025
    undecayed_power: float = 2.569
    undecayed_spread: float = 0.2487
    """At a rate of r, four in five texts are within r times this of the expectation, apart from how their runs end."""
    way_back: float = 0.518
    """Four in five texts lie no higher than this share of the way from the expectation back to the frequencies of
    tokens, in logarithms."""
    least_learned: float = 0.1268
    """The recorded runs were expected to be below the frequencies by this or more, as a difference of logarithms."""
    texts: int = 7
    """The number of texts whose runs the constants were fitted on."""
    spread: float = 0.339
    """Runs on a text that the laws were not fitted on are within this of the expectation in four of five cases, as a
    difference of logarithms."""
    least_flops: float = 2.995e12
    most_flops: float = 2e13
    """The runs that the laws were fitted on took from so many FLOPs to so many."""
    beyond: float = 0.05
    """The spread grows by this for each factor of ten outside of them. It is a guess: no runs say how much."""

    def level(self, text: TextLevel) -> float:
        """Return the level of a text in bits per byte."""
        return math.exp(self.share * math.log(text.counted) + (1 - self.share) * math.log(text.compressed))

    def fresh_bytes(self, read: float, unique: float) -> float:
        """Return how many bytes, each read once, teach as much as ``read`` bytes of a text of ``unique``."""
        repeats = read / unique - 1
        if repeats <= 0:
            return read
        return unique * (1 + self.worth * -math.expm1(-repeats / self.worth))

    def relative(self, parameters: float, read: float, unique: float) -> float:
        """Return the expected loss of a run as a multiple of the text's level."""
        repeats = max(0.0, read / unique - 1)
        return (
            self.floor
            + self.of_size / parameters**self.size_power
            + self.of_bytes / self.fresh_bytes(read, unique) ** self.bytes_power
            + self.by_heart * parameters / unique * repeats**2
        )

    def excess(self, rate: float) -> float:
        """Return the logarithm of what a rate costs that has not decayed yet, ``rate`` being its share of the peak."""
        return self.undecayed * rate**self.undecayed_power

    def bits_per_byte(self, text: TextLevel, parameters: float, read: float, unique: float, rate: float = 0.0) -> float:
        """Return the expected held-out loss of a run in bits per byte.

        rate: the learning rate that is still in force, as a share of its peak.
        """
        return self.level(text) * self.relative(parameters, read, unique) * math.exp(self.excess(rate))

    def interval(
        self, expected: float, flops: float, rate: float = 0.0, frequencies: float = math.inf
    ) -> tuple[float, float]:
        """Return the bounds between which a run's loss lies in four of five cases.

        flops: those of the whole run. rate: as of ``bits_per_byte``. frequencies: the bits per byte for who knows how
        often each token occurs and no more, if known; a run that learns is well below.
        """
        outside = max(0.0, math.log10(self.least_flops / flops), math.log10(flops / self.most_flops))
        spread = math.hypot(self.spread + self.beyond * outside, self.undecayed_spread * rate)
        learned = math.log(frequencies / expected)
        above = min(spread, self.way_back * learned) if learned >= self.least_learned else spread
        return expected * math.exp(-spread), expected * math.exp(above)


LAWS = Laws()
