from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from mechmem.analyses.analysis import Analysis
from mechmem.experiment import cells as home
from mechmem.experiment.cells import TrainedRun
from mechmem.experiment.dry_run import dry_run
from mechmem.experiment.results import all_runs, draw, load_run
from mechmem.experiment.run import run
from mechmem.experiment.spec import PLUGINS, Experiment, load_plugins
from mechmem.progress import ProgressCallback
from mechmem.spec import files
from mechmem.spec.errors import BlockError, InputError
from mechmem.spec.files import FileError, write_record
from mechmem.spec.yaml_file import write_spec
from mechmem.training import loop as training

BARE = {"figures": [], "quantities": {}, "claims": [], "answer": ""}
"""For an experiment without the tables that the small one reads."""


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """The tables of which something is computed, as it is computed, also in a dry run."""
    names, plain, compute = [], Analysis.run, TrainedRun._compute

    def recorded(analysis, session, sweep_domain):
        names.append(analysis.table_name)
        return plain(analysis, session, sweep_domain)

    def recorded_cells(trained_run, cells, store):
        names.extend(dict.fromkeys(cell.analysis.table_name for cell in cells))
        return compute(trained_run, cells, store)

    monkeypatch.setattr(Analysis, "run", recorded)
    monkeypatch.setattr(TrainedRun, "_compute", recorded_cells)
    return names


@pytest.fixture
def no_models(monkeypatch) -> None:
    """No model is trained, loaded or analysed."""
    owners = (
        (training, "_Run"),
        (home.Trained, "at"),
        (home, "Session"),
        (Analysis, "run"),
    )
    for owner, name in owners:
        monkeypatch.setattr(
            owner, name, lambda *a, name=name, **k: pytest.fail(f"{name} was called")
        )


# --- what a run leaves


def test_a_run_folder_keeps_the_spec_tables_figures_record_and_report(made, experiment):
    files = {
        str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()
    }
    assert files - {".lock"} == {
        "experiment.yaml",
        "run.json",
        "report.html",
        "tables/dynamics.parquet",
        "tables/patch_grid.parquet",
        "tables/neuron_shift.parquet",
        "figures/1_curves_dynamics.json",
    }
    assert Experiment.from_yaml(made.folder / "experiment.yaml") == experiment
    assert made.folder.name == f"small-{experiment.content_hash}"


def test_the_record_says_what_was_found_and_where_it_comes_from(made):
    record = load_run(made.folder).record
    assert record == made.record
    assert record["answer"] == made.answer
    assert made.answer.startswith("Layer ")
    assert record["quantities"]["returned"]["labels"]["site"] == "neurons"
    (claim,) = made.claims
    assert (claim["id"], claim["verdict"]) == ("C7", "undetermined")
    assert "1 of the 3 seeds" in claim["reason"]
    assert record["provenance"]["versions"]["torch"]
    assert record["seconds"] > 0


def test_tables_hold_the_seed_and_all_that_was_swept(made):
    assert set(made.tables) == {"dynamics", "patch_grid", "neuron_shift"}
    table = made.table("patch_grid")
    assert list(table.columns[:3]) == ["seed", "site", "layer"]
    assert set(table["seed"]) == {0}
    cells = table[["site", "layer"]].drop_duplicates().to_numpy().tolist()
    assert cells == [["neurons", 0], ["neurons", 1], ["attn_out", 0], ["attn_out", 1]]
    assert set(table["condition"]) == {"baseline", "intervened", "control", "source"}
    with pytest.raises(
        InputError, match="has no table 'patchgrid'; it has dynamics, neuron_shift, patch_grid"
    ):
        made.table("patchgrid")


def test_the_report_holds_the_question_the_answer_and_the_figures(made):
    page = made.report.read_text()
    assert "Does anything come back?" in page
    assert made.answer in page
    assert "Curves" in page
    assert "One seed" in page


def test_a_summary_names_every_file(made):
    summary = made.summary()
    assert summary["name"] == "small"
    paths = [
        *summary["tables"].values(),
        *summary["figures"].values(),
        summary["report"],
        summary["folder"],
    ]
    assert len(paths) == 6
    assert all(Path(path).exists() for path in paths)


# --- what is computed again, and what is not


def test_a_second_run_computes_nothing(experiment, runs, no_models):
    before = load_run(next(iter(all_runs(runs)))).record
    again = run(experiment, runs)
    assert again.record == before


@pytest.mark.parametrize(
    "change",
    [
        {
            "figures": [
                {
                    "kind": "heatmap",
                    "table": "neuron_shift",
                    "x": "neuron",
                    "y": "layer",
                    "value": "auc",
                }
            ]
        },
        {"answer": "Other words."},
        {"question": "Why?"},
        {"claims": []},
        {"name": "renamed"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_only_shown_touches_no_model(spec, change, made, runs, no_models):
    changed = run(Experiment.model_validate(spec(**change)), runs)
    assert changed.folder.name != made.folder.name
    for name in made.tables:
        pd.testing.assert_frame_equal(changed.table(name), made.table(name))
    assert len(all_runs(runs)) == 2


def test_a_changed_analysis_computes_itself_alone(spec, runs, computed):
    block = spec()
    block["analyses"][2] = {"kind": "neuron_shift", "matched": "clean", "examples": "clean"}
    run(Experiment.model_validate(block), runs)
    assert computed == ["neuron_shift"]


def test_a_renamed_analysis_is_not_computed_again(spec, runs, no_models):
    block = spec()
    block["analyses"][2] = {"kind": "neuron_shift", "name": "moved"}
    assert "moved" in run(Experiment.model_validate(block), runs).tables


def test_a_changed_example_set_computes_what_names_it(spec, runs, computed):
    block = spec()
    block["examples"]["clean"]["n"] = 6
    run(Experiment.model_validate(block), runs)
    assert computed == ["neuron_shift"]
    block["examples"]["noisy"]["n"] = 6
    run(Experiment.model_validate(block), runs)
    assert computed[1:] == ["patch_grid", "neuron_shift"]


def test_a_changed_checkpoint_computes_what_names_it(spec, runs, computed):
    block = spec(checkpoints={"before": {"step": 10}, "after": "final"})
    run(Experiment.model_validate(block), runs)
    assert computed == ["patch_grid", "neuron_shift"]


def test_an_analysis_of_all_sets_is_computed_again_when_one_comes(spec, runs, computed):
    block = spec()
    block["analyses"] = [
        block["analyses"][1]
        | {"examples": {"each": "all"}, "site": "attn_out", "layer": 0, "measures": ["kl"]}
    ]
    first = run(Experiment.model_validate(block | BARE), runs)
    assert set(first.table("patch_grid")["examples"]) == {"noisy", "clean"}
    block["examples"]["held_out"] = {"split": "held_out", "n": 4}
    second = run(Experiment.model_validate(block | BARE), runs)
    assert set(second.table("patch_grid")["examples"]) == {"noisy", "clean", "held_out"}


def test_another_seed_is_trained_and_computed_beside_the_first(spec, made, runs, computed):
    both = run(Experiment.model_validate(spec(seeds=[0, 1])), runs)
    assert computed == [*["dynamics", "patch_grid", "neuron_shift"] * 2]  # a rehearsal, then seed 1
    table = both.table("patch_grid")
    assert table["seed"].unique().tolist() == [0, 1]
    first = table[table["seed"] == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(first, made.table("patch_grid"))
    second = table[table["seed"] == 1].reset_index(drop=True)
    assert not second["value"].equals(first["value"])
    assert both.record["quantities"]["returned"]["n_seeds"] == 2
    assert "2 of the 3 seeds" in both.claims[0]["reason"]
    assert "One seed" not in both.report.read_text()


@pytest.mark.parametrize("n_kept", [0, 100])
def test_a_chunk_that_was_cut_off_is_computed_again(n_kept, experiment, made, runs, computed):
    chunks = sorted((runs / "cells").glob("*/*.parquet"))
    assert len(chunks) == 3
    for path in chunks:
        path.write_bytes(path.read_bytes()[:n_kept])
    again = run(experiment, runs)
    assert computed == ["dynamics", "patch_grid", "neuron_shift"]
    for name in made.tables:
        pd.testing.assert_frame_equal(again.table(name), made.table(name))


def test_changed_code_computes_everything_again(experiment, runs, computed, monkeypatch):
    monkeypatch.setattr(home, "code_hash", lambda _: "other")
    run(experiment, runs)
    assert computed == ["dynamics", "patch_grid", "neuron_shift"]


def test_drawing_reads_the_saved_tables_only(runs, no_models):
    finished = load_run(all_runs(runs)[0])
    figure = next(iter(finished.figures.values()))
    before = (figure.read_bytes(), finished.report.read_bytes())
    figure.unlink()
    finished.report.unlink()
    shutil.rmtree(runs / "trainings")
    shutil.rmtree(runs / "cells")
    draw(finished)
    assert (figure.read_bytes(), finished.report.read_bytes()) == before


def test_the_record_and_the_log_tell_which_backend_ran_a_model_and_why(spec, runs, monkeypatch):
    found = {"before": ("hooked", "it has hooks of yours"), "after": ("fast", "it is supported")}
    monkeypatch.setattr(TrainedRun, "backends", found)
    said = []
    block = spec()
    block["examples"]["clean"]["n"] = 6
    finished = run(Experiment.model_validate(block), runs, ProgressCallback(say=said.append))
    assert finished.record["provenance"]["backends"] == {
        "before": ["hooked: it has hooks of yours"],
        "after": ["fast: it is supported"],
    }
    assert "model before ran on the backend hooked: it has hooks of yours" in said
    assert len(said) == len(set(said))
    assert "it has hooks of yours" in finished.report.read_text()


# --- sweeps of the training, other trainings, plugins


def test_a_swept_recipe_is_a_column_of_every_table(spec, recipe, tmp_path):
    block = recipe.model_copy(
        update={"optimisation": recipe.optimisation.model_copy(update={"n_steps": 2})}
    ).block()
    block["architecture"]["d_mlp"] = {"each": [8, 12]}
    ends = {"before": "initial", "after": "final"}
    swept = spec(
        training=block,
        analyses=[{"kind": "dynamics"}, {"kind": "neuron_shift"}],
        checkpoints=ends,
        **BARE,
    )
    said = []
    finished = run(
        Experiment.model_validate(swept),
        tmp_path,
        ProgressCallback(train=lambda name, *_: said.append(name)),
    )
    table = finished.table("neuron_shift")
    assert list(dict.fromkeys(said)) == ["tiny d_mlp 8 seed 0", "tiny d_mlp 12 seed 0"]
    assert table.groupby("d_mlp")["neuron"].max().to_dict() == {8: 7, 12: 11}
    assert len(list((tmp_path / "trainings").iterdir())) == 2


def test_a_checkpoint_may_be_of_another_training(spec, recipe, tmp_path):
    short = recipe.model_copy(
        update={"optimisation": recipe.optimisation.model_copy(update={"n_steps": 2})}
    )
    other = short.model_copy(
        update={
            "name": "twin",
            "optimisation": short.optimisation.model_copy(update={"n_steps": 1}),
        }
    )
    refs = {"before": {"phase": "final", "training": other.block()}, "after": "final"}
    block = spec(
        training=short.block(), checkpoints=refs, analyses=[{"kind": "neuron_shift"}], **BARE
    )
    finished = run(Experiment.model_validate(block), tmp_path)
    assert finished.table("neuron_shift")["shift_noisy"].max() > 0
    assert {path.name.rsplit("-", 1)[0] for path in (tmp_path / "trainings").iterdir()} == {
        "tiny",
        "twin",
    }


def test_several_trainings_stand_in_one_table_by_name(spec, recipe, tmp_path):
    short = recipe.model_copy(
        update={"optimisation": recipe.optimisation.model_copy(update={"n_steps": 1})}
    )
    other = short.model_copy(
        update={
            "name": "narrow",
            "architecture": short.architecture.model_copy(update={"d_mlp": 8}),
        }
    )
    block = spec(
        training=short.block(), also=[other.block()], analyses=[{"kind": "neuron_shift"}], **BARE
    )
    block["checkpoints"] = {"before": "initial", "after": "final"}
    table = run(Experiment.model_validate(block), tmp_path).table("neuron_shift")
    assert table.groupby("training")["neuron"].max().to_dict() == {"tiny": 23, "narrow": 7}


PLUGIN = """
from __future__ import annotations

import pandas as pd
from mechmem.spec.references import ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.analyses.analysis import Analysis

class CountedExamples(Analysis):
    columns = {"n": "number"}
    of: Swept[ExampleSetName] = ExampleSetName("noisy")

    def table(self, session):
        return pd.DataFrame({"n": [FACTOR * len(session.examples(self.of))]})
"""


@pytest.fixture
def plugged(spec, tmp_path):
    """A spec with a plugin beside it, and a function that writes the plugin; the registry is as
    before afterwards."""
    folder = tmp_path / "specs"
    folder.mkdir()
    (folder / "mine.py").write_text(PLUGIN.replace("FACTOR", "1"))
    load_plugins(["mine.py"], folder)
    named = {"checkpoints": {}, "examples": {"noisy": {"noisy": True, "n": 8}}}
    block = spec(analyses=[{"kind": "counted_examples"}], plugins=["mine.py"], **named, **BARE)
    (folder / "spec.yaml").write_text(write_spec(Experiment.model_validate(block)))
    yield (
        folder / "spec.yaml",
        lambda factor: (folder / "mine.py").write_text(PLUGIN.replace("FACTOR", str(factor))),
    )
    Analysis.registries["analysis"].pop("counted_examples")
    PLUGINS.pop("mine.py")


def test_changed_code_of_a_plugin_computes_again(plugged, runs):
    path, write = plugged
    assert run(Experiment.from_yaml(path), runs).table("counted_examples")["n"].tolist() == [8]
    write(3)
    assert run(Experiment.from_yaml(path), runs).table("counted_examples")["n"].tolist() == [24]


def test_a_run_with_a_plugin_can_be_loaded_and_drawn_without_the_spec(plugged, runs):
    path, _ = plugged
    folder = run(Experiment.from_yaml(path), runs).folder
    shutil.rmtree(path.parent)
    with pytest.raises(InputError, match=r"has plug-ins \(mine\.py\), which would be executed"):
        draw(load_run(folder))
    draw(load_run(folder, trust_plugins=True))


def test_reading_the_results_of_a_run_runs_no_code_of_its_folder(plugged, runs):
    path, _ = plugged
    folder = run(Experiment.from_yaml(path), runs).folder
    (folder / "mine.py").write_text("raise SystemExit('this was run')")
    found = load_run(folder)
    assert (found.question, found.answer) == (found.record["question"], found.record["answer"])
    assert found.summary()["name"] == "small"
    with pytest.raises(InputError, match="add --trust-plugins"):
        draw(found)
    with pytest.raises(FileError, match=r"mine\.py is damaged"):  # it is not the one that was run
        draw(load_run(folder, trust_plugins=True))


# --- damage


def flip(path: Path, share: float) -> None:
    """Flip a bit at this share of the file."""
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1.0])
def test_a_flipped_bit_of_stored_cells_is_noticed_and_computed_again(
    share, experiment, made, runs, computed
):
    for path in (runs / "cells").glob("*/*.parquet"):
        flip(path, share)
    noted = []
    again = run(experiment, runs, ProgressCallback(note=noted.append))
    assert computed == ["dynamics", "patch_grid", "neuron_shift"]
    assert len(noted) == 3
    assert all("was damaged: its cells are computed again" in line for line in noted)
    for name in made.tables:
        pd.testing.assert_frame_equal(again.table(name), made.table(name))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.97, 1.0])
def test_a_damaged_table_is_named_and_made_again_from_the_cells(
    share, experiment, made, runs, no_models
):
    finished = load_run(all_runs(runs)[0])
    path = finished.tables["patch_grid"]
    flip(path, share)
    for use in (lambda: finished.table("patch_grid"), lambda: draw(finished)):
        with pytest.raises(FileError, match=r"patch_grid\.parquet is damaged .*`mechmem run "):
            use()
    again = run(experiment, runs)
    pd.testing.assert_frame_equal(again.table("patch_grid"), made.table("patch_grid"))


def test_a_missing_table_is_named(runs):
    finished = load_run(all_runs(runs)[0])
    finished.tables["dynamics"].unlink()
    with pytest.raises(FileError, match=r"dynamics\.parquet is missing; .*`mechmem run "):
        draw(finished)
    record = {key: value for key, value in finished.record.items() if key != "files"}
    (finished.folder / "run.json").write_text(json.dumps(record))  # as version 0.2 wrote it
    with pytest.raises(FileError, match=r"dynamics\.parquet is missing; .*`mechmem run "):
        draw(load_run(finished.folder))


def test_a_damaged_record_of_a_run_is_written_anew(experiment, made, runs):
    path = all_runs(runs)[0] / "run.json"
    path.write_text("[]")
    with pytest.raises(FileError, match=r"run\.json is damaged"):
        load_run(path.parent)
    noted = []
    again = run(experiment, runs, ProgressCallback(note=noted.append))
    assert len(noted) == 1
    assert noted[0].endswith("it is written anew")
    assert again.record["quantities"] == made.record["quantities"]
    assert load_run(path.parent).record == again.record


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("answer"),
        lambda record: record.update(claims={}),
        lambda record: record["claims"][0].update(interval=[0.1]),
        lambda record: record["claims"][0].update(verdict="proven"),
        lambda record: record["quantities"].update(returned=[1]),
        lambda record: record.update(seconds="long"),
        lambda record: record.update(missing={"dynamics": {"x": "y"}}),
    ],
)
def test_a_record_of_a_run_with_wrong_content_is_a_clear_error(change, runs):
    finished = load_run(all_runs(runs)[0])
    change(finished.record)
    write_record(finished.folder / "run.json", finished.record)
    with pytest.raises(FileError, match=r"run\.json is damaged \(.*\); restore it"):
        load_run(finished.folder)


def test_figures_are_not_drawn_through_a_link(runs, tmp_path):
    finished, outside = load_run(all_runs(runs)[0]), tmp_path / "outside"
    (finished.folder / "figures").rename(outside)
    (finished.folder / "figures").symlink_to(outside)
    before = {path.name: path.stat().st_mtime_ns for path in outside.iterdir()}
    with pytest.raises(FileError, match="figures is a link, and nothing is written through links"):
        draw(finished)
    assert {path.name: path.stat().st_mtime_ns for path in outside.iterdir()} == before


@pytest.mark.parametrize("n_written", [0, 1, 3, 6])
def test_a_full_disk_costs_nothing(n_written, experiment, made, runs, monkeypatch):
    shutil.rmtree(runs / "cells")
    shutil.rmtree(all_runs(runs)[0])
    n, sync = [], files.os.fsync

    def full(handle):
        n.append(handle)
        if len(n) > n_written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        with pytest.raises(FileError, match="No space left on device; free some space"):
            run(experiment, runs)
    again = run(experiment, runs)
    for name in made.tables:
        assert again.tables[name].read_bytes() == made.tables[name].read_bytes()


def test_a_refused_run_leaves_no_folder(spec, runs):
    before = sorted(path.name for path in runs.iterdir())
    block = spec(seeds=[5])  # it has to be trained, so that the spec is tried first
    block["analyses"][1] |= {"layer": 7}
    with pytest.raises(BlockError):
        run(Experiment.model_validate(block), runs)
    assert sorted(path.name for path in runs.iterdir()) == before


# --- a phase that never came


def test_a_phase_that_was_never_reached_makes_claims_not_testable(spec, runs):
    block = spec(checkpoints={"before": {"step": 5}, "after": "generalised"})
    figure = {"kind": "heatmap", "table": "neuron_shift", "x": "neuron", "y": "layer"}
    block["figures"].append(figure | {"value": "auc"})
    found = run(Experiment.model_validate(block), runs)
    (claim,) = found.claims
    assert claim["verdict"] == "not testable"
    assert claim["reason"] == "returned: seed 0 never reached phase 'generalised'"
    assert found.answer == "Layer undefined returns undefined."
    assert len(found.table("patch_grid")) == 0
    assert len(found.table("dynamics")) > 0  # the curves need no checkpoint
    page = found.report.read_text()
    assert "Table patch_grid lacks rows of seed 0" in page
    assert "not testable" in page
    assert set(found.figures) == {"1_curves_dynamics"}


# --- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 7}, "layers 0 to 1"),
        ({"site": "neuron"}, "did you mean 'neurons'"),
        ({"source": {"checkpoint": "befor"}}, "did you mean 'before'"),
        ({"examples": "nosy"}, "did you mean 'noisy'"),
        ({"position": "s9"}, "there is no position 's9'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_nothing_is_trained_for_a_spec_that_cannot_run(spec, change, message, tmp_path):
    block = spec()
    block["analyses"][1] |= change
    with pytest.raises(BlockError, match=message) as raised:
        run(Experiment.model_validate(block), tmp_path)
    assert raised.value.loc == ("analyses", 1)
    assert not (tmp_path / "trainings").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "{retuned.percent}"}, "did you mean 'returned'"),
        (
            {"figures": [{"kind": "curves", "table": "dynamics", "where": {"curve": "heldout"}}]},
            "heldout",
        ),
        (
            {"quantities": {"returned": {"table": "patch_grid", "where": {"plaice": "all"}}}},
            "did you mean 'place'",
        ),
    ],
    ids=["answer", "figure", "quantity"],
)
def test_what_is_shown_is_rehearsed_too(spec, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(Experiment.model_validate(spec(**change)), tmp_path)
    assert not (tmp_path / "trainings").exists()


def test_every_training_is_rehearsed(spec, recipe, tmp_path):
    """Before the first is trained, as the second cannot answer."""
    one_layer = recipe.architecture.model_copy(update={"n_layers": 1})
    shallow = recipe.model_copy(update={"name": "one", "architecture": one_layer})
    block = spec(also=[shallow.block()])
    block["analyses"][1] |= {"layer": 1}
    with pytest.raises(BlockError, match="the model has layers 0 to 0"):
        run(Experiment.model_validate(block), tmp_path)
    assert not (tmp_path / "trainings").exists()


def test_a_figure_of_a_later_training_or_seed_is_no_mistake(spec, recipe):
    block = recipe.block()
    block["architecture"]["d_mlp"] = {"each": [8, 12]}
    figures = [{"kind": "curves", "table": "dynamics", "where": {"d_mlp": 12, "seed": 3}}]
    swept = {
        "training": block,
        "seeds": [0, 3],
        "analyses": [{"kind": "dynamics"}],
        "checkpoints": {},
        "examples": {},
        "figures": figures,
    }
    experiment = Experiment.model_validate(spec(**BARE) | swept)
    assert dry_run(experiment) == {"dynamics": 0}


def test_a_rehearsal_foretells_the_cost(spec, recipe, made, monkeypatch):
    """Exactly, where nothing is greedy_answer: decoding takes as many rounds as the model needs."""
    block = spec()
    block["examples"]["clean"]["n"] = 25  # sets of different sizes count each by its own
    block["analyses"][1]["greedy"] = False
    experiment = Experiment.model_validate(block)
    foretold = dry_run(experiment)
    trained_run = TrainedRun(experiment, recipe, 0, made.folder.parent, ProgressCallback(), {})
    for analysis in experiment.analyses:
        before = trained_run.session.n_forwarded
        analysis.run(trained_run.session, experiment.sweep_domain(recipe))
        assert foretold[analysis.table_name] == trained_run.session.n_forwarded - before


def test_a_runs_folder_that_cannot_be_written_is_a_clear_error(experiment, tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(
        FileError, match=r"cannot write .*runs/small-.*; choose another folder with --runs"
    ):
        run(experiment, tmp_path / "runs")


def test_a_folder_without_a_run_is_a_clear_error(tmp_path):
    with pytest.raises(FileError, match="holds no finished run"):
        load_run(tmp_path)


def test_runs_are_listed_latest_first(spec, made, runs):
    later = run(Experiment.model_validate(spec(name="later")), runs)
    assert [path.name for path in all_runs(runs)] == [later.folder.name, made.folder.name]
    assert all_runs(runs / "nowhere") == []


# --- two at once


def run_file(path: Path, runs: Path) -> None:
    run(Experiment.from_yaml(path), runs)


def test_four_processes_may_run_one_spec_at_once(made, processes, tmp_path):
    spec_file = made.folder / "experiment.yaml"
    all_four = [processes.Process(target=run_file, args=(spec_file, tmp_path)) for _ in range(4)]
    for process in all_four:
        process.start()
    for process in all_four:
        process.join()
    assert [process.exitcode for process in all_four] == [0] * 4
    finished = load_run(all_runs(tmp_path)[0])
    pd.testing.assert_frame_equal(finished.table("dynamics"), made.table("dynamics"))


def test_a_second_run_says_that_it_waits(experiment, runs, monkeypatch):
    from filelock import FileLock

    folder = all_runs(runs)[0]
    lock, said = FileLock(folder / ".lock"), []
    lock.acquire()

    def say(text):
        said.append(text)
        lock.release()

    run(experiment, runs, ProgressCallback(note=say))
    assert said == [f"another process is running {folder.name}; waiting for it"]
