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
    """Bootstrap 95 % interval of the mean of each row of `values` (rows x examples); NaN where a value is NaN.

    All rows share the resamples. Source: Efron & Tibshirani 1993, percentile method.
    """
    means = values @ resamples(values.shape[-1], seed)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1)
    return low, high


@lru_cache(maxsize=4)
def resamples(n: int, seed: int = 0) -> Floats:
    """The weight of each of n examples in each resample, `n resamples`; kept, as a sweep asks for it at every cell."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
    return np.ascontiguousarray(counts.T / n)


def hierarchical_interval(by_seed: Sequence[Floats], seed: int = 0) -> tuple[float, float, float]:
    """Mean over seeds with its bootstrap 95 % interval: seeds are drawn again, then the examples in each.

    `by_seed[s]` are the values of the examples of seed s. Returns (mean, low, high). Examples of one seed share a
    model, so the seed is the unit of replication; with one seed the interval speaks of that model alone.
    """
    generator = np.random.default_rng(seed)
    n_seeds = len(by_seed)
    resampled = np.stack(
        [
            values
            @ generator.multinomial(len(values), np.full(len(values), 1 / len(values)), N_RESAMPLES).T
            / len(values)
            for values in by_seed
        ]
    )
    drawn = generator.integers(n_seeds, size=(n_seeds, N_RESAMPLES))
    means = resampled[drawn, generator.integers(N_RESAMPLES, size=drawn.shape)].mean(axis=0)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(np.mean([values.mean() for values in by_seed])), float(low), float(high)
