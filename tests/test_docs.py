"""Every block of Python in README and docs runs; every YAML block is a spec that is valid, or a
part of one.

Pages quote docstrings between `<!-- mechmem show KIND -->` and `<!-- end -->` exactly as the
command prints them; `pytest tests/test_docs.py --write-docs` updates the quotes.
"""

import json
import re
from pathlib import Path

import pytest

from mechmem.analyses.analysis import Analysis
from mechmem.cli import main as cli
from mechmem.experiment.dry_run import dry_run
from mechmem.experiment.spec import Experiment
from mechmem.experiment.study import Study, members_of
from mechmem.experiment.study_results import page as results_page
from mechmem.interventions.intervention import Intervention
from mechmem.report.study_pages import findings
from mechmem.spec.yaml_file import SpecFile
from mechmem.training.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
METHODS = sorted((ROOT / "docs" / "methods").glob("*.md"))
QUOTE = re.compile(r"<!-- mechmem show (\w+) -->\n.*?<!-- end -->", flags=re.DOTALL)
SPECS = sorted((ROOT / "experiments").glob("*.yaml"))
STUDIES = sorted(path.parent for path in (ROOT / "experiments").glob("*/study.yaml"))
RESULTS = ROOT / "docs" / "results.json"
FINDINGS = re.compile(r"(<!-- findings: docs/results.json -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks(page, "python")), str(page), "exec"), {})


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name
)
def test_yaml_of_a_page_is_valid(page, tmp_path):
    whole = [text for text in blocks(page, "yaml") if text.startswith("name:")]
    parts = [text for text in blocks(page, "yaml") if text.startswith("quantities:")]
    assert len(whole) + len(parts) == len(blocks(page, "yaml"))
    for text in whole:
        path = tmp_path / "spec.yaml"
        path.write_text(text)
        kind = Recipe if "\ntask:" in text else Experiment if "\ntraining:" in text else Study
        SpecFile(path).build(kind)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_every_shipped_experiment_can_run(path):
    dry_run(Experiment.from_yaml(path))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments/trainings").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_shipped_training_is_valid(path):
    assert SpecFile(path).build(Recipe).name == path.stem


def test_every_command_of_the_readme_names_files_that_exist():
    named = re.findall(
        r"(?:experiments|docs)/[\w/]+\.(?:yaml|md|png)", (ROOT / "README.md").read_text()
    )
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_method_has_a_page_that_quotes_it():
    quoted = {kind for page in METHODS for kind in QUOTE.findall(page.read_text())}
    assert sorted((Analysis.kinds().keys() | Intervention.kinds().keys()) - quoted) == []


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.name)
def test_a_page_quotes_the_docstrings_as_they_are(page, request, capsys):
    def quoted(found: re.Match) -> str:
        cli.show(found[1])
        shown = capsys.readouterr().out.rstrip()
        return f"<!-- mechmem show {found[1]} -->\n```text\n{shown}\n```\n<!-- end -->"

    text = page.read_text()
    current = QUOTE.sub(quoted, text)
    if request.config.getoption("write_docs"):
        page.write_text(current)
        return
    assert current == text


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.name)
def test_a_page_shows_pictures_that_exist(page):
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", page.read_text())
    assert [name for name in pictures if not (page.parent / name).exists()] == []


# Studies


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_every_spec_of_a_study_is_valid_and_every_claim_interpreted(folder):
    study = Study.from_folder(folder)
    members, failed = members_of(study, folder)
    assert failed == {}
    for member in members:
        dry_run(member.experiment)
        texts = study.interpretations.get(member.name, {})
        assert [claim.id for claim in member.experiment.claims if claim.id not in texts] == []


def shipped_results() -> dict:
    if not RESULTS.exists():
        pytest.skip("no study has written docs/results.json")
    return json.loads(RESULTS.read_text())


def test_the_results_page_is_what_its_records_give():
    found = shipped_results()
    assert (ROOT / "docs" / "results.md").read_text() == results_page(found)


def test_the_results_page_has_every_claim_of_its_study():
    """Also after a change: of a claim, a rule, a seed or an interpretation."""
    found = shipped_results()
    folder = ROOT / "experiments" / found["folder"]
    study = Study.from_folder(folder)
    members, _ = members_of(study, folder)
    expected = [
        (m.name, c.id, c.says, list(m.experiment.seeds), study.interpretations[m.name][c.id])
        for m in members
        for c in m.experiment.claims
    ]
    keys = ("spec", "claim", "says", "seeds", "interpretation")
    assert [tuple(claim[key] for key in keys) for claim in found["claims"]] == expected
    assert found["failed"] == {}


def test_the_findings_of_the_readme_are_those_of_the_results_page(request):
    found = shipped_results()
    page = ROOT / "README.md"
    assert FINDINGS.search(page.read_text())
    text = FINDINGS.sub(lambda m: f"{m[1]}{findings(found)}\n{m[2]}", page.read_text())
    if request.config.getoption("write_docs"):
        page.write_text(text)
        return
    assert page.read_text() == text
