"""Estimates: what is known of one number, as the hull of several intervals.

A part is one way to bound the number: by the spread of the seeds, by the counts of the examples. An
estimate trusts the most careful of its parts, both in its interval and in its p-values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

ERROR = 0.025
"""One-sided error of a test; the interval then covers 95 %."""

Limits = tuple[float, float]
"""The lowest and the highest value that a measure can take."""


class Part(Protocol):
    """One way to bound a number."""

    def ends(self, error: float) -> tuple[float, float]:
        """The interval that leaves this error on each side."""
        ...

    def p_below(self, threshold: float) -> float:
        """The probability of data as low as these if the number were the threshold: small if the
        number is below it."""
        ...

    def p_above(self, threshold: float) -> float:
        """The probability of data as high as these if the number were the threshold."""
        ...


@dataclass(frozen=True)
class Estimate:
    """A number with all that bounds it."""

    value: float
    parts: Sequence[Part]
    limits: Limits | None = None
    n_compared: int = 1
    """Numbers of which this one is the largest or the smallest (Bonferroni)."""

    def ends(self, error: float = ERROR) -> tuple[float, float]:
        """The hull of the parts' intervals, within the limits; NaN without a part."""
        if not self.parts:
            return float("nan"), float("nan")
        ends = [part.ends(error / self.n_compared) for part in self.parts]
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        if self.limits is not None:
            low, high = max(low, self.limits[0]), min(high, self.limits[1])
        # The hull holds the value itself, which an interval of shrunken counts may miss.
        return min(low, self.value), max(high, self.value)

    def p_below(self, threshold: float) -> float:
        """One-sided p of "the number is below the threshold"; 1 without a part."""
        return self._p([part.p_below(threshold) for part in self.parts])

    def p_above(self, threshold: float) -> float:
        """One-sided p of "the number is above the threshold"; 1 without a part."""
        return self._p([part.p_above(threshold) for part in self.parts])

    def _p(self, of_parts: Sequence[float]) -> float:
        return min(1.0, self.n_compared * max(of_parts, default=1.0))
