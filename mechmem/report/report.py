"""Report: one web page with the question, the results and the setup; it opens without a network."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from ruamel.yaml import YAML

from mechmem.report.figures.embed import division, script
from mechmem.spec.errors import suggest

MOST_ROWS = 200
"""Rows of a table that the page shows; the parquet file has them all."""
VERDICTS = {"supported": "✓", "refuted": "✗", "undetermined": "?", "not testable": "–"}
"""The verdicts of a claim, each with its sign."""
TIMINGS = {
    "before": "Rule, fixed before the run",
    "after": "Exploratory, as no record shows that the rule was fixed before its data; rule",
    "changed": "Exploratory, as the rule was changed after a run; rule",
    "exploratory": "Exploratory, as the spec says; rule",
}
"""When the rule of a claim was fixed, as the page says it."""


@dataclass(frozen=True)
class Report:
    """The results of a run, in the order in which they are read.

    Raises ValueError for a claim whose verdict or timing is none of those above.
    """

    title: str
    question: str
    answer: str
    """One sentence."""
    figures: list[tuple[str, str, go.Figure]] = field(default_factory=list)
    """(title, caption, figure)."""
    tables: list[tuple[str, str, pd.DataFrame]] = field(default_factory=list)
    """(name, description, table); the file is `tables/NAME.parquet` in the folder of the page."""
    claims: list[dict[str, Any]] = field(default_factory=list)
    """Each with id, says, verdict, effect, low, high (the 95 % interval), rule, timing,
    exploratory, requires, attainable, control and reason."""
    setup: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for claim in self.claims:
            for key, known in (("verdict", VERDICTS), ("timing", TIMINGS)):
                if claim[key] not in known:
                    hint = suggest(claim[key], known)
                    raise ValueError(f"claim {claim['id']} has the {key} {claim[key]!r}; {hint}")


def render(report: Report) -> str:
    """The page as HTML. The same report gives the same bytes; text in it is escaped."""
    figures = [
        {"title": title, "caption": caption, "html": Markup(division(figure, f"figure-{number}"))}
        for number, (title, caption, figure) in enumerate(report.figures, 1)
    ]
    page = page_environment().get_template("page.html.j2")
    plotly = Markup(script()) if figures else ""
    constants = {"VERDICTS": VERDICTS, "TIMINGS": TIMINGS, "MOST_ROWS": MOST_ROWS}
    return page.render(report=report, figures=figures, plotly=plotly, **constants)


def page_environment() -> Environment:
    """The templates of pages, with the filters that they use."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["known"] = lambda value: number(value) != "–"
    environment.filters |= {"number": number, "yaml": yaml, "without_lists": without_lists}
    return environment


def number(value: Any) -> str:
    """A cell of a table: floats with three digits, an en dash where there is no value.

    >>> number(0.12345), number(2048.0), number(None), number("clean")
    ('0.123', '2048', '–', 'clean')
    """
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if not isinstance(value, float):
        return str(value)
    digits = f"{value:.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.3g}"
    return digits.replace("-", "−")


def yaml(block: dict[str, Any]) -> str:
    """The block in YAML, as in a spec."""
    writer, text = YAML(typ="safe", pure=True), io.StringIO()
    writer.default_flow_style, writer.width = None, 100
    writer.sort_base_mapping_type_on_output = False
    writer.dump(block, text)
    return text.getvalue()


def without_lists(table: pd.DataFrame) -> pd.DataFrame:
    """The table without its values per example, which are too many to read."""
    return table.drop(columns="per_example", errors="ignore")
