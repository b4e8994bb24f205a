"""Every plant: it gives the noisy instances their given labels and leaves the model otherwise as it
was."""

from __future__ import annotations

import copy

import pytest
import torch

import mechmem as mm
from mechmem.data.label_noise import Digit
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.models.architecture import Architecture, Model
from mechmem.spec.errors import InputError
from mechmem.training.loop import accuracy
from mechmem.training.plants.look_up import LookUp, distinct_key
from mechmem.training.plants.plant import Plant
from mechmem.training.plants.random_features import RandomFeatures, ridge_regression
from mechmem.training.store import Trained

TASK = FourDigitAddition(n_train=120, n_held_out=40, noise=Digit(rate=0.02))
"""Two noisy instances. A model with random weights answers few of their ten tokens."""
ADDED = 256
PLANTS = [
    pytest.param(LookUp(n_others=100), id="look_up"),
    pytest.param(LookUp(n_others=100, copies=4, unequal=True), id="copies"),
    pytest.param(RandomFeatures(n_others=100, n_neurons=ADDED), id="random_features"),
]


@pytest.fixture(scope="module")
def base(random_models) -> Model:
    return random_models(d_model=64, n_heads=2, d_mlp=32).requires_grad_(False)


@pytest.fixture(scope="module")
def wide(base) -> Model:
    return LookUp().widened(base, architecture_of(32 + ADDED), TASK)


def architecture_of(d_mlp: int) -> Architecture:
    return Architecture(n_layers=2, d_model=64, n_heads=2, d_mlp=d_mlp)


def missed(model: Model) -> list[list[int]]:
    """Row among the noisy instances and place of every given token that a model does not answer."""
    train = TASK.sample("train")
    noisy = train.select(train.is_noisy).with_prefix("given")
    with torch.no_grad():
        return (model(noisy.tokens)[:, -5:].argmax(-1) != noisy.given).nonzero().tolist()


def right(model: Model, label: str, rows: torch.Tensor) -> float:
    return accuracy(model, TASK.sample("train").select(rows).with_prefix(label))


def test_every_kind_is_tested():
    ours = {
        kind for kind, cls in Plant.kinds().items() if cls.__module__.startswith("mechmem.")
    }  # tests define more
    assert {param.values[0].kind for param in PLANTS} == ours


def test_a_widened_model_computes_the_same(base, wide):
    tokens = TASK.sample("train").tokens
    assert wide.cfg.d_mlp == base.cfg.d_mlp + ADDED
    with torch.no_grad():
        torch.testing.assert_close(wide(tokens), base(tokens))


def test_another_architecture_is_refused(base):
    with pytest.raises(InputError, match="only `d_mlp` may be larger"):
        LookUp().widened(base, architecture_of(16), TASK)
    with pytest.raises(InputError, match="only `d_mlp` may be larger"):
        LookUp().widened(base, architecture_of(64).model_copy(update={"n_layers": 3}), TASK)


@pytest.mark.parametrize("plant", PLANTS)
def test_the_planted_model_gives_every_noisy_instance_its_given_label(plant, wide):
    noisy = TASK.sample("train").is_noisy.nonzero()[:, 0]
    assert right(wide, "given", noisy) == 0
    assert right(plant.build(wide, TASK, 0), "given", noisy) == 1


@pytest.mark.parametrize("plant", PLANTS)
def test_with_the_added_neurons_off_the_model_is_exactly_the_base(plant, wide):
    planted, before = plant.build(wide, TASK, 0), copy.deepcopy(wide.state_dict())
    changed = {n for n, p in planted.state_dict().items() if not p.equal(before[n])}
    assert changed == {f"blocks.1.mlp.{name}" for name in ("W_in", "b_in", "W_out")}
    with torch.no_grad():
        planted.blocks[1].mlp.W_out[32:] = 0
        tokens = TASK.sample("held_out").tokens
        torch.testing.assert_close(planted(tokens), wide(tokens))
    for name in ("W_in", "b_in"):
        weights = planted.state_dict()[f"blocks.1.mlp.{name}"]
        assert weights[..., :32].equal(before[f"blocks.1.mlp.{name}"][..., :32])


@pytest.mark.parametrize("plant", PLANTS)
def test_a_seed_gives_the_same_plant_twice(plant, wide):
    first, second = (plant.build(wide, TASK, 3).state_dict() for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


def test_the_base_is_not_changed(wide):
    before = copy.deepcopy(wide.state_dict())
    LookUp(n_others=100).build(wide, TASK, 0)
    assert all(p.equal(before[name]) for name, p in wide.state_dict().items())


def test_a_model_with_too_few_free_neurons_is_refused(base):
    narrow = LookUp().widened(base, architecture_of(35), TASK)
    needed = len(missed(base))
    with pytest.raises(
        InputError, match=f"needs {needed} added neurons; set d_mlp to {32 + needed}"
    ):
        LookUp(n_others=100).build(narrow, TASK, 0)


def test_a_task_without_noise_is_refused(wide):
    clean = TASK.model_copy(update={"noise": Digit(rate=0)})
    with pytest.raises(InputError, match="needs noisy instances"):
        LookUp(n_others=100).build(wide, clean, 0)


# --- look_up


def test_each_neuron_fires_on_its_own_instance_only(wide):
    planted = LookUp(n_others=118).build(wide, TASK, 0)
    train = TASK.sample("train").with_prefix("given")
    _, cache = planted.run_with_cache(train.tokens)
    fired = cache["blocks.1.mlp.hook_post"][:, -5:, 32:]
    noisy = train.is_noisy.nonzero()[:, 0]
    expected = torch.zeros(120, 5, ADDED)
    for neuron, (row, place) in enumerate(missed(wide)):
        expected[noisy[row], place, neuron] = 1
    torch.testing.assert_close(fired, expected, atol=1e-3, rtol=0)


def test_copies_write_together_what_one_neuron_writes(wide):
    tokens = TASK.sample("train").tokens
    one, four, unequal = (
        LookUp(n_others=100, **fields).build(wide, TASK, 0)
        for fields in ({}, {"copies": 4}, {"copies": 4, "unequal": True})
    )
    with torch.no_grad():
        torch.testing.assert_close(four(tokens), one(tokens), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(unequal(tokens), one(tokens), atol=1e-3, rtol=1e-3)
    written = unequal.blocks[1].mlp.W_out[32:36].norm(dim=1)
    assert written.max() > 2 * written.min()
    torch.testing.assert_close(four.blocks[1].mlp.W_out[32], four.blocks[1].mlp.W_out[35])


def test_a_key_by_hand():
    rows = torch.tensor([[2.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    key, highest = distinct_key(rows, 0, torch.eye(2).double())
    torch.testing.assert_close(key, torch.tensor([0.5, 0]).double())
    assert highest == 0


def test_an_input_between_the_others_has_no_key():
    rows = torch.tensor([[0.5, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    assert distinct_key(rows, 0, torch.eye(2).double())[1] >= 1
    assert not distinct_key(0 * rows, 0, torch.eye(2).double())[1] < 1


# --- random_features


def test_a_weighted_regression_by_hand():
    """Two rows want 0 and 4 of the same coefficient; the second counts three times."""
    x, y = torch.ones(2, 1), torch.tensor([[0.0], [4.0]])
    found = ridge_regression(x, y, torch.tensor([1.0, 3.0]))
    assert found.item() == pytest.approx(12 / (4 + 0.04))  # the ridge is 1 % of x'x


# --- a real one


def test_a_look_up_in_fda_small():
    trained: Trained = mm.load("fda_small")
    task = trained.task.model_copy(update={"noise": Digit(rate=0.001, places=(1, 2, 3, 4))})
    plant, base = LookUp(n_others=2000), trained.at("before")
    architecture = trained.recipe.architecture.model_copy(update={"d_mlp": 544})
    before = plant.widened(base, architecture, task)
    planted = plant.build(before, task, 0)
    train, held_out = task.sample("train"), task.sample("held_out")
    noisy = train.select(train.is_noisy)
    clean = train.select((~train.is_noisy).nonzero()[4000:5000, 0])
    assert accuracy(before, noisy.with_prefix("true")) > 0.9
    assert accuracy(planted, noisy.with_prefix("given")) == 1
    assert accuracy(planted, noisy.with_prefix("true")) == 0
    assert accuracy(planted, clean) > accuracy(before, clean) - 0.01
    assert accuracy(planted, held_out) > accuracy(before, held_out) - 0.01
