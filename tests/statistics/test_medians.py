from __future__ import annotations

import numpy as np
import pytest

from mechmem.statistics.medians import Median


def test_the_interval_of_a_median_by_hand():
    # of 10 coins, at most 1 is heads with probability 11 / 1024 and at most 2 with 56 / 1024
    assert Median(np.arange(10.0)).ends(0.025) == (1.0, 8.0)
    # of 5 coins, none is heads with probability 1 / 32 > 0.025
    assert Median(np.arange(5.0)).ends(0.025) == (-np.inf, np.inf)


def test_infinite_values_are_large_and_nothing_else():
    values = np.array([3.0] * 4 + [np.inf] * 16)
    assert Median(values).ends(0.025)[0] == np.inf
    assert Median(values).p_above(8) == pytest.approx(0.0059, abs=1e-4)
    assert Median(values).p_below(8) > 0.9


def test_it_covers_at_least_as_often_as_it_says():
    values = np.random.default_rng(0).exponential(1.0, (2000, 31))
    ends = [Median(row).ends(0.025) for row in values]
    assert np.mean([low <= np.log(2) <= high for low, high in ends]) > 0.95
