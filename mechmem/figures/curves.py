"""Curves: what a model gets right as training goes on."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from mechmem.figures.figure import Figure
from mechmem.figures.rows import context, hover, in_order
from mechmem.figures.style import SOFT, colours, named, note

DASHES = {"corrected": "dash", "held_out": "dot", "chance": "dashdot"}


class Curves(Figure):
    """Accuracy on each group of instances by optimiser step, one line a seed.

    A model that finds the rule first and fits the wrong labels later shows `corrected` rising and then giving way to
    `memorised`. Rows with curve `phase` mark a step with their `label`; a phase that never came has no row.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        return ("seed", "step", "curve", "value")

    def _draw(self, rows: pd.DataFrame) -> go.Figure:
        lines, phases = rows[rows["curve"] != "phase"], rows[rows["curve"] == "phase"]
        figure = go.Figure([_line(part, lines) for _, part in lines.groupby(["curve", "seed"], sort=False)])
        figure.update_xaxes(title_text="optimiser step", rangemode="tozero")
        figure.update_yaxes(title_text="accuracy (% of instances)", range=[0, 1.02], tickformat=".0%")
        for label in in_order(phases["label"]) if len(phases) else []:
            _mark(figure, phases["step"][phases["label"] == label].tolist(), label)
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
        hovertext=hover(part.drop(columns="label", errors="ignore")),
        hoverinfo="text",
    )


def _mark(figure: go.Figure, steps: list[float], label: str) -> None:
    """A thin line for each seed that reached the phase, with one label for all."""
    for step in steps:
        figure.add_vline(x=step, line={"color": SOFT, "width": 1, "dash": "dot"})
    spread = f"step {min(steps):,.0f}" + (f" to {max(steps):,.0f}" if max(steps) > min(steps) else "")
    where = {"x": sum(steps) / len(steps), "yref": "paper", "y": 1, "yanchor": "bottom"}
    figure.add_annotation(text=f"{label}<br>{spread}", showarrow=False, font={"size": 11, "color": SOFT}, **where)
