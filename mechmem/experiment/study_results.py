"""The records of a study's claims, from which its pages are rendered, and their interpretations.

A record is plain JSON with rounded numbers. An interpretation is kept as its template, so that the
numbers in the text are always those of the table.
"""

from __future__ import annotations

import math
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mechmem.experiment.measured import Measured
from mechmem.experiment.results import Run
from mechmem.experiment.sentence import render_answer
from mechmem.experiment.spec import Experiment
from mechmem.spec.errors import InputError

NUMBERS = ("effect", "attainable", "control")
"""Placeholders with `.percent`, `.points`, `.number`, `.value`, `.low` and `.high`, as those of
quantities have them."""
WORDS = ("verdict", "reason", "rule", "claim", "task", "seeds", "interval", *NUMBERS)
"""Placeholders that are used alone."""


INFINITE = {math.inf: "∞", -math.inf: "−∞"}


def claim_records(
    name: str,
    experiment: Experiment,
    finished: Run,
    interpretations: Mapping[str, str],
    pooled: Collection[str] = (),
) -> list[dict[str, Any]]:
    """One record per claim of a finished run.

    Args:
        name: of the spec.
        experiment: of the run.
        finished: the run.
        interpretations: paragraphs with placeholders, by the id of a claim.
        pooled: measures whose spread between seeds is pooled over the study.
    """
    quantities = {key: _quantity(found) for key, found in finished.record["quantities"].items()}
    shared = {"task": task_names(experiment), "seeds": list(experiment.seeds)}
    return [
        {"spec": name, "claim": claim["id"]}
        | shared
        | {key: claim.get(key, "") for key in ("says", "verdict", "reason", "rule", "timing")}
        | {"effect": _effect(claim)}
        | {key: looked_up(claim.get(key), quantities) for key in ("attainable", "control")}
        | {key: rounded(claim.get(key) or []) for key in ("conditions", "requires")}
        | {"unpooled": _unpooled(claim["id"], experiment, finished, pooled)}
        | {"quantities": quantities, "interpretation": interpretations.get(claim["id"], "")}
        for claim in finished.claims
    ]


def _unpooled(
    claim_id: str, experiment: Experiment, finished: Run, pooled: Collection[str]
) -> list[str]:
    """The judged quantities whose spread is known from their own few seeds alone.

    Args:
        claim_id: of the claim.
        experiment: of the run.
        finished: the run.
        pooled: measures whose spread between seeds is pooled over the study.
    """
    claim = next(claim for claim in experiment.claims if claim.id == claim_id)
    judged = dict.fromkeys(condition.quantity for condition in claim.holds_when)
    found = finished.record["quantities"]
    return [
        name
        for name in judged
        if found[name]["n_seeds"] > 1 and found[name]["measure"] not in pooled
    ]


def task_names(experiment: Experiment) -> str:
    """The initials of the tasks' kinds, as the field abbreviates them: FDA is four-digit addition.

    Several trainings of an experiment may have different tasks.
    """
    kinds = [recipe.task.kind for recipe in (experiment.training, *experiment.also)]
    initials = ["".join(word[0] for word in kind.split("_")).upper() for kind in kinds]
    return ", ".join(dict.fromkeys(initials))


def _effect(claim: Mapping[str, Any]) -> dict[str, Any]:
    low, high = claim.get("interval") or (None, None)
    return rounded({"value": claim.get("effect"), "low": low, "high": high})


def _quantity(found: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: found.get(key) for key in ("value", "low", "high", "n_seeds")}
    return rounded(kept | {"labels": found.get("labels", {})})


def looked_up(found: Any, quantities: Mapping[str, Any]) -> dict[str, Any] | None:
    """Value, low and high of a number that is shown next to an effect.

    Args:
        found: what the claim gives: the name of a quantity, a number, a mapping with `value` and
            `interval`, or None.
        quantities: the quantities of the run, by name.
    """
    if isinstance(found, str):
        return {key: quantities[found][key] for key in ("value", "low", "high")}
    if isinstance(found, (int, float)):
        found = {"value": found}
    if found is None:
        return None
    low, high = found.get("interval") or (None, None)
    return rounded({"value": found["value"], "low": low, "high": high})


def rounded(value: Any) -> Any:
    """The value with four significant digits, null for what is undefined, and a sign for what has
    no end: JSON has neither.

    >>> rounded({"value": 0.123456, "low": float("nan"), "n": 3})
    {'value': 0.1235, 'low': None, 'n': 3}
    """
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        if math.isinf(value):
            return INFINITE[value]
        return None if math.isnan(value) else float(f"{value:.4g}")
    return value


def page(results: Mapping[str, Any]) -> str:
    """The Markdown page of a study's records."""
    from mechmem.report.study_pages import results_page

    return results_page(with_texts(results))


def with_texts(results: Mapping[str, Any]) -> dict[str, Any]:
    """The records, each with its interpretation as `text`: the numbers are put in."""
    claims = [claim | {"text": interpreted(claim)} for claim in results["claims"]]
    return {**results, "claims": claims}


def interpreted(claim: Mapping[str, Any]) -> str:
    """The interpretation of a record. Raises InputError for an unknown placeholder."""
    from mechmem.report.report import number

    measured = {
        name: _measured(found)
        for name, found in [*claim["quantities"].items(), *((n, claim[n]) for n in NUMBERS)]
    }
    words = {name: str(claim[name]) for name in ("verdict", "reason", "rule", "claim", "task")}
    words["seeds"] = str(len(claim["seeds"]))
    for name in NUMBERS:
        words[name] = number((claim[name] or {}).get("value"))
    low, high = (number(claim["effect"][end]) for end in ("low", "high"))
    words["interval"] = f"{low} to {high}"
    text = _Paragraph(words, measured).vformat(claim["interpretation"], (), {})
    return " ".join(text.split())


def _measured(found: Mapping[str, Any] | None) -> Measured:
    found = found or {}
    value, low, high = (_float(found.get(key)) for key in ("value", "low", "high"))
    n_seeds, labels = found.get("n_seeds", 0), found.get("labels", {})
    return Measured(value=value, low=low, high=high, n_seeds=n_seeds, labels=labels)


def _float(value: float | str | None) -> float:
    """A number of a record as it was before it was rounded to JSON."""
    ends = {sign: number for number, sign in INFINITE.items()}
    return math.nan if value is None else ends[value] if isinstance(value, str) else value


class _Paragraph(string.Formatter):
    """Placeholders of one word from `words`; those with a dot as in the answer of an experiment."""

    def __init__(self, words: Mapping[str, str], measured: Mapping[str, Measured]) -> None:
        self.words, self.measured = words, measured

    def get_field(
        self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, str]:
        if field_name in self.words:
            return self.words[field_name], field_name
        return render_answer(f"{{{field_name}}}", self.measured), field_name


def placeholders(text: str) -> Iterator[tuple[str, str]]:
    """(name, attribute) of each placeholder. Raises InputError if the text is not a template."""
    try:
        for _, name, _, _ in string.Formatter().parse(text):
            if name is not None:
                first, _, attribute = name.partition(".")
                yield first, attribute
    except ValueError as error:
        raise InputError(f"the interpretation {text!r} cannot be filled in: {error}") from error
