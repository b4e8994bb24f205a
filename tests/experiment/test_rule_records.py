"""The record of rules: what a rule is, and when it was fixed."""

from __future__ import annotations

from typing import Any

import pytest

from mechmem.experiment import rules
from mechmem.experiment.rules import rule_of, timing_of_rules
from mechmem.experiment.spec import Experiment
from mechmem.spec.files import read_json


@pytest.fixture
def data(monkeypatch) -> dict[str, set[int]]:
    """By the name of a table, the seeds of which data have been computed."""
    found: dict[str, set[int]] = {"dynamics": set(), "patch_grid": set(), "neuron_shift": set()}
    monkeypatch.setattr(rules, "_seeds_with_data", lambda experiment, runs: found)
    return found


def of(spec, at_least: float = 0.1, seeds: tuple[int, ...] = (1, 2), **claim: Any) -> Experiment:
    block = spec(seeds=list(seeds))
    block["claims"][0] |= {
        "holds_when": [{"quantity": "returned", "at_least": at_least}],
        **claim,
    }
    return Experiment.model_validate(block)


def test_a_rule_on_record_before_its_data_was_fixed_before_the_run(spec, data, tmp_path):
    assert timing_of_rules(of(spec), tmp_path) == {"C7": "before"}
    data["patch_grid"].update({1, 2})  # the run itself
    assert timing_of_rules(of(spec), tmp_path) == {"C7": "before"}
    record = read_json(tmp_path / "rules" / "small.json")
    assert record["claims"]["C7"]["judged_on"] == [1, 2]
    (entry,) = record["claims"]["C7"]["rules"]
    assert entry["seeds_seen"] == []
    assert entry["rule"]["claim"]["holds_when"] == [{"quantity": "returned", "at_least": 0.1}]


def test_a_rule_whose_data_were_there_already_came_after(spec, data, tmp_path):
    data["patch_grid"].add(2)
    assert timing_of_rules(of(spec), tmp_path) == {"C7": "after"}


def test_data_of_other_tables_and_other_seeds_do_not_matter(spec, data, tmp_path):
    data["dynamics"].update({1, 2})
    data["patch_grid"].add(0)
    assert timing_of_rules(of(spec), tmp_path) == {"C7": "before"}


def test_a_threshold_that_is_changed_after_the_run_marks_the_verdict(spec, data, tmp_path):
    timing_of_rules(of(spec), tmp_path)
    assert timing_of_rules(of(spec, at_least=0.05), tmp_path) == {"C7": "changed"}
    assert timing_of_rules(of(spec, at_least=0.05), tmp_path) == {"C7": "changed"}
    assert timing_of_rules(of(spec), tmp_path) == {"C7": "before"}  # the one that was there first


def test_rules_may_be_changed_on_seed_0_and_tested_on_others(spec, data, tmp_path):
    timing_of_rules(of(spec, seeds=(0,)), tmp_path)
    timing_of_rules(of(spec, at_least=0.2, seeds=(0,)), tmp_path)
    assert timing_of_rules(of(spec, at_least=0.2, seeds=(1, 2)), tmp_path) == {"C7": "before"}


def test_a_spec_may_say_that_it_explores(spec, data, tmp_path):
    explores = of(spec, exploratory="k was chosen on these seeds")
    assert timing_of_rules(explores, tmp_path) == {"C7": "exploratory"}


def test_prose_is_no_part_of_a_rule_and_settings_are(spec):
    plain, prose = of(spec), of(spec, says="In other words.")
    assert rule_of(plain.claims[0], plain) == rule_of(prose.claims[0], prose)
    block = spec()
    block["analyses"][1]["layer"] = 0
    other = Experiment.model_validate(block)
    (ours, theirs) = (rule_of(e.claims[0], e)["analyses"] for e in (plain, other))
    assert ours != theirs
    assert set(ours) == {"patch_grid"}


def test_the_record_holds_for_a_run(made):
    record = read_json(made.folder.parent / "rules" / "small.json")
    assert record["claims"]["C7"]["rules"][0]["seeds_seen"] == []
    assert made.claims[0]["timing"] == "before"
    assert "Rule, fixed before the run" in made.report.read_text()
