"""Answers: from an experiment's tables to its quantities, its claims and the answer's sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mechmem.experiment.claims import Measured, render_answer
from mechmem.experiment.spec import Experiment
from mechmem.spec.errors import BlockError, InputError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Answer:
    """What an experiment's tables say about its question."""

    quantities: Mapping[str, Measured]
    claims: Sequence[Mapping[str, Any]]
    """id, says, verdict, reason, rule, effect and interval of every claim."""
    text: str
    """The answer's sentence; empty where the spec has none."""


def answer_from(tables: Mapping[str, pd.DataFrame], experiment: Experiment) -> Answer:
    """The answer that these tables give. Raises BlockError for a quantity that they do not hold."""
    measured = {}
    for name, quantity in experiment.quantities.items():
        try:
            measured[name] = quantity.measure(tables)
        except InputError as error:
            raise BlockError(("quantities", name), str(error)) from error
    claims = [claim.verdict(measured) for claim in experiment.claims]
    verdicts = {claim["id"]: claim["verdict"] for claim in claims}
    return Answer(measured, claims, render_answer(experiment.answer, measured, verdicts))


def labelled(table: pd.DataFrame, labels: Mapping[str, Any]) -> pd.DataFrame:
    """The table with these values as its first columns; the table itself is changed."""
    for i, (column, value) in enumerate(labels.items()):
        table.insert(i, column, value)
    return table


def one_below_the_other(tables: Mapping[str, list[pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    """By name, the tables of all trainings as one; the lists are emptied, so that a large table is
    not held twice."""
    import pandas as pd

    joined = {}
    for name, parts in tables.items():
        joined[name] = pd.concat(parts, ignore_index=True)
        parts.clear()
    return joined
