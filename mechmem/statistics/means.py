"""Means: over seeds, whose spread has a floor, and over the examples within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mechmem.statistics.estimate import Limits
from mechmem.statistics.intervals import Floats

N_POOLED = 5
"""Interior quantities of a measure from which its spread over seeds can be told."""


@dataclass(frozen=True)
class Location:
    """A number with a standard error: t-distributed, or normal if `df` is infinite."""

    mean: float
    error: float
    """Standard error."""
    df: float

    def ends(self, error: float) -> tuple[float, float]:
        width = t_quantile(self.df, 1 - error) * self.error
        return self.mean - width, self.mean + width

    def p_below(self, threshold: float) -> float:
        return self._probability(self.mean - threshold)

    def p_above(self, threshold: float) -> float:
        return self._probability(threshold - self.mean)

    def _probability(self, distance: float) -> float:
        if self.error == 0:  # no spread: nothing but the number itself is known
            return 0.0 if distance < 0 else 1.0
        return t_probability(self.df, distance / self.error)


def over_seeds(by_seed: Sequence[float] | Floats, floor: float = 0.0) -> Location:
    """The mean over at least two seeds, by Student's t.

    Args:
        by_seed: a number for each seed.
        floor: least standard deviation between seeds, such as `pooled_spread`.
    """
    values = np.asarray(by_seed, float)
    spread = max(float(values.std(ddof=1)), floor)
    return Location(float(values.mean()), spread / np.sqrt(len(values)), len(values) - 1)


def over_examples_of_seeds(by_seed: Sequence[Floats]) -> Location:
    """The mean over seeds by the spread of the examples within them.

    Args:
        by_seed: for each seed, the values of its examples, at least two.
    """
    df = sum(len(values) - 1 for values in by_seed)
    mean = float(np.mean([values.mean() for values in by_seed]))
    variance = sum(values.var(ddof=1) / len(values) for values in by_seed) / len(by_seed) ** 2
    return Location(mean, float(np.sqrt(variance)), df)


def is_interior(by_seed: Sequence[float] | Floats, limits: Limits | None) -> bool:
    """Whether a quantity is so far from the limits of its measure that they do not squeeze its
    spread: mean and two standard deviations lie within them, and not on them."""
    values = np.asarray(by_seed, float)
    if limits is None:
        return True
    mean, reach = values.mean(), 2 * values.std(ddof=1)
    return bool(limits[0] < mean - reach and mean + reach < limits[1])


def pooled_spread(quantities: Sequence[Floats]) -> float:
    """The standard deviation between seeds, pooled over interior quantities of one measure; 0 for
    fewer than five.

    Args:
        quantities: for each, its value in each seed.
    """
    if len(quantities) < N_POOLED:
        return 0.0
    return float(np.sqrt(np.mean([np.var(values, ddof=1) for values in quantities])))


def t_quantile(df: float, probability: float) -> float:
    """A quantile of Student's t distribution; of the normal one if `df` is infinite."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri(probability) if np.isinf(df) else stdtrit(df, probability))


def t_probability(df: float, t: float) -> float:
    """The probability of a value of at most `t`."""
    from scipy.special import ndtr, stdtr

    return float(ndtr(t) if np.isinf(df) else stdtr(df, t))
