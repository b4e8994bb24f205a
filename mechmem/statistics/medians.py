"""Medians: an interval by order statistics, which any distribution and infinite values allow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mechmem.statistics.intervals import Floats


@dataclass(frozen=True)
class Median:
    """The median of independent observations."""

    values: Floats

    def ends(self, error: float) -> tuple[float, float]:
        """The k-th smallest and largest value, where fewer than k of n fair coins are heads with at
        most this probability; infinite if there are too few observations."""
        from scipy.special import bdtr

        ordered, n = np.sort(np.asarray(self.values, float)), len(self.values)
        k = int(np.sum(bdtr(np.arange(n), n, 0.5) <= error))
        return (ordered[k - 1], ordered[n - k]) if k else (-np.inf, np.inf)

    def p_below(self, threshold: float) -> float:
        return _sign_test(self.values, threshold)

    def p_above(self, threshold: float) -> float:
        return _sign_test(-np.asarray(self.values, float), -threshold)


def _sign_test(values: Floats, threshold: float) -> float:
    """The p of "the median is below the threshold": as few values at or above it."""
    from scipy.special import bdtr

    return float(bdtr(int(np.sum(np.asarray(values) >= threshold)), len(values), 0.5))
