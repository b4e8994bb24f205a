"""Which rows of a table have which values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechmem.spec.errors import InputError, suggest, suggest_value


def rows_where(table: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    """The rows with these values. Raises InputError for an unknown column, or a value that no row
    has.

    Only the `label` of a phase may be absent: a phase can never come.
    """
    for column, value in where.items():
        if column not in table:
            hint = "a field of an analysis is a column of its table where it is swept with `each:`"
            raise InputError(
                f"the table has no column {column!r}; {suggest(column, table.columns)} ({hint})"
            )
        is_word = not pd.api.types.is_numeric_dtype(table[column])
        chosen = table[
            table[column] == (str(value) if is_word and not isinstance(value, bool) else value)
        ]
        if chosen.empty and column != "label" and not table.empty:
            known = [str(v) for v in table[column].unique()]
            raise InputError(f"no row has {column} {value!r}; {suggest_value(value, known)}")
        table = chosen
    return table
