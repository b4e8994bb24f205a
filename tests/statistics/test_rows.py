from __future__ import annotations

import numpy as np
import pytest

from mechmem.statistics.intervals import LEVEL, interval
from mechmem.statistics.rows import (
    FRACTION,
    interval_by_unit,
    over_draws,
    over_examples,
    single,
)

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


def test_right_and_wrong_answers_have_an_exact_interval():
    row = over_examples(np.ones(12), FRACTION)
    assert (row["low"], row["high"]) == (pytest.approx(0.025 ** (1 / 12)), 1.0)
    none = over_examples(np.zeros(12), FRACTION)
    assert (none["low"], none["high"]) == (0.0, pytest.approx(1 - 0.025 ** (1 / 12)))


def test_zeros_of_another_unit_are_exactly_zero():
    row = over_examples(np.zeros(12), "nats")
    assert (row["low"], row["high"]) == (0.0, 0.0)


def test_means_in_fractions_keep_their_bootstrap_interval():
    row, low_high = over_examples(VALUES, FRACTION), interval(VALUES[None])
    assert (row["low"], row["high"]) == (low_high[0][0], low_high[1][0])


def test_exact_intervals_cover_a_high_accuracy():
    values = (np.random.default_rng(0).random((1000, 20)) < 0.95).astype(float)
    low, high = interval_by_unit(values, [FRACTION] * 1000)
    assert ((low <= 0.95) & (high >= 0.95)).mean() >= 0.95


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
