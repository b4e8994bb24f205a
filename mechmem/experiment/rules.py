"""The record of rules: when the rule of each claim was fixed, and which data it could have seen.

A rule is on record in `runs/rules/NAME.json` from the first run of a spec on, before anything is
computed. A changed rule is added to the record; nothing is ever taken out of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from mechmem.experiment.cells import TrainedRun
from mechmem.experiment.claims import Claim
from mechmem.experiment.spec import Experiment
from mechmem.progress import ProgressCallback
from mechmem.spec.files import read_record, write_record
from mechmem.spec.registry import Component
from mechmem.training.index import RECORD
from mechmem.training.store import folder_of

Timing = Literal["before", "after", "changed", "exploratory"]
FIRST_SEEDS = range(10)
"""Seeds that are searched for data next to those of the spec: the same rule may be judged on them
later."""
REMEDY = (
    "restore it from a copy; without it, or if you delete it, the rules count as written after "
    "their data"
)


class _Entry(BaseModel):
    rule: dict[str, Any]
    recorded: str
    seeds_seen: list[int]


class _Rules(BaseModel):
    judged_on: list[int]
    rules: list[_Entry]


class RuleRecord(BaseModel):
    """runs/rules/NAME.json."""

    experiment: str
    claims: dict[str, _Rules]


def timing_of_rules(experiment: Experiment, runs: Path) -> dict[str, Timing]:
    """When the rule of each claim was fixed, by the claim's id; new rules are put on record.

    `before`: on record before data of any seed of this run were computed; `after`: its data were
    there already; `changed`: another rule was judged on them first; `exploratory`: the spec says
    so.

    Args:
        experiment: whose claims are judged.
        runs: folder of all runs.
    """
    if not experiment.claims:
        return {}
    path = runs / "rules" / f"{experiment.name}.json"
    record: dict[str, Any] = {"experiment": experiment.name, "claims": {}}
    if path.exists():
        record = read_record(path, RuleRecord, REMEDY)
    timing: dict[str, Timing] = {}
    data: dict[str, set[int]] | None = None
    for claim in experiment.claims:
        rules = record["claims"].setdefault(claim.id, {"judged_on": [], "rules": []})
        rule = rule_of(claim, experiment)
        if all(entry["rule"] != rule for entry in rules["rules"]):
            data = _seeds_with_data(experiment, runs) if data is None else data
            seen = set(rules["judged_on"]).union(
                *(data[table] for table in _tables(claim, experiment))
            )
            now = datetime.now(UTC).isoformat(timespec="seconds")
            rules["rules"].append({"rule": rule, "recorded": now, "seeds_seen": sorted(seen)})
        timing[claim.id] = _timing(claim, rule, rules["rules"], experiment)
        rules["judged_on"] = sorted({*rules["judged_on"], *experiment.seeds})
    write_record(path, record)
    return timing


def rule_of(claim: Claim, experiment: Experiment) -> dict[str, Any]:
    """All that decides a verdict, without the prose: the conditions, the quantities that they read,
    and what is set for the analyses, examples and checkpoints behind these."""
    names = sorted(experiment.quantities_behind(name for _, name in claim.quantities()))
    tables = _tables(claim, experiment)
    analyses = {a.table_name: a for a in experiment.analyses if a.table_name in tables}
    used = [experiment.references_of(analysis) for analysis in analyses.values()]
    checkpoints = sorted(frozenset().union(*(of.checkpoints for of in used)))
    examples = sorted(frozenset().union(*(of.examples for of in used)))
    return {
        "claim": {k: v for k, v in _set(claim).items() if k not in ("says", "exploratory")},
        "quantities": {name: _set(experiment.quantities[name]) for name in names},
        "analyses": {name: _set(analysis) for name, analysis in analyses.items()},
        "examples": {name: _set(experiment.examples[name]) for name in examples},
        "checkpoints": {name: _set(experiment.checkpoints[name]) for name in checkpoints},
    }


def _timing(
    claim: Claim, rule: Mapping[str, Any], entries: list[Mapping[str, Any]], experiment: Experiment
) -> Timing:
    if claim.exploratory:
        return "exploratory"
    at = next(i for i, entry in enumerate(entries) if entry["rule"] == rule)
    if not set(entries[at]["seeds_seen"]) & set(experiment.seeds):
        return "before"
    return "changed" if at > 0 else "after"


def _tables(claim: Claim, experiment: Experiment) -> set[str]:
    """The tables that a claim is judged by."""
    names = experiment.quantities_behind(name for _, name in claim.quantities())
    tables = {experiment.quantities[name].table for name in names}
    return {table for table in tables if table is not None}


def _seeds_with_data(experiment: Experiment, runs: Path) -> dict[str, set[int]]:
    """By the name of a table, the seeds of which cells have been computed already."""
    found: dict[str, set[int]] = {a.table_name: set() for a in experiment.analyses}
    for _, recipe in experiment.recipes():
        for seed in sorted({*experiment.seeds, *FIRST_SEEDS}):
            if not (folder_of(recipe, seed, runs) / RECORD).exists():
                continue
            trained_run = TrainedRun(experiment, recipe, seed, runs, ProgressCallback(), {})
            for analysis in experiment.analyses:
                if trained_run.has_cells(analysis):
                    found[analysis.table_name].add(seed)
    return found


def _set(value: Any) -> Any:
    """What differs from the defaults, in JSON, so that a new field changes no old rule."""
    if isinstance(value, Component):
        fields = type(value).model_fields.items()
        kind = {"kind": value.kind} if value.registry is not None else {}
        return kind | {
            name: _set(getattr(value, name))
            for name, field in fields
            if name != "name" and (field.is_required() or getattr(value, name) != field.default)
        }
    if isinstance(value, Mapping):
        return {str(key): _set(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_set(part) for part in value]
    return to_jsonable_python(value)
