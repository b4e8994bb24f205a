from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from mechmem.analyses.analysis import Analysis
from mechmem.cli import main as cli
from mechmem.experiment.spec import Experiment
from mechmem.spec.registry import Component
from mechmem.spec.yaml_file import write_spec
from mechmem.training import store as checkpoints


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self):
        def refuse(constant):
            raise ValueError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


Ask = Callable[..., Answer]


@pytest.fixture
def ask(monkeypatch, capsys) -> Ask:
    """Runs a command line as the console script does."""

    def asked(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["mechmem", *arguments])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return Answer(code, *capsys.readouterr())

    return asked


@pytest.fixture
def here(made, experiment, recipe, tmp_path, monkeypatch) -> Path:
    """A folder to work in: the small experiment, its training, and their runs."""
    shutil.copytree(made.folder.parent, tmp_path / "runs")
    (tmp_path / "experiments" / "trainings").mkdir(parents=True)
    (tmp_path / "experiments" / "small.yaml").write_text(write_spec(experiment))
    (tmp_path / "experiments" / "trainings" / "tiny.yaml").write_text(write_spec(recipe))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path / "shipped")
    return tmp_path


SMALL = "experiments/small.yaml"
TINY = "experiments/trainings/tiny.yaml"
CURVES = {"clean", "memorised", "corrected", "held_out"}


# --- list and show


def test_list_names_all_there_is(ask, here, made):
    found = ask("list", "--json")
    assert (found.code, found.err) == (0, "")
    assert found.json.keys() == {"experiments", "trainings", "runs", "kinds"}
    assert found.json["experiments"] == [SMALL]
    assert found.json["trainings"] == ["tiny"]
    assert found.json["runs"] == [made.folder.name]
    assert found.json["kinds"].keys() == Component.registries.keys()
    assert "patch_grid" in found.json["kinds"]["analysis"]
    text = ask("list").out
    assert all(
        name in text
        for name in (SMALL, "tiny", made.folder.name, "patch_grid", "four_digit_addition")
    )


def test_list_in_an_empty_folder_finds_the_kinds(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = ask("list", "--json").json
    assert (found["experiments"], found["runs"]) == ([], [])
    assert found["kinds"]["task"]


def kinds() -> list[str]:
    return sorted(kind for members in Component.registries.values() for kind in members)


@pytest.mark.parametrize("kind", kinds())
def test_show_explains_every_kind(kind, ask, here):
    found = ask("show", kind, "--json").json
    assert found.keys() == {"kind", "registry", "doc", "fields"}
    assert found["kind"] == kind
    assert found["doc"]
    assert all(field.keys() == {"type", "default"} for field in found["fields"].values())
    text = ask("show", kind)
    assert text.code == 0
    assert all(name in text.out for name in [kind, *found["fields"]])


def test_show_tells_how_a_training_went(ask, here, recipe, trained):
    found = ask("show", "tiny", "--json").json
    assert found.keys() == {"name", "checkpoints", "phases", "seed", "recipe_hash"}
    assert (found["name"], found["seed"], found["recipe_hash"]) == ("tiny", 0, recipe.recipe_hash)
    assert found["phases"] == {
        "initial": 0,
        "before": None,
        "generalised": None,
        "memorised": 0,
        "final": 20,
    }
    assert all(row.keys() == {"name", "step", *CURVES} for row in found["checkpoints"])
    assert [row["step"] for row in found["checkpoints"]] == [0, 5, 10, 15, 20]
    curves = trained.curves.to_dict("records")
    assert [{key: row[key] for key in curves[0]} for row in found["checkpoints"]] == curves
    assert "initial, memorised" in ask("show", "tiny").out


RUN_KEYS = {"name", "answer", "claims", "tables", "figures", "report", "folder", "seconds"}


def test_show_tells_what_a_run_found(ask, here, made):
    for name in ("small", made.folder.name, f"runs/{made.folder.name}"):
        found = ask("show", name, "--json").json
        assert found.keys() == RUN_KEYS
        assert found["answer"] == made.answer
    text = ask("show", "small").out
    assert made.answer in text
    assert "C7: undetermined" in text
    assert "rule (fixed before the run): returned >= 0" in text


def test_show_of_what_is_not_there_names_the_nearest(ask, here):
    found = ask("show", "patchgrid")
    assert (found.code, found.out) == (2, "")
    assert (
        found.err
        == "mechmem: there is no kind, training or run 'patchgrid'; did you mean 'patch_grid'?\n"
    )


# --- check


def test_check_says_what_an_experiment_costs(ask, here):
    found = ask("check", SMALL, "--json").json
    assert found.keys() == {"valid", "analyses", "trainings", "effects"}
    assert found["valid"] is True
    assert found["trainings"] == []
    assert [row["analysis"] for row in found["analyses"]] == [
        "dynamics",
        "patch_grid",
        "neuron_shift",
    ]
    assert all(
        row.keys() == {"analysis", "examples_forwarded", "seconds"} for row in found["analyses"]
    )
    assert found["analyses"][1]["examples_forwarded"] > 0
    assert "is valid: 3 analyses, 1 seed" in ask("check", SMALL).out


def test_check_says_what_would_have_to_be_trained_first(ask, here):
    found = ask("check", SMALL, "seeds=[0,7]", "--json").json["trainings"]
    assert [row["training"] for row in found] == ["tiny seed 7"]
    assert found[0]["minutes"] >= 0
    assert "1 model must be trained first (about" in ask("check", SMALL, "seeds=[0,7]").out


def test_check_counts_the_seeds(ask, here):
    one, two = (
        ask("check", SMALL, f"seeds={seeds}", "--json").json["analyses"][1]
        for seeds in ("[0]", "[0,1]")
    )
    assert two["examples_forwarded"] == 2 * one["examples_forwarded"]


def test_check_says_what_a_training_costs(ask, here, recipe):
    found = ask("check", TINY, "--json").json
    assert found.keys() == {
        "training",
        "recipe_hash",
        "parameters",
        "training_instances",
        "steps",
        "minutes",
    }
    parameters = sum(p.numel() for p in recipe.build(0).parameters())
    expected = {"training": "tiny", "recipe_hash": recipe.recipe_hash, "parameters": parameters}
    assert found | expected | {"training_instances": 120, "steps": 20} == found


def test_check_computes_nothing(ask, here):
    shutil.rmtree("runs")
    ask("check", SMALL)
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_wrong_spec_is_told_with_its_place(command, ask, here):
    path = Path(SMALL)
    path.write_text(path.read_text().replace("kind: neuron_shift", "kind: neuron_shifts"))
    line = 1 + path.read_text().splitlines().index("- kind: neuron_shifts")
    found = ask(command, SMALL)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith(f"mechmem: {SMALL}:{line}:")
    assert "did you mean 'neuron_shift'?" in found.err


@pytest.mark.parametrize("command", ["check", "run"])
def test_what_only_a_rehearsal_finds_is_told_with_its_place(command, ask, here):
    shutil.rmtree("runs")
    found = ask(command, SMALL, "analyses.1.layer=5")
    assert found.code == 2
    line = 1 + Path(SMALL).read_text().splitlines().index("- kind: patch_grid")
    assert found.err.startswith(f"mechmem: {SMALL}:{line}:")
    assert "layer 5 is out of range: the model has layers 0 to 1" in found.err


# --- run and draw


def test_run_answers(ask, here, made):
    found = ask("run", SMALL, "--json")
    assert found.code == 0
    assert found.json.keys() == RUN_KEYS
    (claim,) = found.json["claims"]
    assert claim.keys() >= {"id", "says", "verdict", "reason", "rule", "effect", "interval"}
    assert (claim["id"], claim["verdict"]) == ("C7", "undetermined")
    assert claim["interval"][0] <= claim["effect"] <= claim["interval"][1]
    paths = [found.json["report"], *found.json["tables"].values(), *found.json["figures"].values()]
    assert all(Path(path).exists() for path in paths)
    assert made.answer in ask("run", SMALL).out


def test_run_takes_overrides_and_another_folder(ask, here):
    shutil.copytree("runs", "elsewhere")
    found = ask("run", SMALL, "examples.noisy.n=6", "--runs", "elsewhere", "--json").json
    assert Path(found["folder"]).parent == Path("elsewhere")
    assert Experiment.from_yaml(Path(found["folder"]) / "experiment.yaml").examples["noisy"].n == 6
    assert len(list(Path("runs").glob("small-*"))) == 1


def test_progress_does_not_stand_among_the_results(ask, here):
    shutil.rmtree("runs/cells")
    found = ask("run", SMALL, "--json")
    assert found.json["name"] == "small"
    assert "dynamics" in found.err


def test_an_undefined_effect_is_still_json(ask, here):
    """A phase that never came: the file says so with null, as JSON has no NaN."""
    never = "quantities.returned={table: dynamics, where: {curve: held_out, label: generalised}}"
    found = ask("run", SMALL, never, "answer=nothing", "--json")
    (claim,) = found.json["claims"]
    assert (claim["verdict"], claim["effect"], claim["interval"]) == (
        "not testable",
        None,
        [None, None],
    )
    assert "seed 0" in claim["reason"]
    assert ask("show", found.json["folder"]).code == 0


def test_draw_draws_again(ask, here, made, monkeypatch):
    monkeypatch.setattr(Analysis, "run", lambda *_: pytest.fail("an analysis was run"))
    report = Path("runs") / made.folder.name / "report.html"
    before = report.read_bytes()
    report.unlink()
    assert ask("draw", "small").out == f"{report}\n"
    assert report.read_bytes() == before
    found = ask("draw", f"runs/{made.folder.name}", "--json").json
    assert found["report"] == str(report)
    assert list(found["figures"]) == ["1_curves_dynamics"]


def test_draw_of_what_is_not_there_names_the_nearest(ask, here):
    found = ask("draw", "smal")
    assert found.code == 2
    assert "there is no run 'smal'; did you mean 'small'?" in found.err


# --- studies


@pytest.fixture
def study(here) -> Path:
    """The small experiment as a study of its own, and a spec in it that is wrong."""
    folder = here / "experiments" / "paper"
    folder.mkdir()
    (folder / "study.yaml").write_text("name: paper\nquestion: Does it hold?\n")
    shutil.copy(SMALL, folder / "small.yaml")
    return folder


def test_run_of_a_folder_ends_with_one_table(ask, study):
    found = ask("run", "experiments/paper/")
    assert found.code == 0
    lines = found.out.splitlines()
    assert lines[0].split() == [
        *["claim", "task", "effect", "[95", "%", "interval]"],
        *["attainable", "control", "seeds", "verdict"],
    ]
    assert lines[1].split()[:2] == ["C7", "FDA"]
    assert lines[1].split()[-2:] == ["1", "undetermined"]
    assert "runs/paper/index.html" in lines
    numbers = ask("run", "experiments/paper", "--json").json
    assert [claim["claim"] for claim in numbers["claims"]] == ["C7"]
    assert numbers["index"] == "runs/paper/index.html"
    assert all(Path(report).exists() for report in numbers["reports"].values())


def test_a_study_in_which_a_spec_fails_is_exit_code_1_and_names_it(ask, study):
    text = (study / "small.yaml").read_text()
    (study / "wrong.yaml").write_text(text.replace("kind: neuron_shift", "kind: neuron_shifts"))
    for command in ("run", "check"):
        found = ask(command, "experiments/paper")
        assert found.code == 1
        assert found.err.splitlines()[-1] == "mechmem: 1 of 2 specs failed: wrong"
        assert "did you mean 'neuron_shift'?" in found.out + found.err
    assert ask("run", "experiments/paper").out.splitlines()[1].startswith("C7 ")


def test_check_of_a_folder_adds_up_what_its_specs_cost(ask, study):
    found = ask("check", "experiments/paper", "seeds=[0,7]", "--json")
    assert found.code == 0
    assert found.json.keys() == {
        *["valid", "specs", "trainings", "to_fetch", "without_interpretation", "failed"]
    }
    (row,) = found.json["specs"]
    assert (row["spec"], row["analyses"], row["seeds"]) == ("small", 3, 2)
    assert [row["training"] for row in found.json["trainings"]] == ["tiny seed 7"]
    assert found.json["without_interpretation"] == ["small.C7"]
    text = ask("check", "experiments/paper", "seeds=[0,7]").out
    assert "1 model must be trained first (about" in text
    assert "without an interpretation in study.yaml: small.C7" in text


def test_options_are_for_every_spec_of_a_study(ask, study):
    ask("run", "experiments/paper", "--backend", "hooked")
    written = [path.read_text() for path in Path("runs").glob("small-*/experiment.yaml")]
    assert sum("backend: hooked" in text for text in written) == 1


# --- fetch


def test_fetch_gets_a_seed_that_check_says_is_missing(ask, here, trained):
    shipped = here / "shipped"
    for seed in (0, 2):
        checkpoints.ship(trained, [0, 5, 20], shipped / "tiny" / f"seed_{seed}")
    assert ask("index").out == f"{shipped / 'checksums.json'}\n"
    shutil.copytree(shipped, "clone")
    shutil.rmtree(shipped / "tiny" / "seed_2")
    checkpoints.forget()
    command = "mechmem fetch tiny --seeds 2 --from URL|FOLDER"
    assert command in ask("check", SMALL, "seeds=[0,2]").out
    found = ask("fetch", "tiny", "--seeds", "2", "--from", "clone", "--json")
    assert found.json == {"training": "tiny", "folders": ["runs/trainings/shipped/tiny/seed_2"]}
    assert command not in ask("check", SMALL, "seeds=[0,2]").out
    assert ask("show", "tiny", "--seed", "2").code == 0


# --- train and ship


def test_train_trains_a_seed_and_tells_how_it_went(ask, here, recipe):
    found = ask("train", TINY, "--seed", "1", "--json")
    assert found.code == 0
    assert (found.json["name"], found.json["seed"], found.json["recipe_hash"]) == (
        "tiny",
        1,
        recipe.recipe_hash,
    )
    assert all(row.keys() == {"name", "step", *CURVES} for row in found.json["checkpoints"])
    assert (checkpoints.own_folder(recipe, 1, Path("runs")) / "training.json").exists()
    assert ask("show", "tiny", "--seed", "1", "--json").json == found.json


def test_train_and_check_go_through_every_cell_of_a_sweep(ask, here):
    sweep = [
        TINY,
        "architecture.d_mlp={each: [8, 12]}",
        "optimisation.n_steps=2",
        "optimisation.evaluate_every=2",
    ]
    assert [cell["d_mlp"] for cell in ask("check", *sweep, "--json").json["cells"]] == [8, 12]
    assert "2 trainings" in ask("check", *sweep).out
    found = ask("train", *sweep, "--json").json
    assert len({made["recipe_hash"] for made in found}) == 2
    assert ask("train", *sweep).out.count("Trained(tiny") == 2


def test_train_takes_overrides(ask, here):
    found = ask("train", TINY, "optimisation.n_steps=2", "name=short", "--json").json
    assert [row["step"] for row in found["checkpoints"]] == [0, 2]
    assert "short" in ask("list", "--json").json["trainings"]


def test_ship_copies_a_training_into_the_package(ask, here):
    assert ask("ship", "tiny", "0", "20").out == f"{here / 'shipped' / 'tiny' / 'seed_0'}\n"
    index = json.loads((here / "shipped" / "checksums.json").read_text())
    assert "tiny/seed_0/checkpoints/step_000020.safetensors" in index
    shutil.rmtree("runs")
    assert [row["step"] for row in ask("show", "tiny", "--json").json["checkpoints"]] == [0, 20]


def test_ship_of_what_was_not_made_is_refused(ask, here):
    found = ask("ship", "tinny", "0")
    assert found.code == 2
    assert "no training 'tinny' of seed 0 was made in runs; did you mean 'tiny'?" in found.err


# --- the rest


def test_schema_is_the_schema_of_experiments(ask):
    found = ask("schema").json
    assert found["properties"].keys() == Experiment.model_fields.keys()
    assert "analysis.patch_grid" in found["$defs"]


def test_shell_has_the_model_at_hand(ask, here, monkeypatch):
    import code

    given = {}
    monkeypatch.setattr(
        code, "interact", lambda banner, local, exitmsg: given.update(local, banner=banner)
    )
    assert ask("shell", "tiny").code == 0
    assert given.keys() >= {"mm", "trained", "model", "task", "examples", "held_out", "sites"}
    assert given["model"].cfg.n_layers == 2
    logits, _ = given["model"].run_with_cache(
        given["examples"].tokens[:8]
    )  # what the banner proposes
    assert logits.shape == (8, 14, 12)


def test_help_is_shown_without_a_command(ask):
    assert "Mechanistic interpretability of memorisation" in (ask().out + ask().err)
    assert ask("--help").code == 0


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["run"], ["run", SMALL, "--nonsense"], ["train", TINY, "--seed", "-1"]],
    ids=" ".join,
)
def test_a_wrong_command_line_is_one_clear_line(arguments, ask, here):
    found = ask(*arguments)
    assert found.code == 2
    assert found.out == ""
    assert found.err.startswith("mechmem: ")
    assert found.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "experiments/smal.yaml"],
            "experiments/smal.yaml does not exist; did you mean experiments/small.yaml?",
        ),
        (["run", "experiments"], "experiments is a folder; name a .yaml file in it"),
        (["run", SMALL, "seeds"], "override 'seeds' is not of the form key.sub=value"),
        (["show", "tiny", "--seed", "9"], "there is no training 'tiny' of seed 9"),
    ],
)
def test_wrong_input_is_told_without_a_traceback(arguments, message, ask, here):
    found = ask(*arguments)
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert "Traceback" not in found.err


def test_a_failing_machine_is_exit_code_1(ask, here):
    shutil.rmtree("runs")
    Path("runs").write_text("")
    found = ask("run", SMALL)
    assert found.code == 1
    assert "cannot write runs/small-" in found.err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "interrupted; rerun the same command to resume"),
        (MemoryError(), "out of memory"),
        (ArithmeticError("training diverged"), "training diverged"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_interruptions_and_failures_are_exit_code_1(error, message, ask, here, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("mechmem.experiment.run.run", fail)
    found = ask("run", SMALL)
    assert (found.code, found.err) == (1, f"mechmem: {message}\n")


def test_a_bug_of_ours_keeps_its_traceback(ask, here, monkeypatch):
    monkeypatch.setattr("mechmem.experiment.run.run", lambda *_: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        ask("run", SMALL)


def test_the_console_script_is_this_one():
    script = Path(sys.executable).parent / "mechmem"
    ran = subprocess.run([script, "nonsense"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("mechmem: No such command 'nonsense'")
