"""ActivationMaps: activations by pair of digits, one panel per neuron and model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechmem.report.figures.figure import Figure
from mechmem.report.figures.heatmap import FROM_ZERO
from mechmem.report.figures.rows import context, hover, in_order, shown
from mechmem.report.figures.style import VERMILLION, note
from mechmem.spec.errors import InputError

ROW, MARK = 235, 9
"""Height of a row of panels, and size of a marker (pixels)."""
SHOWN_ELSEWHERE = (
    "model",
    "order",
    "layer",
    "neuron",
    "type",
    "rule",
    "a",
    "b",
    "n_noisy",
    "noisy_value",
)


class ActivationMaps(Figure):
    """The colour of a cell is its mean activation; the colour of a circle is the mean of the
    memorised instances in the cell.

    Each neuron has its own scale, shared by its panels, from its smallest activation to its
    largest. A circle of the colour of its cell is a memorised instance treated like all others; a
    circle of another colour is an outlier.
    Raises InputError if the rows are of several seeds, places or carries: choose one with `where`.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        return (
            "seed",
            "model",
            "order",
            "layer",
            "neuron",
            "type",
            "rule",
            "a",
            "b",
            "carry",
            "value",
            "noisy_value",
        )

    def _draw(self, rows: pd.DataFrame) -> go.Figure:
        self._check_one_each(rows)
        models, neurons = in_order(rows["model"]), in_order(rows["order"])
        panels = [
            (m, o, rows[(rows["model"] == m) & (rows["order"] == o)])
            for m in models
            for o in neurons
        ]
        titles = [_title(model, part.iloc[0]) for model, _, part in panels]
        height = ROW * len(models) + 150
        spacing = {"horizontal_spacing": 0.035, "vertical_spacing": 66 / (height - 150)}
        figure = make_subplots(
            len(models), len(neurons), subplot_titles=titles, shared_yaxes=True, **spacing
        )
        figure.update_annotations(font={"size": 10})
        figure.update_layout(height=height, coloraxis=_scale(), legend={"itemclick": False})
        for model, order, part in panels:
            place = {"row": models.index(model) + 1, "col": neurons.index(order) + 1}
            figure.add_traces(
                [*_panel(part, rows[rows["order"] == order])], place["row"], place["col"]
            )
            figure.update_xaxes(title_text="a (digit)" if model == models[-1] else None, **place)
            figure.update_yaxes(title_text="b (digit)" if order == neurons[0] else None, **place)
        figure.update_xaxes(dtick=1, showgrid=False, ticks="", tickangle=0, range=[-0.5, 9.5])
        figure.update_yaxes(dtick=1, showgrid=False, ticks="", range=[-0.5, 9.5])
        figure.add_trace(
            _mark(x=[None], y=[None], marker_color="white", name="memorised instances in the cell")
        )
        note(
            figure, context(rows.drop(columns=["n", "value"], errors="ignore"), SHOWN_ELSEWHERE, "")
        )
        return figure

    def _check_one_each(self, rows: pd.DataFrame) -> None:
        for column in ("seed", "carry", "place"):
            there = in_order(rows[column]) if column in rows else []
            if len(there) > 1:
                listed = ", ".join(map(shown, there))
                raise InputError(
                    f"table {self.table} holds maps of {column} {listed}; choose one with `where`"
                )
        if rows.duplicated(["model", "order", "a", "b"]).any():
            raise InputError(
                f"table {self.table} holds several maps of a neuron; choose one with `where`"
            )


def _title(model: str, row: pd.Series) -> str:
    """`after, layer 2 neuron 37` above `a in 3..5 (operand range)`."""
    kind = str(row["type"]).replace("_", " ")
    rule = f"{row['rule']} ({kind})" if row["rule"] else {"none": "no rule"}.get(kind, kind)
    return f"{model}, layer {row['layer']} neuron {row['neuron']}<br>{rule}"


def _scale() -> dict[str, Any]:
    bar = {
        "title": {"text": "activation<br>(share of the<br>neuron's range)", "font": {"size": 12}},
        "thickness": 14,
    }
    bar |= {"outlinewidth": 0, "nticks": 6}
    return {"colorscale": [list(step) for step in FROM_ZERO], "cmin": 0, "cmax": 1, "colorbar": bar}


def _panel(part: pd.DataFrame, of_neuron: pd.DataFrame) -> tuple[go.Heatmap, go.Scatter]:
    """The cells, and the memorised instances in them, on the neuron's scale."""
    known = of_neuron[["value", "noisy_value"]].to_numpy(float)
    least, most = np.nanmin(known, initial=np.inf), np.nanmax(known, initial=-np.inf)
    width = most - least if most > least else 1.0
    part = part.assign(texts=hover(part))
    grids = [
        part.pivot_table(values=c, index="b", columns="a", aggfunc="first", dropna=False)
        for c in ("value", "texts")
    ]
    look = {
        "x": [*grids[0].columns],
        "y": [*grids[0].index],
        "hoverinfo": "text",
        "coloraxis": "coloraxis",
    }
    z = ((grids[0] - least) / width).to_numpy().tolist()
    cells = go.Heatmap(
        z=z, hovertext=grids[1].to_numpy().tolist(), xgap=1, ygap=1, hoverongaps=False, **look
    )
    marked = part[part["noisy_value"].notna()]
    colours = {
        "marker_color": ((marked["noisy_value"] - least) / width).tolist(),
        "marker_coloraxis": "coloraxis",
    }
    texts = {"hovertext": marked["texts"].tolist(), "hoverinfo": "text", "showlegend": False}
    return cells, _mark(x=marked["a"].tolist(), y=marked["b"].tolist(), **colours, **texts)


def _mark(**fields: Any) -> go.Scatter:
    return go.Scatter(
        mode="markers", marker_size=MARK, marker_line={"color": VERMILLION, "width": 1}, **fields
    )
