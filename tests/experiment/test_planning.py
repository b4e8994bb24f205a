"""Rules that no outcome can meet, and the smallest effect that the planned seeds can establish."""

from __future__ import annotations

import re

import pytest

from mechmem.experiment.dry_run import rehearse
from mechmem.experiment.measured import Measured
from mechmem.experiment.planning import Plan
from mechmem.experiment.spec import Experiment
from mechmem.spec.errors import BlockError

WHERE = {
    "site": "neurons",
    "layer": 0,
    "condition": "intervened",
    "prefix": "given",
    "place": "all",
}


@pytest.mark.parametrize(
    ("measure", "minus", "condition", "message"),
    [
        ("accuracy_true", None, {"at_least": 1.5}, "q lies between 0 and 1"),
        ("accuracy_true", {"condition": "control"}, {"at_most": -1.2}, "q lies between -1 and 1"),
        ("accuracy_true", None, {"at_least": 0.999}, "even 8 of 8 have an interval from 0.631"),
        ("accuracy_true", None, {"at_most": 0.01}, "even 0 of 8 have an interval up to 0.369"),
        ("logit_true", None, {"at_least": 40.0}, None),
        ("accuracy_true", {"condition": "control"}, {"at_least": 0.99}, None),
    ],
)
def test_a_threshold_that_nothing_reaches_is_refused(spec, measure, minus, condition, message):
    block = spec(figures=[], answer="")
    block["analyses"][1]["measures"] = [measure]
    quantity = {"table": "patch_grid", "where": WHERE | {"measure": measure}, "minus": minus}
    block["quantities"] = {"q": quantity}
    holds = [{"quantity": "q", **condition}]
    block["claims"] = [{"id": "C7", "says": "", "holds_when": holds}]
    experiment = Experiment.model_validate(block)
    if message is None:
        rehearse(experiment)
        return
    with pytest.raises(BlockError, match=re.escape(message)) as raised:
        rehearse(experiment)
    assert raised.value.loc == ("claims", 0, "holds_when", 0, *condition)


def plan(spec, seeds: list[int], **fields) -> Plan:
    found = Measured(0.5, 0, 1, 5, {"examples": "noisy"}, measure="m", limits=(0.0, 1.0), **fields)
    return Plan(Experiment.model_validate(spec(seeds=seeds)), {"returned": found}, {"noisy": 100})


def test_the_smallest_effect_by_hand(spec):
    rows = plan(spec, [1, 2, 3, 4, 5]).smallest_effects({})
    # 2.776 is the 97.5 % point of Student's t with four degrees of freedom
    assert [row["smallest_effect"] for row in rows] == [
        pytest.approx(2.776 * spread / 5**0.5, abs=1e-4) for spread in (0.03, 0.1)
    ]
    (known,) = plan(spec, [1, 2, 3, 4, 5]).smallest_effects({"m": 0.05})
    assert known["smallest_effect"] == pytest.approx(2.776 * 0.05 / 5**0.5, abs=1e-4)


def test_a_proportion_is_known_no_better_than_its_counts(spec):
    (row,) = plan(spec, [1, 2], is_proportion=True).smallest_effects({"m": 1e-6})
    assert row["smallest_effect"] > 0.01


def test_one_seed_establishes_nothing(spec):
    assert plan(spec, [0]).smallest_effects({"m": 0.05})[0]["smallest_effect"] is None
