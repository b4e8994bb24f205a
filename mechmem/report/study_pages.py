"""The pages of a study: one table of claims as text, Markdown and HTML, and a paragraph for each.

All of them are rendered from the study's records alone: no model and no table is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mechmem.report.report import VERDICTS, number, page_environment

WRITTEN = "<!-- Written by `mechmem run`; change study.yaml, not this page. -->"
"""The first line of a page that `mechmem run` may overwrite."""
COLUMNS = (
    "claim",
    "task",
    "effect [95 % interval]",
    "attainable",
    "control",
    "seeds",
    "verdict",
)

Results = Mapping[str, Any]
"""name, folder, question, titles (claim id -> short title), claims and failed (spec -> message).

Each claim has spec, claim (its id), task, says, verdict, reason, rule, timing, effect, attainable
and control (value, low, high, or None), seeds, conditions, requires, unpooled (judged quantities
whose spread is known from their own seeds alone) and text (its interpretation).
"""


def results_page(results: Results) -> str:
    """The study as a Markdown page: its table, and a section for each claim and task."""
    lines = [WRITTEN, "", f"# {results['question']}", ""]
    for spec, message in results["failed"].items():
        lines += [f"**{spec} failed and is left out**: {message}", ""]
    lines += [*markdown_table(COLUMNS, [row_of(claim) for claim in by_claim(results)]), ""]
    lines += [
        "*Effect*: the quantity of the claim's rule, mean over seeds. *Attainable*: what the",
        "effect could have been at most. *Control*: the same number for the matched control. A",
        "verdict is *supported*, *refuted*, *undetermined* or *not testable*.",
        "",
    ]
    last = None
    for claim in by_claim(results):
        if claim["claim"] != last:
            last = claim["claim"]
            lines += [f"## {heading(results, last)}", ""]
        lines += [*_section(claim), ""]
    return "\n".join(lines)


def heading(results: Results, claim_id: str) -> str:
    """A claim's id with its short title, if the study has one."""
    return " ".join(part for part in (claim_id, results["titles"].get(claim_id)) if part)


def _section(claim: Mapping[str, Any]) -> list[str]:
    lines = [f"### {claim['claim']} on {claim['task']}: {claim['verdict']}", ""]
    lines += [claim["says"], ""]
    lines += [claim["text"] or "Nobody has interpreted this result yet.", ""]
    lines.append(f"- Rule{_timing(claim)}: `{claim['rule']}`.")
    for condition in claim["conditions"]:
        lines.append(f"  - `{condition['rule']}`: {condition['found']}, {_outcome(condition)}")
    lines += [_requirement(condition) for condition in claim["requires"]]
    lines.append(f"- Verdict: {claim['reason']}.")
    if claim["unpooled"]:
        names = ", ".join(f"`{name}`" for name in claim["unpooled"])
        lines.append(
            f"- The spread between seeds of {names} is known from these seeds alone, as fewer than "
            "five quantities of the study share the measure. The interval may be too short."
        )
    lines.append(f"- Spec `{claim['spec']}`, seeds {', '.join(map(str, claim['seeds']))}.")
    return lines


def _outcome(condition: Mapping[str, Any]) -> str:
    if condition["met"]:
        return "holds"
    is_contradicted = condition.get("contradicted", condition["met"] is False)
    return "contradicted" if is_contradicted else "unclear"


def _requirement(condition: Mapping[str, Any]) -> str:
    outcome = {True: "holds in every seed", False: "fails", None: "unclear in some seed"}
    return f"  - requires `{condition['rule']}`: {outcome[condition['met']]}"


def _timing(claim: Mapping[str, Any]) -> str:
    """When the rule was fixed, as far as the run's record proves it."""
    return {
        "before": ", fixed before the run",
        "after": ", written after a look at the data",
        "changed": ", changed after its first run",
        "exploratory": ", exploratory",
    }.get(claim.get("timing") or "", "")


def by_claim(results: Results) -> list[Mapping[str, Any]]:
    """The claims, those of one id together, in the order in which the ids first appear."""
    ids = list(dict.fromkeys(claim["claim"] for claim in results["claims"]))
    return sorted(results["claims"], key=lambda claim: ids.index(claim["claim"]))


def row_of(claim: Mapping[str, Any]) -> list[str]:
    """The cells of a claim, as in COLUMNS."""
    found = [with_interval(claim[name]) for name in ("effect", "attainable", "control")]
    return [claim["claim"], claim["task"], *found, str(len(claim["seeds"])), claim["verdict"]]


def with_interval(found: Mapping[str, Any] | None) -> str:
    """`0.79 [0.7, 0.86]`; a dash for a number that is undefined or absent."""
    if found is None or found["value"] is None:
        return "–"
    if found["low"] is None:
        return number(found["value"])
    return f"{number(found['value'])} [{number(found['low'])}, {number(found['high'])}]"


def text_table(results: Results) -> str:
    """The table for a terminal: columns aligned by blanks."""
    rows = [list(COLUMNS), *(row_of(claim) for claim in by_claim(results))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def findings(results: Results) -> str:
    """The short form for the README: one row per claim, one column per task."""
    tasks = sorted({claim["task"] for claim in results["claims"]})
    rows = []
    for claim_id in dict.fromkeys(claim["claim"] for claim in by_claim(results)):
        of_claim = [claim for claim in results["claims"] if claim["claim"] == claim_id]
        cells = [[_finding(claim) for claim in of_claim if claim["task"] == t] for t in tasks]
        rows.append([heading(results, claim_id), *("; ".join(cell) or "–" for cell in cells)])
    return "\n".join(markdown_table(["claim", *tasks], rows))


def _finding(claim: Mapping[str, Any]) -> str:
    effect = with_interval(claim["effect"])
    return f"**{claim['verdict']}**" + ("" if effect == "–" else f" {effect}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown; vertical bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines]


def index_page(results: Results, reports: Mapping[str, str]) -> str:
    """The study as one HTML page that links the report of each spec; text in it is escaped.

    Args:
        results: of the study.
        reports: by the name of a spec, the address of its report.
    """
    rows = [(claim, row_of(claim)) for claim in by_claim(results)]
    page = page_environment().get_template("study.html.j2")
    return page.render(
        report={"title": results["name"]},
        results=results,
        rows=rows,
        reports=reports,
        COLUMNS=COLUMNS,
        VERDICTS=VERDICTS,
    )
