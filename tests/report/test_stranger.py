"""A report of a stranger's run is safe to open: whatever the run says is shown as text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

from mechmem.report.figures.bars import Bars
from mechmem.report.figures.style import finish
from mechmem.report.report import Report, render

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
OWNED = "document.documentElement.dataset.owned=1"
TEXTS = (
    f"</script><script>{OWNED}</script>",
    f'<img src=x onerror="{OWNED}">',
    f'<a href="javascript:{OWNED}">click</a>',
    f"<svg onload='{OWNED}'></svg>",
    f"<a href='java&#115;cript:{OWNED}'>click</a>",
    f"<A HREF='&#x6A;avascript:{OWNED}'>click</A>",
    '<a href="https://example.org/" target="_blank">click</a>',
)


def report(text: str) -> str:
    """A page in which a stranger wrote all text."""
    table = pd.DataFrame(
        {
            "seed": 0,
            "layer": [text, "b"],
            "value": [0.1, 0.2],
            "condition": [text, text],
            text: [text, text],
        }
    )
    figure = Bars(table="t", x="layer", title=text, caption=text).draw(table)
    figure.update_layout(xaxis_title_text=text)
    figure.add_annotation(x=0, y=0, text=text)
    claim = {
        **{"id": text, "says": text, "effect": 0.5, "low": 0.1, "high": 0.9, "rule": text},
        **{"reason": text, "timing": "before", "exploratory": False, "verdict": "supported"},
        **{"requires": [{"rule": text}], "control": None},
        "attainable": {"quantity": text, "value": 0.5, "interval": [0.1, 0.9]},
    }
    return render(
        Report(
            title=text,
            question=text,
            answer=text,
            figures=[(text, text, finish(figure, text))],
            tables=[(text, text, table)],
            claims=[claim],
            setup={text: text},
            provenance={text: [text]},
            warnings=[text],
        )
    )


class Links(HTMLParser):
    """The addresses of all links."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found += [value or "" for name, value in attrs if name in ("href", "src")]


@pytest.mark.parametrize("text", TEXTS)
def test_a_strangers_text_makes_no_link(text):
    for address in Links(report(text)).found:
        assert address == "data:," or address.startswith(("#", "tables/"))


@pytest.mark.parametrize("text", TEXTS)
def test_plotly_is_given_text_and_no_markup(text):
    figure = finish(go.Figure(go.Bar(x=[text], y=[1], name=text, hovertext=[text])), text)
    shown = json.dumps(figure.to_plotly_json(), default=str)
    assert not re.search(r"<\s*/?(a|img|svg|script)\b", shown, re.IGNORECASE)
    assert "&lt;" in shown


def test_plain_text_and_our_own_markup_stay_as_they_are():
    figure = finish(go.Figure(go.Bar(x=["a < b", "<b>c</b><br>d"], y=[1, 2])), "p < 0.05")
    assert list(figure.data[0].x) == ["a < b", "<b>c</b><br>d"]
    assert figure.layout.title.text == "p < 0.05"


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("text", ["\n".join(TEXTS)])
def test_a_browser_runs_nothing_of_a_strangers_report(text, tmp_path):
    page = dumped(tmp_path / "report.html", report(text))
    assert "main-svg" in page  # plotly has drawn the figure: scripts do run
    assert "data-owned" not in page.partition("<body")[0]
    links = re.findall(r'<a[^>]*?href="\s*([^"]*)"', page)
    assert [link for link in links if re.match(r"javascript:|(https?:)?//[^/]*example", link)] == []


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_browser_would_notice(tmp_path):
    page = dumped(tmp_path / "owned.html", f"<html><body><script>{OWNED}</script></body></html>")
    assert "data-owned" in page.partition("<body")[0]


def dumped(path: Path, html: str) -> str:
    """The page after a browser has loaded it and run its scripts."""
    path.write_text(html)
    profile = f"--user-data-dir={path.parent / 'profile'}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", profile]
    command = [str(BROWSER), *options, "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
