from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mechmem.statistics.intervals import hierarchical_interval, interval, ratio

# An end of a percentile interval from 2,000 resamples is off by a sixtieth of the interval's width
# (one standard deviation, of a normal mean): six of them are allowed.
NEAR = 0.1


def near(found, wanted) -> bool:
    width = wanted[1] - wanted[0]
    return all(abs(f - w) < NEAR * width for f, w in zip(found, wanted, strict=True))


def by_scipy(values: np.ndarray) -> tuple[float, float]:
    found = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(5)
    )
    return found.confidence_interval


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2.0, 3.0, shape)


SAMPLES = {
    "normal": drawn(40),
    "shares": np.repeat([1.0, 0.0], [12, 28]),
    "skewed": np.exp(drawn(60, seed=1) / 3),
    "few": drawn(6, seed=2),
}


@pytest.mark.parametrize("values", SAMPLES.values(), ids=SAMPLES)
def test_interval_is_that_of_scipy(values):
    low, high = interval(values[None])
    assert near((low[0], high[0]), by_scipy(values))


@pytest.mark.parametrize("values", SAMPLES.values(), ids=SAMPLES)
def test_with_one_seed_the_interval_is_the_plain_one(values):
    mean, *found = hierarchical_interval([values])
    assert mean == pytest.approx(values.mean())
    assert near(found, by_scipy(values))


def test_interval_covers_the_mean_as_often_as_it_says():
    low, high = interval(drawn(1000, 50))
    covered = ((low <= 2.0) & (high >= 2.0)).mean()
    assert 0.91 < covered < 0.97  # 0.94 expected: the percentile method is a little short at n = 50


def test_equal_values_have_an_interval_without_width():
    assert interval(np.full((1, 9), 0.25)) == (pytest.approx([0.25]), pytest.approx([0.25]))
    assert hierarchical_interval([np.full(5, 0.5)] * 3) == (0.5, 0.5, 0.5)


def test_a_shift_and_a_scale_carry_over_to_the_interval():
    values = drawn(1, 30)
    low, high = interval(values)
    assert interval(10 - 2 * values) == (pytest.approx(10 - 2 * high), pytest.approx(10 - 2 * low))


def test_rows_share_the_resamples_so_that_equal_rows_have_equal_intervals():
    low, high = interval(np.stack([SAMPLES["normal"], SAMPLES["normal"] + 1]))
    assert low[1] - low[0] == pytest.approx(1)
    assert high[1] - high[0] == pytest.approx(1)


def test_a_value_that_is_missing_makes_its_own_row_undefined_and_no_other():
    values = np.stack([SAMPLES["normal"], SAMPLES["normal"]])
    values[1, 3] = np.nan
    low, high = interval(values)
    assert np.isnan([low[1], high[1]]).all()
    assert near((low[0], high[0]), by_scipy(SAMPLES["normal"]))


def test_a_missing_value_makes_the_whole_quantity_undefined():
    assert np.isnan(hierarchical_interval([SAMPLES["few"], np.array([1.0, np.nan])])).all()


def test_the_same_values_give_the_same_interval():
    seeds = [drawn(20, seed=s) for s in range(3)]
    assert hierarchical_interval(seeds) == hierarchical_interval(seeds)
    assert hierarchical_interval(seeds, seed=1) != hierarchical_interval(seeds)
    assert interval(drawn(1, 20))[0] == interval(drawn(1, 20))[0]


def test_every_seed_counts_the_same_however_many_examples_it_has():
    assert hierarchical_interval([np.ones(30), np.full(2, 4.0)])[0] == 2.5


def test_without_spread_inside_a_seed_the_seeds_alone_are_drawn():
    # the mean of two draws from {0, 1} is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4
    assert hierarchical_interval([np.zeros(10), np.ones(10)]) == (0.5, 0.0, 1.0)
    # of six draws from six, with three ones, it is binomial(6, 1/2) / 6, whose 2.5 % and 97.5 %
    # points are 1/6 and 5/6
    seeds = [np.full(4, float(i < 3)) for i in range(6)]
    assert hierarchical_interval(seeds) == (0.5, pytest.approx(1 / 6), pytest.approx(5 / 6))


def test_examples_of_a_seed_are_drawn_again_too():
    # seeds with equal means: what is left is the spread of the examples, over sqrt(4 seeds x 100
    # examples)
    values = drawn(100)
    _, low, high = hierarchical_interval([values, values, values, values])
    assert (high - low) / (2 * 1.96) == pytest.approx(values.std() / 20, rel=0.1)


def test_a_seeds_examples_do_not_stand_for_other_trainings():
    # 12 models that differ (sd 1) with 25 examples each (sd 1): the seed is the unit of replication
    rng, n = np.random.default_rng(0), 60
    values = rng.normal(0, 1, (n, 12, 1)) + rng.normal(0, 1, (n, 12, 25))
    ends = [hierarchical_interval(list(seeds))[1:] for seeds in values]
    covered = np.mean([low <= 0 <= high for low, high in ends])
    low, high = interval(values.reshape(n, -1))
    pooled = np.mean((low <= 0) & (high >= 0))
    assert covered > 0.85  # 0.92 expected of a percentile interval over twelve seeds
    assert pooled < 0.55  # 0.41 expected: as if the 300 examples were as many models


def test_one_number_of_one_seed_has_no_interval():
    mean, low, high = hierarchical_interval([np.array([0.5])])
    assert mean == 0.5
    assert np.isnan([low, high]).all()
    assert not np.isnan(hierarchical_interval([np.array([0.5]), np.array([0.7])])).any()


def test_what_is_subtracted_is_drawn_apart_and_widens_the_interval_as_scipy_says():
    ours, theirs = drawn(80), drawn(50, seed=3)
    mean, *found = hierarchical_interval([ours], [theirs])
    assert mean == pytest.approx(ours.mean() - theirs.mean())
    by = stats.bootstrap(
        (ours, theirs),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(5),
    )
    assert near(found, by.confidence_interval)


def test_a_ratio_by_hand():
    # 3 / 2, and each example's own numerator less 1.5 of its own denominator
    assert ratio(np.array([2.0, 4.0]), np.array([1.0, 3.0])).tolist() == [1.5 + 0.25, 1.5 - 0.25]
    assert np.isnan(ratio(np.array([2.0, 4.0]), np.array([1.0, -1.0]))).all()


def test_the_interval_of_a_ratio_is_that_of_the_ratio_of_resampled_means():
    denominators = np.random.default_rng(0).normal(5, 1, 300)
    numerators = 2 * denominators + np.random.default_rng(1).normal(0, 1, 300)
    values = ratio(numerators, denominators)
    assert values.mean() == pytest.approx(numerators.mean() / denominators.mean())
    rows = np.random.default_rng(2).integers(300, size=(20_000, 300))
    resampled = numerators[rows].mean(1) / denominators[rows].mean(1)
    low, high = interval(values[None])
    assert near((low[0], high[0]), np.quantile(resampled, [0.025, 0.975]))
