from __future__ import annotations

import pandas as pd
import pytest

from mechmem.analyses.dynamics import Dynamics
from mechmem.experiment.quantities import Quantity
from mechmem.session import Session

CURVES = [
    {"step": 0, "clean": 0.0, "memorised": 0.0, "corrected": 0.0, "held_out": 0.1},
    {"step": 50, "clean": 0.9, "memorised": 0.2, "corrected": 0.7, "held_out": 0.8},
]
SESSION = Session(
    curves=CURVES,
    phases={"initial": 0, "generalised": 50, "memorised": None, "final": 50},
    chance=0.25,
)


def test_every_curve_is_told_at_every_step_with_chance():
    table = Dynamics().table(SESSION)
    assert set(table.columns) == set(Dynamics.columns)
    plain = table[table["label"] == ""]
    found = {(row.step, row.curve): row.value for row in plain.itertuples()}
    expected = {
        (row["step"], curve): value
        for row in CURVES
        for curve, value in row.items()
        if curve != "step"
    }
    expected |= {(0, "chance"): 0.25, (50, "chance"): 0.25, (0, "lead"): 0, (50, "lead"): 0.5}
    assert found == pytest.approx(expected)
    assert len(plain) == 12


def test_each_phase_has_its_mark_and_the_curves_there():
    table = Dynamics().table(SESSION)
    marks = table[table["curve"] == "phase"]
    assert dict(zip(marks["label"], marks["value"], strict=True)) == {
        "initial": 0,
        "generalised": 50,
        "final": 50,
    }
    assert (marks["step"] == marks["value"]).all()
    at = table[(table["label"] == "generalised") & (table["curve"] != "phase")].set_index("curve")[
        "value"
    ]
    assert at.to_dict() == {
        "clean": 0.9,
        "memorised": 0.2,
        "corrected": 0.7,
        "held_out": 0.8,
        "chance": 0.25,
        "lead": pytest.approx(0.5),
    }


def test_a_phase_that_never_came_has_no_row():
    assert "memorised" not in set(Dynamics().table(SESSION)["label"])


def lead(phases) -> dict[str, float]:
    """By label, the lead of the rule."""
    table = Dynamics().table(Session(curves=CURVES, phases=phases, chance=0.25))
    rows = table[(table["curve"] == "lead") & (table["label"] != "")]
    assert not rows["label"].duplicated().any()
    return dict(zip(rows["label"], rows["value"].round(9), strict=True))


def test_memory_without_the_rule_means_no_lead():
    assert lead({"generalised": None, "memorised": 50}) == {
        "generalised": 0,
        "memorised": 0.5,
        "best": 0.5,
    }
    assert lead({"generalised": 0, "memorised": 50})["generalised"] == 0  # as the curve says
    assert "generalised" not in lead({"generalised": None, "memorised": None})


def test_the_best_is_the_first_step_of_the_highest_held_out_accuracy():
    curves = [CURVES[0], CURVES[1], CURVES[1] | {"step": 100, "clean": 0.95}]
    table = Dynamics().table(Session(curves=curves, phases={"final": 100}))
    best = table[table["label"] == "best"]
    assert set(best["step"]) == {50}
    assert best.set_index("curve")["value"]["held_out"] == 0.8
    assert "phase" not in set(best["curve"])  # no mark in the figure


def test_every_value_has_its_unit():
    table = Dynamics().table(SESSION)
    assert set(table.loc[table["curve"] == "phase", "unit"]) == {"optimiser steps"}
    assert set(table.loc[table["curve"] == "lead", "unit"]) == {"difference of fractions"}
    others = table[~table["curve"].isin(("phase", "lead"))]
    assert set(others["unit"]) == {"fraction"}


def test_a_lead_can_be_negative_and_its_interval_too():
    found = []
    for seed, lead in enumerate((0.0, 0.0, 0.0, -1.0, 0.0), start=1):
        row = {"step": 50, "clean": 1.0, "memorised": -lead, "corrected": 0.0, "held_out": 0.9}
        session = Session(curves=[row], phases={"generalised": 50}, chance=0.0)
        found.append(Dynamics().table(session).assign(seed=seed))
    where = {"curve": "lead", "label": "generalised"}
    lead = Quantity(table="dynamics", where=where).measure({"dynamics": pd.concat(found)})
    # Student's t: -0.2 +- 2.776 * 0.447 / sqrt(5)
    assert (lead.low, lead.high) == pytest.approx((-0.755, 0.355), abs=1e-3)
    assert lead.measure == "dynamics difference"
