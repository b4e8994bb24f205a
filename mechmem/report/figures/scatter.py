"""Scatter: two numbers for each neuron or component."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mechmem.report.figures.figure import Figure
from mechmem.report.figures.rows import context, hover, in_order
from mechmem.report.figures.style import SOFT, colours, named, note, titled, unit_of

MOST_IN_SVG = 4000
"""Points up to which the drawing is a vector graphic."""


class Scatter(Figure):
    """One point for each row: neurons above the diagonal are shifted more on one set of instances
    than on the other.

    Every seed has its own neurons, so nothing is averaged; the hover text has the seed.
    """

    x: str
    y: str
    colour: str = "layer"
    diagonal: bool = True
    """Draw the line on which both are equal."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("seed", self.x, self.y, self.colour)

    def _draw(self, rows: pd.DataFrame) -> go.Figure:
        palette = colours(rows[self.colour])
        points = go.Scattergl if len(rows) > MOST_IN_SVG else go.Scatter
        figure = go.Figure()
        for value in in_order(rows[self.colour]):
            figure.add_trace(
                points(**self._points(rows[rows[self.colour] == value], value, palette[value]))
            )
        if self.diagonal:
            figure.add_trace(self._equal(rows))
        figure.update_layout(height=520)
        figure.update_xaxes(title_text=titled(self.x, unit_of(rows, self.x)))
        figure.update_yaxes(title_text=titled(self.y, unit_of(rows, self.y)))
        note(
            figure,
            context(rows, [self.x, self.y, self.colour], "{} seeds, each with its own neurons"),
        )
        return figure

    def _points(self, rows: pd.DataFrame, value: Any, colour: str) -> dict[str, Any]:
        return {
            "x": rows[self.x].tolist(),
            "y": rows[self.y].tolist(),
            "mode": "markers",
            "marker": {"color": colour, "size": 6, "opacity": 0.6, "line": {"width": 0}},
            "name": named(value, self.colour),
            "hovertext": hover(rows),
            "hoverinfo": "text",
        }

    def _equal(self, rows: pd.DataFrame) -> go.Scatter:
        both = pd.concat([rows[self.x], rows[self.y]])
        ends = [float(both.min()), float(both.max())]
        line = {"color": SOFT, "width": 1, "dash": "dash"}
        return go.Scatter(
            x=ends, y=ends, mode="lines", line=line, name="equal on both", hoverinfo="skip"
        )
