from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mechmem.statistics.proportions import (
    Counts,
    agresti_caffo,
    agresti_min,
    clopper_pearson,
    is_binary,
)

COUNTS = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_twelve_of_twelve_and_none_of_twelve_by_hand():
    # (1/40)^(1/12), as 12 of 12 right has probability p^12
    low, high = clopper_pearson(np.array([12, 0]), 12)
    assert low.tolist() == pytest.approx([0.025 ** (1 / 12), 0.0])
    assert high.tolist() == pytest.approx([1.0, 1 - 0.025 ** (1 / 12)])
    assert round(float(low[0]), 3) == 0.735


@given(COUNTS)
def test_the_exact_interval_is_that_of_scipy(of):
    hits, n = of
    found = stats.binomtest(hits, n).proportion_ci(method="exact")
    assert Counts(hits, n).ends(0.025) == pytest.approx((found.low, found.high), abs=1e-9)


@given(COUNTS, st.floats(0.01, 0.99))
def test_p_values_are_those_of_the_binomial_test(of, share):
    hits, n = of
    for alternative, p in (("less", Counts.p_below), ("greater", Counts.p_above)):
        wanted = stats.binomtest(hits, n, share, alternative=alternative).pvalue
        assert p(Counts(hits, n), share) == pytest.approx(wanted, abs=1e-9)


@given(COUNTS, st.floats(0.0, 1.0))
def test_the_interval_holds_what_is_not_rejected(of, share):
    counts = Counts(*of)
    low, high = counts.ends(0.025)
    if share < low - 1e-9:
        assert counts.p_above(share) < 0.025
    elif share > high + 1e-9:
        assert counts.p_below(share) < 0.025
    elif low + 1e-9 < share < high - 1e-9:
        assert min(counts.p_above(share), counts.p_below(share)) > 0.025


@given(COUNTS)
def test_hits_and_misses_mirror_each_other_and_no_interval_is_a_point(of):
    hits, n = of
    low, high = Counts(hits, n).ends(0.025)
    assert Counts(n - hits, n).ends(0.025) == pytest.approx((1 - high, 1 - low))
    assert high - low > 0.5 / n


def test_a_paired_difference_by_hand():
    # 10 of 40 became right, 2 wrong: (10 - 2) / 42, variance ((13) / 42 - (8 / 42)²) / 42
    found = agresti_min(10, 2, 40)
    assert found.mean == pytest.approx(8 / 42)
    assert found.error == pytest.approx(np.sqrt((13 / 42 - (8 / 42) ** 2) / 42))


@given(st.integers(1, 200))
def test_examples_that_do_not_differ_leave_doubt(n):
    low, high = agresti_min(0, 0, n).ends(0.025)
    assert low == pytest.approx(-high)
    assert high > 0.5 / n


def test_one_of_two_unpaired_proportions_by_hand():
    found = agresti_caffo(12, 12)
    assert found.mean == pytest.approx(13 / 14)
    assert found.error == pytest.approx(np.sqrt(13 / 14 * 1 / 14 / 14))


def test_ones_and_zeros_are_told_from_other_numbers():
    assert is_binary(np.array([0.0, 1.0, 1.0]))
    assert not is_binary(np.array([0.0, 0.5]))
    assert not is_binary(np.array([np.nan, 1.0]))
