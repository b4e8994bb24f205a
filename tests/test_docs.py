"""Every block of Python in README and docs runs; every YAML block is a spec that is valid, or a part of one."""

import re
from pathlib import Path

import pytest

from mechmem.experiment import Experiment
from mechmem.recipe import Recipe
from mechmem.runs import rehearse
from mechmem.specs import SpecFile

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SPECS = sorted((ROOT / "experiments").glob("*.yaml"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks(page, "python")), str(page), "exec"), {})


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
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
    rehearse(Experiment.from_yaml(path))


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/trainings").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_training_is_valid(path):
    assert SpecFile(path).build(Recipe).name == path.stem


def test_every_command_of_the_readme_names_files_that_exist():
    named = re.findall(r"(?:experiments|docs)/[\w/]+\.(?:yaml|md|png)", (ROOT / "README.md").read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
