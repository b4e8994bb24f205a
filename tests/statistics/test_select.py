from __future__ import annotations

import pandas as pd
import pytest

from mechmem.spec.errors import InputError
from mechmem.statistics.select import rows_where

TABLE = pd.DataFrame(
    {
        "condition": ["baseline", "intervened", "intervened"],
        "layer": ["0", "0", "0+1"],
        "k": [1, 2, 4],
        "greedy": [True, False, False],
        "label": ["final", "", ""],
    }
)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ({}, [0, 1, 2]),
        ({"condition": "intervened"}, [1, 2]),
        ({"condition": "intervened", "k": 4}, [2]),
        ({"k": 2.0}, [1]),
        ({"layer": 0}, [0, 1]),  # a number in a column of text
        ({"layer": "0+1"}, [2]),
        ({"greedy": True}, [0]),
    ],
)
def test_rows_are_chosen_by_their_values(where, rows):
    assert rows_where(TABLE, where).index.tolist() == rows


def test_an_unknown_column_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="no column 'condtion'; did you mean 'condition'"):
        rows_where(TABLE, {"condtion": "baseline"})


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"condition": "intervend"}, "no row has condition 'intervend'; did you mean 'intervened'"),
        ({"k": 3}, "no row has k 3; choose from 1, 2, 4"),
        ({"condition": "baseline", "k": 4}, "no row has k 4; choose from 1"),
    ],
)
def test_a_value_that_no_row_has_is_refused_with_the_values_of_the_rows_left(where, message):
    with pytest.raises(InputError, match=message):
        rows_where(TABLE, where)


def test_a_phase_that_was_never_reached_has_no_row():
    assert rows_where(TABLE, {"label": "memorised"}).empty


def test_what_is_chosen_from_no_rows_is_none():
    assert rows_where(TABLE, {"label": "memorised", "k": 3}).empty
