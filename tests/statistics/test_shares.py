from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mechmem.statistics.shares import share_over_examples, share_over_seeds

GAINED, ATTAINABLE = [0.2, 0.3, 0.25, 0.35], [0.5, 0.6, 0.45, 0.65]


def test_a_share_is_the_ratio_of_means_and_not_the_mean_of_ratios():
    found = share_over_seeds([0.1, 0.9], [0.2, 1.0])
    assert found.gained / found.attainable == pytest.approx(1.0 / 1.2)


@given(st.floats(-3, 3))
def test_the_interval_is_every_share_that_a_t_test_does_not_reject(ratio):
    found = share_over_seeds(GAINED, ATTAINABLE)
    low, high = found.ends(0.025)
    contrast = np.array(GAINED) - ratio * np.array(ATTAINABLE)
    p = stats.ttest_1samp(contrast, 0.0, alternative="less").pvalue
    assert found.p_below(ratio) == pytest.approx(p, abs=1e-9)
    if abs(ratio - low) > 1e-6 and abs(ratio - high) > 1e-6:
        is_rejected = min(p, 1 - p) < 0.025
        assert is_rejected == (not low <= ratio <= high)


def test_an_exact_share_by_hand():
    found = share_over_seeds([0.2, 0.25, 0.3], [0.4, 0.5, 0.6])
    assert found.ends(0.025) == pytest.approx((0.5, 0.5))


def test_nothing_is_known_if_nothing_may_have_been_attainable():
    assert share_over_seeds([0.1, 0.2, 0.3], [-0.1, 0.1, 0.2]).ends(0.025) == (-np.inf, np.inf)


@given(st.floats(0.1, 10))
def test_the_unit_does_not_matter(scale):
    plain = share_over_seeds(GAINED, ATTAINABLE)
    other = share_over_seeds([scale * g for g in GAINED], [scale * a for a in ATTAINABLE])
    assert other.ends(0.025) == pytest.approx(plain.ends(0.025))


def test_removals_are_shares_of_a_negative_difference():
    plain = share_over_seeds(GAINED, ATTAINABLE)
    other = share_over_seeds([-g for g in GAINED], [-a for a in ATTAINABLE])
    assert other.ends(0.025) == pytest.approx(plain.ends(0.025))
    assert other.p_below(0.9) == pytest.approx(plain.p_below(0.9))


def test_all_right_of_all_wrong_is_no_certainty():
    ones = np.ones(20)
    found = share_over_examples(ones, ones)
    low, high = found.ends(0.025)
    assert found.gained / found.attainable == 1.0
    assert low < 0.95
    assert high > 1.05


def test_a_share_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    attainable = rng.normal(0.6, 0.1, (2000, 5))
    gained = 0.4 * attainable + rng.normal(0, 0.05, (2000, 5))
    ends = [share_over_seeds(g, a).ends(0.025) for g, a in zip(gained, attainable, strict=True)]
    assert 0.935 < np.mean([low <= 0.4 <= high for low, high in ends]) < 0.965
