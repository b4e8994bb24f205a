from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mechmem.statistics.means import (
    Location,
    is_interior,
    over_examples_of_seeds,
    over_seeds,
    pooled_spread,
)


def test_the_mean_of_three_seeds_by_hand():
    found = over_seeds([0.4, 0.5, 0.6])
    assert (found.mean, found.df) == (pytest.approx(0.5), 2)
    assert found.error == pytest.approx(0.1 / np.sqrt(3))
    # 4.303 is the 97.5 % point of Student's t with two degrees of freedom
    assert found.ends(0.025) == pytest.approx(
        (0.5 - 4.303 * 0.05774, 0.5 + 4.303 * 0.05774), abs=1e-4
    )


def test_without_a_floor_it_is_the_t_test_of_scipy():
    values = np.random.default_rng(0).normal(0.6, 0.1, 6)
    found = over_seeds(values)
    test = stats.ttest_1samp(values, 0.5, alternative="greater")
    assert found.p_above(0.5) == pytest.approx(test.pvalue)
    assert found.p_below(0.5) == pytest.approx(1 - test.pvalue)
    wanted = stats.ttest_1samp(values, 0.5).confidence_interval()
    assert found.ends(0.025) == pytest.approx(tuple(wanted))


def test_a_floor_widens_and_never_narrows():
    values = [0.5, 0.52, 0.51]
    assert over_seeds(values, 0.1).error == pytest.approx(0.1 / np.sqrt(3))
    assert over_seeds(values, 1e-6).error == over_seeds(values).error


def test_equal_seeds_tell_only_their_own_number():
    found = over_seeds([0.25, 0.25])
    assert found.ends(0.025) == (0.25, 0.25)
    assert (found.p_above(0.2), found.p_above(0.3), found.p_above(0.25)) == (0.0, 1.0, 1.0)


def test_a_normal_location_has_the_quantile_of_the_normal_distribution():
    assert Location(0.0, 1.0, np.inf).ends(0.025)[1] == pytest.approx(1.959964)


def test_the_spread_of_examples_by_hand():
    # variances 1 and 4 of two examples each: (1 / 2 + 4 / 2) / 2² seeds
    found = over_examples_of_seeds([np.array([0.0, np.sqrt(2)]), np.array([0.0, 2 * np.sqrt(2)])])
    assert found.error == pytest.approx(np.sqrt((0.5 + 2) / 4))
    assert found.df == 2


def test_a_quantity_is_interior_if_two_deviations_fit_into_the_range():
    assert is_interior([0.4, 0.5, 0.6], (0.0, 1.0))
    assert not is_interior([0.7, 0.9, 0.8], (0.0, 0.99))
    assert not is_interior([0.98, 1.0, 0.96], (0.0, 1.0))
    assert not is_interior([1.0, 1.0, 1.0], (0.0, 1.0))
    assert is_interior([5.0, 900.0], None)


def test_a_spread_is_pooled_over_five_quantities_and_not_over_four():
    quantities = [np.array([0.0, 2.0]), np.array([0.0, 4.0])] + [np.array([1.0, 1.0])] * 3
    assert pooled_spread(quantities) == pytest.approx(np.sqrt((2 + 8) / 5))
    assert pooled_spread(quantities[:4]) == 0.0
