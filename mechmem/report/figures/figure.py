"""Figure: the base of all figures: chosen rows of a saved table, drawn."""

from __future__ import annotations

from abc import abstractmethod

import pandas as pd
import plotly.graph_objects as go
from pydantic import Field

from mechmem.report.figures.rows import in_order, readable, shown
from mechmem.report.figures.style import finish
from mechmem.spec.errors import InputError, suggest, suggest_value
from mechmem.spec.registry import Component

Value = bool | int | float | str


class Figure(Component, registry="figure"):
    """A figure of one table; drawing it again recomputes nothing."""

    table: str
    """Name of the table that it draws."""
    where: dict[str, Value | tuple[Value, ...]] = Field(default_factory=dict)
    """Which rows: a column, and the value or values that it must have."""
    title: str = ""
    caption: str = ""
    """How to read the figure, and what follows from it."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns that the table must have, in addition to those of `where`."""

    @abstractmethod
    def _draw(self, rows: pd.DataFrame) -> go.Figure:
        """Draw the chosen rows."""

    def draw(self, table: pd.DataFrame) -> go.Figure:
        """The figure of the rows that `where` chooses; the same table gives the same bytes.

        Raises InputError for an unknown column, a value that no row has, or rows that do not fit
        in one figure.
        """
        return finish(self._draw(self.rows(table)), self.title)

    def rows(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows that `where` chooses, without the values per example."""
        rows = readable(table)
        for column in (*self.columns, *self.where):
            if column not in rows:
                raise InputError(
                    f"table {self.table} has no column {column!r}; {suggest(column, rows.columns)}"
                )
        if rows.empty:
            raise InputError(f"table {self.table} has no rows")
        for column, wanted in self.where.items():
            rows = self._chosen(rows, column, wanted if isinstance(wanted, tuple) else (wanted,))
        return rows

    def _chosen(self, rows: pd.DataFrame, column: str, wanted: tuple[Value, ...]) -> pd.DataFrame:
        there = in_order(rows[column])
        for value in wanted:
            if value not in there:
                raise InputError(
                    f"table {self.table}, where {self.where}: no row is left with "
                    f"{column} {value!r}; {suggest_value(value, map(shown, there))}"
                )
        return rows[rows[column].isin(list(wanted))]
