from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_hooks import activations_of, logits_of
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from mechmem.analyses.effects.neuron_top_k import NeuronTopK
from mechmem.analyses.neurons.neuron_shift import NeuronShift
from mechmem.analyses.neurons.ranking import SPREAD_FLOOR
from mechmem.data.examples import third_labels
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.patch_contributions import PatchContributions
from mechmem.session import Session
from mechmem.spec.errors import InputError

READOUT = slice(9, 14)


class HandMade(Session):
    """A session whose neurons are given: by (model, example set, layer)."""

    def __init__(self, given: dict[tuple[str, str, int], torch.Tensor], *named) -> None:
        super().__init__(*named)
        self.given = given

    def activation(self, model, examples, at):
        model_name = next(name for name, found in self.models.items() if found is model)
        set_name = next(name for name, found in self.example_sets.items() if found is examples)
        assert at.hook == f"blocks.{at.layer}.mlp.hook_post"
        return at.take(self.given[model_name, set_name, at.layer], torch.arange(len(examples)))


@pytest.fixture
def still(model, other_model, examples, others) -> HandMade:
    """Clean instances at `before` alternate between -1 and 1, so that every spread is 1; nothing
    else moves."""
    alternating = (1.0 - 2.0 * (torch.arange(12) % 2)).reshape(12, 1, 1).expand(12, 14, 24).clone()
    zeros = torch.zeros(12, 14, 24)
    given = {}
    for layer in (0, 1):
        given |= {(m, "noisy", layer): zeros.clone() for m in ("before", "after")}
        given |= {(m, "clean", layer): alternating.clone() for m in ("before", "after")}
    models = {"after": model, "before": other_model}
    return HandMade(given, models, {"noisy": examples, "clean": others})


@pytest.fixture
def moving(still) -> HandMade:
    """Random activations everywhere; neuron 5 of layer 0 is dead."""
    generator = torch.Generator().manual_seed(0)
    still.given = {key: torch.randn(12, 14, 24, generator=generator).relu() for key in still.given}
    for (_, _, layer), activation in still.given.items():
        if layer == 0:
            activation[..., 5] = 0
    return still


def shifts(session: HandMade, layer: int, name: str) -> np.ndarray:
    """The shift of every example and neuron, written out."""
    before, after = (
        session.given[m, name, layer][:, READOUT].double().numpy() for m in ("before", "after")
    )
    spread = session.given["before", "clean", layer][:, READOUT].double().numpy().std(axis=0)
    spread = np.maximum(spread, SPREAD_FLOOR * np.median(spread)) + 1e-12
    return np.abs((after - before) / spread).mean(axis=1)


def neuron(table, layer: int, index: int):
    return table.set_index(["layer", "neuron"]).loc[(layer, index)]


def test_a_known_shift_is_found(still):
    after = still.given["after", "noisy", 1]
    after[:, READOUT, 3] = 2.0
    after[:, 9:11, 4] = -3.0  # two of the five positions
    still.given["after", "clean", 1][:, READOUT, 3] += 0.5
    table = NeuronShift().table(still)
    found = neuron(table, 1, 3)
    assert found[["shift_noisy", "shift_clean", "signed_noisy", "auc"]].tolist() == pytest.approx(
        [2, 0.5, 2, 1]
    )
    found = neuron(table, 1, 4)
    assert found[["shift_noisy", "shift_clean", "signed_noisy", "auc"]].tolist() == pytest.approx(
        [1.2, 0, -1.2, 1]
    )
    rest = table[~((table["layer"] == 1) & table["neuron"].isin([3, 4]))]
    assert (rest[["shift_noisy", "shift_clean", "signed_noisy"]] == 0).all(axis=None)
    assert (rest["auc"] == 0.5).all()


def test_shifts_are_in_units_of_the_spread_over_clean_instances_before(still):
    still.given["before", "clean", 0][..., 7] *= 4
    still.given["after", "clean", 0][..., 7] *= 4
    still.given["after", "noisy", 0][:, READOUT, 6:8] = 2.0
    table = NeuronShift().table(still)
    assert neuron(table, 0, 6)["shift_noisy"] == pytest.approx(2)
    assert neuron(table, 0, 7)["shift_noisy"] == pytest.approx(0.5)


def test_other_positions_than_the_readout_do_not_count(still):
    still.given["after", "noisy", 0][:, :9] = 100.0
    assert (NeuronShift().table(still)["shift_noisy"] == 0).all()


def test_a_silent_neuron_that_wakes_is_measured_by_the_floor(still):
    for model in ("before", "after"):
        still.given[model, "clean", 0][..., 2] = 0
    still.given["after", "noisy", 0][:, READOUT, 2] = 1.0
    assert neuron(NeuronShift().table(still), 0, 2)["shift_noisy"] == pytest.approx(
        1 / SPREAD_FLOOR
    )


def test_dead_neurons_have_numbers_too(moving):
    table = NeuronShift().table(moving)
    assert np.isfinite(table.to_numpy(float)).all()
    assert neuron(table, 0, 5)[["shift_noisy", "shift_clean", "auc", "p"]].tolist() == [
        0,
        0,
        0.5,
        1,
    ]


def test_a_layer_of_dead_neurons_has_numbers_too(still):
    still.given = {key: torch.zeros(12, 14, 24) for key in still.given}
    table = NeuronShift().table(still)
    assert np.isfinite(table.to_numpy(float)).all()
    assert set(table["auc"]) == {0.5}


def test_auc_is_that_of_scikit_learn(moving):
    table = NeuronShift().table(moving)
    assert len(table) == 48
    is_noisy = [1] * 12 + [0] * 12
    for layer in (0, 1):
        noisy, clean = shifts(moving, layer, "noisy"), shifts(moving, layer, "clean")
        for index in range(24):
            found = neuron(table, layer, index)
            expected = roc_auc_score(is_noisy, np.concatenate([noisy[:, index], clean[:, index]]))
            assert found["auc"] == pytest.approx(expected, abs=1e-9)
            assert found["shift_noisy"] == pytest.approx(noisy[:, index].mean())
            assert found["shift_clean"] == pytest.approx(clean[:, index].mean())


def test_q_is_the_benjamini_hochberg_rate_over_all_neurons(moving):
    table = NeuronShift().table(moving)
    p = table["p"].to_numpy()
    order = np.argsort(p)
    adjusted = p[order] * len(p) / np.arange(1, len(p) + 1)
    expected = np.empty_like(p)
    expected[order] = np.minimum.accumulate(adjusted[::-1])[::-1]
    np.testing.assert_allclose(table["q"], expected.clip(max=1))


def test_a_separation_is_significant_and_none_is_not(still):
    still.given["after", "noisy", 1][:, READOUT, 3] = torch.arange(1.0, 13)[:, None]
    table = NeuronShift().table(still)
    assert neuron(table, 1, 3)["p"] < 1e-3
    assert neuron(table, 1, 0)["p"] == 1


def test_the_columns_are_documented(moving):
    assert list(NeuronShift().table(moving).columns) == list(NeuronShift.columns)


def test_real_activations_are_those_of_the_two_checkpoints(session, model, other_model, examples):
    found = neuron(NeuronShift().table(session), 1, 6)
    hook = "blocks.1.mlp.hook_post"
    before, after = (
        session.activation(m, examples, hook)[:, READOUT, 6].double() for m in (other_model, model)
    )
    spread = (
        session.activation(other_model, session.examples("clean"), hook)[:, READOUT]
        .double()
        .std(dim=0, correction=0)
    )
    floor = SPREAD_FLOOR * np.median(spread)
    expected = ((after - before) / spread[:, 6].clamp_min(floor)).abs().mean()
    assert found["shift_noisy"] == pytest.approx(expected.item(), rel=1e-6)


def top_k(k: int, layer: int | tuple[int, ...] = 1, **fields) -> NeuronTopK:
    given = {"n_random": 2, "greedy": False, "ranking": "spread"} | fields
    return NeuronTopK(layer=layer, k=k, **given)


def neurons(patches) -> set[tuple[int, int]]:
    return {(patch.layer, index) for patch in patches for index in patch.neurons}


@pytest.fixture
def ranked(still) -> HandMade:
    """Neuron i of layer l has moved by i + 30 l on the noisy instances, those of layer 1
    downwards."""
    for layer, sign in ((0, 1), (1, -1)):
        still.given["after", "noisy", layer][:, READOUT] = sign * (torch.arange(24.0) + 30 * layer)
    return still


def test_the_most_shifted_neurons_are_patched_whatever_the_direction(ranked):
    assert neurons(top_k(3).interventions(ranked)) == {(1, 23), (1, 22), (1, 21)}
    assert neurons(top_k(2, layer=0).interventions(ranked)) == {(0, 23), (0, 22)}
    assert neurons(top_k(26, layer=(0, 1)).interventions(ranked)) == {(1, i) for i in range(24)} | {
        (0, 23),
        (0, 22),
    }


def test_they_are_patched_back_to_before(ranked):
    source = Source(checkpoint="before")
    assert top_k(2).interventions(ranked) == [
        Patch(site="neurons", layer=1, neurons=(22, 23), source=source)
    ]


def test_random_neurons_are_as_many_of_the_same_layers(ranked):
    for layer in (0, 1, (0, 1)):
        analysis = top_k(9, layer=layer, n_random=30)
        draws = [neurons(draw) for draw in analysis.controls(ranked, [])["control"]]
        assert [len(draw) for draw in draws] == [9] * 30
        assert {at for draw in draws for at, _ in draw} == set(analysis.layers)
        assert {index for draw in draws for _, index in draw} == set(range(24))
        assert draws == [neurons(draw) for draw in analysis.controls(ranked, [])["control"]]


def test_more_neurons_than_there_are_is_refused(ranked):
    with pytest.raises(InputError, match=r"k 25 is more than the 24 neurons of layers \(1,\)"):
        top_k(25).table(ranked)


def test_a_control_of_another_kind_is_refused():
    with pytest.raises(ValidationError, match="neuron_top_k has no key 'control'"):
        top_k(1, control="random_direction")


def test_no_neuron_patched_is_the_baseline(session):
    table = top_k(0).table(session).set_index(["condition", "prefix", "place", "measure"])["value"]
    assert table["intervened"].equals(table["baseline"])
    assert table["control"].equals(table["baseline"])


def test_all_neurons_patched_is_the_patched_layer(session):
    table = top_k(24, measures=("logit_difference",)).table(session)
    both = table.set_index(["condition", "prefix", "place"])["value"]
    np.testing.assert_allclose(both["intervened"], both["control"], atol=1e-5)
    assert not np.allclose(both["intervened"], both["baseline"], atol=1e-3)


def test_neurons_are_ranked_once_for_a_whole_sweep(session, monkeypatch):
    calls, gradients = [], Session.gradients
    monkeypatch.setattr(
        Session, "gradients", lambda self, *args: calls.append(args) or gradients(self, *args)
    )
    for k in (1, 2):
        top_k(k, ranking="attribution").table(session)
        top_k(k, layer=0, ranking="attribution").table(session)
    assert len(calls) == 2


def test_rankings_share_their_random_neurons(session, monkeypatch):
    top_k(4).table(session)
    done = session.n_forwarded
    found = top_k(4, ranking="activation").table(session)
    assert session.n_forwarded - done == 24  # the patched answers under two prefixes
    assert set(found["condition"]) == {"baseline", "intervened", "control", "source"}


def test_the_source_is_what_can_be_attained(session, other_model, examples):
    table = top_k(48, layer=(0, 1)).table(session)
    values = table.set_index(["condition", "prefix", "place", "measure"])["value"]
    right = logits_of(other_model, examples).argmax(-1) == examples.true
    assert values["source", "given", "all", "accuracy_true"] == right.all(1).double().mean()


def test_the_norm_is_that_of_the_change_in_mlp_out(session, model, other_model, examples):
    table = top_k(3, ranking="activation").table(session)
    norm = table.groupby("condition")["norm"].first()
    (patch,) = top_k(3, ranking="activation").interventions(session)
    chosen = list(patch.neurons)
    own, theirs = (
        activations_of(m, examples)["blocks.1.mlp.hook_post"][:, READOUT, chosen]
        for m in (model, other_model)
    )
    moved = (theirs - own) @ model.blocks[1].mlp.W_out[chosen]
    assert norm["intervened"] == pytest.approx(moved.norm(dim=-1).mean().item(), rel=1e-5)
    assert norm["baseline"] == 0
    assert np.isnan(norm["source"])


def test_neurons_can_be_patched_forward(session, model, other_model):
    back = top_k(5, ranking="attribution", model="before", before="after", towards="given")
    (patch,) = back.interventions(session)
    assert patch.source == Source(checkpoint="after")
    change = back.change(session)
    assert change.model is other_model
    assert change.source is model


def test_contributions_are_patched_where_asked(session):
    (patch,) = top_k(2, patch="contributions").interventions(session)
    assert isinstance(patch, PatchContributions)
    (draw, _) = top_k(2, patch="contributions").controls(session, [])["control"]
    assert all(isinstance(part, PatchContributions) for part in draw)


def test_positions_are_those_that_are_patched(session):
    (patch,) = top_k(2, position="=").interventions(session)
    assert patch.position == "="


def test_a_third_label_takes_the_place_of_the_true_one(session, examples):
    table = top_k(2, towards="third", greedy=True).table(session)
    assert set(table["measure"]) == {"accuracy_third", "accuracy_given"}
    assert set(table["prefix"]) == {"given", "greedy"}
    third = top_k(2, towards="third").answered(session)
    assert torch.equal(third.true, third_labels(examples, 0))
    ranked = top_k(24, ranking="attribution").ranked(session)
    assert top_k(24, ranking="attribution", towards="third").ranked(session) != ranked
