"""Holm's correction for several tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechmem.statistics.estimate import ERROR


def holm(p_values: Sequence[float], error: float = ERROR) -> list[bool]:
    """Which hypotheses are rejected, such that any false rejection has at most this probability.

    Source: Holm 1979: the smallest p is compared with error / m, the next with error / (m - 1), and
    so on up to the first that fails.

    Args:
        p_values: one for each hypothesis.
        error: probability of a false rejection among all.
    """
    rejected = [False] * len(p_values)
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[i] > error / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected
