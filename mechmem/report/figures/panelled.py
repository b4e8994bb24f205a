"""Panelled: the base of bars and curves: conditions by colour, one panel per swept value."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechmem.report.figures.figure import Figure
from mechmem.report.figures.rows import averaged, context, in_order, shown
from mechmem.report.figures.style import SOFT, colours, named, note, value_axis

WIDEST = 3
"""Panels side by side before a new row is begun."""


class Panelled(Figure):
    """An effect and its controls, with 95 % intervals: values and ends of intervals are means over
    seeds.

    A row without `x` (such as the baseline) holds for its whole panel and is a dashed line; a row
    without a facet holds for every panel.
    """

    interval: ClassVar[str]
    """How the interval is drawn."""

    x: str
    value: str = "value"
    colour: str = "condition"
    facet: str | None = None
    facet_row: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return ("seed", self.x, self.value, self.colour, *self._facets)

    @property
    def _facets(self) -> tuple[str, ...]:
        return tuple(facet for facet in (self.facet_row, self.facet) if facet is not None)

    @abstractmethod
    def _series(self, rows: pd.DataFrame, colour: str) -> list[Any]:
        """The traces of one condition in one panel."""

    @abstractmethod
    def _x_axis(self, rows: pd.DataFrame, n_columns: int) -> dict[str, Any]:
        """The x axis, the same in all panels, of which `n_columns` share the width."""

    def _draw(self, rows: pd.DataFrame) -> go.Figure:
        keys = [self.x, self.colour, *self._facets]
        held = averaged(rows, keys)
        panels, palette = _panels(held, self._facets), colours(held[self.colour])
        n_columns = (
            held[self.facet].nunique()
            if self.facet and self.facet_row
            else min(len(panels), WIDEST)
        )
        figure = _empty(
            list(panels), n_columns, self._x_axis(held, n_columns), value_axis(rows, self.value)
        )
        for i, part in enumerate(panels.values()):
            for name in in_order(held[self.colour]):
                place = {"row": i // n_columns + 1, "col": i % n_columns + 1}
                self._add(figure, part[part[self.colour] == name], palette[name], place)
        _legend_once(figure)
        interval = f" · {self.interval}: 95 % interval" if self._has_interval(rows) else ""
        note(figure, context(rows, keys, "mean of {} seeds") + interval)
        return figure

    def _add(
        self, figure: go.Figure, rows: pd.DataFrame, colour: str, place: dict[str, int]
    ) -> None:
        along = rows[rows[self.x].notna()]
        for trace in self._series(along, colour) if len(along) else []:
            figure.add_trace(trace, **place)
        for row in rows[rows[self.x].isna() & rows[self.value].notna()].to_dict("records"):
            _level(figure, row[self.value], self._legend(row[self.colour]), colour, place)

    def _legend(self, value: Any) -> dict[str, Any]:
        return {"name": named(value, self.colour), "legendgroup": shown(value)}

    def _has_interval(self, rows: pd.DataFrame) -> bool:
        """`low` and `high` are those of `value`; a recovery has none."""
        return self.value == "value" and {"low", "high"} <= set(rows.columns)


def _panels(rows: pd.DataFrame, facets: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """The rows of each panel by its title."""
    panels = {"": rows}
    for facet in facets:
        panels = {
            ", ".join(filter(None, (title, named(value, facet)))): part[
                part[facet].isna() | (part[facet] == value)
            ]
            for title, part in panels.items()
            for value in in_order(rows[facet]) or [None]
        }
    return panels


def _empty(
    titles: list[str], n_columns: int, x_axis: dict[str, Any], y_axis: dict[str, Any]
) -> go.Figure:
    """Panels with titles; only the lowest panels have an x title, only the leftmost a y title."""
    n_rows = -(-len(titles) // n_columns)
    height = 300 * n_rows + 120
    spacing = {
        "vertical_spacing": 100 / (height - 160) if n_rows > 1 else 0.0,
        "horizontal_spacing": 0.04,
    }
    figure = make_subplots(n_rows, n_columns, subplot_titles=titles, shared_yaxes="all", **spacing)
    figure.update_annotations(font={"size": 13})
    figure.update_layout(height=height)
    figure.update_xaxes(**(x_axis | {"title_text": None}))
    figure.update_yaxes(**(y_axis | {"title_text": None}))
    for i in range(len(titles)):
        place = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        figure.update_xaxes(
            title_text=x_axis["title_text"] if i + n_columns >= len(titles) else None, **place
        )
        figure.update_yaxes(
            **({"title_text": y_axis["title_text"]} if i % n_columns == 0 else {"ticks": ""}),
            **place,
        )
    return figure


def _level(
    figure: go.Figure, value: float, legend: dict[str, Any], colour: str, place: dict[str, int]
) -> None:
    """A dashed line over a whole panel, with its value at the right end."""
    end = {"text": shown(value), "font": {"size": 11, "color": SOFT}}
    line = {"color": colour, "width": 1.5, "dash": "dash"}
    figure.add_hline(
        y=value, line=line, annotation=end, annotation_position="top right", **legend, **place
    )


def _legend_once(figure: go.Figure) -> None:
    """One legend entry for each condition, however many panels it is in."""
    seen: set[str] = set()
    for item in (*figure.data, *figure.layout.shapes):
        if item.showlegend is not False:
            item.showlegend = item.legendgroup not in seen
            seen.add(item.legendgroup)
