"""The simulations of docs/methods/statistics.md, with fewer draws."""

from __future__ import annotations

import numpy as np
import pytest
from coverage_table import Case, ends, ends_of, worst_of

from mechmem.statistics.samples import Samples, Values


@pytest.mark.parametrize("n_seeds", [3, 5, 10])
def test_intervals_cover_in_every_case(n_seeds):
    # 1,000 draws: six standard errors of .95 below it are .91; .99, .99 and .975 are expected
    found = worst_of(n_seeds, has_floor=True, draws=1000)
    assert found.coverage >= 0.95
    assert found.width < 1.5


def test_a_true_effect_at_the_threshold_is_hardly_ever_supported():
    draws = 10_000
    for case in (Case(0.5, 50, 0.0, 5), Case(0.5, 400, 0.1, 5), Case(0.95, 100, 0.03, 5)):
        low, high = ends(case, draws, np.random.default_rng(1), has_floor=True)
        assert (low > case.estimand).mean() <= 0.025
        assert (high < case.estimand).mean() <= 0.025


@pytest.mark.parametrize("floor", [0.0, 0.06])
def test_the_simulation_is_of_our_interval(floor):
    generator, n = np.random.default_rng(2), 40
    for p in (0.5, 0.9, 1.0):
        shares = generator.binomial(n, p, (20, 4)) / n
        low, high = ends_of(shares, n, np.full(20, floor))
        for i, row in enumerate(shares):
            by_seed = {
                seed: {("t", "e"): Values(np.repeat([1.0, 0.0], [round(s * n), n - round(s * n)]))}
                for seed, s in enumerate(row)
            }
            found = Samples(by_seed, are_shares=True, limits=(0.0, 1.0)).estimate(floor).ends()
            assert found == pytest.approx((low[i], high[i]))
