"""A seeded sample of the campaign. `python tests/faults` runs all of it."""

from __future__ import annotations

import pytest
from campaign import Case, all_cases, outcomes, run_case, sample, table

N = 16
"""Cases of the sample: a minute on two slow cores."""


def test_a_sample_of_the_campaign_is_answered_clearly(tmp_path):
    found = list(outcomes(sample(all_cases(), N), tmp_path))
    bad = [f"{case.name}: {o.kind}: {o.note}" for case, o in found if not o.is_good]
    assert not bad, "\n".join([*bad, table(found)])


def test_the_campaign_has_at_least_700_cases_of_input_and_draws_others_for_another_seed():
    cases, others = all_cases(), all_cases(1)
    assert len(cases) >= 700
    assert [case.name for case in cases] == [case.name for case in all_cases()]
    assert {case.name for case in cases} != {case.name for case in others}


def made_to(fail: str) -> Case:
    """A case whose outcome is known."""

    def prepare(folder):
        if fail == "wrong":
            (folder.parent / "elsewhere").write_text("")
        return {
            "accepted": ["list"],
            "ok": ["list"],
            "refused": ["show", "nothing"],
            "late": ["run", "--help"],
        }.get(fail, ["list"])

    must = "be refused" if fail == "accepted" else "either"
    check = (lambda folder, outcome: "another result") if fail == "checked" else lambda *_: ""
    return Case(fail, "test", prepare, must, check, seconds=0.001 if fail == "late" else 30)


@pytest.mark.parametrize("kind", ["ok", "refused", "accepted", "late"])
def test_outcomes_are_told_apart(kind, tmp_path):
    assert run_case(made_to(kind), tmp_path / "case" / "work").kind == kind


def test_what_a_check_finds_is_a_wrong_outcome(tmp_path):
    outcome = run_case(made_to("checked"), tmp_path / "case" / "work")
    assert (outcome.kind, outcome.note) == ("wrong", "another result")
