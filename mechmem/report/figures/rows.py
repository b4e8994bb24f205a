"""The rows of a tidy table: their order, their means over seeds, and their values as text."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_float_dtype, is_numeric_dtype

from mechmem.spec.errors import InputError

RESULTS = ("value", "low", "high", "recovery", "n")
"""The columns of an effect table that are results; the others are labels."""


def in_order(values: pd.Series) -> list[Any]:
    """The distinct values: numbers by size, names by first appearance (so positions stay in reading
    order)."""
    there = list(dict.fromkeys(values.dropna().tolist()))
    return sorted(there) if is_numeric_dtype(values) else there


def shown(value: Any) -> str:
    """A value as text: three digits, and an en dash if it is missing."""
    if not isinstance(value, float):
        return "–" if value is None or value is pd.NA else str(value)
    if value != value:
        return "–"
    return str(int(value)) if value.is_integer() else f"{value:.3g}"


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table without its values per example; results are plain floats, other lists are text."""
    table = table.drop(columns="per_example", errors="ignore")
    lists = [
        c
        for c in table
        if table[c].dtype == object and table[c].map(lambda v: np.ndim(v) > 0).any()
    ]
    numbers = {
        c: pd.to_numeric(table[c]).to_numpy(float, na_value=np.nan) for c in RESULTS if c in table
    }
    return table.assign(**{c: table[c].map(_as_text) for c in lists}, **numbers)


def averaged(rows: pd.DataFrame, keys: Sequence[str | None]) -> pd.DataFrame:
    """One row per combination of `keys`: numbers are means over the seeds that have one, names are
    listed.

    Seeds are the unit of replication; `low` and `high` become the mean of the seeds' own intervals.
    Raises InputError if a seed has several rows for one combination: their mean would hide a
    difference.
    """
    by = [key for key in dict.fromkeys(keys) if key is not None]
    one_row_per_seed(rows, by)
    means = {c for c in rows if c in RESULTS or is_float_dtype(rows[c])}
    method = {c: "mean" if c in means else _listed for c in rows if c not in by}
    return rows.groupby(by, sort=False, dropna=False).agg(method).reset_index()


def one_row_per_seed(rows: pd.DataFrame, by: list[str]) -> None:
    """Check that a seed has one row per combination of `by`.

    Raises InputError with the columns in which several rows differ.
    """
    key = [*by, *(["seed"] if "seed" not in by else [])]
    alike = rows[rows.duplicated(key, keep=False)]
    if alike.empty:
        return
    _, first = next(iter(alike.groupby(key, sort=False, dropna=False)))
    differ = {
        c: in_order(first[c])
        for c in first
        if c not in RESULTS and len(set(map(shown, first[c]))) > 1
    }
    listed = "; ".join(f"{c} ({', '.join(map(shown, values))})" for c, values in differ.items())
    at = ", ".join(f"{c} {shown(first[c].iloc[0])}" for c in key)
    raise InputError(
        f"{len(first)} rows for {at}: they differ in {listed or 'nothing'}; choose one with `where`"
    )


def context(rows: pd.DataFrame, keys: Sequence[str | None], seeds: str) -> str:
    """Text: the labels that all rows share (examples, prefix, place ...) and the number of seeds.

    Args:
        rows: the rows that are drawn.
        keys: columns that the figure shows already.
        seeds: text about several seeds, with `{}` for their number.
    """
    names = [c for c in rows if c not in (*keys, *RESULTS, "seed", "measure", "unit")]
    shared = [
        f"{name} {shown(in_order(rows[name])[0])}"
        for name in names
        if len(in_order(rows[name])) == 1
    ]
    there = in_order(rows["seed"])
    return " · ".join(
        [*shared, seeds.format(len(there)) if len(there) > 1 else f"seed {shown(there[0])} only"]
    )


def hover(rows: pd.DataFrame) -> list[str]:
    """The hover text of each row: every column with its value."""
    return [
        "<br>".join(f"{c}: {shown(v)}" for c, v in row.items()) for row in rows.to_dict("records")
    ]


def _as_text(value: Any) -> Any:
    return ", ".join(map(shown, value)) if np.ndim(value) > 0 else value


def _listed(values: pd.Series) -> Hashable:
    there = in_order(values)
    return there[0] if len(there) == 1 else ", ".join(map(shown, there))
