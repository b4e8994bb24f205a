from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from mechmem.analyses.held_out_loss import HeldOutLoss, accuracy, error_ratio
from mechmem.session import Session

MODEL = np.array([1.0] * 90 + [0] * 10)
REFERENCE = np.array([1.0] * 94 + [0] * 4 + [1] * 2)


def test_an_error_ratio_by_hand():
    # errors: 10 and 4, of which 4 are shared; 6 are the model's alone
    found = error_ratio(MODEL, REFERENCE)
    assert found["value"] == pytest.approx(2.5)
    width = stats.norm.ppf(0.975) * math.sqrt(6 / 40)
    assert found["low"] == pytest.approx(2.5 * math.exp(-width))
    assert found["high"] == pytest.approx(2.5 * math.exp(width))
    assert found["per_example"].mean() == pytest.approx(2.5)


def test_without_errors_of_the_reference_there_is_no_ratio():
    assert np.isnan(error_ratio(MODEL, np.ones(100))["value"])
    none = error_ratio(np.ones(100), REFERENCE)
    assert none["value"] == 0
    assert np.isnan([none["low"], none["high"]]).all()


def test_the_ratio_covers_the_true_one():
    """1 % and 2 % of errors, half of the smaller share in common, 2,000 instances."""
    generator, inside = np.random.default_rng(0), 0
    for _ in range(500):
        u = generator.choice(4, size=2000, p=[0.005, 0.015, 0.005, 0.975])
        found = error_ratio(1.0 * ~np.isin(u, (0, 1)), 1.0 * ~np.isin(u, (0, 2)))
        inside += found["low"] <= 2 <= found["high"]
    assert inside / 500 > 0.93


def test_an_accuracy_of_1_has_an_interval_that_counts_n():
    found = accuracy(np.ones(12))
    assert (found["value"], found["high"]) == (1, 1)
    assert found["low"] == pytest.approx(0.025 ** (1 / 12))  # .735


def test_the_table_by_greedy_answers(model, other_model, others):
    answers = {m: Session().greedy(m, others) for m in (model, other_model)}
    true = answers[other_model].clone()
    true[0, 0] = 1 - true[0, 0].clamp_max(1)  # the reference errs once
    same = (answers[model] == true).all(dim=1)
    held_out = replace(others, true=true, given=true)
    session = Session({"after": model, "twin": other_model}, {"held_out": held_out})
    table = HeldOutLoss().table(session)
    assert [*table] == [*HeldOutLoss.columns]
    found = {(row.condition, row.measure): row for row in table.itertuples()}
    assert found["reference", "accuracy"].value == pytest.approx(11 / 12)
    assert found["model", "accuracy"].per_example.tolist() == same.float().tolist()
    right = torch.tensor([0.0] + [1] * 11)
    assert found["lost", "accuracy"].per_example.tolist() == (right - same.float()).tolist()
    assert found["lost", "error_ratio"].value == pytest.approx(int((~same).sum()))
    assert set(table["n"]) == {12}
