"""Rows of tables: a mean with its interval, over examples or over draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechmem.statistics.intervals import Floats, interval, middle

Row = dict[str, Any]
"""value, low, high, n and per_example; an analysis adds the labels."""


def over_examples(values: Floats) -> Row:
    """A mean over examples, with its bootstrap 95 % interval."""
    low, high = interval(values[None])
    return _row(values.mean(), low[0], high[0], len(values), values)


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
