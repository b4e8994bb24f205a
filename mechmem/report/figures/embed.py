"""A figure as a part of a web page that needs no network."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from mechmem.report.figures.style import finish

CONFIG = {"displaylogo": False, "responsive": True}


def script() -> str:
    """The source of plotly.js; a page holds it once."""
    return get_plotlyjs()


def division(figure: go.Figure, name: str) -> str:
    """The figure as one `<div>` with the id `name`, always the same bytes; its title is left to the
    page."""
    untitled = finish(go.Figure(figure), title="")
    height = f"{figure.layout.height or 420}px"
    return to_html(
        untitled,
        CONFIG,
        include_plotlyjs=False,
        full_html=False,
        div_id=name,
        default_height=height,
    )
