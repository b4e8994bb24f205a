"""Bootstrap intervals over examples and seeds, and the ratio of two means."""

from __future__ import annotations

from collections.abc import Sequence
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


def hierarchical_interval(
    by_seed: Sequence[Floats], minus: Sequence[Floats | None] | None = None, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over seeds with its bootstrap 95 % interval: seeds are resampled first, then the
    examples within each.

    Examples of one seed share a model, so the seed is the unit of replication. With one seed the
    interval describes that model only. A scalar from a single seed gets no interval (NaN).

    Args:
        by_seed: for each seed, the values of its examples.
        minus: for each seed, the values of other examples whose mean is subtracted, or None; they
            are resampled independently of the first.
        seed: seed of the resamples.

    Returns:
        (mean, low, high).
    """
    generator, others = np.random.default_rng(seed), minus or [None] * len(by_seed)
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
    low, high = middle(means)
    return mean, float(low), float(high)


def middle(values: Floats) -> tuple[Floats, Floats]:
    """The two ends of the middle 95 % of the values along the last axis."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1)
    return low, high


def _resampled_mean(values: Floats, generator: np.random.Generator) -> Floats:
    n = len(values)
    return values @ generator.multinomial(n, np.full(n, 1 / n), N_RESAMPLES).T / n
