"""Studies: every spec of a folder is run, failures cost only themselves, and the pages are what
the records give."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from mechmem.analyses.effects.effect import EffectAnalysis
from mechmem.experiment import study as engine
from mechmem.experiment.results import Run
from mechmem.experiment.spec import Experiment
from mechmem.experiment.study import Study, members_of, project_of, run_study
from mechmem.experiment.study_results import (
    claim_records,
    interpreted,
    looked_up,
    page,
    rounded,
    task_names,
)
from mechmem.progress import ProgressCallback
from mechmem.spec.errors import InputError
from mechmem.spec.yaml_file import SpecError, write_spec
from mechmem.training.store import own_folder

STUDY = """\
name: both
question: What is remembered?
seeds: [0]
own_seeds: [b_other.yaml]
titles: {C7: outlier neurons}
interpretations:
  a_small:
    C7: "The rule `{rule}` is {verdict} over {seeds} seeds: {returned.number}, from {interval}."
results: docs/results.md
"""


@pytest.fixture
def folder(spec, trained, recipe, tmp_path, monkeypatch) -> Path:
    """A project with a study of two specs on the tiny training."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    shutil.copytree(trained.folder, own_folder(recipe, 0, tmp_path / "runs"))
    study = tmp_path / "experiments" / "both"
    study.mkdir(parents=True)
    (study / "study.yaml").write_text(STUDY)
    grid = {
        "kind": "patch_grid",
        "site": {"each": ["neurons"]},
        "layer": {"each": [1]},
        "source": {"checkpoint": "before"},
    }
    grid["measures"] = ["logit_difference"]
    for name, n in (("a_small", 4), ("b_other", 6)):
        examples = {"noisy": {"noisy": True, "n": n}}
        block = spec(name=name, examples=examples, analyses=[grid], figures=[])
        (study / f"{name}.yaml").write_text(write_spec(Experiment.model_validate(block)))
    return study


class Heard(ProgressCallback):
    """Records the parts and the notes of a study."""

    def __init__(self) -> None:
        self.parts, self.notes = [], []
        super().__init__(note=self.notes.append, part=lambda *event: self.parts.append(event))


def change(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


# --- what a study is


def test_a_study_is_every_spec_of_the_folder_in_order(folder):
    study = Study.from_folder(folder)
    assert list(study.files(folder)) == ["a_small", "b_other"]
    chosen = Study.from_folder(folder, ["specs=[b_other.yaml]"])
    assert list(chosen.files(folder)) == ["b_other"]


def test_seeds_are_those_of_the_study_unless_a_spec_keeps_its_own(folder):
    members, failed = members_of(Study.from_folder(folder, ["seeds=[0, 1]"]), folder)
    assert failed == {}
    assert [member.experiment.seeds for member in members] == [(0, 1), (0,)]
    members, _ = members_of(Study.from_folder(folder, ["seeds=null"]), folder, ["backend=hooked"])
    assert [member.experiment.seeds for member in members] == [(0,), (0,)]
    assert {member.experiment.backend for member in members} == {"hooked"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("specs=[a_smal.yaml]", "a_smal.yaml does not exist; did you mean 'a_small.yaml'?"),
        ("own_seeds=[a_smal.yaml]", "the study has no spec 'a_smal.yaml'; did you mean"),
        ("interpretations={c: {C7: x}}", "the study has no spec 'c'"),
        ("results=/etc/results.md", "must be an .md file below the project's folder"),
        ("results=../results.md", "must be an .md file below the project's folder"),
        ("results=docs/results.txt", "must be an .md file below the project's folder"),
        ("name=trainings", "runs/trainings is used by mechmem itself"),
        ("sedes=[1]", "study has no key 'sedes'; did you mean 'seeds'?"),
    ],
)
def test_a_wrong_study_is_refused(override, message, folder):
    with pytest.raises(SpecError, match=re.escape(message)):
        Study.from_folder(folder, [override])


def test_a_wrong_key_is_told_with_its_place(folder):
    change(folder / "study.yaml", "seeds:", "sedes:")
    with pytest.raises(SpecError, match=r"both/study.yaml:3:1: sedes: study has no key 'sedes'"):
        Study.from_folder(folder)


def test_a_folder_without_study_yaml_is_none(tmp_path):
    with pytest.raises(SpecError, match=r"is a folder; name a \.yaml file in it"):
        Study.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{retruned.percent}", "refers to 'retruned'; did you mean 'returned'?"),
        ("{verdikt}", "refers to 'verdikt'; did you mean 'verdict'?"),
        ("{verdict.percent}", "refers to 'verdict'"),
        ("{", "cannot be filled in"),
    ],
)
def test_an_interpretation_with_an_unknown_placeholder_fails_before_the_run(text, message, folder):
    (folder / "study.yaml").write_text(re.sub(r'C7: ".*"', f'C7: "{text}"', STUDY))
    _, failed = members_of(Study.from_folder(folder), folder)
    assert list(failed) == ["a_small"]
    assert message in failed["a_small"]


def test_an_interpretation_of_an_unknown_claim_is_refused(folder):
    change(folder / "study.yaml", '    C7: "', '    C9: "')
    _, failed = members_of(Study.from_folder(folder), folder)
    assert "interprets the claim 'C9'" in failed["a_small"]


# --- a run


def test_a_study_runs_every_spec_and_writes_its_pages(folder):
    heard = Heard()
    found = run_study(folder, progress=heard)
    assert found.failed == {}
    assert list(found.runs) == ["a_small", "b_other"]
    assert [claim["spec"] for claim in found.results["claims"]] == ["a_small", "b_other"]
    first, second = found.results["claims"]
    assert (first["claim"], first["task"], first["seeds"]) == ("C7", "FDA", [0])
    assert second["interpretation"] == ""
    assert first["effect"] == rounded(
        {
            "value": found.runs["a_small"].claims[0]["effect"],
            "low": found.runs["a_small"].claims[0]["interval"][0],
            "high": found.runs["a_small"].claims[0]["interval"][1],
        }
    )
    assert [part[:3] for part in heard.parts] == [("a_small", 0, 2), ("b_other", 1, 2)]
    assert heard.parts[0][3] is None
    assert heard.parts[1][3] > 0
    index = found.index.read_text()
    links = re.findall(r'href="(\.\./[^"]+)"', index)
    assert {(found.folder / link).resolve() for link in links} == {
        run.report.resolve() for run in found.runs.values()
    }
    assert json.loads((found.folder / "results.json").read_text()) == found.results
    # The page in the project is what its records give, and both equal those among the runs.
    assert [path.name for path in found.written] == ["results.md", "results.json"]
    written = json.loads(Path("docs/results.json").read_text())
    assert Path("docs/results.md").read_text() == page(written)
    assert (found.folder / "results.md").read_text() == page(written)


def test_the_rules_of_all_specs_are_on_record_before_the_first_is_run(folder):
    # Both read tables of the same training: one run after the other, the second would count as
    # written after a look at its data.
    found = run_study(folder)
    assert [claim["timing"] for claim in found.results["claims"]] == ["before", "before"]


def test_a_second_run_computes_nothing_and_gives_the_same_bytes(folder, monkeypatch):
    first = run_study(folder)
    before = {path: path.read_bytes() for path in (*first.written, first.index)}
    monkeypatch.setattr(EffectAnalysis, "table", lambda *_: pytest.fail("an analysis was computed"))
    assert run_study(folder).results == first.results
    assert {path: path.read_bytes() for path in before} == before


def test_an_interrupted_study_goes_on_where_it_was(folder, monkeypatch):
    real, ran = engine.run, []

    def interrupted(experiment, *rest):
        if experiment.name == "b_other":
            raise KeyboardInterrupt
        return real(experiment, *rest)

    monkeypatch.setattr(engine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(folder)
    monkeypatch.setattr(engine, "run", real)
    table = EffectAnalysis.table
    monkeypatch.setattr(EffectAnalysis, "table", lambda *a: ran.append(a) or table(*a))
    assert list(run_study(folder).runs) == ["a_small", "b_other"]
    assert len(ran) == 1  # the one cell of b_other


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: patch_grid", "kind: patch_gird", "did you mean 'patch_grid'?"),  # no valid spec
        ("prefix: given", "prefix: gvien", "a_small.yaml:"),  # found by the run, with its place
    ],
)
def test_a_spec_that_fails_is_named_and_the_others_are_run(old, new, message, folder):
    change(folder / "a_small.yaml", old, new)
    heard = Heard()
    found = run_study(folder, progress=heard)
    assert list(found.failed) == ["a_small"]
    assert message in found.failed["a_small"]
    assert list(found.runs) == ["b_other"]
    assert heard.notes == [f"a_small failed: {found.failed['a_small']}"]
    assert "a_small failed and is left out" in (found.folder / "results.md").read_text()
    assert "a_small: " in found.index.read_text()
    assert found.written == ()
    assert found.note == "docs/results.md was left as it is: a spec failed"
    assert not Path("docs").exists()


def test_an_error_that_nobody_foresaw_costs_one_spec_and_names_its_line(folder, monkeypatch):
    real = engine.run

    def broken(experiment, *rest):
        if experiment.name == "a_small":
            raise KeyError("x")
        return real(experiment, *rest)

    monkeypatch.setattr(engine, "run", broken)
    found = run_study(folder)
    assert re.fullmatch(r"KeyError: 'x' \(test_study.py:\d+\)", found.failed["a_small"])
    assert list(found.runs) == ["b_other"]


# --- the page in the project


def test_an_overridden_study_leaves_the_page_of_the_project_alone(folder):
    found = run_study(folder, ["seeds=[0]"])
    assert found.written == ()
    assert found.note == "docs/results.md was left as it is: study.yaml was overridden"
    assert (found.folder / "results.md").exists()


def test_a_page_that_somebody_wrote_is_not_replaced(folder):
    Path("docs").mkdir()
    Path("docs/results.md").write_text("# My results\n")
    with pytest.raises(InputError, match="was not written by `mechmem run`"):
        run_study(folder)
    assert Path("docs/results.md").read_text() == "# My results\n"
    assert Path("runs/both/results.md").exists()


def test_a_link_out_of_the_project_is_not_followed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    Path("docs").symlink_to(outside)
    with pytest.raises(InputError, match="lies outside of the project"):
        run_study(folder)
    assert list(outside.iterdir()) == []


def test_the_project_is_the_nearest_folder_that_is_one(folder, tmp_path):
    assert project_of(folder) == tmp_path.resolve()
    alone = tmp_path / "pyproject.toml"
    alone.unlink()
    (folder.parent / ".git").mkdir()
    assert project_of(folder) == folder.parent.resolve()


# --- records


def test_records_are_rounded_to_four_digits_and_null_for_undefined():
    assert rounded(
        {"a": [0.123456, float("nan")], "b": 12345.6, "c": [float("inf"), 3], "d": "x"}
    ) == {
        "a": [0.1235, None],
        "b": 12350.0,
        "c": ["∞", 3],
        "d": "x",
    }


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, None),
        ("returned", {"value": 0.5, "low": 0.4, "high": 0.6}),
        (0.25, {"value": 0.25, "low": None, "high": None}),
        (
            {"quantity": "returned", "value": 0.5, "interval": [0.25, float("inf")]},
            {"value": 0.5, "low": 0.25, "high": "∞"},
        ),
    ],
)
def test_a_number_next_to_the_effect_is_a_quantity_or_a_value(found, expected):
    assert looked_up(found, {"returned": {"value": 0.5, "low": 0.4, "high": 0.6}}) == expected


@pytest.mark.parametrize(
    ("n_seeds", "pooled", "expected"),
    [(5, (), ["returned"]), (5, ("logit_difference",), []), (1, (), [])],
)
def test_a_record_names_the_judged_quantities_whose_spread_is_not_pooled(
    n_seeds, pooled, expected, experiment
):
    found = {"value": 0.5, "n_seeds": n_seeds, "measure": "logit_difference"}
    run = Run(Path(), {"claims": [{"id": "C7"}], "quantities": {"returned": found}})
    (record,) = claim_records("small", experiment, run, {}, pooled)
    assert record["unpooled"] == expected


def test_tasks_are_named_by_their_initials(experiment):
    assert task_names(experiment) == "FDA"


RECORD = {
    "claim": "C7",
    "task": "FDA",
    "verdict": "supported",
    "reason": "over 5 seeds: all hold",
    "rule": "returned >= 0.5",
    "seeds": [1, 2, 3, 4, 5],
    "effect": {"value": 0.7912, "low": 0.7, "high": 0.8634},
    "attainable": {"value": 0.98, "low": None, "high": None},
    "control": None,
    "quantities": {
        "clean": {"value": 0.98, "low": 0.97, "high": 0.99, "n_seeds": 5, "labels": {"layer": 2}}
    },
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{verdict} on {task}, {seeds} seeds", "supported on FDA, 5 seeds"),
        ("{effect}, {interval}", "0.791, 0.7 to 0.863"),
        ("{effect.percent} of {attainable.percent}", "79 % [70, 86] of 98 %"),
        ("{control} and {control.percent}", "– and undefined"),
        ("layer {clean.layer}:\n  {clean.points}", "layer 2: +98 points [+97, +99]"),
        ("", ""),
    ],
)
def test_an_interpretation_takes_its_numbers_from_the_record(text, expected):
    assert interpreted(RECORD | {"interpretation": text}) == expected


def test_an_interpretation_cannot_reach_anything_private():
    with pytest.raises(InputError):
        interpreted(RECORD | {"interpretation": "{effect.__class__}"})
