"""Intervals over examples: bootstrap for means, exact for shares; and the ratio of two means."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

N_RESAMPLES = 2000
LEVEL = 0.95
FEW = 4000
"""Examples up to which the weights of all resamples are kept as they are multiplied."""
BLOCK = 50
"""Resamples that are worked through together beyond that."""

Floats = NDArray[np.floating]


def interval(values: Floats, seed: int = 0) -> tuple[Floats, Floats]:
    """Bootstrap 95 % interval of the mean of each row of `values` (rows x examples); NaN where a
    value is NaN.

    All rows share the resamples. Source: Efron & Tibshirani 1993, percentile method.
    """
    return middle(resampled_means(values, seed))


def resampled_means(values: Floats, seed: int = 0) -> Floats:
    """The mean of each row of `values` (`... examples`) in each resample, `... resamples`."""
    n = values.shape[-1]
    if n <= FEW:
        return values @ _weights(n, seed)
    counts = _counts(n, seed)
    blocks = [values @ (counts[i : i + BLOCK].T / n) for i in range(0, N_RESAMPLES, BLOCK)]
    return np.concatenate(blocks, axis=-1)


@lru_cache(maxsize=4)
def _weights(n: int, seed: int) -> Floats:
    """The weight of each of n examples in each resample, `n resamples`.

    Cached, because a sweep needs the same ones in every cell.
    """
    # contiguous: the products of all cells are then some 15 % faster than with the transposed view
    return np.ascontiguousarray(_counts(n, seed).T / n)


@lru_cache(maxsize=4)
def _counts(n: int, seed: int) -> NDArray[np.uint8]:
    """How often each of n examples is in each resample, `resamples n`: a byte each, since the
    weights of many examples would take gigabytes."""
    generator, share = np.random.default_rng(seed), np.full(n, 1 / n)
    found = np.empty((N_RESAMPLES, n), np.uint8)
    for i in range(0, N_RESAMPLES, BLOCK):
        drawn = generator.multinomial(n, share, size=BLOCK)
        assert n < 256 or drawn.max() < 256, "an example was drawn 256 times"
        found[i : i + BLOCK] = drawn
    return found


def ratio(numerators: Floats, denominators: Floats, tolerance: float = 1e-6) -> Floats:
    """One value per example (last axis) whose mean is the ratio of the two means.

    The ratio of means is not the mean of ratios: to first order, an example moves it by its own
    numerator minus the ratio times its own denominator. Source: Cochran 1977, ratio estimators.

    Args:
        numerators: values of the examples, `... n`.
        denominators: values of the examples, `n`.
        tolerance: a mean denominator below this makes the ratio undefined (NaN).
    """
    mean = denominators.mean()
    whole = mean if abs(mean) >= tolerance else np.nan
    found = numerators.mean(-1, keepdims=True) / whole
    return found + (numerators - found * denominators) / whole


def middle(values: Floats) -> tuple[Floats, Floats]:
    """The two ends of the middle 95 % of the values along the last axis."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1)
    return low, high
