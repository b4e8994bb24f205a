"""Summaries of a kind, a training and a run: as text for a person, and as numbers for a script."""

from __future__ import annotations

import inspect
import math
from typing import Any

from mechmem.experiment.results import Run
from mechmem.spec.registry import Component
from mechmem.training.store import Trained

TIMINGS = {
    "before": "fixed before the run",
    "after": "exploratory: not on record before its data",
    "changed": "exploratory: changed after a run",
    "exploratory": "exploratory",
}
"""When the rule of a claim was fixed."""


def run_text(finished: Run) -> str:
    """Question, answer, claims and quantities of a run, and where its report and tables are."""
    lines = [finished.question, "", finished.answer, ""]
    for claim in finished.claims:
        lines += [f"{claim['id']}: {claim['verdict']} ({claim['reason']})", f"  {claim['says']}"]
        lines.append(
            f"  rule ({TIMINGS[claim.get('timing', 'after')]}): {claim['rule']}; "
            f"effect {_number(claim['effect']):.3g} {_interval(*claim['interval'])}"
        )
    quantities = finished.record["quantities"]
    lines += [""] if quantities else []
    for name, found in quantities.items():
        interval = _interval(found["low"], found["high"])
        lines.append(f"  {name:<28} {_number(found['value']):>8.3f}  {interval}")
    tables = ", ".join(str(path) for path in finished.tables.values())
    return "\n".join([*lines, "", f"report {finished.report}", f"tables {tables}"])


def run_numbers(finished: Run) -> dict[str, Any]:
    """The same, with paths."""
    return finished.summary()


def training_text(trained: Trained) -> str:
    """The kept checkpoints of a training with the four curves there."""
    checkpoints = trained.checkpoints().to_string(
        index=False, float_format=lambda value: f"{value:.3f}"
    )
    lines = [
        repr(trained),
        f"recipe {trained.recipe.recipe_hash}, {trained.folder}",
        "",
        checkpoints,
        "",
    ]
    legend = (
        "share of whole answers that are right: clean and memorised by the given labels, "
        "corrected and held_out by the true ones"
    )
    return "\n".join([*lines, legend])


def training_numbers(trained: Trained) -> dict[str, Any]:
    """The same, with the step of each phase."""
    phases = {
        "phases": trained.phases,
        "seed": trained.seed,
        "recipe_hash": trained.recipe.recipe_hash,
    }
    return {
        "name": trained.recipe.name,
        "checkpoints": trained.checkpoints().to_dict("records"),
        **phases,
    }


def kind_text(kind: type[Component]) -> str:
    """The documentation of a kind, its fields, and the columns of its table if it makes one."""
    lines = [f"{kind.kind} ({kind.registry})", "", inspect.getdoc(kind) or "", ""]
    for name, field in kind.model_fields.items():
        default = "required" if field.is_required() else f"default {field.default!r}"
        lines.append(
            f"  {name:<18} {default}{'  ' + field.description if field.description else ''}"
        )
    columns = getattr(kind, "columns", None)  # a figure's are what it needs
    lines += (
        [f"  column {c:<14} {meaning}" for c, meaning in columns.items()]
        if isinstance(columns, dict)
        else []
    )
    return "\n".join(lines)


def kind_numbers(kind: type[Component]) -> dict[str, Any]:
    """The same, with the fields' types."""
    fields = {
        name: {
            "type": str(field.annotation),
            "default": None if field.is_required() else repr(field.default),
        }
        for name, field in kind.model_fields.items()
    }
    return {
        "kind": kind.kind,
        "registry": kind.registry,
        "doc": inspect.getdoc(kind),
        "fields": fields,
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return "(no interval)"
    return f"[{low:.3f}, {high:.3f}]"
