"""Bars: an effect by layer, place or component, with its controls."""

from __future__ import annotations

from typing import Any, ClassVar

import pandas as pd
import plotly.graph_objects as go

from mechmem.report.figures.panelled import Panelled
from mechmem.report.figures.rows import hover, in_order, shown
from mechmem.report.figures.style import titled


class Bars(Panelled):
    """Groups of bars: how much an intervention changes the answer, against the matched control at
    the same place."""

    interval: ClassVar[str] = "whiskers"

    def _series(self, rows: pd.DataFrame, colour: str) -> list[go.Bar]:
        whiskers = self._whiskers(rows) if self._has_interval(rows) else None
        return [
            go.Bar(
                x=[shown(value) for value in rows[self.x]],
                y=rows[self.value].tolist(),
                error_y=whiskers,
                # the line makes a bar of height 0 visible
                marker={"color": colour, "line": {"color": colour, "width": 2}},
                cliponaxis=False,
                hovertext=hover(rows),
                hoverinfo="text",
                offsetgroup=shown(rows[self.colour].iloc[0]),
                **self._legend(rows[self.colour].iloc[0]),
            )
        ]

    def _whiskers(self, rows: pd.DataFrame) -> dict[str, Any]:
        up, down = (
            (rows["high"] - rows["value"]).clip(lower=0),
            (rows["value"] - rows["low"]).clip(lower=0),
        )
        look = {"thickness": 1.6, "width": 0, "color": "#14171a"}
        return {
            "type": "data",
            "symmetric": False,
            "array": up.tolist(),
            "arrayminus": down.tolist(),
            **look,
        }

    def _x_axis(self, rows: pd.DataFrame, n_columns: int) -> dict[str, Any]:
        order = [shown(value) for value in in_order(rows[self.x])]
        return {
            "title_text": titled(self.x),
            "type": "category",
            "categoryorder": "array",
            "categoryarray": order,
        }
