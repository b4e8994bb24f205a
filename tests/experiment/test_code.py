from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mechmem
from mechmem.analyses.analysis import Analysis
from mechmem.analyses.dynamics import Dynamics
from mechmem.analyses.effects.patch_grid import PatchGrid
from mechmem.experiment import code
from mechmem.experiment.code import code_hash, imported, syntax
from mechmem.experiment.spec import PLUGINS, load_plugins
from mechmem.interventions.patch import Source
from mechmem.spec.registry import Component

PACKAGE = Path(mechmem.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
GRID = PatchGrid(site="z", layer=0, source=Source(checkpoint="before"))

PLAIN = '''"""Module."""
import pandas as pd
from mechmem.analyses.analysis import Analysis
from mechmem.spec.sweep import Swept


class Plugged(Analysis):
    """What it does."""

    factor: Swept[int] = 2
    """What it is."""

    def table(self, session):
        return pd.DataFrame({"n": [self.factor * 3]})  # why
'''


# Syntax trees


@every_file
def test_layout_and_comments_of_a_file_do_not_count(path):
    source = path.read_text()
    assert syntax("# first\n\n" + source + "\n# last\n") == syntax(source)
    assert syntax(ast.unparse(ast.parse(source))) == syntax(source)


@every_file
def test_texts_that_describe_do_not_count(path):
    class Reworded(ast.NodeTransformer):
        def visit_Expr(self, node):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                node.value.value = "Other words."
            return node

    source = path.read_text()
    reworded = ast.unparse(ast.fix_missing_locations(Reworded().visit(ast.parse(source))))
    assert syntax(reworded) == syntax(source)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("* 3", "* 4"),
        ("* 3", "+ 3"),
        ("factor: Swept[int] = 2", "factor: Swept[int] = 3"),
        ('{"n"', '{"m"'),
        ("import pandas as pd", "import numpy as pd"),
        ("(Analysis)", "(Other)"),
    ],
)
def test_every_other_change_counts(old, new):
    assert old in PLAIN
    assert syntax(PLAIN.replace(old, new)) != syntax(PLAIN)


# Imports


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("import mechmem.models.sites", {"mechmem.models.sites"}),
        ("import mechmem.models.sites as s", {"mechmem.models.sites"}),
        ("from mechmem.models import sites", {"mechmem.models", "mechmem.models.sites"}),
        ("def f():\n    from mechmem.models.sites import x", {"mechmem.models.sites"}),
        ("from mechmem import Patch", {"mechmem.interventions.patch"}),
        ("import mechmem as mm\nmm.Patch()", {"mechmem.interventions.patch"}),
        ("import mechmem\nx = [mechmem.Patch]", {"mechmem.interventions.patch"}),
        ("if TYPE_CHECKING:\n    import mechmem.api\nelse:\n    import a", {"a"}),
        ("from . import other", {"pack", "pack.other"}),
        ("from .other import x", {"pack.other"}),
    ],
)
def test_the_modules_that_a_source_imports(source, modules):
    found = imported(source, "pack.module")
    assert modules <= found
    assert "mechmem.api" not in found


def test_what_an_analysis_loads_is_in_its_hash():
    """In a fresh process, everything of ours that the module of an analysis brings with it."""
    program = (
        "import sys, mechmem.analyses.effects.patch_grid\n"
        "print(*(name for name in sys.modules if name.startswith('mechmem.')))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modules = {
        base.__module__ for base in PatchGrid.__mro__ if not code._is_library(base.__module__)
    }
    assert set(ran.stdout.split()) <= set(code._sources(modules))


# Hashes of components


@pytest.fixture
def plugged(tmp_path):
    """A function that loads the plug-in with this source and returns its analysis."""

    def load(source: str) -> Component:
        (tmp_path / "mine.py").write_text(source)
        load_plugins(["mine.py"], tmp_path)
        return Analysis.kinds()["plugged"]()

    yield load
    Analysis.registries["analysis"].pop("plugged")
    PLUGINS.pop("mine.py")


def test_a_plugin_with_other_comments_and_docstrings_has_the_same_hash(plugged):
    first = code_hash([plugged(PLAIN)])
    reworded = PLAIN.replace("What it does.", "All that it does.").replace("# why", "# why not")
    assert reworded.count("All that") == reworded.count("why not") == 1
    assert code_hash([plugged("# new\n" + reworded)]) == first


def test_a_plugin_with_other_code_has_another_hash(plugged):
    first = code_hash([plugged(PLAIN)])
    assert code_hash([plugged(PLAIN.replace("* 3", "* 4"))]) != first


@pytest.fixture
def changed(monkeypatch, tmp_path):
    """A function that puts other source in the place of a module of the package."""

    def change(module: str, source: str) -> None:
        file = code._file
        (tmp_path / "changed.py").write_text(source)
        monkeypatch.setattr(
            code, "_file", lambda name: tmp_path / "changed.py" if name == module else file(name)
        )
        code._hash_of.cache_clear()

    yield change
    code._hash_of.cache_clear()


@pytest.mark.parametrize(
    ("module", "is_run"),
    [
        ("mechmem.statistics.intervals", True),
        ("mechmem.analyses.analysis", True),
        ("mechmem.session", True),
        ("mechmem.measures.accuracy", True),
        ("mechmem.analyses.readouts.probe", False),
        ("mechmem.experiment.claims", False),
        ("mechmem.report.report", False),
    ],
)
def test_only_code_that_an_analysis_runs_changes_its_hash(module, is_run, changed):
    source, before = code._file(module).read_text(), code_hash([GRID])
    changed(module, f"# a comment\n{source}\n'a text'\n")
    assert code_hash([GRID]) == before
    changed(module, f"{source}\nNEW = 1\n")
    assert (code_hash([GRID]) != before) == is_run


def test_the_parts_of_a_component_count():
    from mechmem.measures.kl import KL

    assert code_hash([GRID]) != code_hash([GRID.model_copy(update={"measures": (KL(),)})])
    assert code_hash([GRID]) == code_hash([GRID.model_copy(update={"layer": 1})])
    assert code_hash([GRID]) != code_hash([Dynamics()])


def test_code_without_a_file_is_taken_from_no_other_process():
    made = type("Fleeting", (Dynamics,), {"__module__": "gone"})
    try:
        assert code._sources({"gone"}) == {"gone": None}
        program = "from mechmem.experiment.code import UNKNOWN; print(UNKNOWN)"
        ran = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert ran.stdout.strip() != code.UNKNOWN
        assert code_hash([made()]) != code_hash([Dynamics()])
    finally:
        Analysis.registries["analysis"].pop("fleeting")
