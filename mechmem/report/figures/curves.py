"""Curves: accuracies by training step."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mechmem.report.figures.figure import Figure
from mechmem.report.figures.rows import context, hover, in_order, one_row_per_seed
from mechmem.report.figures.style import SOFT, colours, named, note

DASHES = {"corrected": "dash", "held_out": "dot", "chance": "dashdot"}
LABEL_WIDTH = 0.15
"""Width of a phase's label, as a share of the axis."""
ENDS = ("initial", "final")
"""Phases that are the two ends of the axis."""


class Curves(Figure):
    """Accuracy on each group of instances by optimiser step, one line per seed.

    In a model that learns the rule first and the wrong labels later, `corrected` rises and then
    falls while `memorised` rises. Rows with curve `phase` mark a step with their `label`; a phase
    that was never reached has no row. Other rows with a label repeat a point of a curve and are
    left out, as are the marks of the two ends of training and the difference `lead`.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        return ("seed", "step", "curve", "value")

    def _draw(self, rows: pd.DataFrame) -> go.Figure:
        labels = rows["label"].fillna("") if "label" in rows else pd.Series("", rows.index)
        lines = rows[~rows["curve"].isin(("phase", "lead")) & (labels == "")].drop(
            columns="label", errors="ignore"
        )
        phases = rows[(rows["curve"] == "phase") & ~labels.isin(ENDS)]
        one_row_per_seed(lines, ["step", "curve"])
        figure = go.Figure(
            [_line(part, lines) for _, part in lines.groupby(["curve", "seed"], sort=False)]
        )
        figure.update_xaxes(title_text="optimiser step", rangemode="tozero")
        figure.update_yaxes(
            title_text="accuracy (% of instances)", range=[0, 1.02], tickformat=".0%"
        )
        _mark(figure, phases, width=float(lines["step"].max()))
        note(figure, context(lines, ["step", "curve"], "{} seeds, one line each"))
        return figure


def _line(part: pd.DataFrame, lines: pd.DataFrame) -> go.Scatter:
    part = part.sort_values("step")
    curve, seeds = part["curve"].iloc[0], in_order(lines["seed"])
    width = 2.2 if len(seeds) == 1 else 1.2
    dash = DASHES.get(curve, "solid")
    return go.Scatter(
        x=part["step"].tolist(),
        y=part["value"].tolist(),
        mode="lines",
        line={"color": colours(lines["curve"])[curve], "width": width, "dash": dash},
        name=named(curve, "curve"),
        legendgroup=curve,
        showlegend=bool(part["seed"].iloc[0] == seeds[0]),
        hovertext=hover(part),
        hoverinfo="text",
    )


def _mark(figure: go.Figure, phases: pd.DataFrame, width: float) -> None:
    """A thin line for each seed that reached a phase, and one label a phase; close neighbours'
    labels are stacked."""
    last, height = -np.inf, 0
    for label, at in sorted(_steps(phases).items(), key=lambda phase: np.mean(phase[1])):
        height = height + 1 if np.mean(at) - last < LABEL_WIDTH * width else 0
        last = np.mean(at)
        for step in at:
            figure.add_vline(x=step, line={"color": SOFT, "width": 1, "dash": "dot"})
        spread = f"step {min(at):,.0f}" + (f" to {max(at):,.0f}" if max(at) > min(at) else "")
        look = {
            "yref": "paper",
            "y": 1,
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 11, "color": SOFT},
        }
        figure.add_annotation(x=last, text=f"{label}<br>{spread}" + "<br>\xa0" * 2 * height, **look)


def _steps(phases: pd.DataFrame) -> dict[str, list[float]]:
    return (
        {str(label): part["step"].tolist() for label, part in phases.groupby("label")}
        if len(phases)
        else {}
    )
