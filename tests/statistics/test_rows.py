from __future__ import annotations

import numpy as np
import pytest

from mechmem.statistics.intervals import LEVEL, interval
from mechmem.statistics.rows import over_draws, over_examples, single

VALUES = np.array([0.0, 1.0, 1.0, 0.5])


def test_a_mean_over_examples_by_hand():
    row = over_examples(VALUES)
    assert row["value"] == pytest.approx(0.625)
    assert row["n"] == 4
    assert row["per_example"].tolist() == VALUES.tolist()


def test_the_interval_of_a_mean_is_the_bootstrap_interval():
    row = over_examples(VALUES)
    low, high = interval(VALUES[None])
    assert (row["low"], row["high"]) == (low[0], high[0])
    assert row["low"] < row["value"] < row["high"]


def test_a_mean_over_draws_by_hand():
    row = over_draws([np.array([0.0, 1.0]), np.array([1.0, 1.0]), np.array([0.5, 0.5])])
    assert row["value"] == pytest.approx(4 / 6)
    assert row["per_example"].tolist() == pytest.approx([0.5, 2.5 / 3])
    assert row["n"] == 3


def test_the_interval_of_draws_is_the_middle_of_their_means():
    means = np.linspace(0, 1, 1001)
    row = over_draws([np.full(3, mean) for mean in means])
    assert row["low"] == pytest.approx((1 - LEVEL) / 2)
    assert row["high"] == pytest.approx((1 + LEVEL) / 2)


def test_a_single_number_has_an_interval_without_width():
    row = single(0.25)
    assert row.pop("per_example").tolist() == [0.25]
    assert row == {"value": 0.25, "low": 0.25, "high": 0.25, "n": 1}


@pytest.mark.parametrize(
    "row",
    [over_examples(VALUES), over_draws([VALUES, VALUES]), single(1)],
    ids=["over_examples", "over_draws", "single"],
)
def test_every_row_has_the_same_columns_of_the_same_types(row):
    assert {name: type(value) for name, value in row.items()} == {
        "value": float,
        "low": float,
        "high": float,
        "n": int,
        "per_example": np.ndarray,
    }
    assert row["per_example"].dtype == np.float32  # half the size on disk


def test_an_undefined_value_stays_undefined():
    row = over_examples(np.array([1.0, np.nan]))
    assert np.isnan([row["value"], row["low"], row["high"]]).all()
