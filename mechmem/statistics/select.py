"""Select the rows of a table by the values of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechmem.spec.errors import InputError, suggest, suggest_value

MAY_BE_ABSENT = "label"
"""The column of the phases: a phase may never be reached, and then no row has it."""


def rows_where(table: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    """The rows whose columns have these values.

    In a column of text a number is matched by its text, so that `layer: 0` matches where layers
    are lists such as `0+1`. Only the `label` of a phase may be absent.

    Raises:
        InputError: a column is unknown, or no row has a value.
    """
    for column, value in where.items():
        table = _with_value(table, column, value)
    return table


def _with_value(table: pd.DataFrame, column: str, value: Any) -> pd.DataFrame:
    if column not in table:
        raise InputError(
            f"the table has no column {column!r}; {suggest(column, table.columns)} "
            "(a field of an analysis is a column of its table if it is swept with `each:`)"
        )
    is_text = not pd.api.types.is_numeric_dtype(table[column])
    chosen = table[
        table[column] == (str(value) if is_text and not isinstance(value, bool) else value)
    ]
    if chosen.empty and column != MAY_BE_ABSENT and not table.empty:
        known = [str(v) for v in table[column].unique()]
        raise InputError(f"no row has {column} {value!r}; {suggest_value(value, known)}")
    return chosen
