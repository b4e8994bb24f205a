from __future__ import annotations

import copy

import pytest
import torch
from plain_hooks import activations_of
from sklearn.metrics import roc_auc_score

from mechmem.analyses.neurons.localisation import Localisation, Planted, found_by
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.errors import InputError

PLANTED = (20, 21, 22, 23)
"""Neurons of layer 1 that are silent before; 20 to 23 belong to examples 0 to 3."""


def without(model: Model) -> Model:
    made = copy.deepcopy(model)
    mlp = made.blocks[1].mlp
    with torch.no_grad():
        for neuron in PLANTED:
            mlp.W_in[:, neuron] = mlp.b_in[neuron] = mlp.W_out[neuron] = 0
    return made.requires_grad_(False)


def planted(model: Model, examples) -> Model:
    """Each planted neuron fires at one example's last readout and writes its given last token."""
    made = without(model)
    mlp, norm = made.blocks[1].mlp, made.blocks[1].ln2
    read = activations_of(made, examples)["blocks.1.ln2.hook_normalized"]
    # Before scale and bias all inputs are equally long, so each is the nearest to itself.
    with torch.no_grad():
        for row, neuron in enumerate(PLANTED):
            own = read[row, -1]
            peak, next_one = (read @ own).flatten().topk(2).values
            key = 2 * own / norm.w / (peak - next_one)
            mlp.W_in[:, neuron] = key
            mlp.b_in[neuron] = -norm.b @ key - (peak + next_one) / (peak - next_one)
            given, true = examples.given[row, -1], examples.true[row, -1]
            mlp.W_out[neuron] = 5 * (made.W_U[:, given] - made.W_U[:, true])
    return made.requires_grad_(False)


@pytest.fixture
def wrong(examples):
    """The noisy examples, whose last given digit is wrong."""
    chosen = (examples.given[:, -1] != examples.true[:, -1]).nonzero()[:4, 0]
    return examples.select(chosen).as_set().with_name("noisy")


@pytest.fixture
def with_plant(model, wrong, others) -> Session:
    models = {"after": planted(model, wrong), "before": without(model)}
    return Session(models, {"noisy": wrong, "clean": others})


def test_planted_neurons_are_found_in_the_weights(with_plant, model):
    found = Localisation().planted(with_plant)
    assert found.layers == (1,)
    assert found.neurons.tolist() == list(PLANTED)
    hook = "blocks.1.mlp.hook_post"
    after = with_plant.activation(with_plant.model("after"), with_plant.examples("noisy"), hook)
    owners = after[:, 9:, list(PLANTED)].amax(1).argmax(0)
    assert found.owners.tolist() == owners.tolist() == [0, 1, 2, 3]


def test_attribution_finds_the_planted_neuron_of_each_instance(with_plant):
    table = Localisation(methods=("attribution", "ablation", "weight_change")).table(with_plant)
    found = table.set_index(["method", "measure"])["value"]
    assert found["attribution", "r_at_1"] == 1
    assert found["ablation", "r_at_1"] == 1
    assert found["attribution", "auc"] > 0.99
    # One neuron's weights changed most, and it is the first of every instance.
    assert found["weight_change", "r_at_1"] == 0.25
    assert list(table.columns) == list(Localisation.columns)


def test_a_model_without_a_plant_is_refused(session):
    with pytest.raises(InputError, match="no neuron writes nothing in 'before'"):
        Localisation().table(session)


def test_r_at_1_and_auc_by_hand():
    sizes = torch.tensor([[3.0, 1, 2], [5, 4, 0]], dtype=torch.double)
    own = Planted((0,), torch.tensor([0, 1]), torch.tensor([0, 1]))
    found = found_by(sizes, own, torch.tensor([True, True, True]))
    assert found["r_at_1"].tolist() == [1, 0]
    # The others are 1, 2, 5 and 0: 3 exceeds three of them, 4 too.
    assert found["auc"].tolist() == [0.75, 0.75]
    labels = [1, 0, 0, 0, 1, 0]
    assert found["auc"].mean() == roc_auc_score(labels, sizes.flatten())


def test_a_tie_is_not_found():
    sizes = torch.ones(1, 2, dtype=torch.double)
    found = found_by(sizes, Planted((0,), torch.tensor([0]), torch.tensor([0])), sizes[0] > 0)
    assert found["r_at_1"].tolist() == [0]
    assert found["auc"].tolist() == [0.5]


def test_dead_neurons_are_left_out():
    sizes = torch.tensor([[1.0, 9, 0]], dtype=torch.double)
    own = Planted((0,), torch.tensor([0]), torch.tensor([0]))
    found = found_by(sizes, own, torch.tensor([True, False, True]))
    assert found["r_at_1"].tolist() == [1]
    assert found["auc"].tolist() == [1]
