from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from mechmem.spec.errors import InputError
from mechmem.spec.files import FileError, write_record, write_tensors
from mechmem.spec.yaml_file import SpecFile
from mechmem.training import store as checkpoints
from mechmem.training.recipe import Recipe
from mechmem.training.store import (
    SHIPPED,
    Trained,
    find,
    folder_of,
    names,
    own_folder,
    ship,
)


@pytest.fixture
def copied(trained, tmp_path) -> Trained:
    """A copy of the tiny training that a test may damage."""
    return Trained(shutil.copytree(trained.folder, tmp_path / "copied"))


@pytest.fixture
def runs(trained, recipe, tmp_path) -> Path:
    """A runs folder in which the tiny training was made."""
    shutil.copytree(trained.folder, own_folder(recipe, 0, tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """An empty folder in the place of the shipped trainings."""
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped"


def checkpoint(trained: Trained, step: int) -> Path:
    return trained.folder / "checkpoints" / f"step_{step:06d}.safetensors"


def without_checksums(trained: Trained) -> Trained:
    """The training with a record as version 0.2 wrote it."""
    record = {key: value for key, value in trained.record.items() if key != "checkpoints"}
    (trained.folder / "training.json").write_text(json.dumps(record))
    return Trained(trained.folder)


# --- a finished training


def test_a_training_knows_its_recipe_seed_and_steps(trained, recipe):
    assert trained.recipe == recipe
    assert trained.task == recipe.task
    assert trained.seed == 0
    assert trained.steps == [0, 5, 10, 15, 20]
    assert trained.phases == {
        "initial": 0,
        "before": None,
        "generalised": None,
        "memorised": 0,
        "final": 20,
    }
    assert (
        repr(trained)
        == "Trained(tiny, seed 0: initial 0, before never, generalised never, memorised 0, "
        "final 20)"
    )


def test_the_curves_are_a_table(trained):
    assert list(trained.curves.columns) == ["step", "clean", "memorised", "corrected", "held_out"]
    assert trained.curves["step"].tolist() == trained.steps
    assert trained.curves.drop(columns="step").stack().between(0, 1).all()


@pytest.mark.parametrize(
    ("asked", "step"), [("initial", 0), ("memorised", 0), ("final", 20), (10, 10)]
)
def test_a_checkpoint_is_asked_for_by_phase_or_step(asked, step, trained):
    assert trained.step(asked) == step
    tensors = checkpoints.read_tensors(checkpoint(trained, step))
    found = dict(trained.at(asked).named_parameters())
    assert tensors.keys() == found.keys()
    assert all(torch.equal(tensors[name], found[name]) for name in tensors)


def test_a_loaded_model_is_ready_to_be_looked_at(trained):
    model = trained.at("final")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not torch.equal(model.W_E, trained.at("initial").W_E)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("memorized", "there is no phase 'memorized'; did you mean 'memorised'?"),
        ("generalised", "tiny (seed 0) never reached phase 'generalised'; see its curves"),
        (7, "tiny (seed 0) keeps no checkpoint of step 7; it has 0, 5, 10, 15, 20"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused(asked, message, trained):
    with pytest.raises(InputError, match=re.escape(message)):
        trained.at(asked)


def test_the_kept_checkpoints_are_listed_with_their_curves(trained):
    table = trained.checkpoints()
    assert list(table.columns) == ["name", "step", "clean", "memorised", "corrected", "held_out"]
    assert table["name"].tolist() == ["initial, memorised", "step 5", "step 10", "step 15", "final"]
    assert table["held_out"].tolist() == trained.curves["held_out"].tolist()


def test_phases_are_found_again_when_their_thresholds_change(copied):
    record = copied.record
    record["recipe"]["optimisation"]["generalised"] = {"memorised_at_most": 1.0}
    write_record(copied.folder / "training.json", record)
    assert Trained(copied.folder).phases["generalised"] == 0


@pytest.mark.parametrize("n_kept", [0, 5, 300])
def test_a_damaged_checkpoint_is_a_clear_error(n_kept, copied):
    path = checkpoint(copied, 10)
    path.write_bytes(path.read_bytes()[:n_kept])
    with pytest.raises(
        FileError, match=r"step_000010\.safetensors is damaged .*; delete the folder .* and train"
    ):
        copied.at(10)


def test_a_checkpoint_of_another_architecture_is_a_clear_error(copied, random_models):
    copied = without_checksums(copied)  # with them, it would be refused as damaged
    parameters = dict(random_models(0, d_mlp=20).named_parameters())
    write_tensors(checkpoint(copied, 10), parameters)
    with pytest.raises(FileError, match="does not fit the architecture of tiny; delete the folder"):
        copied.at(10)
    write_tensors(checkpoint(copied, 10), dict(list(parameters.items())[1:]))
    with pytest.raises(FileError, match="does not fit the architecture of tiny"):
        copied.at(10)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_a_clear_error(value, copied):
    copied = without_checksums(copied)
    tensors = checkpoints.read_tensors(checkpoint(copied, 10))
    tensors["embed.W_E"][0, 0] = value
    write_tensors(checkpoint(copied, 10), tensors)
    with pytest.raises(FileError, match=r"step_000010.* \(a weight is not a finite number\)"):
        copied.at(10)


def test_any_flipped_bit_of_a_checkpoint_is_noticed(copied):
    content = checkpoint(copied, 10).read_bytes()
    for place in range(0, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[place] ^= 1
        checkpoint(copied, 10).write_bytes(damaged)
        with pytest.raises(FileError, match=r"step_000010\.safetensors is damaged"):
            copied.at(10)
    checkpoint(copied, 10).write_bytes(content)
    assert copied.verified() is copied


def test_a_deleted_checkpoint_is_missed(copied):
    checkpoint(copied, 10).unlink()
    with pytest.raises(FileError, match=r"step_000010\.safetensors is missing; delete the folder"):
        copied.at(10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("recipe"), "'recipe' is missing"),
        (lambda record: record.update(recipe=3), "recipe: "),
        (lambda record: record.update(recipe={"task": {"kind": "x"}}), "there is no task 'x'"),
        (lambda record: record.update(seed="0"), "seed: "),
        (lambda record: record.update(curves=[]), "curves: "),
        (lambda record: record["curves"][1].update(clean=float("nan")), "curves.1.clean: "),
        (lambda record: record["curves"][1].pop("clean"), "is missing"),
        (lambda record: record["curves"].reverse(), "must increase"),
        (lambda record: record.update(checkpoints={"step_000000.safetensors": 5}), "checkpoints"),
    ],
)
def test_a_record_with_wrong_content_is_a_clear_error(change, message, copied):
    change(copied.record)
    write_record(copied.folder / "training.json", copied.record)
    with pytest.raises(FileError, match=message) as raised:
        Trained(copied.folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "[" * 100_000, "{}"])
def test_a_record_that_is_no_mapping_is_a_clear_error(text, copied):
    (copied.folder / "training.json").write_text(text)
    with pytest.raises(FileError, match=r"training\.json (is damaged|cannot be read)"):
        Trained(copied.folder)


def test_a_changed_record_is_refused(copied):
    path = copied.folder / "training.json"
    path.write_text(path.read_text().replace('"seed": 0,', '"seed": 1,', 1))
    with pytest.raises(FileError, match=r"is damaged or was changed .*; delete the folder"):
        Trained(copied.folder)


def test_a_folder_without_a_training_is_a_clear_error(tmp_path):
    with pytest.raises(FileError, match=r"training\.json is missing"):
        Trained(tmp_path)


def test_a_damaged_record_is_a_clear_error(copied):
    (copied.folder / "training.json").write_text("{")
    with pytest.raises(FileError, match=r"training\.json cannot be read .*; delete the folder"):
        Trained(copied.folder)


# --- finding and shipping


def test_a_training_is_found_where_it_was_made(runs, recipe, shipped):
    assert folder_of(recipe, 0, runs) == own_folder(recipe, 0, runs)
    assert find("tiny", 0, runs).folder == own_folder(recipe, 0, runs)
    assert names(runs) == ["tiny"]


def test_another_recipe_or_seed_has_another_place(recipe, tmp_path):
    other = recipe.model_copy(
        update={"architecture": recipe.architecture.model_copy(update={"n_layers": 1})}
    )
    places = {
        own_folder(recipe, 0, tmp_path),
        own_folder(recipe, 1, tmp_path),
        own_folder(other, 0, tmp_path),
    }
    assert len(places) == 3


def test_an_unknown_training_is_refused_with_the_nearest(runs, shipped):
    with pytest.raises(
        InputError, match="there is no training 'tinny' of seed 0; did you mean 'tiny'"
    ):
        find("tinny", 0, runs)
    with pytest.raises(InputError, match="there is no training 'tiny' of seed 3"):
        find("tiny", 3, runs)


def test_a_training_is_not_taken_for_one_whose_name_begins_alike(recipe, trained, runs, shipped):
    longer = recipe.model_copy(update={"name": "tiny-clean"})
    shutil.copytree(trained.folder, own_folder(longer, 0, runs))
    assert find("tiny", 0, runs).folder == own_folder(recipe, 0, runs)
    assert find("tiny-clean", 0, runs).folder == own_folder(longer, 0, runs)
    assert names(runs) == ["tiny", "tiny-clean"]


def test_of_two_trainings_of_a_name_the_latest_is_found(recipe, trained, runs, shipped):
    newer = recipe.model_copy(
        update={"architecture": recipe.architecture.model_copy(update={"n_layers": 1})}
    )
    shutil.copytree(trained.folder, own_folder(newer, 0, runs))
    os.utime(own_folder(recipe, 0, runs) / "training.json", (1, 1))
    assert find("tiny", 0, runs).folder == own_folder(newer, 0, runs)
    os.utime(own_folder(newer, 0, runs) / "training.json", (0, 0))
    assert find("tiny", 0, runs).folder == own_folder(recipe, 0, runs)


def test_a_training_under_the_name_of_a_shipped_one_is_reported(recipe, trained, runs, shipped):
    ship(trained, [20], shipped / "tiny" / "seed_0")
    assert find("tiny", 0, runs).folder == shipped / "tiny" / "seed_0"  # the same recipe
    other = recipe.model_copy(
        update={"architecture": recipe.architecture.model_copy(update={"n_layers": 1})}
    )
    shutil.copytree(trained.folder, own_folder(other, 0, runs))
    with pytest.raises(InputError, match="'tiny' is a shipped training and another one that was"):
        find("tiny", 0, runs)
    assert find(f"tiny-{other.recipe_hash}", 0, runs).folder == own_folder(other, 0, runs)
    assert names(runs) == ["tiny", f"tiny-{other.recipe_hash}"]
    elsewhere = runs / "no_runs"
    found = find(f"tiny-{recipe.recipe_hash}", 0, elsewhere).folder
    assert found == shipped / "tiny" / "seed_0"


@pytest.mark.parametrize("name", ["", "*", "..", "../tiny", "/tmp", "ti*"])
def test_a_path_or_a_pattern_is_no_name(name, runs, shipped):
    with pytest.raises(InputError, match="is not the name of a training"):
        find(name, 0, runs)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_have_a_range(seed, runs, shipped):
    with pytest.raises(InputError, match="must be at least 0 and less than 2\\^63"):
        find("tiny", seed, runs)


def test_a_shipped_training_holds_the_chosen_checkpoints_and_a_card(
    trained, recipe, shipped, tmp_path
):
    ship(trained, [0, 20], shipped / "tiny" / "seed_0")
    found = find("tiny", 0, tmp_path / "no_runs")
    assert found.folder == shipped / "tiny" / "seed_0"
    assert found.steps == [0, 20]
    assert all(
        torch.equal(a, b.half().float())
        for a, b in zip(found.at("final").parameters(), trained.at(20).parameters(), strict=True)
    )
    assert found.curves.equals(trained.curves)
    assert names(tmp_path / "no_runs") == ["tiny"]
    assert folder_of(recipe, 0, tmp_path / "no_runs") == found.folder
    assert folder_of(recipe, 1, tmp_path / "no_runs") == own_folder(recipe, 1, tmp_path / "no_runs")


def test_a_training_made_here_goes_before_the_shipped_one_of_the_same_recipe(
    trained, recipe, runs, shipped
):
    ship(trained, [20], shipped / "tiny" / "seed_0")
    assert folder_of(recipe, 0, runs) == own_folder(recipe, 0, runs)


def test_the_name_and_the_phases_do_not_keep_a_shipped_training_from_being_found(
    trained, recipe, shipped, tmp_path
):
    ship(trained, [20], shipped / "tiny" / "seed_0")
    renamed = Recipe.model_validate(recipe.block() | {"name": "other"})
    assert folder_of(renamed, 0, tmp_path / "runs") == shipped / "tiny" / "seed_0"


def test_a_step_that_was_not_kept_cannot_be_shipped(trained, tmp_path):
    with pytest.raises(InputError, match="keeps no checkpoint of step 3"):
        ship(trained, [3], tmp_path / "target")


def test_the_card_tells_what_it_is_and_how_it_does(trained):
    card = trained.card()
    assert card.startswith("# tiny, seed 0\n")
    assert f"Recipe hash `{trained.recipe.recipe_hash}`" in card
    assert (
        len(re.findall(r"^\| .* \|$", card, flags=re.MULTILINE)) == 6
    )  # heading and five checkpoints
    row = trained.checkpoints().iloc[4]
    cells = [
        row["name"],
        "20",
        *(f"{row[c]:.3f}" for c in ("clean", "memorised", "corrected", "held_out")),
    ]
    assert f"| {' | '.join(cells)} |" in card
    assert "kind: four_digit_addition" in card


# --- the trainings that are shipped

RECORDS = sorted(SHIPPED.glob("*/seed_*/training.json"))
SPECS = Path(__file__).parents[2] / "experiments" / "trainings"


@pytest.fixture(params=[record.parent for record in RECORDS], ids=lambda f: f.parent.name)
def of_the_package(request) -> Trained:
    """Each training that is shipped."""
    return Trained(request.param)


def test_trainings_are_shipped():
    assert {"fda_small", "fda_small_clean", "thr_small", "thr_few_relations"} <= {
        record.parent.parent.name for record in RECORDS
    }


def test_a_shipped_training_is_found_by_its_recipe(of_the_package, tmp_path):
    found = folder_of(of_the_package.recipe, of_the_package.seed, tmp_path / "no_runs")
    assert found == of_the_package.folder


def test_a_shipped_training_is_that_of_the_spec_of_its_name(of_the_package):
    spec = SpecFile(SPECS / f"{of_the_package.recipe.name}.yaml").build(Recipe)
    hashes = {member.recipe_hash for _, member in spec.expand({})}
    assert of_the_package.recipe.recipe_hash in hashes


def test_the_card_of_a_shipped_training_agrees_with_its_record(of_the_package):
    assert (of_the_package.folder / "card.md").read_text() == of_the_package.card()


def test_every_checkpoint_of_a_shipped_training_can_be_loaded(of_the_package):
    # Of other seeds, a training whose curves alone are read is shipped as its record.
    assert of_the_package.steps or of_the_package.seed > 0
    for step in of_the_package.steps:
        assert of_the_package.at(step).cfg.n_layers == of_the_package.recipe.architecture.n_layers
