from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechmem.interventions.ablate import Ablate, derangement, donors
from mechmem.interventions.applied import applied
from mechmem.interventions.intervention import Intervention
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.registry import Component

METHODS = ["zero", "mean", "resample", "gaussian"]


def ablated(session, model, examples, **fields):
    """What a site holds after the ablation, and what it held before."""
    part = Ablate(**({"site": "z", "layer": 1} | fields))
    edit = part.edits(session, model, examples)[0]
    before = session.activation(model, examples, edit.hook)
    return edit(before, torch.arange(len(examples))), before


def test_zero_is_zero(session, model, examples):
    assert not ablated(session, model, examples, method="zero")[0].any()


def test_mean_by_hand(session, model, examples):
    after, before = ablated(session, model, examples, method="mean", head=1, position="=")
    by_hand = sum(before[i, 9, 1] for i in range(12)) / 12
    assert torch.allclose(after[:, 9, 1], by_hand.expand(12, -1), atol=1e-6)
    assert torch.equal(after[:, 9, 0], before[:, 9, 0])
    assert torch.equal(after[:, :9], before[:, :9])


def test_the_mean_of_each_head_and_position_is_its_own(session, model, examples):
    after, _ = ablated(session, model, examples, method="mean")
    flat = after[0].flatten(0, 1)
    assert len(flat.unique(dim=0)) == len(flat)


def test_the_mean_is_over_the_stated_set(session, model, examples, others):
    after, _ = ablated(session, model, examples, method="mean", reference_set="clean")
    expected = session.activation(model, others, "blocks.1.attn.hook_z").mean(0)
    assert torch.allclose(after, expected.expand_as(after), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_few_of_a_set_get_what_they_get_in_the_whole_set(method, session, model, examples):
    rows = torch.tensor([5, 2, 9])
    whole, _ = ablated(session, model, examples, method=method)
    few, _ = ablated(session, model, examples.select(rows), method=method)
    assert torch.allclose(few, whole[rows], atol=1e-6)
    twice, _ = ablated(
        session, model, examples.select(rows).select(torch.tensor([2])), method=method
    )
    assert torch.allclose(twice, whole[[9]], atol=1e-6)


@given(st.integers(2, 60), st.integers(0, 10**6))
def test_a_derangement_is_a_permutation_that_moves_everything(n, seed):
    found = derangement(n, seed)
    assert sorted(found.tolist()) == list(range(n))
    assert (found != torch.arange(n)).all()
    assert torch.equal(found, derangement(n, seed))


def test_one_example_cannot_be_exchanged_for_another(examples):
    with pytest.raises(InputError, match="at least two examples"):
        derangement(1, 0)
    one = examples.select(torch.tensor([0])).as_set()
    twice = examples.select(torch.tensor([0, 0])).as_set()
    with pytest.raises(InputError, match="only the ablated one"):
        donors(one, twice, 0)


@given(st.integers(0, 10**6))
def test_from_an_overlapping_set_no_example_gets_its_own(examples, seed):
    part = examples.select(torch.arange(3, 7)).as_set()
    rows = donors(examples, part, seed)
    assert (part.prompt[rows] != examples.prompt).any(dim=1).all()


def test_resample_is_the_same_other_example_at_every_site(session, model, examples):
    rows = donors(examples, examples, 3)
    for site in ("z", "mlp_out", "pattern"):
        after, before = ablated(session, model, examples, method="resample", site=site, seed=3)
        assert torch.equal(after, before[rows])


def test_gaussian_has_the_mean_and_spread_of_the_set(model, task):
    examples = task.sample("train")
    session = Session()
    after, before = ablated(session, model, examples, method="gaussian", site="mlp_pre")
    z = (after - before.mean(0)) / before.std(0, correction=0).clamp_min(1e-6)
    varies = before.std(0) > 1e-3
    assert abs(z[:, varies].mean()) < 0.02
    assert abs(z[:, varies].std() - 1) < 0.02
    other, _ = ablated(session, model, examples, method="gaussian", site="mlp_pre", seed=1)
    assert not torch.allclose(after, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("site", ["embed", "resid_pre", "z", "pattern", "neurons", "norm_final"])
@torch.no_grad()
def test_the_fast_path_is_the_hook_path(method, site, session, model, examples):
    layer = None if site in ("embed", "norm_final") else 1
    part = Ablate(
        site=site, layer=layer, position=("=", "s4"), method=method, reference_set="clean"
    )
    fast = session.logits(model, examples, [part])
    with applied(model, [part], examples, session):
        slow = model(examples.tokens)[:, -examples.n_answer :]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(fast, session.logits(model, examples), atol=1e-3)


def test_upstream_sites_are_unchanged(session, model, examples):
    part = Ablate(site="mlp_out", layer=1, method="mean")
    with applied(model, [part], examples, session):
        _, cache = model.run_with_cache(examples.tokens)
    for hook in ("blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.1.mlp.hook_post"):
        assert torch.allclose(cache[hook], session.activation(model, examples, hook), atol=1e-5)


def test_an_unknown_set_is_refused(session, model, examples):
    with pytest.raises(InputError, match="did you mean 'clean'"):
        Ablate(site="z", layer=0, reference_set="claen").edits(session, model, examples)


def test_it_is_a_block_of_a_spec():
    part = Ablate(site="z", layer=0, head=1, method="resample", reference_set="clean", seed=4)
    assert Intervention.model_validate(part.block()) == part
    assert Component.registries["intervention"]["ablate"] is Ablate
