"""Shares of what was attainable: the ratio of two means, by Fieller's theorem.

Never a mean of ratios: a share of at least r is tested on the contrast `gained - r * attainable`,
and the interval is every r that is not rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mechmem.statistics.intervals import Floats
from mechmem.statistics.means import Location, t_quantile

Matrix = NDArray[np.floating]
"""A covariance matrix of two means, `2 2`."""


@dataclass(frozen=True)
class Share:
    """The ratio of two means with a joint distribution."""

    gained: float
    attainable: float
    covariance: Matrix
    """Of (gained, attainable), `2 2`."""
    df: float

    def contrast(self, ratio: float) -> Location:
        """`gained - ratio * attainable`, with the sign that makes attainable positive."""
        sign = 1.0 if self.attainable >= 0 else -1.0
        weights = sign * np.array([1.0, -ratio])
        means = np.array([self.gained, self.attainable])
        variance = max(float(weights @ self.covariance @ weights), 0.0)
        return Location(float(weights @ means), float(np.sqrt(variance)), self.df)

    def ends(self, error: float) -> tuple[float, float]:
        """Every ratio that is not rejected; infinite if attainable may be 0."""
        t = t_quantile(self.df, 1 - error)
        # |contrast|² <= t² variance is a quadratic inequality in the ratio: a r² - 2 b r + c <= 0
        a = self.attainable**2 - t**2 * self.covariance[1, 1]
        b = self.gained * self.attainable - t**2 * self.covariance[0, 1]
        c = self.gained**2 - t**2 * self.covariance[0, 0]
        if a <= 0:
            return -np.inf, np.inf
        root = float(np.sqrt(max(b**2 - a * c, 0.0)))
        return float((b - root) / a), float((b + root) / a)

    def p_below(self, threshold: float) -> float:
        return self.contrast(threshold).p_below(0.0)

    def p_above(self, threshold: float) -> float:
        return self.contrast(threshold).p_above(0.0)


def share_over_seeds(gained: Sequence[float], attainable: Sequence[float]) -> Share:
    """The share over at least two seeds.

    Source: Fieller 1954.

    Args:
        gained: a number for each seed.
        attainable: the most that it could have been, for each seed.
    """
    both = np.array([gained, attainable], float)
    means = both.mean(axis=1)
    return Share(means[0], means[1], np.cov(both) / both.shape[1], both.shape[1] - 1)


def share_over_examples(gained: Floats, attainable: Floats) -> Share:
    """The share within one model, on paired examples.

    Differences of right and wrong get two more observations, as by Agresti and Min, so that equal
    examples do not make a certainty.

    Args:
        gained: a number for each example.
        attainable: the most that it could have been, for each example.
    """
    both, n = np.array([gained, attainable], float), len(gained)
    if not np.isin(both, (-1, 0, 1)).all():
        means = both.mean(axis=1)
        return Share(means[0], means[1], np.cov(both) / n, n - 1)
    means = both.sum(axis=1) / (n + 2)
    squares = (both @ both.T + np.eye(2)) / (n + 2)
    return Share(means[0], means[1], (squares - np.outer(means, means)) / (n + 2), np.inf)
