"""Answers: from an experiment's tables to its quantities, its claims and the answer's sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mechmem.experiment.measured import Measured, pooled_spreads
from mechmem.experiment.quantities import Replication, Tables
from mechmem.experiment.sentence import render_answer
from mechmem.experiment.spec import Experiment
from mechmem.spec.errors import BlockError, InputError

if TYPE_CHECKING:
    import pandas as pd

Missing = Mapping[str, Mapping[int, str]]
"""By the name of a table, why some seeds have no rows in it."""
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Answer:
    """What an experiment's tables say about its question."""

    quantities: Mapping[str, Measured]
    claims: Sequence[dict[str, Any]]
    """The verdict of every claim, with all that it rests on."""
    text: str
    """The answer's sentence; empty where the spec has none."""
    spreads: Mapping[str, float] = field(default_factory=dict)
    """By measure, the least standard deviation between seeds that was assumed."""


def answer_from(
    tables: Mapping[str, pd.DataFrame],
    experiment: Experiment,
    s0: Mapping[str, float] | None = None,
    missing: Missing = NOTHING,
    per: Replication = "seed",
) -> Answer:
    """The answer that these tables give.

    Args:
        tables: by name, of all seeds.
        experiment: whose quantities and claims are read.
        s0: by measure, the spread between seeds that is pooled over a study
            (`measured.pooled_spreads`); by default, pooled over this experiment's quantities.
        missing: by the name of a table, the seeds without rows and the reason.
        per: `instance` judges the models at hand, however few, and no other trainings.

    Raises:
        BlockError: a quantity cannot be read from the tables.
    """
    measured = measure(tables, experiment, NOTHING, missing, per)
    spreads = pooled_spreads(measured.values()) if s0 is None else s0
    if spreads:
        measured = measure(tables, experiment, spreads, missing, per)
    claims = [claim.verdict(measured, per) for claim in experiment.claims]
    verdicts = {claim["id"]: claim["verdict"] for claim in claims}
    text = render_answer(experiment.answer, measured, verdicts)
    return Answer(measured, claims, text, dict(spreads))


def measure(
    tables: Mapping[str, pd.DataFrame],
    experiment: Experiment,
    s0: Mapping[str, float] = NOTHING,
    missing: Missing = NOTHING,
    per: Replication = "seed",
) -> dict[str, Measured]:
    """The quantities of an experiment by name; the arguments are those of `answer_from`."""
    source = Tables(tables, experiment.quantities, missing)
    measured = {}
    for name, quantity in experiment.quantities.items():
        try:
            measured[name] = quantity.measure(source, s0, per)
        except InputError as error:
            raise BlockError(("quantities", name), str(error)) from error
    return measured


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
        # One without rows, of a seed that never reached a phase, has no columns to agree with.
        filled = [part for part in parts if len(part)] or parts
        joined[name] = pd.concat(filled, ignore_index=True)
        parts.clear()
    return joined
