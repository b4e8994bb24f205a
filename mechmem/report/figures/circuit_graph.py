"""CircuitGraph: the edges that matter most, drawn from the embedding below to the logits above."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pydantic import Field

from mechmem.report.figures.figure import Figure
from mechmem.report.figures.rows import context, hover
from mechmem.report.figures.style import BLUE, FAINT, INK, SOFT, VERMILLION, note, titled

PORTS = {"q": -0.2, "k": 0.0, "v": 0.2}
"""Where a head's inputs arrive, from its middle; nodes are 1 apart."""
HALF = (0.34, 0.2)
"""Half the width and half the height of a node."""
FIRST, LAYER, MLP = 1.3, 1.9, 0.85
"""Height of the first heads, of a layer, and of the MLP above the heads of its layer."""
UNIT = 84
"""Pixels of one unit of height."""
THINNEST, WIDEST = 0.8, 7.0
"""Width of an edge of no score and of the largest score, in pixels."""
SHOWN_ELSEWHERE = (
    "source",
    "target",
    "source_layer",
    "layer",
    "into",
    "node",
    "eap",
    "eap_ig",
    "exact",
)


class Place(NamedTuple):
    """Where a node is drawn: layers upwards, heads side by side (figure units)."""

    x: float
    y: float


class CircuitGraph(Figure):
    """The `n` edges of the largest absolute score, without those on no path from the embedding to
    the logits.

    Blue edges are useful (corrupting them lowers the metric), vermillion ones work against it; the
    width is the absolute score. An edge arrives at a head's query (left), key (middle) or value
    (right). The rows are of one seed, model and set.
    Raises ValueError if the rows are of several graphs.
    """

    value: str = "eap_ig"
    """Column of the scores."""
    n: int = Field(30, ge=1, le=100_000)
    """Number of edges of the largest score."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("seed", "source", "target", "source_layer", "layer", "into", self.value)

    def _draw(self, rows: pd.DataFrame) -> go.Figure:
        self._check_one_graph(rows)
        rows = rows.assign(
            node=[_node(*ends) for ends in zip(rows["target"], rows["into"], strict=True)]
        )
        top = rows.loc[rows[self.value].abs().nlargest(self.n).index]
        drawn, places = connected(top), _places(rows)
        figure = go.Figure(_named_once(self._lines(drawn, places)))
        for is_used in (False, True):
            used = {*drawn["source"], *drawn["node"]}
            _boxes(
                figure,
                {name: place for name, place in places.items() if (name in used) == is_used},
                is_used,
            )
        _lay_out(figure, places)
        of = (
            f" of {titled(str(rows['measure'].iloc[0]), str(rows['unit'].iloc[0]))}"
            if "measure" in rows
            else ""
        )
        drawn_edges = (
            f"top {len(top)} of {len(rows)} edges by |{self.value}|{of}, {len(drawn)} connected"
        )
        shared = rows[[c for c in rows if not c.startswith("spearman")]]
        note(figure, f"{drawn_edges} · {context(shared, SHOWN_ELSEWHERE, '')}")
        return figure

    def _check_one_graph(self, rows: pd.DataFrame) -> None:
        if rows.duplicated(["source", "target"]).any():
            counts = rows.groupby(["source", "target"]).nunique().max()
            differ = ", ".join(counts.index[counts > 1])
            raise ValueError(
                f"table {self.table} holds several graphs ({differ}); choose one with `where`"
            )

    def _lines(self, drawn: pd.DataFrame, places: Mapping[str, Place]) -> list[go.Scatter]:
        """The strongest on top."""
        rows = drawn.reindex(drawn[self.value].abs().sort_values().index)
        texts, largest = hover(rows.drop(columns="node")), rows[self.value].abs().max()
        return [
            _line(row, row[self.value] / largest, places, text)
            for row, text in zip(rows.to_dict("records"), texts, strict=True)
        ]


def connected(edges: pd.DataFrame) -> pd.DataFrame:
    """The edges on a path from `embed` to `logits`; the others change no output."""
    while True:
        reached, useful = {"embed", *edges["node"]}, {"logits", *edges["source"]}
        kept = edges[edges["source"].isin(list(reached)) & edges["node"].isin(list(useful))]
        if len(kept) == len(edges):
            return kept
        edges = kept


def _node(target: str, into: str) -> str:
    """The node that an input belongs to: `a1.h0.q` is read by `a1.h0`."""
    return target.rpartition(".")[0] if into in PORTS else target


def _places(rows: pd.DataFrame) -> dict[str, Place]:
    """Heads side by side, each layer's MLP above their right end, the embedding below and the
    logits above all."""
    heads = rows.loc[rows["into"].isin(list(PORTS)), ["node", "layer"]].drop_duplicates()
    mlps = rows.loc[rows["into"] == "mlp", ["node", "layer"]].drop_duplicates()
    width, top = int(heads.groupby("layer").size().max()), int(rows["layer"].max())
    # between two heads, so that the edge from the embedding to the logits passes behind none
    middle = (width - 1) // 2 + 0.5
    places = {"embed": Place(middle, 0.0), "logits": Place(middle, FIRST + LAYER * top)}
    for layer, group in heads.groupby("layer")["node"]:
        names = sorted(group, key=lambda name: (len(name), name))
        places |= {name: Place(i, FIRST + LAYER * layer) for i, name in enumerate(names)}
    return places | {
        name: Place(width, FIRST + MLP + LAYER * layer)
        for name, layer in mlps.itertuples(index=False)
    }


def _line(
    edge: Mapping[Hashable, Any], share: float, places: Mapping[str, Place], text: str
) -> go.Scatter:
    """A curve that leaves and arrives upright; `share` is the score as a share of the largest."""
    start, end, t = places[edge["source"]], places[edge["node"]], np.linspace(0, 1, 25)
    x, to = start.x, end.x + PORTS.get(edge["into"], 0.0)
    y, up = start.y + HALF[1], end.y - HALF[1]
    colour, name = (BLUE, "useful") if share >= 0 else (VERMILLION, "works against the metric")
    return go.Scatter(
        x=(x + (to - x) * t**2 * (3 - 2 * t)).tolist(),
        y=(y + (up - y) * t).tolist(),
        mode="lines",
        line={"color": colour, "width": THINNEST + (WIDEST - THINNEST) * abs(share)},
        opacity=0.4 + 0.45 * abs(share),
        hovertext=text,
        hoverinfo="text",
        name=name,
        legendgroup=name,
    )


def _named_once(lines: list[go.Scatter]) -> list[go.Scatter]:
    seen: set[str] = set()
    for line in lines:
        line.showlegend = line.name not in seen
        seen.add(line.name)
    return lines


def _boxes(figure: go.Figure, places: Mapping[str, Place], is_used: bool) -> None:
    """The nodes; those without an edge are faint, heads show where queries, keys and values
    arrive."""
    ink, line = (INK, SOFT) if is_used else ("#a9b0b9", FAINT)
    for name, (x, y) in places.items():
        ends = {"x0": x - HALF[0], "x1": x + HALF[0], "y0": y - HALF[1], "y1": y + HALF[1]}
        figure.add_shape(type="rect", fillcolor="white", line={"color": line, "width": 1.4}, **ends)
        ports = PORTS if ".h" in name else {}
        texts = [
            (name, x, y + 0.05 * bool(ports), 12),
            *((port, x + at, y - 0.13, 9) for port, at in ports.items()),
        ]
        for text, at_x, at_y, size in texts:
            font = {"size": size, "color": ink if size == 12 or not is_used else SOFT}
            figure.add_annotation(text=text, x=at_x, y=at_y, showarrow=False, font=font)


def _lay_out(figure: go.Figure, places: Mapping[str, Place]) -> None:
    right, top = (
        max(place.x for place in places.values()),
        max(place.y for place in places.values()),
    )
    bare = {"visible": False, "fixedrange": True}
    figure.update_xaxes(range=[-0.6, right + 0.6], **bare)
    figure.update_yaxes(range=[-0.4, top + 0.4], **bare)
    figure.update_layout(height=int(UNIT * (top + 0.8)) + 140, legend_itemclick=False)
