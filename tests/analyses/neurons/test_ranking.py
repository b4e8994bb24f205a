from __future__ import annotations

import pytest
import torch
from plain_hooks import activations_of, close, logits_of

from mechmem.analyses.neurons.ranking import (
    Change,
    Options,
    indifference,
    preference,
    ranked,
    scores,
    spread_of,
)
from mechmem.session import Session

POST, OUT = "blocks.{}.mlp.hook_post", "blocks.{}.hook_mlp_out"


@pytest.fixture
def change(session, model, other_model, examples, others) -> Change:
    return Change(session, model, other_model, examples, others, (0, 1))


def plain_gradients(model, examples, metric, hooks, setting=None) -> dict[str, torch.Tensor]:
    """Gradients by TransformerLens's hooks and autograd alone; `setting` are whole activations."""
    seen = {}

    def look(activation, hook):
        if setting is not None:
            activation = setting[hook.name].clone()
        activation = activation if activation.requires_grad else activation.requires_grad_()
        seen[hook.name] = activation
        return activation

    leaf = ("hook_embed", lambda activation, hook: activation.detach().requires_grad_())
    with torch.enable_grad(), model.hooks(fwd_hooks=[leaf, *((hook, look) for hook in hooks)]):
        logits = model(examples.tokens)[:, -examples.n_answer :]
        value = metric(logits, torch.arange(len(examples))).sum()
        found = torch.autograd.grad(value, [seen[hook] for hook in hooks])
    return dict(zip(hooks, found, strict=True))


def plain_metric(examples):
    def metric(logits, rows):
        true, given = (logits.gather(-1, e[..., None]) for e in (examples.true, examples.given))
        return (true - given)[..., 0].sum(1)

    return metric


@pytest.mark.parametrize("backend", ["fast", "hooked"])
def test_attribution_is_the_gradient_times_the_change(
    model, other_model, examples, others, backend
):
    session = Session(backend=backend)
    change = Change(session, model, other_model, examples, others, (0, 1))
    hooks = [POST.format(layer) for layer in (0, 1)]
    gradients = plain_gradients(model, examples, plain_metric(examples), hooks)
    own, theirs = activations_of(model, examples), activations_of(other_model, examples)
    for hook, found in zip(hooks, scores(change, "attribution"), strict=True):
        expected = (gradients[hook] * (theirs[hook] - own[hook]))[:, -5:].sum(1)
        close(found.float(), expected)
        assert found.abs().max() > 1e-3


def test_integrated_gradients_are_those_of_the_straight_line(change, model, other_model, examples):
    hooks = [POST.format(layer) for layer in (0, 1)]
    own, theirs = activations_of(model, examples), activations_of(other_model, examples)
    total = dict.fromkeys(hooks, 0.0)
    for point in (0.25, 0.75):
        # Only the readouts move; the neurons elsewhere are those of the model.
        at = {hook: own[hook].clone() for hook in hooks}
        for hook in hooks:
            at[hook][:, -5:] += point * (theirs[hook] - own[hook])[:, -5:]
        found = plain_gradients(model, examples, plain_metric(examples), hooks, at)
        total = {hook: total[hook] + found[hook] / 2 for hook in hooks}
    by_layer = scores(change, "integrated_gradients", options=Options(n_steps=2))
    expected = [(total[h] * (theirs[h] - own[h]))[:, -5:].sum(1) for h in hooks]
    for found, right in zip(by_layer, expected, strict=True):
        close(found.float(), right)


@pytest.mark.parametrize("unit", ["activations", "contributions"])
def test_integrated_gradients_sum_to_the_effect_of_all_neurons(change, model, examples, unit):
    change = Change(*[*vars(change).values()][:5], (1,), unit=unit)
    (found,) = scores(change, "integrated_gradients", options=Options(n_steps=64))
    metric, every = preference(examples, "true"), torch.arange(len(examples))
    session, patch = change.session, change.patch(1, range(24))
    whole = metric(session.logits(model, examples, [patch]), every)
    before = metric(session.baseline(model, examples), every)
    torch.testing.assert_close(found.sum(1).float(), whole - before, atol=2e-2, rtol=1e-2)


def test_contributions_take_the_weights_out_of_neurons_along(change, model, other_model, examples):
    change = Change(*[*vars(change).values()][:6], unit="contributions")
    hook = OUT.format(1)
    gradient = plain_gradients(model, examples, plain_metric(examples), [hook])[hook]
    own, theirs = (activations_of(m, examples)[POST.format(1)] for m in (model, other_model))
    expected = torch.stack(
        [
            (
                gradient
                * (
                    theirs[..., i, None] * other_model.blocks[1].mlp.W_out[i]
                    - own[..., i, None] * model.blocks[1].mlp.W_out[i]
                )
            )[:, -5:].sum((1, 2))
            for i in range(24)
        ],
        dim=1,
    )
    close(scores(change, "attribution")[1].float(), expected)


def test_ablation_is_the_exact_effect_of_each_neuron(change, model, other_model, examples):
    metric, every = plain_metric(examples), torch.arange(len(examples))
    found = scores(change, "ablation")[1]
    theirs = activations_of(other_model, examples)[POST.format(1)]

    def moved(activation, hook):
        activation = activation.clone()
        activation[:, -5:, 7] = theirs[:, -5:, 7]
        return activation

    effect = metric(logits_of(model, examples, (POST.format(1), moved)), every) - metric(
        logits_of(model, examples), every
    )
    close(found[:, 7].float(), effect, 1e-4)


def test_the_target_turns_the_sign(change, examples):
    for method in ("attribution", "label_neutral"):
        forth, back = (scores(change, method, target)[1] for target in ("true", "given"))
        torch.testing.assert_close(forth, -back)


def test_label_neutral_does_not_look_at_the_true_label(change, examples, session):
    logits = torch.zeros(12, 5, 12)
    logits.scatter_(-1, examples.given[..., None], 12.0)
    every = torch.arange(12)
    assert indifference(examples)(logits, every).tolist() == pytest.approx([5 * (1 - 12)] * 12)
    wrong = examples.with_true(examples.true.flip(0))
    other = Change(session, change.model, change.source, wrong, change.clean, (0, 1))
    torch.testing.assert_close(
        scores(other, "label_neutral")[0], scores(change, "label_neutral")[0]
    )
    assert not torch.allclose(scores(other, "attribution")[0], scores(change, "attribution")[0])


def test_sizes_are_means_over_the_readouts(change, model, other_model, examples, others):
    hook = POST.format(0)
    own, theirs = (activations_of(m, examples)[hook][:, -5:] for m in (model, other_model))
    clean = activations_of(other_model, others)[hook][:, -5:].double().numpy()
    size = (theirs - own).abs().double()
    close(scores(change, "activation")[0], size.mean(1))
    spread = torch.from_numpy(spread_of(clean, 0.5))
    found = scores(change, "spread", options=Options(spread_floor=0.5))[0]
    close(found, (size / spread).mean(1))


def test_the_floor_of_the_spread_is_a_share_of_the_median():
    values = torch.zeros(4, 1, 3).numpy()
    values[:, 0, 0] = [1, -1, 1, -1]
    values[:, 0, 1] = [2, -2, 2, -2]
    assert spread_of(values, 0.25)[0].tolist() == pytest.approx([1, 2, 0.25])


def test_weight_change_is_the_norm_of_all_weights_of_a_neuron(change, model, other_model):
    mlps = [m.blocks[1].mlp for m in (model, other_model)]
    parts = [torch.cat([m.W_in[:, 3], m.b_in[3:4], m.W_out[3]]) for m in mlps]
    found = scores(change, "weight_change")[1]
    assert found[:, 3].tolist() == pytest.approx([(parts[0] - parts[1]).norm().item()] * 12)


def test_the_clean_mean_is_subtracted(change, model, other_model, examples, others):
    change = Change(*[*vars(change).values()][:6], minus_clean=True)
    hook = POST.format(1)
    shifts = [
        (activations_of(other_model, e)[hook] - activations_of(model, e)[hook])[:, -5:]
        for e in (examples, others)
    ]
    expected = (shifts[0] - shifts[1].mean(0)).abs().double().mean(1)
    close(scores(change, "activation")[1], expected)


def test_random_scores_are_those_of_the_seed(change):
    first, same, other = (
        scores(change, "random", options=Options(seed=seed))[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(first[0], first[1])


def test_neurons_are_ranked_by_their_mean_score_over_all_layers():
    of_layers = [torch.tensor([[1.0, -9.0], [3.0, -9.0]]), torch.tensor([[0.0, 9.0], [2.0, 9.0]])]
    assert ranked(of_layers, (1, 4)) == [(4, 1), (1, 0), (4, 0), (1, 1)]


@pytest.mark.parametrize("unit", ["activations", "contributions"])
def test_heads_are_scored_by_the_sum_over_their_dimensions(
    session, model, other_model, examples, others, unit
):
    change = Change(
        session, model, other_model, examples, others, (0, 1), None, unit=unit, site="z"
    )
    hook, summed = "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"
    own, theirs = (activations_of(m, examples)[hook] for m in (model, other_model))
    metric = plain_metric(examples)
    if unit == "activations":
        gradient = plain_gradients(model, examples, metric, [hook])[hook]
        expected = (gradient * (theirs - own)).sum((1, 3))
    else:
        gradient = plain_gradients(model, examples, metric, [summed])[summed]
        written = [
            torch.einsum("nphd,hdm->nphm", z, m.blocks[1].attn.W_O)
            for z, m in ((theirs, other_model), (own, model))
        ]
        expected = torch.einsum("npm,nphm->nh", gradient, written[0] - written[1])
    close(scores(change, "attribution")[1].float(), expected)
