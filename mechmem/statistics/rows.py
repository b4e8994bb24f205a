"""Rows of tables: a mean with its interval, over examples or over draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechmem.statistics.intervals import Floats, interval, middle
from mechmem.statistics.proportions import clopper_pearson, is_binary

FRACTION = "fraction"
"""The unit of shares of examples."""

DIFFERENCE = "difference of fractions"
"""The unit of what is subtracted in a table already."""

Row = dict[str, Any]
"""value, low, high, n and per_example; an analysis adds the labels."""


def over_examples(values: Floats, unit: str = "") -> Row:
    """A mean over examples, with its 95 % interval.

    Args:
        values: of the examples.
        unit: of the values. Zeros and ones in fractions are right and wrong answers, whose interval
            is exact; that of all else is a bootstrap interval.
    """
    low, high = interval_by_unit(values[None], [unit])
    return _row(values.mean(), low[0], high[0], len(values), values)


def interval_by_unit(values: Floats, units: Sequence[str]) -> tuple[Floats, Floats]:
    """The 95 % interval of the mean of each row (rows x examples): exact (Clopper-Pearson) for
    zeros and ones in fractions, so that twelve of twelve are no certainty; bootstrap for the rest.

    Args:
        values: of the examples, `rows n`.
        units: the unit of each row.
    """
    low, high = interval(values)
    for i, unit in enumerate(units):
        if unit == FRACTION and is_binary(values[i]):
            low[i], high[i] = clopper_pearson(values[i].sum(), values.shape[1])
    return low, high


def over_draws(draws: Sequence[Floats]) -> Row:
    """A mean over examples and draws, with the middle 95 % of the draws.

    `n` is the number of draws; `per_example` are the means of the examples over the draws.
    """
    low, high = middle(np.array([values.mean() for values in draws]))
    mean: Floats = np.mean(draws, axis=0)
    return _row(float(np.mean(draws)), float(low), float(high), len(draws), mean)


def single(value: float) -> Row:
    """A number that is counted, not sampled: its interval has no width."""
    return _row(value, value, value, 1, np.array([value]))


def _row(value: float, low: float, high: float, n: int, per_example: Floats) -> Row:
    numbers = {"value": float(value), "low": float(low), "high": float(high)}
    return numbers | {"n": n, "per_example": per_example.astype(np.float32)}
