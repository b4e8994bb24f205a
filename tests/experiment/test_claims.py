from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from mechmem.experiment.claims import Claim, Condition
from mechmem.experiment.measured import Measured
from mechmem.experiment.quantities import Quantity
from mechmem.experiment.sentence import render_answer
from mechmem.spec.errors import InputError

NAN = float("nan")
TRUE = {"at_least": 0.5}


def effect(layers: dict[Any, dict[str, list[list[float]]]]) -> pd.DataFrame:
    """{layer: {condition: values by seed and example}} as a table of an effect."""
    rows = [
        {
            "layer": layer,
            "condition": condition,
            "seed": seed,
            "value": float(np.mean(values)),
            "per_example": values,
        }
        for layer, conditions in layers.items()
        for condition, seeds in conditions.items()
        for seed, values in enumerate(seeds)
    ]
    return pd.DataFrame(rows).assign(
        n=4, low=0.0, high=1.0, recovery=pd.array([None] * len(rows), dtype="Float64")
    )


TABLES = {
    "grid": effect(
        {
            0: {
                "intervened": [[1, 1, 0, 1], [0, 0, 0, 1]],
                "baseline": [[0, 1, 0, 0], [0, 0, 0, 0]],
            },
            1: {
                "intervened": [[1, 1, 1, 1], [1, 1, 0, 1]],
                "baseline": [[0, 1, 0, 0], [0, 0, 0, 0]],
            },
        }
    ),
    "shift": pd.DataFrame(
        {"seed": [0, 0, 1, 1], "layer": [0, 1, 0, 1], "shift": [1.0, 3.0, 2.0, 6.0]}
    ),
}


def measure(**fields: Any) -> Measured:
    return Quantity(**({"table": "grid"} | fields)).measure(TABLES)


def test_a_quantity_is_the_mean_over_seeds_of_the_means_over_examples():
    found = measure(where={"layer": 0, "condition": "intervened"})
    assert found.value == (0.75 + 0.25) / 2
    assert found.n_seeds == 2
    assert 0 <= found.low < 0.5 < found.high <= 1
    assert found.labels == {"layer": 0, "condition": "intervened"}


def test_a_difference_by_hand():
    found = measure(where={"layer": 0, "condition": "intervened"}, minus={"condition": "baseline"})
    assert found.value == (np.mean([1, 0, 0, 1]) + np.mean([0, 0, 0, 1])) / 2


def test_a_difference_is_paired_example_by_example():
    base = [[0.0, 10, 20, 30], [5, 15, 25, 35]]
    tables = {"grid": effect({0: {"intervened": (np.array(base) + 2).tolist(), "baseline": base}})}
    found = Quantity(
        table="grid", where={"condition": "intervened"}, minus={"condition": "baseline"}
    ).measure(tables)
    assert (found.value, found.low, found.high) == (
        2,
        2,
        2,
    )  # the examples differ, the effect does not


def test_other_examples_are_subtracted_by_their_mean():
    table = effect({0: {"intervened": [[4.0, 6.0]]}}).assign(examples="noisy")
    other = effect({0: {"intervened": [[1.0, 3.0]]}}).assign(examples="clean")
    both = {"grid": pd.concat([table, other], ignore_index=True)}
    found = Quantity(
        table="grid", where={"examples": "noisy"}, minus={"examples": "clean"}
    ).measure(both)
    assert found.value == 3
    # Both sets are drawn apart (paired it would be 3 exactly): each mean has a standard error of 1,
    # so the difference has one of sqrt(2), with two degrees of freedom.
    assert (found.low, found.high) == pytest.approx(
        (3 - 4.3027 * 2**0.5, 3 + 4.3027 * 2**0.5), 1e-4
    )


def test_rows_of_single_neurons_are_averaged_within_a_seed():
    found = measure(table="shift", value="shift")
    assert found.value == (2 + 4) / 2
    assert found.n_seeds == 2
    less = measure(table="shift", value="shift", where={"layer": 1}, minus={"layer": 0})
    assert less.value == ((3 - 1) + (6 - 2)) / 2


def test_a_single_number_is_said_without_an_interval():
    found = Quantity(table="dynamics").measure(
        {"dynamics": pd.DataFrame({"seed": [0], "value": [0.538]})}
    )
    assert (found.percent, found.points, found.number) == ("54 %", "+54 points", "0.538")
    assert [Condition(quantity="q", at_least=x).outcome(found) for x in (0.1, 0.6)] == [True, False]
    claim = Claim(id="C", says="", holds_when=[{"quantity": "q", "at_least": 0.1}])
    assert claim.verdict({"q": found})["verdict"] == "undetermined"


@pytest.mark.parametrize(("pick", "layer", "value"), [("largest", 1, 0.875), ("smallest", 0, 0.5)])
def test_of_several_rows_the_extreme_mean_over_seeds_is_picked(pick, layer, value):
    found = measure(where={"condition": "intervened"}, pick=pick)
    assert found.value == value
    assert found.labels["layer"] == layer


@pytest.mark.parametrize("pick", ["largest", "smallest"])
def test_a_row_that_is_undefined_is_not_picked(pick):
    tables = {
        "grid": effect(
            {
                0: {"intervened": [[NAN, 1]]},
                1: {"intervened": [[0, 1]]},
                2: {"intervened": [[NAN, 1]]},
            }
        )
    }
    assert Quantity(table="grid", pick=pick).measure(tables).labels["layer"] == 1


def test_a_phase_that_never_came_is_undefined():
    tables = {
        "dynamics": pd.DataFrame(
            {"seed": [0, 0], "label": ["", "generalised"], "value": [0.1, 400.0]}
        )
    }
    came, never = (
        Quantity(table="dynamics", where={"label": label}).measure(tables)
        for label in ("generalised", "memorised")
    )
    assert (came.value, came.n_seeds) == (400, 1)
    assert np.isnan([never.value, never.low, never.high]).all()
    assert never.n_seeds == 0


@pytest.mark.parametrize("layer", [0, "0", "0+1"])
def test_a_number_fits_a_column_of_words(layer):
    words = effect({"0": {"intervened": [[1]]}, "0+1": {"intervened": [[0]]}})
    found = Quantity(table="grid", where={"layer": layer}).measure({"grid": words})
    assert found.value == (0 if layer == "0+1" else 1)


def test_a_recovery_that_is_undefined_makes_no_number():
    assert np.isnan(measure(where={"layer": 0, "condition": "intervened"}, value="recovery").value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"table": "gird"}, "there is no table 'gird'; did you mean 'grid'?"),
        ({"where": {"laier": 0}}, "the table has no column 'laier'; did you mean 'layer'?"),
        (
            {"where": {"layer": 0}},
            "2 rows per seed fit {'layer': 0}; add a key (condition) or `pick:`",
        ),
        ({}, "4 rows per seed fit {}; add a key (layer, condition) or `pick:`"),
        (
            {"value": "recoverie"},
            "table 'grid' has no column 'recoverie'; did you mean 'recovery'?",
        ),
        (
            {"table": "shift", "value": "shfit"},
            "table 'shift' has no column 'shfit'; did you mean 'shift'?",
        ),
        (
            {"table": "shift", "value": "shift", "pick": "largest"},
            "`pick` needs per-example values, but column 'shift' of table 'shift' has none",
        ),
        ({"where": {"layer": 7}}, "no row has layer 7; choose from 0, 1"),
        (
            {"where": {"condition": "intervned"}},
            "no row has condition 'intervned'; did you mean 'intervened'?",
        ),
        (
            {"where": {"layer": 1, "condition": "source"}},
            "no row has condition 'source'; choose from intervened, baseline",
        ),
        (
            {"table": "shift", "value": "shift", "minus": {"layer": 9}},
            "no row has layer 9; choose from 0, 1",
        ),
        (
            {"where": {"layer": 0, "condition": "intervened"}, "minus": {"condition": "no"}},
            "no row has condition 'no'",
        ),
        (
            {"where": {"layer": 0, "condition": "intervened"}, "minus": {"cond": "no"}},
            "no column 'cond'; did you mean",
        ),
    ],
)
def test_what_cannot_be_read_off_is_refused(fields, message):
    with pytest.raises(InputError, match=re.escape(message)):
        measure(**fields)


@pytest.mark.parametrize(
    ("threshold", "low", "high", "outcome"),
    [
        ({"at_least": 0.5}, 0.6, 0.8, True),
        ({"at_least": 0.5}, 0.5, 0.8, True),
        ({"at_least": 0.5}, 0.4, 0.6, None),
        ({"at_least": 0.5}, 0.3, 0.5, None),
        ({"at_least": 0.5}, 0.1, 0.4, False),
        ({"at_most": 0.5}, 0.1, 0.5, True),
        ({"at_most": 0.5}, 0.4, 0.6, None),
        ({"at_most": 0.5}, 0.5, 0.6, None),
        ({"at_most": 0.5}, 0.6, 0.8, False),
        ({"at_least": 0.0}, 0.0, 0.1, True),
        ({"at_least": 0.0}, -0.1, 0.1, None),
        ({"at_most": 0.0}, 0.1, 0.2, False),
        ({"at_least": -0.2}, -0.1, 0.3, True),
        ({"at_most": -0.2}, -0.4, -0.3, True),
    ],
)
def test_a_condition_asks_the_whole_interval(threshold, low, high, outcome):
    assert (
        Condition(quantity="q", **threshold).outcome(Measured((low + high) / 2, low, high, 3))
        is outcome
    )


@pytest.mark.parametrize("threshold", [{"at_least": 0.5}, {"at_most": 0.5}])
def test_nothing_is_concluded_from_an_undefined_quantity(threshold):
    assert Condition(quantity="q", **threshold).outcome(Measured(NAN, NAN, NAN, 0)) is None


@pytest.mark.parametrize("thresholds", [{}, {"at_least": 0.1, "at_most": 0.2}])
def test_a_condition_has_one_threshold(thresholds):
    with pytest.raises(ValidationError, match="needs one of `at_least` and `at_most`"):
        Condition(quantity="q", **thresholds)


def claim(*quantities: str, **fields: Any) -> Claim:
    conditions = tuple(Condition(quantity=name, **TRUE) for name in quantities)
    return Claim(id="C1", says="it is so", holds_when=conditions, **fields)


HOLDS, FAILS, UNCLEAR = (0.7, 0.6, 0.8), (0.2, 0.1, 0.3), (0.5, 0.4, 0.6)


@pytest.mark.parametrize(
    ("first", "second", "n_seeds", "verdict", "reason"),
    [
        (HOLDS, HOLDS, 3, "supported", "over 3 seeds: all hold"),
        (HOLDS, FAILS, 3, "refuted", "over 3 seeds: contradicted: b >= 0.5"),
        (FAILS, UNCLEAR, 5, "refuted", "over 5 seeds: contradicted: a >= 0.5"),
        (HOLDS, UNCLEAR, 3, "undetermined", "over 3 seeds: unclear: b >= 0.5"),
        (UNCLEAR, UNCLEAR, 3, "undetermined", "over 3 seeds: unclear: a >= 0.5; b >= 0.5"),
        (HOLDS, (NAN, NAN, NAN), 3, "undetermined", "over 3 seeds: unclear: b >= 0.5"),
        (
            HOLDS,
            HOLDS,
            2,
            "undetermined",
            "2 of the 3 seeds that a verdict needs; so far all hold",
        ),
        (
            *(FAILS, FAILS, 1, "undetermined"),
            "1 of the 3 seeds that a verdict needs; so far contradicted: a >= 0.5; b >= 0.5",
        ),
    ],
)
def test_verdicts(first, second, n_seeds, verdict, reason):
    found = claim("a", "b").verdict(
        {"a": Measured(*first, n_seeds), "b": Measured(*second, n_seeds)}
    )
    assert (found["verdict"], found["reason"]) == (verdict, reason)


def test_the_fewest_seeds_count():
    measured = {"a": Measured(*HOLDS, 5), "b": Measured(*HOLDS, 2)}
    assert claim("a", "b").verdict(measured)["verdict"] == "undetermined"
    assert claim("a", "b", min_seeds=2).verdict(measured)["verdict"] == "supported"


def test_a_verdict_says_what_was_asked_and_found():
    conditions = (Condition(quantity="a", at_least=0.5), Condition(quantity="b", at_most=0.25))
    asked = Claim(id="C7", says="it is so", holds_when=conditions)
    found = asked.verdict(
        {
            "a": Measured(0.7, 0.6, 0.8, 3),
            "b": Measured(0.3, 0.2, 0.4, 3),
            "c": Measured(1, 1, 1, 9),
        }
    )
    assert found == {
        "id": "C7",
        "says": "it is so",
        "verdict": "undetermined",
        "reason": "over 3 seeds: unclear: b <= 0.25",
        "rule": "a >= 0.5 and b <= 0.25",
        "effect": 0.7,
        "interval": [0.6, 0.8],
        "requires": [],
        "attainable": None,
        "control": None,
        "n_seeds": 3,
        "timing": "after",
        "exploratory": False,
        "conditions": [
            {
                "rule": "a >= 0.5",
                "met": True,
                "contradicted": False,
                "found": "0.7 [0.6, 0.8]",
            },
            {
                "rule": "b <= 0.25",
                "met": None,
                "contradicted": False,
                "found": "0.3 [0.2, 0.4]",
            },
        ],
    }


@pytest.mark.parametrize("fields", [{"min_seeds": 1}, {"holds_when": ()}])
def test_a_claim_can_fail_and_never_rests_on_one_seed(fields):
    with pytest.raises(ValidationError):
        Claim(
            **({"id": "C1", "says": "", "holds_when": [{"quantity": "q", "at_least": 0}]} | fields)
        )


MEASURED = {
    "best": Measured(0.625, 0.58, 0.661, 3, {"layer": 1, "site": "attn_out"}),
    "change": Measured(-0.123, -0.151, 0.004, 3),
    "hardly": Measured(-0.002, -0.004, 0.004, 1),
    "gone": Measured(NAN, NAN, NAN, 0),
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{best.percent} return", "62 % [58, 66] return"),
        ("{change.points}", "-12 points [-15, +0]"),
        ("{best.number}", "0.625 [0.58, 0.661]"),
        ("{hardly.points}, {hardly.percent}", "+0 points [+0, +0], 0 % [0, 0]"),
        ("{best.value:.2f} over {best.n_seeds} seeds", "0.62 over 3 seeds"),
        ("{best.low}, {best.high}", "0.58, 0.661"),
        ("layer {best.layer}'s {best.site}", "layer 1's attn_out"),
        (
            "{gone.percent}, {gone.points}, {gone.number}, layer {gone.layer}",
            ", ".join(["undefined"] * 3) + ", layer undefined",
        ),
        ("two\n  lines {{as they are}}", "two lines {as they are}"),
        ("", ""),
    ],
)
def test_the_answer_in_a_sentence(template, text):
    assert render_answer(template, MEASURED) == text


def test_an_answer_may_say_the_verdict_of_a_claim():
    assert (
        render_answer("C7-few is {C7-few.verdict}", MEASURED, {"C7-few": "refuted"})
        == "C7-few is refuted"
    )
    with pytest.raises(InputError, match="the answer template refers to unknown quantity 'C7-few'"):
        render_answer("{C7-few.reason}", MEASURED, {"C7-few": "refuted"})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{beste.percent}",
            "the answer template refers to unknown quantity 'beste'; did you mean 'best'?",
        ),
        ("{best.percnt}", "best has no 'percnt'; did you mean 'percent'?"),
        ("{best}", "best has no ''"),
        ("{best.__class__}", "best has no '__class__'"),
        ("{best.value.__class__.__mro__}", "best has no 'value.__class__.__mro__'"),
        ("{best.labels}", "best has no 'labels'"),
        ("{best.value:{best.__dict__}}", "best has no '__dict__'"),
        ("{best[0]}", "the answer template refers to unknown quantity 'best[0]'"),
        ("{}", "the answer template refers to unknown quantity '0'"),
        ("50 % {", "the answer '50 % {' cannot be filled in"),
        ("{best.value:zz}", "cannot be filled in"),
    ],
)
def test_an_answer_that_speaks_of_anything_else_is_refused(template, message):
    with pytest.raises(InputError, match=re.escape(message)):
        render_answer(template, MEASURED)
