"""Every block of Python in README and docs runs; every YAML block is a spec that is valid, or a
part of one.

Pages quote docstrings between `<!-- mechmem show KIND -->` and `<!-- end -->` exactly as the
command prints them; `pytest tests/test_docs.py --write-docs` updates the quotes.
"""

import re
from pathlib import Path

import pytest

from mechmem.analyses.analysis import Analysis
from mechmem.cli import main as cli
from mechmem.experiment.dry_run import dry_run
from mechmem.experiment.spec import Experiment
from mechmem.interventions.intervention import Intervention
from mechmem.spec.yaml_file import SpecFile
from mechmem.training.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
METHODS = sorted((ROOT / "docs" / "methods").glob("*.md"))
QUOTE = re.compile(r"<!-- mechmem show (\w+) -->\n.*?<!-- end -->", flags=re.DOTALL)
SPECS = sorted((ROOT / "experiments").glob("*.yaml"))


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
        SpecFile(path).build(Recipe if "\ntask:" in text else Experiment)


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
