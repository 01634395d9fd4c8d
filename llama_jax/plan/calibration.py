"""Corrects the estimates of a search by what the compiler said of the candidates before.

The logarithm of compiler's figure over estimate is taken as a sum: a constant, a part for each policy of remat, and one
for each doubling of rows, of parts of the batch, and of the mesh's axes. All parts but the constant are small until
compiled plans say otherwise: Bayesian linear regression (Bishop, "Pattern Recognition and Machine Learning", 3.3.1).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

import numpy as np

from llama_jax.plan import Plan
from llama_jax.plan.estimate import POLICIES, Candidate
from llama_jax.train_args import layer_policies

# Standard deviations before anything is compiled: of the constant, of a policy's part, of a doubling's; of the rest.
CONSTANT, POLICY, DOUBLING, REST = 1.0, 0.1, 0.03, 0.02
# What a step that the compiler refuses without naming its bytes needs at least, by the chip's memory.
REFUSED = 1.1


@dataclass(frozen=True)
class Guess:
    """Expected bytes a device, and seconds a step, of a candidate."""

    bytes: float
    seconds: float


@dataclass(frozen=True)
class Compiled:
    """A candidate, its plan, and what the plans before it led to expect."""

    candidate: Candidate
    plan: Plan
    expected: Guess


@dataclass(frozen=True)
class Correction:
    """Factors on an estimate: weights of the features, with their covariance."""

    weights: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, logarithms: np.ndarray) -> "Correction":
        """Return the correction that ``features`` [plans, features] and ``logarithms`` [plans] of ratios suggest."""
        precision = np.diag(1.0 / _deviations() ** 2) + features.T @ features / REST**2
        covariance = np.linalg.inv(precision)
        return cls(covariance @ features.T @ logarithms / REST**2, covariance)

    def factors(self, features: np.ndarray) -> np.ndarray:
        """Return by what the estimates of candidates, of ``features`` [candidates, features], are to be multiplied."""
        return np.exp(features @ self.weights)

    def deviations(self, features: np.ndarray) -> np.ndarray:
        """Return the standard deviations of the logarithms of ``factors``."""
        return np.sqrt(np.sum(features @ self.covariance * features, axis=1))


@dataclass(frozen=True)
class Calibration:
    """Corrections of bytes and of seconds, by the plans compiled so far."""

    bytes: Correction
    seconds: Correction

    @classmethod
    def of(cls, found: Sequence[Compiled]) -> "Calibration":
        """Return corrections that compiled plans suggest. Without any, all factors are 1."""
        sizes = [(c.candidate, needed_bytes(c.plan) / c.candidate.bytes) for c in found]
        times = [(c.candidate, c.plan.seconds / c.candidate.seconds) for c in found if 0 < c.plan.seconds < math.inf]
        return cls.fitted(sizes, times)

    @classmethod
    def fitted(
        cls, sizes: Sequence[tuple[Candidate, float]], times: Sequence[tuple[Candidate, float]]
    ) -> "Calibration":
        """Return corrections by candidates, each with the compiler's bytes, or seconds, over those of its estimate."""
        return cls(_fitted(sizes), _fitted(times))

    def guesses(self, candidates: Sequence[Candidate], features: np.ndarray) -> list[Guess]:
        """Return what is expected of candidates, whose features are given."""
        factors = zip(self.bytes.factors(features), self.seconds.factors(features), strict=True)
        return [Guess(float(c.bytes * a), float(c.seconds * b)) for c, (a, b) in zip(candidates, factors, strict=True)]

    def at_best(self, candidates: Sequence[Candidate], features: np.ndarray) -> list[float]:
        """Return the seconds of candidates, one standard deviation below what is expected."""
        factors = self.seconds.factors(features) * np.exp(-self.seconds.deviations(features))
        return [float(c.seconds * factor) for c, factor in zip(candidates, factors, strict=True)]

    def fits(self, candidates: Sequence[Candidate], features: np.ndarray, room: float) -> list[float]:
        """Return the probabilities that candidates fit into ``room`` bytes."""
        normal, spread = NormalDist(), np.hypot(self.bytes.deviations(features), REST)
        sizes = [guess.bytes for guess in self.guesses(candidates, features)]
        return [normal.cdf(math.log(room / size) / s) for size, s in zip(sizes, spread, strict=True)]


def _fitted(ratios: Sequence[tuple[Candidate, float]]) -> Correction:
    return Correction.of(features_of([c for c, _ in ratios]), np.log(np.array([ratio for _, ratio in ratios])))


def needed_bytes(plan: Plan) -> float:
    """Return the bytes a device that a step needs; more than it has, if the compiler refuses it and does not say."""
    return plan.bytes or REFUSED * plan.topology.chip.hbm_bytes


def features_of(candidates: Iterable[Candidate]) -> np.ndarray:
    """Return the features of candidates, float64 [candidates, features]."""
    return np.array([_features(c) for c in candidates], float).reshape(-1, len(_deviations()))


def _features(candidate: Candidate) -> list[float]:
    config = candidate.config
    layers, parts, mesh = config.model.n_layers, config.train.gradient_accumulation_steps, config.mesh
    shares = dict.fromkeys(POLICIES, 0.0)
    for name, first, end in layer_policies(config.train.remat, layers):
        if name in shares:
            shares[name] += (end - first) / layers
    sizes = (candidate.rows, parts, mesh.fsdp, mesh.tensor, mesh.sequence)
    return [1.0, *shares.values(), *map(math.log2, sizes)]


def _deviations() -> np.ndarray:
    return np.array([CONSTANT, *[POLICY] * len(POLICIES), *[DOUBLING] * 5])


@dataclass(frozen=True)
class Errors:
    """Relative errors of expectations on ``count`` compiled plans: the median and the largest one."""

    count: int
    median: float
    largest: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> "Errors | None":
        """Return the errors of pairs of what was expected and what was found, or None of no pairs."""
        errors = [abs(expected / found - 1) for expected, found in pairs]
        return cls(len(errors), median(errors), max(errors)) if errors else None


def errors(found: Sequence[Compiled]) -> dict[str, tuple[Errors | None, Errors | None]]:
    """Return errors of "bytes" and of "seconds", each of the plain estimate and of the calibrated one.

    ``found`` is in the order of compilation. Every candidate was estimated before it was compiled. The first one is
    left out, since nothing calibrated its estimate.
    """
    later = found[1:]
    sized, timed = [c for c in later if c.plan.bytes], [c for c in later if 0 < c.plan.seconds < math.inf]
    return {
        "bytes": (
            Errors.of([(c.candidate.bytes, c.plan.bytes) for c in sized]),
            Errors.of([(c.expected.bytes, c.plan.bytes) for c in sized]),
        ),
        "seconds": (
            Errors.of([(c.candidate.seconds, c.plan.seconds) for c in timed]),
            Errors.of([(c.expected.seconds, c.plan.seconds) for c in timed]),
        ),
    }
