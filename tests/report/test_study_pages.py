"""The pages of a study, from records alone."""

from __future__ import annotations

from mechmem.report.study_pages import (
    findings,
    index_page,
    markdown_table,
    results_page,
    text_table,
    with_interval,
)


def claim(**fields):
    return {
        "spec": "c7_fda",
        "claim": "C7",
        "task": "FDA",
        "says": "it returns",
        "verdict": "supported",
        "reason": "over 5 seeds: all hold",
        "rule": "returned >= 0.5",
        "timing": "before",
        "effect": {"value": 0.7912, "low": 0.7, "high": 0.86},
        "attainable": {"value": 0.98, "low": None, "high": None},
        "control": None,
        "seeds": [1, 2, 3, 4, 5],
        "conditions": [{"rule": "returned >= 0.5", "met": True, "found": "0.791 [0.7, 0.86]"}],
        "requires": [],
        "unpooled": [],
        "text": "It does.",
    } | fields


RESULTS = {
    "name": "paper",
    "folder": "paper",
    "question": "Which claims hold?",
    "titles": {"C7": "outlier neurons"},
    "failed": {},
    "claims": [
        claim(),
        claim(claim="C1", spec="c1_fda", effect={"value": None, "low": None, "high": None}),
        claim(task="THR", spec="c7_thr", verdict="not testable", text="", timing="changed"),
    ],
}


def test_an_effect_is_shown_with_its_interval():
    assert with_interval({"value": 0.7912, "low": 0.7, "high": 0.86}) == "0.791 [0.7, 0.86]"
    assert with_interval({"value": -0.5, "low": None, "high": None}) == "−0.5"
    assert with_interval({"value": None, "low": None, "high": None}) == "–"
    assert with_interval(None) == "–"


def test_the_page_says_whose_spread_is_known_from_its_own_seeds_alone():
    of = "- The spread between seeds of `returned` is known from these seeds alone"
    assert of not in results_page(RESULTS)
    assert of in results_page(RESULTS | {"claims": [claim(unpooled=["returned"])]})


def test_the_table_has_a_row_for_each_claim_and_task():
    assert text_table(RESULTS).splitlines() == [
        "claim  task  effect [95 % interval]  attainable  control  seeds  verdict",
        "C7     FDA   0.791 [0.7, 0.86]       0.98        –        5      supported",
        "C7     THR   0.791 [0.7, 0.86]       0.98        –        5      not testable",
        "C1     FDA   –                       0.98        –        5      supported",
    ]


def test_the_page_has_a_section_for_each_claim_and_task():
    lines = results_page(RESULTS).splitlines()
    assert lines[0].startswith("<!-- Written by `mechmem run`")
    assert lines[2] == "# Which claims hold?"
    assert "| C7 | THR | 0.791 [0.7, 0.86] | 0.98 | – | 5 | not testable |" in lines
    headings = [line for line in lines if line.startswith("##")]
    assert headings == [
        "## C7 outlier neurons",
        "### C7 on FDA: supported",
        "### C7 on THR: not testable",
        "## C1",
        "### C1 on FDA: supported",
    ]
    assert "- Rule, fixed before the run: `returned >= 0.5`." in lines
    assert "- Rule, changed after its first run: `returned >= 0.5`." in lines
    assert "  - `returned >= 0.5`: 0.791 [0.7, 0.86], holds" in lines
    assert lines.count("It does.") == 2
    assert lines.count("Nobody has interpreted this result yet.") == 1


def test_each_condition_and_precondition_is_shown_with_its_outcome():
    conditions = [
        {"rule": "a >= 1", "met": met, "contradicted": wrong, "found": "x"}
        for met, wrong in ((True, False), (False, True), (False, False), (None, False))
    ]
    requires = [{"rule": "b >= 1", "met": met, "found": {}} for met in (True, False, None)]
    page = results_page(RESULTS | {"claims": [claim(conditions=conditions, requires=requires)]})
    shown = [line for line in page.splitlines() if line.startswith("  - ")]
    assert [line.partition(": ")[2] for line in shown] == [
        "x, holds",
        "x, contradicted",
        "x, unclear",
        "x, unclear",
        "holds in every seed",
        "fails",
        "unclear in some seed",
    ]


def test_a_rule_of_unknown_time_is_not_called_fixed_before_the_run():
    results = RESULTS | {"claims": [claim(timing="")]}
    assert "- Rule: `returned >= 0.5`." in results_page(results).splitlines()


def test_a_failed_spec_is_named_on_the_pages():
    results = RESULTS | {"failed": {"c4": "no <b>memory</b>"}}
    assert "**c4 failed and is left out**: no <b>memory</b>" in results_page(results)
    reports = {"c7_fda": "a.html", "c7_thr": "b.html", "c1_fda": "c.html"}
    assert "c4: no &lt;b&gt;memory&lt;/b&gt;" in index_page(results, reports)


def test_the_short_form_has_one_row_for_a_claim():
    assert findings(RESULTS).splitlines() == [
        "| claim | FDA | THR |",
        "| --- | --- | --- |",
        "| C7 outlier neurons | **supported** 0.791 [0.7, 0.86] "
        "| **not testable** 0.791 [0.7, 0.86] |",
        "| C1 | **supported** | – |",
    ]


def test_bars_in_a_cell_do_not_end_it():
    assert markdown_table(["a"], [["x|y"]])[2] == "| x\\|y |"


def test_the_index_links_every_report_and_looks_like_a_report():
    reports = {"c7_fda": "../a/report.html", "c7_thr": "../b/report.html", "c1_fda": "../c/r.html"}
    page = index_page(RESULTS, reports)
    assert all(page.count(f'href="{address}"') == 2 for address in reports.values())
    assert 'class="badge not-testable"' in page
    assert page.count("</html>") == 1
    assert ".badge {" in page
    assert "http" not in page.replace('lang="en"', "")
