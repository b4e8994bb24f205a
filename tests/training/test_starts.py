"""Trainings that start from another one, train a part, or learn the true labels for a while."""

from __future__ import annotations

import pytest
import torch

from mechmem.data.label_noise import UniformWrong
from mechmem.models.architecture import Model
from mechmem.spec.errors import InputError
from mechmem.training.loop import _Mixed, _Shuffled, made, train
from mechmem.training.plants.plant import Plant
from mechmem.training.recipe import Phase, Recipe, Start
from mechmem.training.store import Trained, own_folder
from mechmem.training.trainable import Trainable


def changed(recipe: Recipe, **fields) -> Recipe:
    optimisation = {k: fields.pop(k) for k in list(fields) if k not in Recipe.model_fields}
    block = recipe.block() | fields
    block["optimisation"] = block["optimisation"] | optimisation
    return Recipe.model_validate(block)


def weights(trained: Trained, at: str | int) -> dict[str, torch.Tensor]:
    return dict(trained.at(at).named_parameters())


def is_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, bool]:
    return {name: torch.equal(a[name], b[name]) for name in a}


# --- start


def test_a_training_starts_with_the_weights_of_its_start(recipe, tmp_path):
    later = changed(recipe, name="later", start={"training": recipe.block(), "at": 10}, n_steps=5)
    trained = made(later, 2, tmp_path)
    base = Trained(own_folder(recipe, 2, tmp_path))  # made on the way
    assert all(is_same(weights(trained, 0), weights(base, 10)).values())
    assert not any(is_same(weights(trained, "final"), weights(base, 10)).values())


def test_the_hash_knows_what_it_starts_from_but_not_its_name(recipe):
    def hash_of(start: Recipe, at: str | int = "memorised") -> str:
        return changed(recipe, start={"training": start.block(), "at": at}).recipe_hash

    assert hash_of(recipe) == hash_of(changed(recipe, name="another"))
    assert hash_of(recipe) != recipe.recipe_hash
    assert hash_of(recipe) != hash_of(recipe, "final")
    assert hash_of(recipe) != hash_of(changed(recipe, learning_rate=0.5))
    # at a phase, it counts when that is
    assert hash_of(recipe) != hash_of(changed(recipe, memorised={"memorised": 0.1}))
    assert hash_of(recipe, "final") == hash_of(
        changed(recipe, memorised={"memorised": 0.1}), "final"
    )


def test_another_architecture_than_that_of_the_start_is_refused(recipe):
    small = recipe.architecture.block() | {"n_layers": 1}
    with pytest.raises(ValueError, match="must be that of"):
        changed(recipe, architecture=small, start={"training": recipe.block()})


# --- trainable

TRAINED = {
    "everything": {},
    "last_layers": {"last_layers": 1},
    "attn": {"part": "attn", "layer": 0},
    "mlp": {"part": "mlp", "layer": 1},
    "w_in": {"part": "w_in", "layer": 1},
}
NAMES = {
    "everything": lambda name: True,
    "last_layers": lambda name: name.startswith("blocks.1."),
    "attn": lambda name: name.startswith("blocks.0.attn."),
    "mlp": lambda name: name.startswith("blocks.1.mlp."),
    "w_in": lambda name: name in ("blocks.1.mlp.W_in", "blocks.1.mlp.b_in"),
}


@pytest.mark.parametrize("part", TRAINED)
def test_only_the_named_parameters_change_also_by_weight_decay(part, recipe, tmp_path):
    only = changed(recipe, trainable=TRAINED[part], weight_decay=0.5, n_steps=5)
    trained = train(only, 0, tmp_path)
    same = is_same(weights(trained, 0), weights(trained, "final"))
    no_gradient = {"blocks.0.attn.b_K", "blocks.1.attn.b_K"}  # softmax ignores it
    assert {name for name, kept in same.items() if not kept} | no_gradient == {
        name for name in same if NAMES[part](name)
    } | no_gradient


def test_one_head_is_trained_and_the_others_keep_every_bit(recipe, tmp_path):
    head = {"part": "head", "layer": 1, "head": 1}
    trained = train(changed(recipe, trainable=head, weight_decay=0.5, n_steps=5), 0, tmp_path)
    before, after = weights(trained, 0), weights(trained, "final")
    for name in before:
        differs = before[name] != after[name]
        if name == "blocks.1.attn.W_O":
            assert differs[1].any()
            differs[1] = False
        elif name.startswith("blocks.1.attn.") and name != "blocks.1.attn.b_O":
            differs[1] = False
        assert not differs.any(), name


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"part": "mlp"}, "go together"),
        ({"layer": 1}, "go together"),
        ({"part": "head", "layer": 1}, "`head` goes with"),
        ({"part": "mlp", "layer": 1, "last_layers": 1}, "choose either"),
    ],
)
def test_half_a_choice_is_refused(fields, error):
    with pytest.raises(ValueError, match=error):
        Trainable(**fields)


def test_a_layer_that_is_not_there_is_refused_not_left_untrained(recipe, tmp_path):
    with pytest.raises(InputError, match="trains nothing"):
        train(changed(recipe, trainable={"part": "mlp", "layer": 7}), 0, tmp_path)


# --- true labels


def test_true_labels_give_the_weights_of_a_training_without_noise(recipe, tmp_path):
    clean = recipe.task.model_copy(update={"noise": UniformWrong(rate=0)})
    twin = train(changed(recipe, true_labels=True), 0, tmp_path / "twin")
    without = train(changed(recipe, task=clean.block()), 0, tmp_path / "without")
    assert all(is_same(weights(twin, "final"), weights(without, "final")).values())
    assert twin.task.sample("train").is_noisy.any()  # and yet it has noisy instances to look at


def test_wrong_labels_begin_when_the_phase_is_met(recipe):
    until = recipe.model_copy(update={"true_labels": Phase(held_out=0.9)})
    rows = [{"held_out": h, "corrected": 0.0, "memorised": 0.0} for h in (0.1, 0.9, 0.2)]
    assert [until.has_true_labels(rows[:n]) for n in (1, 2, 3)] == [True, False, False]
    assert not recipe.has_true_labels(rows)


def test_a_switch_of_labels_survives_an_interruption(recipe, trained, tmp_path):
    until = changed(recipe, true_labels={"held_out": 0.0}, n_steps=10)  # met at step 0
    found = train(until, 0, tmp_path / "found")
    same = train(changed(recipe, n_steps=10), 0, tmp_path / "same")
    assert all(is_same(weights(found, "final"), weights(same, "final")).values())


# --- batches with a share of noisy instances


def test_a_mixed_batch_has_so_many_noisy_instances():
    batches = _Mixed(_Shuffled(torch.arange(6), 3, 0), _Shuffled(torch.arange(6, 20), 5, 0))
    for step in range(7):
        rows = batches.at(step)
        assert (rows < 6).tolist() == [True] * 3 + [False] * 5
    assert sorted(torch.cat([batches.at(i)[:3] for i in (0, 1)]).tolist()) == list(range(6))


def test_a_share_of_what_is_not_there_is_refused(recipe, tmp_path):
    clean = recipe.task.model_copy(update={"noise": UniformWrong(rate=0)})
    with pytest.raises(InputError, match="noisy and clean"):
        train(changed(recipe, task=clean.block(), noisy_share=0.5), 0, tmp_path)


# --- plants


class Louder(Plant):
    """Adds a constant to the output of the last layer."""

    def build(self, base: Model, task, seed):
        model = base
        model.blocks[-1].mlp.b_out.data += 1
        return model


@pytest.fixture
def planted(recipe) -> Recipe:
    wider = recipe.architecture.block() | {"d_mlp": (recipe.architecture.d_mlp or 0) + 3}
    start = Start(training=recipe, at="final")
    return Recipe(
        name="planted",
        task=recipe.task,
        architecture=wider,
        optimisation={"n_steps": 1, "evaluate_every": 1},
        start=start,
        plant=Louder(),
    )


def test_a_plant_is_built_in_one_step_from_the_widened_start(planted, recipe, tmp_path):
    found = made(planted, 0, tmp_path)
    base = Trained(own_folder(recipe, 0, tmp_path)).at("final")
    before, after = found.at(0), found.at("final")
    tokens = recipe.task.sample("held_out").tokens[:20]
    torch.testing.assert_close(before(tokens), base(tokens))
    assert not before.blocks[-1].mlp.W_in[:, -3:].any()
    torch.testing.assert_close(after.blocks[-1].mlp.b_out, before.blocks[-1].mlp.b_out + 1)
    assert found.steps == [0, 1]


def test_a_plant_needs_a_start_and_one_step(planted):
    for key, value in (("start", None), ("optimisation", {"n_steps": 2})):
        with pytest.raises(ValueError, match="a plant needs"):
            Recipe.model_validate(planted.block() | {key: value})


def test_a_start_that_is_wider_than_the_plant_is_refused(planted, recipe, tmp_path):
    narrow = planted.model_copy(
        update={"architecture": recipe.architecture.model_copy(update={"d_mlp": 2})}
    )
    with pytest.raises(InputError, match="does not fit"):
        made(narrow, 0, tmp_path)
