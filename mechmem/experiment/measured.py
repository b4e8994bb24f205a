"""Measured quantities: a number with its 95 % interval, and the pooled spread between seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mechmem.statistics.estimate import Estimate, Limits
from mechmem.statistics.means import is_interior, pooled_spread

NAN = float("nan")


@dataclass(frozen=True)
class OfSeed:
    """A quantity in one model, with its interval over examples (NaN for a single number)."""

    value: float
    low: float = NAN
    high: float = NAN


@dataclass(frozen=True)
class Measured:
    """A quantity as found: the mean over seeds with its 95 % interval.

    With one seed the interval is over the examples of that model. A single number of a single seed
    has no interval: NaN.
    """

    value: float
    low: float
    high: float
    n_seeds: int
    labels: Mapping[str, Any] = field(default_factory=dict)
    by_seed: Mapping[int, OfSeed] = field(default_factory=dict)
    measure: str = ""
    """Names the quantities whose spread over seeds is pooled with that of this one."""
    limits: Limits | None = None
    """The lowest and the highest value that the measure can take; None if it has none."""
    untestable: str = ""
    """Why nothing can be concluded from it; empty if something can."""
    missing: Mapping[int, str] = field(default_factory=dict)
    """The seeds that have no such number, each with the reason."""
    is_proportion: bool = False
    """Whether it is a share of examples, from which nothing is subtracted."""
    estimate: Estimate | None = field(default=None, repr=False, compare=False)

    @property
    def percent(self) -> str:
        """`62 % [58, 66]`."""
        return self._format(lambda x: f"{round(100 * x)}", " %")

    @property
    def points(self) -> str:
        """A difference of shares: `+12 points [+8, +15]`."""
        return self._format(lambda x: f"{round(100 * x):+d}", " points")

    @property
    def number(self) -> str:
        """`1.77 [1.70, 1.84]`."""
        return self._format(lambda x: f"{x:.3g}", "")

    def _format(self, number: Callable[[float], str], unit: str) -> str:
        if np.isnan(self.value):
            return "undefined"

        def formatted(x: float) -> str:
            return (
                number(x) if np.isfinite(x) else f"{x:+}".replace("+inf", "∞").replace("inf", "∞")
            )

        ends = "" if np.isnan(self.low) else f" [{formatted(self.low)}, {formatted(self.high)}]"
        return f"{formatted(self.value)}{unit}{ends}"

    def p_below(self, threshold: float) -> float:
        """One-sided p of "it is below the threshold"."""
        if self.estimate is not None:
            return self.estimate.p_below(threshold)
        return 0.0 if self.high < threshold else 1.0

    def p_above(self, threshold: float) -> float:
        """One-sided p of "it is above the threshold"."""
        if self.estimate is not None:
            return self.estimate.p_above(threshold)
        return 0.0 if self.low > threshold else 1.0

    def record(self) -> dict[str, Any]:
        """For run.json."""
        block = {name: value for name, value in vars(self).items() if name != "estimate"}
        return block | {
            "by_seed": {str(seed): vars(found) for seed, found in self.by_seed.items()},
            "missing": {str(seed): reason for seed, reason in self.missing.items()},
        }


def pooled_spreads(measured: Iterable[Measured]) -> dict[str, float]:
    """By measure, the standard deviation between seeds, pooled over the interior quantities of a
    study; measures with fewer than five of them are left out.

    Args:
        measured: the quantities of the specs that are run together.
    """
    by_measure: dict[str, list[np.ndarray]] = {}
    for quantity in measured:
        values = np.array([found.value for found in quantity.by_seed.values()], float)
        if not quantity.measure or len(values) < 2 or not np.isfinite(values).all():
            continue
        if is_interior(values, quantity.limits):
            by_measure.setdefault(quantity.measure, []).append(values)
    spreads = {measure: pooled_spread(found) for measure, found in by_measure.items()}
    return {measure: spread for measure, spread in spreads.items() if spread > 0}
