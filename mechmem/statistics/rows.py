"""Rows of tables: a mean with its interval, over examples or over draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechmem.statistics.intervals import LEVEL, interval

Row = dict[str, Any]


def _row(value: float, low: float, high: float, n: int, per_example: np.ndarray) -> Row:
    numbers = {"value": float(value), "low": float(low), "high": float(high)}
    return numbers | {"n": n, "per_example": per_example.astype(np.float32)}


def over_examples(values: np.ndarray) -> Row:
    """A mean over examples."""
    low, high = interval(values[None])
    return _row(values.mean(), low[0], high[0], len(values), values)


def over_draws(draws: Sequence[np.ndarray]) -> Row:
    """A mean over examples and draws, with the middle 95 % of the draws."""
    low, high = np.quantile([values.mean() for values in draws], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return _row(np.mean(draws), low, high, len(draws), np.mean(draws, axis=0))


def single(value: float) -> Row:
    """A number that is counted, not sampled."""
    return _row(value, value, value, 1, np.array([value]))
