from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mechmem.statistics.holm import holm


def test_by_hand():
    # .01 <= .025 / 2, then .02 <= .025 / 1
    assert holm([0.02, 0.01]) == [True, True]
    # .02 > .025 / 2: the smaller one fails, so the larger is not even looked at
    assert holm([0.02, 0.024]) == [False, False]
    assert holm([0.5, 0.001, 0.9]) == [False, True, False]
    assert holm([0.025]) == [True]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_it_rejects_no_more_than_each_test_alone_and_no_less_than_bonferroni(p_values):
    for p, is_rejected in zip(p_values, holm(p_values), strict=True):
        assert not is_rejected or p <= 0.025
        assert is_rejected or p > 0.025 / len(p_values)
