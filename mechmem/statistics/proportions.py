"""Proportions: exact intervals of counts, and differences of two counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mechmem.statistics.estimate import ERROR
from mechmem.statistics.intervals import Floats
from mechmem.statistics.means import Location


def clopper_pearson(hits: Floats, n: Floats | int, error: float = ERROR) -> tuple[Floats, Floats]:
    """The exact interval of a proportion, elementwise.

    Source: Clopper & Pearson 1934, by quantiles of beta distributions.

    Args:
        hits: number of ones; between them, real numbers are allowed.
        n: number of observations.
        error: error on each side.
    """
    from scipy.special import betaincinv

    hits, misses = np.asarray(hits, float), np.asarray(n - np.asarray(hits), float)
    # betaincinv is not defined for a parameter of 0, where the end is 0 or 1 itself.
    low = np.where(hits <= 0, 0.0, betaincinv(np.maximum(hits, 1e-9), misses + 1, error))
    high = np.where(misses <= 0, 1.0, betaincinv(hits + 1, np.maximum(misses, 1e-9), 1 - error))
    return low, high


@dataclass(frozen=True)
class Counts:
    """A proportion of independent observations."""

    hits: float
    n: int

    def ends(self, error: float) -> tuple[float, float]:
        low, high = clopper_pearson(np.array(self.hits), self.n, error)
        return float(low), float(high)

    def p_below(self, threshold: float) -> float:
        return _at_most(self.hits, self.n, threshold)

    def p_above(self, threshold: float) -> float:
        return _at_most(self.n - self.hits, self.n, 1 - threshold)


def agresti_min(better: float, worse: float, n: int) -> Location:
    """The difference of two proportions on the same examples.

    Source: Agresti & Min 2005: a half is added to each of the four cells of the paired table.

    Args:
        better: number of examples that are 1 in the first and 0 in the second.
        worse: number of examples that are 0 in the first and 1 in the second.
        n: number of examples.
    """
    whole = n + 2
    difference = (better - worse) / whole
    variance = ((better + worse + 1) / whole - difference**2) / whole
    return Location(difference, float(np.sqrt(variance)), np.inf)


def agresti_caffo(hits: float, n: int) -> Location:
    """One of two proportions on different examples, whose difference is then taken.

    Source: Agresti & Caffo 2000: one hit and one miss are added to each.

    Args:
        hits: number of ones.
        n: number of observations.
    """
    share = (hits + 1) / (n + 2)
    return Location(share, float(np.sqrt(share * (1 - share) / (n + 2))), np.inf)


def is_binary(values: Floats) -> bool:
    """Whether there are only zeros and ones."""
    return bool(np.isin(values, (0, 1)).all())


def _at_most(hits: float, n: int, share: float) -> float:
    """The probability of at most this many hits."""
    from scipy.special import betainc

    if hits >= n or share <= 0:
        return 1.0
    return 0.0 if share >= 1 else float(betainc(n - hits, hits + 1, 1 - share))
