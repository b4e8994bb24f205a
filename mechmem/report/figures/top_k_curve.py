"""TopKCurve: an effect by the number of components changed, in ranked and in random order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mechmem.report.figures.panelled import Panelled
from mechmem.report.figures.rows import hover, in_order, shown
from mechmem.report.figures.style import titled

NARROWEST = 0.035
"""Smallest distance of two tick labels, as a share of the figure's width."""


class TopKCurve(Panelled):
    """Lines with bands: if a few ranked neurons do more than many random ones, the memory is in
    them.

    The scale `log` places k at log(1 + k), so that it includes k = 0.
    """

    interval: ClassVar[str] = "bands"

    x: str = "k"
    scale: Literal["log", "linear"] = "log"

    def _series(self, rows: pd.DataFrame, colour: str) -> list[go.Scatter]:
        rows = rows.sort_values(self.x)
        at = self._placed(rows[self.x].tolist())
        legend = self._legend(rows[self.colour].iloc[0])
        line = go.Scatter(
            x=at,
            y=rows[self.value].tolist(),
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 6},
            hovertext=hover(rows),
            hoverinfo="text",
            **legend,
        )
        return [*(self._band(rows, at, colour, legend) if self._has_interval(rows) else []), line]

    def _band(
        self, rows: pd.DataFrame, at: list[float], colour: str, legend: dict[str, Any]
    ) -> list[go.Scatter]:
        edge: dict[str, Any] = {
            "x": at,
            "mode": "lines",
            "line": {"width": 0, "color": colour},
            "hoverinfo": "skip",
        }
        edge |= {"showlegend": False, "legendgroup": legend["legendgroup"]}
        fill = {"fill": "tonexty", "fillcolor": _faint(colour)}
        return [
            go.Scatter(y=rows["low"].tolist(), **edge),
            go.Scatter(y=rows["high"].tolist(), **fill, **edge),
        ]

    def _placed(self, ks: Sequence[float]) -> list[float]:
        return (np.log1p(ks) if self.scale == "log" else np.asarray(ks, dtype=float)).tolist()

    def _x_axis(self, rows: pd.DataFrame, n_columns: int) -> dict[str, Any]:
        title = titled(self.x) + (" (log scale)" if self.scale == "log" else "")
        ks = in_order(rows[self.x])
        at = self._placed(ks)
        kept = _apart(at, NARROWEST * n_columns)
        texts = [shown(ks[i]) for i in kept]
        ticks = {
            "tickmode": "array",
            "tickvals": [at[i] for i in kept],
            "ticktext": texts,
            "tickangle": 0,
        }
        return ticks | {"title_text": title}


def _apart(at: list[float], least: float) -> list[int]:
    """Which of the places are far enough from the one before to be labelled; `least` is a share of
    their range."""
    kept: list[int] = []
    for i, place in enumerate(at):
        if not kept or place - at[kept[-1]] >= least * (at[-1] - at[0]):
            kept.append(i)
    return kept


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.18)"
