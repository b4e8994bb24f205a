"""The style of all figures: fonts, colours with a fixed meaning, and titles with units."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale, unlabel_rgb

from mechmem.report.figures.rows import in_order, shown
from mechmem.spec.errors import InputError

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, SOFT, FAINT, UNDEFINED = "#2f3640", "#5c6570", "#e4e7eb", "#c9ced6"

BLUE, VERMILLION, GREEN, PLUM, AMBER = "#0072B2", "#D55E00", "#009E73", "#a55c9b", "#E69F00"
SLATE, GREY, SAND = "#535d69", "#9ea6b1", "#cdbb8a"
COLOURS = {
    **{"clean": BLUE, "noisy": VERMILLION, "memorised": VERMILLION, "accuracy_given": VERMILLION},
    **{"corrected": GREEN, "accuracy_true": GREEN, "held_out": INK, "chance": GREY},
    **{"baseline": SLATE, "intervened": PLUM, "source": AMBER},
    **{"control": GREY, "random": GREY, "variance_matched": SAND, "head_permuted": SLATE},
    **{"top": PLUM, "ranked": PLUM, "together": PLUM, "rest": SLATE},
    **{"lens": PLUM, "untrained": SLATE, "probe": PLUM, "shuffled": GREY, "majority": SAND},
}
"""Names that always have the same colour; the colours can be distinguished with all common kinds of
colour vision (after Okabe and Ito)."""
OTHERS = ("#332288", "#44AA99", "#999933", "#882255", "#88CCEE", "#DDCC77")
"""Colours of names without a fixed one (after Paul Tol)."""

UNWANTED = [
    "sendcharttocloud",
    "zoom2d",
    "pan2d",
    "select2d",
    "lasso2d",
    "zoomin2d",
    "zoomout2d",
    "autoscale2d",
]
"""Plotly's buttons that are removed; the first would send the figure to a server."""

MEANINGS = {
    "memorised": "memorised: noisy instances, given label",
    "corrected": "corrected: noisy instances, true label",
    "clean": "clean instances",
    "noisy": "noisy instances",
    "held_out": "held-out instances",
    "control": "control (matched, random)",
    "random": "random (control)",
    "ranked": "ranked (most needed first)",
    "together": "the model",
    "head_permuted": "head_permuted (control: heads of each layer permuted)",
    "given": "given label",
    "true": "true label",
    "variance_matched": "random, of equal variance (control)",
    "shuffled": "shuffled labels (control)",
    "control_task": "random function of the inputs (control)",
    "majority": "commonest value",
    "source": "source (where patches come from)",
}
UNITS = {
    **{
        "accuracy": "fraction",
        "probability": "probability",
        "logit": "nats",
        "kl": "nats",
        "loss": "nats",
    },
    **{"rank": "0 is best", "recovery": "0 baseline, 1 source", "shift": "standard deviations"},
    **{"auc": "0.5 is no difference", "step": "optimiser steps"},
}
"""Units by the first word of a column or measure, for tables that have no column `unit`."""


def colours(values: pd.Series) -> dict[Any, str]:
    """A colour for each value: the fixed one of a name, a step of a dark-to-light scale for
    numbers."""
    there = in_order(values)
    if values.dtype.kind in "if":
        steps = [0.8 * i / max(len(there) - 1, 1) for i in range(len(there))]
        return {
            value: _hex(rgb)
            for value, rgb in zip(there, sample_colorscale("Viridis", steps), strict=True)
        }
    others = [value for value in there if value not in COLOURS]
    return COLOURS | {value: OTHERS[i % len(OTHERS)] for i, value in enumerate(others)}


def _hex(rgb: str) -> str:
    return "#" + "".join(f"{round(part):02x}" for part in unlabel_rgb(rgb))


def named(value: Any, column: str) -> str:
    """The name of a value in a legend or the title of a panel: `noisy instances`, `layer 1`."""
    if isinstance(value, str) and not value.replace("+", "").isdigit():
        return MEANINGS.get(value, value)
    return f"{column.replace('_', ' ')} {shown(value)}"


def titled(name: str, unit: str | None = None) -> str:
    """The title of an axis: the name in words, with its unit."""
    stem, _, label = name.rpartition("_")
    words = (
        f"{stem}, {label} label" if stem and label in ("true", "given", "noisy", "clean") else name
    )
    if label == "pair" and not stem.endswith("_less"):
        words = f"{stem}, the pair's label"
    if label in ("noisy", "clean"):
        words = f"{stem} on {label} instances"
    unit = UNITS.get(name.split("_")[0], "") if unit is None else unit
    return words.replace("_", " ") + (f" ({unit})" if unit not in ("", words) else "")


def unit_of(rows: pd.DataFrame, column: str) -> str:
    """The unit of a column: one that its name always has, else the one that all rows state."""
    stated = in_order(rows["unit"]) if "unit" in rows else []
    return UNITS.get(column.split("_")[0], stated[0] if len(stated) == 1 else "")


def measured(rows: pd.DataFrame, value: str) -> tuple[str, str]:
    """Title and unit of the column `value`. Raises InputError for measures of several units."""
    if value != "value" or "measure" not in rows:
        unit = unit_of(rows, value)
        return titled(value, unit), unit
    names = in_order(rows["measure"])
    units = (
        in_order(rows["unit"])
        if "unit" in rows
        else [UNITS.get(name.split("_")[0], "") for name in names]
    )
    if len(set(units)) > 1:
        raise InputError(
            f"the measures {', '.join(names)} share no unit; choose with `where: {{measure: ...}}`"
        )
    stem = names[0] if len(names) == 1 else names[0].split("_")[0]
    return titled(stem, units[0]), units[0]


def value_axis(rows: pd.DataFrame, value: str) -> dict[str, Any]:
    """The axis of the values; shares and probabilities always go from 0 to 1."""
    title, unit = measured(rows, value)
    return {"title_text": title} | (
        {"range": [0, 1.03]} if unit in ("fraction", "probability") else {}
    )


def note(figure: go.Figure, text: str) -> None:
    """Set the subtitle: the labels that all rows share, such as the prefix, and the seeds."""
    whole = " · ".join(part.replace(" ", "\xa0") for part in text.split(" · "))
    figure.update_layout(title_subtitle_text="<br>".join(textwrap.wrap(whole, 96)))


def finish(figure: go.Figure, title: str) -> go.Figure:
    """The figure with its title and the common style. Its text is shown as text: markup that plotly
    would make a link of is escaped."""
    figure = _without_markup(figure)
    heading = "<br>".join(textwrap.wrap(_escaped(title), 85))
    heads = [a.text for a in figure.layout.annotations if a.yref == "paper" and a.y == 1]
    small = _lines(figure.layout.title.subtitle.text) + max(map(_lines, heads), default=0)
    figure.update_layout(template=template(), margin_t=26 + 21 * _lines(heading) + 17 * small)
    return figure.update_layout(title_text=heading, title_pad_t=12 * max(_lines(heading), 1))


MARKUP = re.compile(r"<(?!/?(?:br|b|i|sub|sup|extra)\s*/?>)(?=[A-Za-z/!])", re.IGNORECASE)
"""The begin of a tag that plotly would obey, except those that our figures use."""


def _without_markup(figure: go.Figure) -> go.Figure:
    """The figure itself, or one with every other tag escaped, in labels, names and hover texts."""
    block = figure.to_dict()
    escaped = _escaped(block)
    # The comparison is by identity: most figures have nothing to escape.
    return figure if escaped is block else go.Figure(escaped)


def _escaped(value: Any) -> Any:
    """The value with tags in its texts escaped; the same object if there are none."""
    if isinstance(value, str):
        return MARKUP.sub("&lt;", value) if "<" in value else value
    if isinstance(value, dict):
        parts = {_escaped(key): _escaped(part) for key, part in value.items()}
        is_same = all(parts.get(key) is part for key, part in value.items())
        return value if is_same else parts
    if isinstance(value, np.ndarray) and value.dtype.kind in "OU":
        found = _escaped(value.tolist())
        return value if found == value.tolist() else np.array(found, dtype=object)
    if isinstance(value, (list, tuple)):
        parts = [_escaped(part) for part in value]
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts
    return value


def _lines(text: str | None) -> int:
    return 1 + text.count("<br>") if text else 0


def template(colorway: Sequence[str] = OTHERS) -> go.layout.Template:
    """White background, thin grey lines, readable at 900 pixels; the legend is below the figure."""
    axis: dict[str, Any] = {
        "gridcolor": FAINT,
        "linecolor": SOFT,
        "showline": True,
        "ticks": "outside",
        "tickcolor": SOFT,
    }
    axis |= {"zeroline": False, "automargin": True, "title": {"standoff": 10, "font": {"size": 13}}}
    legend = {
        "orientation": "h",
        "yref": "container",
        "y": 0,
        "yanchor": "bottom",
        "x": 0,
        "font": {"size": 12},
    }
    heading: dict[str, Any] = {
        "x": 0,
        "xref": "container",
        "pad": {"l": 4},
        "yref": "container",
        "y": 1,
        "yanchor": "top",
    }
    heading |= {"font": {"size": 16}, "subtitle": {"font": {"size": 12, "color": SOFT}}}
    layout = {
        **{
            "font": {"family": FONT, "size": 12, "color": INK},
            "colorway": list(colorway),
            "legend": legend,
        },
        **{"paper_bgcolor": "white", "plot_bgcolor": "white", "xaxis": axis, "yaxis": axis},
        **{"title": heading, "margin": {"l": 64, "r": 24, "b": 64}, "height": 420},
        **{
            "hoverlabel": {"align": "left", "font": {"size": 12}, "bgcolor": "white"},
            "hovermode": "closest",
        },
        **{"modebar": {"remove": UNWANTED}},
    }
    return go.layout.Template(layout=layout)
