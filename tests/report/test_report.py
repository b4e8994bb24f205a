"""The report: all that it was given, in a reader's order, as text that stays text, in one file."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser

import pandas as pd
import plotly.graph_objects as go
import pytest

from mechmem.report.report import Report, number, render, yaml

EVIL = "</script><script>alert('x')</script><b onclick=\"y\">"
CLAIM = {
    "id": "C1",
    "says": "rule first",
    "effect": 0.5,
    "low": 0.25,
    "high": 0.75,
    "rule": "r",
    "reason": "because",
    "timing": "before",
    "exploratory": False,
    "requires": [],
    "attainable": None,
    "control": None,
}

RIGHT = {
    **{"verdict": "refuted", "timing": "exploratory", "requires": [{"rule": EVIL}]},
    "attainable": {"quantity": EVIL, "value": 0.5, "interval": [0.1, 0.9]},
    "control": None,
}
SUPPORTED = {"verdict": "supported"}


def report(**changes) -> Report:
    table = pd.DataFrame(
        {"site": ["neurons", None], "value": [0.123456, float("nan")], "per_example": [[1], [2]]}
    )
    fields = {
        "title": "fda",
        "question": "Which layer?",
        "answer": "Layer 1.",
        "figures": [
            ("One", "caption", go.Figure(go.Bar(x=["a"], y=[1]))),
            ("Two", "", go.Figure()),
        ],
        "tables": [("patch_grid", "one row a cell", table)],
        "claims": [
            CLAIM | {"verdict": verdict}
            for verdict in ("supported", "refuted", "undetermined", "not testable")
        ],
        "setup": {"seeds": (0, 1), "task": {"kind": "four_digit_addition", "rate": 0.05}},
        "provenance": {"commit": "abc", "versions": {"torch": "2"}},
        "warnings": ["one seed only"],
    }
    return Report(**(fields | changes))


class Page(HTMLParser):
    """The tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.inside = "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.text += "" if self.inside in ("script", "style") else data

    def __getitem__(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_order_is_the_readers():
    text = Page(render(report())).text
    order = [
        "Which layer?",
        "Layer 1.",
        "one seed only",
        "rule first",
        "Figure 1. One",
        "patch_grid",
        "seeds:",
        "commit:",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_the_same_report_is_the_same_bytes():
    assert render(report()) == render(report())


def test_plotly_is_inlined_once_and_nothing_is_loaded():
    page = Page(render(report()))
    html = render(report())
    assert html.count("plotly.js v") == 1
    assert not [tag for tag in page["script"] if "src" in tag]
    assert [link["href"] for link in page["link"]] == ["data:,"]
    assert not re.search(r"@import|url\(", html[: html.index("</style>")])
    assert [div["id"] for div in page["div"] if "id" in div] == ["figure-1", "figure-2"]
    assert len(render(report(figures=[]))) < 20_000


def test_verdicts_are_said_in_words():
    text = Page(render(report())).text
    assert all(
        f"{sign} {verdict}" in text
        for sign, verdict in (
            ("✓", "supported"),
            ("✗", "refuted"),
            ("?", "undetermined"),
            ("–", "not testable"),
        )
    )
    assert "Effect 0.5, 95 % interval 0.25 to 0.75" in text


def test_a_claim_without_a_number_says_only_why():
    claim = CLAIM | {"verdict": "undetermined", "effect": None, "low": None, "high": None}
    text = Page(render(report(claims=[claim]))).text
    assert "because" in text
    assert "Effect" not in text


@pytest.mark.parametrize(
    ("timing", "text"),
    [
        ("before", "Rule, fixed before the run: r"),
        ("after", "Exploratory, as no record shows"),
        ("changed", "Exploratory, as the rule was changed after a run; rule: r"),
        ("exploratory", "Exploratory, as the spec says; rule: r. k was chosen on seed 0"),
    ],
)
def test_only_a_rule_on_record_is_called_fixed_before_the_run(timing, text):
    reason = "k was chosen on seed 0" if timing == "exploratory" else False
    page = Page(
        render(report(claims=[CLAIM | SUPPORTED | {"timing": timing, "exploratory": reason}]))
    )
    assert text in page.text
    assert ("fixed before the run" in page.text) == (timing == "before")


def test_what_a_verdict_rests_on_is_next_to_it():
    beside = {"quantity": "whole", "value": 0.8, "interval": [0.7, 0.9]}
    claim = CLAIM | SUPPORTED | {"attainable": beside, "requires": [{"rule": "memorised >= 0.9"}]}
    text = Page(render(report(claims=[claim]))).text
    assert "Attainable (whole) 0.8, 95 % interval 0.7 to 0.9" in text
    assert "Required in every seed: memorised >= 0.9" in text


def test_an_unknown_verdict_is_refused():
    with pytest.raises(
        ValueError, match="claim C1 has the verdict 'suported'; did you mean 'supported'"
    ):
        report(claims=[CLAIM | {"verdict": "suported"}])


def test_tables_are_short_and_point_to_their_file():
    page = Page(render(report(tables=[("a b", "d", pd.DataFrame({"x": range(1300)}))])))
    assert len(page["tr"]) == 201
    assert "The first 200 of 1,300 rows." in page.text
    assert "tables/a%20b.parquet" in [a.get("href") for a in page["a"]]


def test_table_cells_are_short_and_values_per_example_left_out():
    text = Page(render(report())).text
    assert "0.123" in text
    assert "0.1234" not in text
    assert "per_example" not in text


@pytest.mark.parametrize(
    "changes",
    [
        *({field: EVIL} for field in ("title", "question", "answer")),
        {"figures": [(EVIL, EVIL, go.Figure(go.Bar(x=[EVIL], y=[1]), {"title": {"text": EVIL}}))]},
        {"tables": [(EVIL, EVIL, pd.DataFrame({EVIL: [EVIL]}))]},
        {"claims": [dict.fromkeys(CLAIM, EVIL) | RIGHT]},
        {"setup": {EVIL: EVIL}, "provenance": {EVIL: [EVIL]}, "warnings": [EVIL]},
    ],
)
def test_no_text_becomes_markup(changes):
    plain, evil = (
        Page(render(report(figures=[]))),
        Page(render(report(**({"figures": []} | changes)))),
    )
    n_scripts = 3 if "figures" in changes else 0
    assert len(evil["script"]) == n_scripts
    assert not [attributes for _, attributes in evil.tags if "onclick" in attributes]
    assert len(evil["b"]) == len(plain["b"])


def test_a_report_may_be_nearly_empty():
    page = Page(render(Report(title="t", question="q", answer="a")))
    assert not page["figure"] + page["table"] + page["article"] + page["script"]


def test_numbers_have_three_digits():
    values = (0.12345, -0.5, 2.0, 12345.6, float("nan"), None, pd.NA, "clean", 7, [1, 2])
    expected = ["0.123", "−0.5", "2", "12346", "–", "–", "–", "clean", "7", "[1, 2]"]
    assert [number(value) for value in values] == expected


def test_blocks_stand_as_they_would_in_a_spec():
    assert yaml({"b": (0, 1), "a": {"c": None}}) == "b: [0, 1]\na: {c: null}\n"


def test_no_torch_is_needed():
    code = "import sys, mechmem.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_claim_of_a_number_without_an_interval_speaks_of_none():
    claims = [
        CLAIM | {"verdict": "undetermined", "low": end, "high": end} for end in (None, float("nan"))
    ]
    text = Page(render(report(claims=claims))).text
    assert text.count("Effect 0.5") == 2
    assert "95 % interval" not in text
