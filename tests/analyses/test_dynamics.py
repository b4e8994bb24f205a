from __future__ import annotations

from mechmem.analyses.dynamics import Dynamics
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
    assert found == expected | {(0, "chance"): 0.25, (50, "chance"): 0.25}
    assert len(plain) == 10


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
    }


def test_a_phase_that_never_came_has_no_row():
    assert "memorised" not in set(Dynamics().table(SESSION)["label"])


def test_every_value_has_its_unit():
    table = Dynamics().table(SESSION)
    assert set(table.loc[table["curve"] == "phase", "unit"]) == {"optimiser steps"}
    assert set(table.loc[table["curve"] != "phase", "unit"]) == {"fraction"}
