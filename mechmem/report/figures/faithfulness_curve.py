"""FaithfulnessCurve: how much of the metric a circuit keeps, by its share of the edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mechmem.report.figures.rows import in_order, shown
from mechmem.report.figures.style import SOFT, named
from mechmem.report.figures.top_k_curve import TopKCurve


class FaithfulnessCurve(TopKCurve):
    """Faithfulness of circuits and of random ones: a curve that is high far to the left is a small
    circuit.

    Draws the rows of measure `faithfulness`, by the share of the edges (or `x: n_edges`) on a log
    scale that includes 0. If there is one panel and the table has the areas CPR and CMD, they are
    in the legend.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        return (*super().columns, "measure")

    def _draw(self, rows: pd.DataFrame) -> go.Figure:
        figure = super()._draw(self._chosen(rows, "measure", ("faithfulness",)))
        ends: dict[str, Any] = {
            "line": {"color": SOFT, "width": 1, "dash": "dot"},
            "layer": "below",
        }
        for level in (0, 1):
            figure.add_hline(y=level, showlegend=False, **ends)
        if not self._facets:
            self._add_areas(figure, rows[rows["measure"].isin(["cpr", "cmd"])])
        return figure

    def _add_areas(self, figure: go.Figure, rows: pd.DataFrame) -> None:
        """`circuit (CPR 0.86, CMD 0.14)`, the mean over seeds."""
        for name in in_order(rows[self.colour]):
            means = (
                rows[rows[self.colour] == name].groupby("measure", sort=False)[self.value].mean()
            )
            areas = ", ".join(
                f"{measure.upper()} {shown(round(float(mean), 2))}"
                for measure, mean in means.items()
            )
            legend = f"{named(name, self.colour)}: {areas}"
            figure.update_traces(name=legend, selector={"legendgroup": shown(name)})

    def _placed(self, ks: Sequence[float]) -> list[float]:
        """log(1 + 1000 k): the published sizes, 0.001 to 1, nearly evenly spaced, and 0 to their
        left."""
        is_share = self.x == "k" and self.scale == "log"
        return super()._placed([1000 * k for k in ks] if is_share else ks)

    def _x_axis(self, rows: pd.DataFrame, n_columns: int) -> dict[str, Any]:
        axis = super()._x_axis(rows, n_columns)
        if self.x != "k":
            return axis
        ks = in_order(rows["k"])
        share = dict(zip(self._placed(ks), ks, strict=True))
        title = axis["title_text"].replace("k", "share of the edges that is kept", 1)
        return axis | {
            "ticktext": [f"{100 * share[at]:.3g} %" for at in axis["tickvals"]],
            "title_text": title,
        }
