"""Quantities and claims: numbers from the tables with intervals, and verdicts by rules that were
written before the run."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from mechmem.spec.errors import InputError, suggest
from mechmem.spec.registry import Component
from mechmem.statistics.intervals import hierarchical_interval
from mechmem.statistics.select import rows_where

Where = dict[str, str | int | float | bool]
NOT_LABELS = {"seed", "value", "low", "high", "recovery", "n", "per_example"}


@dataclass(frozen=True)
class Measured:
    """A quantity as found: the mean over seeds with its 95 % interval (seeds, then examples).

    A single number of a single seed has no interval: NaN.
    """

    value: float
    low: float
    high: float
    n_seeds: int
    labels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def percent(self) -> str:
        """`62 % [58, 66]`."""
        return self._format(lambda x: f"{round(100 * x)}", " %")

    @property
    def points(self) -> str:
        """A difference of shares: `+12 points [+8, +15]`."""
        return self._format(lambda x: f"{round(100 * x):+d}", " points")

    @property
    def number(self) -> str:
        """`1.77 [1.70, 1.84]`."""
        return self._format(lambda x: f"{x:.3g}", "")

    def _format(self, number: Callable[[float], str], unit: str) -> str:
        if np.isnan(self.value):
            return "undefined"
        ends = "" if np.isnan(self.low) else f" [{number(self.low)}, {number(self.high)}]"
        return f"{number(self.value)}{unit}{ends}"


Sample = tuple[np.ndarray, np.ndarray | None]
"""The values of a seed, and those of other examples whose mean is subtracted from theirs."""


class Quantity(Component):
    """A number from a table: the mean of the rows of `where`, minus (example by example) that of
    the rows of `minus`."""

    table: str
    where: Where = {}
    minus: Where | None = None
    """The keys in which the subtracted rows differ from `where`."""
    value: str = "value"
    """The column to average; of `value`, per-example values are used where the table has them."""
    pick: Literal["largest", "smallest"] | None = None
    """Of several rows per seed (layers, sites ...), take the one with the largest or smallest mean
    over seeds; of equal ones the first. The interval is that of this row alone: the interval of a
    maximum over rows would be wider, and higher."""

    def measure(self, tables: Mapping[str, pd.DataFrame]) -> Measured:
        """The quantity in these tables. Raises InputError for an unknown table or column, and where
        several rows fit and `pick` is not set."""
        if self.table not in tables:
            raise InputError(f"there is no table {self.table!r}; {suggest(self.table, tables)}")
        groups = self._groups(tables[self.table])
        if not groups:
            return Measured(float("nan"), float("nan"), float("nan"), 0)
        if len(groups) > 1 and self.pick is None:
            raise InputError(
                f"{len(groups)} rows per seed fit {self.where}; add a key ({_differing(groups)}) "
                "or `pick:`"
            )
        measured = [_over_seeds(samples, labels) for labels, samples in groups]
        defined = [m for m in measured if not np.isnan(m.value)] or measured
        return (min if self.pick == "smallest" else max)(defined, key=lambda m: m.value)

    def _groups(self, table: pd.DataFrame) -> list[tuple[dict[str, Any], list[Sample]]]:
        chosen = rows_where(table, self.where)
        if chosen.empty:
            return []
        if self.value not in chosen:
            raise InputError(
                f"table {self.table!r} has no column {self.value!r}; "
                f"{suggest(self.value, chosen.columns)}"
            )
        if "per_example" not in chosen or self.value != "value":
            if self.pick:
                raise InputError(
                    f"`pick` needs per-example values, but column {self.value!r} of table "
                    f"{self.table!r} has none; use `where`"
                )
            return [
                (
                    dict(self.where),
                    [self._rows_of(table, seed, rows) for seed, rows in chosen.groupby("seed")],
                )
            ]
        keys = [c for c in chosen.columns if c not in NOT_LABELS]
        groups = []
        for labels, rows in chosen.groupby(keys, sort=False, dropna=False):
            named = dict(zip(keys, labels if isinstance(labels, tuple) else (labels,), strict=True))
            groups.append((named, [self._paired(table, row, named) for _, row in rows.iterrows()]))
        return groups

    def _rows_of(self, table: pd.DataFrame, seed: Any, rows: pd.DataFrame) -> Sample:
        values = rows[self.value].to_numpy(float)
        if self.minus is None:
            return values, None
        other = rows_where(table[table["seed"] == seed], self.where | self.minus)
        if other.empty:
            raise InputError(f"`minus` leaves no row of seed {seed}: {self.where | self.minus}")
        return values, other[self.value].to_numpy(float)

    def _paired(self, table: pd.DataFrame, row: pd.Series, labels: Mapping[str, Any]) -> Sample:
        values = np.asarray(row["per_example"], float)
        if self.minus is None:
            return values, None
        known = {key: value for key, value in labels.items() if not _missing(value)}
        other = rows_where(table[table["seed"] == row["seed"]], known | self.minus)
        if len(other) != 1:
            raise InputError(f"`minus` must leave one row, not {len(other)}: {known | self.minus}")
        subtracted = np.asarray(other["per_example"].iloc[0], float)
        # Paired where both rows are of the same examples, else a difference of means.
        is_paired = len(subtracted) == len(values) and "examples" not in self.minus
        return (values - subtracted, None) if is_paired else (values, subtracted)


def _over_seeds(samples: Sequence[Sample], labels: Mapping[str, Any]) -> Measured:
    values, subtracted = zip(*samples, strict=True)
    return Measured(*hierarchical_interval(values, subtracted), len(samples), labels)


class Condition(Component):
    """What a claim requires: that a quantity's whole interval is on one side of a threshold."""

    quantity: str
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a condition needs one of `at_least` and `at_most`")
        return self

    @property
    def rule(self) -> str:
        if self.at_least is not None:
            return f"{self.quantity} >= {self.at_least:g}"
        return f"{self.quantity} <= {self.at_most:g}"

    def outcome(self, measured: Measured) -> bool | None:
        """True if the whole interval fulfils the condition, False if none of it does, else None.

        A number without an interval (a scalar of a single seed) counts as it is.
        """
        if np.isnan(measured.value):
            return None
        low, high = (
            measured.value if np.isnan(end) else end for end in (measured.low, measured.high)
        )
        threshold = self.at_least
        if self.at_most is not None:
            low, high, threshold = -high, -low, -self.at_most
        return True if low >= (threshold or 0.0) else False if high < (threshold or 0.0) else None


class Claim(Component):
    """A finding that can fail: supported if all conditions hold, refuted if one is contradicted,
    else (or with too few seeds) undetermined."""

    id: str
    says: str
    holds_when: tuple[Condition, ...] = Field(min_length=1)
    min_seeds: int = Field(3, ge=2)
    """With fewer seeds the verdict is `undetermined`, whatever the numbers are."""

    def verdict(self, measured: Mapping[str, Measured]) -> dict[str, Any]:
        """id, says, verdict, reason, rule, effect and its interval (of the first condition)."""
        outcomes = [
            condition.outcome(measured[condition.quantity]) for condition in self.holds_when
        ]
        first = measured[self.holds_when[0].quantity]
        n_seeds = min(measured[condition.quantity].n_seeds for condition in self.holds_when)
        verdict, reason = self._judged(outcomes, n_seeds)
        return {
            "id": self.id,
            "says": self.says,
            "verdict": verdict,
            "reason": reason,
            "rule": " and ".join(condition.rule for condition in self.holds_when),
            "effect": first.value,
            "interval": [first.low, first.high],
            "conditions": [
                {"rule": c.rule, "met": o, "found": measured[c.quantity].number}
                for c, o in zip(self.holds_when, outcomes, strict=True)
            ],
        }

    def _judged(self, outcomes: Sequence[bool | None], n_seeds: int) -> tuple[str, str]:
        """The verdict and its reason."""
        by_rule = [(c.rule, o) for c, o in zip(self.holds_when, outcomes, strict=True)]
        failed = [rule for rule, outcome in by_rule if outcome is False]
        unclear = [rule for rule, outcome in by_rule if outcome is None]
        if failed:
            verdict, found = "refuted", f"contradicted: {'; '.join(failed)}"
        elif unclear:
            verdict, found = "undetermined", f"unclear: {'; '.join(unclear)}"
        else:
            verdict, found = "supported", "all hold"
        if n_seeds < self.min_seeds:
            needed = f"{n_seeds} of the {self.min_seeds} seeds that a verdict needs"
            return "undetermined", f"{needed}; so far {found}"
        return verdict, f"over {n_seeds} seeds: {found}"


class _Sentence(string.Formatter):
    """str.format on measured quantities, without a way to anything private."""

    def get_field(
        self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, str]:
        name, _, attribute = field_name.partition(".")
        if isinstance(kwargs.get(name), str) and attribute == "verdict":
            return kwargs[name], name
        if not isinstance(kwargs.get(name), Measured):
            raise InputError(
                f"the answer template refers to unknown quantity {name!r}; {suggest(name, kwargs)}"
            )
        measured: Measured = kwargs[name]
        if attribute in ("value", "low", "high", "n_seeds", "percent", "points", "number"):
            return getattr(measured, attribute), name
        if attribute in measured.labels or np.isnan(measured.value):
            return measured.labels.get(attribute, "undefined"), name
        known = ["percent", "number", *measured.labels]
        raise InputError(f"{name} has no {attribute!r}; {suggest(attribute, known)}")


def template_fields(template: str) -> list[str]:
    """The names in a template's braces. Raises InputError if it is not a valid template."""
    try:
        return [
            field.partition(".")[0]
            for _, field, _, _ in string.Formatter().parse(template)
            if field is not None
        ]
    except ValueError as error:
        raise InputError(f"the answer {template!r} cannot be filled in: {error}") from error


def render_answer(
    template: str, measured: Mapping[str, Measured], verdicts: Mapping[str, str] | None = None
) -> str:
    """The sentence that answers the question. Raises InputError for an unknown name.

    Args:
        template: such as `{returned.percent} of the true answers return; C7 is {C7.verdict}`.
        measured: quantities by name.
        verdicts: of claims, by their id.
    """
    try:
        return " ".join(_Sentence().vformat(template, (), {**(verdicts or {}), **measured}).split())
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"the answer {template!r} cannot be filled in: {error}") from error


def _differing(groups: Sequence[tuple[Mapping[str, Any], Any]]) -> str:
    keys = [key for key in groups[0][0] if len({str(labels[key]) for labels, _ in groups}) > 1]
    return ", ".join(keys)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))
