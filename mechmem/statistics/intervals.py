"""Intervals and rates: bootstrap over examples and seeds, Benjamini-Hochberg."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

N_RESAMPLES = 2000
LEVEL = 0.95

Floats = NDArray[np.floating]


def interval(values: Floats, seed: int = 0) -> tuple[Floats, Floats]:
    """Bootstrap 95 % interval of the mean of each row of `values` (rows x examples); NaN where a
    value is NaN.

    All rows share the resamples. Source: Efron & Tibshirani 1993, percentile method.
    """
    means = values @ resamples(values.shape[-1], seed)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1)
    return low, high


@lru_cache(maxsize=4)
def resamples(n: int, seed: int = 0) -> Floats:
    """The weight of each of n examples in each resample, `n resamples`; kept, as a sweep asks for
    it at every cell."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
    return np.ascontiguousarray(counts.T / n)


def ratio(numerators: Floats, denominators: Floats, tolerance: float = 1e-6) -> Floats:
    """A value of each example (last axis) whose mean is the ratio of the means; NaN where that of
    the denominators is below the tolerance.

    A ratio of means is no mean of ratios: to first order an example moves it by its own numerator
    less the ratio times its own denominator. Source: Cochran 1977, ratio estimators.
    """
    whole = denominators.mean() if abs(denominators.mean()) >= tolerance else np.nan
    found = numerators.mean(-1, keepdims=True) / whole
    return found + (numerators - found * denominators) / whole


def hierarchical_interval(
    by_seed: Sequence[Floats], less: Sequence[Floats | None] | None = None, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over seeds with its bootstrap 95 % interval: seeds are drawn again, then the examples in
    each.

    `by_seed[s]` are the values of the examples of seed s; `less[s]`, where given, those of other
    examples whose mean is subtracted and which are drawn apart. Returns (mean, low, high). Examples
    of one seed share a model, so the seed is the unit of replication; with one seed the interval
    speaks of that model alone, and one number of one seed has none
    (NaN).
    """
    generator, others = np.random.default_rng(seed), less or [None] * len(by_seed)
    pairs = [
        (values, other if other is not None else np.zeros(1))
        for values, other in zip(by_seed, others, strict=True)
    ]
    mean = float(np.mean([values.mean() - other.mean() for values, other in pairs]))
    if len(pairs) == 1 and len(pairs[0][0]) == 1:
        return mean, float("nan"), float("nan")
    resampled = np.stack(
        [_resampled_mean(v, generator) - _resampled_mean(o, generator) for v, o in pairs]
    )
    drawn = generator.integers(len(pairs), size=(len(pairs), N_RESAMPLES))
    means = resampled[drawn, generator.integers(N_RESAMPLES, size=drawn.shape)].mean(axis=0)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean, float(low), float(high)


def _resampled_mean(values: Floats, generator: np.random.Generator) -> Floats:
    n = len(values)
    return values @ generator.multinomial(n, np.full(n, 1 / n), N_RESAMPLES).T / n
