"""Heatmap: an effect at every pair of two swept values, such as layer and position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas.api.types import is_numeric_dtype

from mechmem.report.figures.figure import Figure
from mechmem.report.figures.rows import averaged, context, hover, in_order, shown
from mechmem.report.figures.style import UNDEFINED, measured, note, titled
from mechmem.spec.errors import InputError

MOST_NUMBERS = 200
"""Cells up to which the numbers are written."""
WIDE = 9
"""Columns up to which a long word fits into a cell."""
FROM_ZERO = ((0.0, "#f5f8fa"), (0.5, "#7fb2d6"), (1.0, "#08457e"))
AROUND_ZERO = (
    (0.0, "#a84a12"),
    (0.25, "#e3a57a"),
    (0.5, "#f7f7f5"),
    (0.75, "#86b4d6"),
    (1.0, "#0b5c92"),
)
SIGNED = {"recovery", "logit_difference"}
"""Measures drawn around zero, over at least -1 to 1, so that a small effect looks small."""
ALL_GREY: dict[str, Any] = {"colorscale": [[0, UNDEFINED], [1, UNDEFINED]], "showscale": False}


class Heatmap(Figure):
    """The mean over seeds in each cell: where in the model an intervention changes the answer.

    A grey cell is undefined in every seed (a recovery without a difference to recover); an empty
    one has no row.
    Raises InputError if a cell has several rows of one seed, or a row belongs to no cell.
    """

    x: str
    y: str
    value: str = "value"

    @property
    def columns(self) -> tuple[str, ...]:
        return ("seed", self.x, self.y, self.value)

    def _draw(self, rows: pd.DataFrame) -> go.Figure:
        for axis in (self.x, self.y):
            if rows[axis].isna().any():
                raise InputError(
                    f"table {self.table} has rows without a {axis}; leave them out with `where`"
                )
        title, unit = measured(rows, self.value)
        z, texts = self._cells(rows)
        is_signed = not SIGNED.isdisjoint([self.value, *rows.get("measure", [])])
        figure = go.Figure(_defined(z, texts, title, _scale(z, unit, is_signed)))
        figure.add_trace(_undefined(z, texts))
        self._axes(figure, rows)
        note(figure, context(rows, [self.x, self.y], "mean of {} seeds"))
        return figure

    def _cells(self, rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The values and the hover texts, with `y` down and `x` across; both missing where there is
        no row."""
        held = averaged(rows, [self.y, self.x])
        held = held.assign(texts=hover(held))
        for axis in (self.y, self.x):
            held[axis] = pd.Categorical(held[axis], in_order(held[axis])).rename_categories(shown)
        look: dict[str, Any] = {
            "index": self.y,
            "columns": self.x,
            "aggfunc": "first",
            "observed": False,
            "dropna": False,
        }
        return held.pivot_table(values=self.value, **look), held.pivot_table(values="texts", **look)

    def _axes(self, figure: go.Figure, rows: pd.DataFrame) -> None:
        """Layers go up, names are read downwards."""
        upwards = True if is_numeric_dtype(rows[self.y]) else "reversed"
        height = min(max(44 * len(in_order(rows[self.y])), 130), 640)
        figure.update_layout(height=168 + height)
        figure.update_xaxes(title_text=titled(self.x), type="category", showgrid=False, ticks="")
        figure.update_yaxes(
            title_text=titled(self.y), type="category", showgrid=False, ticks="", autorange=upwards
        )


def _grid(z: pd.DataFrame, texts: pd.DataFrame) -> dict[str, Any]:
    cells = {
        "x": list(z.columns),
        "y": list(z.index),
        "z": z.to_numpy().tolist(),
        "xgap": 1,
        "ygap": 1,
    }
    return cells | {
        "hovertext": texts.to_numpy().tolist(),
        "hoverinfo": "text",
        "hoverongaps": False,
    }


def _defined(z: pd.DataFrame, texts: pd.DataFrame, title: str, scale: dict[str, Any]) -> go.Heatmap:
    heading = {"text": title.replace(" (", "<br>("), "side": "right", "font": {"size": 13}}
    bar = {"title": heading, "outlinewidth": 0, "thickness": 14, "tickformat": ".3~g", "nticks": 6}
    numbers = "%{z:.2f}" if z.size <= MOST_NUMBERS else None
    return go.Heatmap(**_grid(z, texts), texttemplate=numbers, colorbar=bar, **scale)


def _undefined(z: pd.DataFrame, texts: pd.DataFrame) -> go.Heatmap:
    is_undefined = texts.notna() & z.isna()
    word, size = ("undefined", 12) if z.shape[1] <= WIDE else ("un-<br>defined", 9)
    words = np.where(is_undefined, word, "").tolist()
    marked = is_undefined.astype(float).where(is_undefined)
    return go.Heatmap(
        **_grid(marked, texts), text=words, texttemplate="%{text}", textfont_size=size, **ALL_GREY
    )


def _scale(z: pd.DataFrame, unit: str, is_signed: bool) -> dict[str, Any]:
    """Around zero for signed values, 0 to 1 for shares, from zero for the rest."""
    most = float(np.nanmax(np.abs(z.to_numpy()), initial=1e-9))
    if is_signed or (z < 0).any(axis=None):
        most = max(most, 1.0) if is_signed else most
        return {"colorscale": AROUND_ZERO, "zmin": -most, "zmax": most}
    return {
        "colorscale": FROM_ZERO,
        "zmin": 0,
        "zmax": 1 if unit in ("fraction", "probability") else most,
    }
