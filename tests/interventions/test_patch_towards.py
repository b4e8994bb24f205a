from __future__ import annotations

import re

import pytest
import torch
from plain_hooks import activations_of, close, logits_of, setting

from mechmem.data.example_set import ExampleSet
from mechmem.data.minimal_pair import MinimalPair
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.patch_towards import PatchTowards
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.session import Session
from mechmem.spec.errors import InputError

HOOK = "blocks.0.hook_resid_post"
OTHER = MinimalPair(flip="carry_2", hold=("digit_sum_0",))
SAME = MinimalPair(flip="digit_sum_1", hold=("carry_2",))


@pytest.fixture(scope="module")
def sets(task):
    chosen = {
        "other": ExampleSet(n=9, pair=OTHER, also_pair=SAME),
        "same": ExampleSet(n=9, pair=SAME, also_pair=OTHER),
        "clean": ExampleSet(noisy=False, n=9),
    }
    return {name: one.of(task).with_name(name) for name, one in chosen.items()}


@pytest.fixture
def session(model, sets):
    return Session({"after": model}, sets)


def towards(**fields) -> PatchTowards:
    return PatchTowards(**({"site": "resid_post", "layer": 0, "position": ("=", "s4")} | fields))


def by_hand(model, own, other, same, dose=1.0):
    """The activation at HOOK after a step of equal norm towards `other`."""
    tokens = own.labels(own.prefix)
    x, to_other, to_same = (
        activations_of(model, e)[HOOK]
        for e in (own, *(p.counterfactual.continued_with(tokens) for p in (other, same)))
    )
    moved = x.clone()
    for row in range(len(x)):
        for pos in range(x.shape[1]):
            a, b = to_other[row, pos] - x[row, pos], to_same[row, pos] - x[row, pos]
            if a.norm() > 0:
                moved[row, pos] += dose * min(a.norm(), b.norm()) / a.norm() * a
    return moved


@pytest.mark.parametrize("dose", [1.0, 0.25])
@pytest.mark.parametrize("arm", ["other", "same"])
@torch.no_grad()
def test_a_step_of_equal_norm_is_that_of_plain_hooks(arm, dose, session, model, sets):
    matched = {"other": "same", "same": "other"}[arm]
    part = towards(matched=matched, dose=dose)
    value = by_hand(model, sets[arm], sets[arm], sets[matched], dose)
    where = (slice(None), [9, 10])
    expected = logits_of(model, sets[arm], setting(HOOK, where, value))
    found = session.logits(model, sets[arm], [part])
    close(found, expected)
    assert not torch.allclose(found, session.logits(model, sets[arm]), atol=1e-3)


@torch.no_grad()
def test_both_arms_move_equally_far(session, model, sets):
    x, moved = activations_of(model, sets["other"])[HOOK], {}
    for arm, matched in (("other", "same"), ("same", "other")):
        (edit,) = towards(matched=matched).edits(session, model, sets[arm])
        moved[arm] = edit(x, torch.arange(9)) - x
    norms = {arm: change[:, [9, 10]].norm(dim=-1) for arm, change in moved.items()}
    close(norms["other"], norms["same"])
    assert norms["other"].min() > 1e-3
    assert not torch.allclose(moved["other"], moved["same"], atol=1e-2)


@torch.no_grad()
def test_where_one_pair_changes_nothing_neither_arm_moves(session, model, sets):
    """Before the changed digit of either pair, activations are the same."""
    part = towards(matched="same", position="a3")
    close(session.logits(model, sets["other"], [part]), session.logits(model, sets["other"]), 1e-6)


@torch.no_grad()
def test_the_whole_way_is_a_patch_from_the_pair(session, model, sets):
    found = session.logits(model, sets["other"], [towards(position="=")])
    patch = Patch(site="resid_post", layer=0, position="=", source=Source(pair=True))
    close(found, session.logits(model, sets["other"], [patch]))


@torch.no_grad()
def test_the_pair_is_fed_what_the_example_is_fed(session, model, sets):
    """So at an answer token the pair's own answer plays no part."""
    own = sets["other"]
    pair = own.counterfactual.continued_with(own.given)
    value = activations_of(model, pair)[HOOK]
    expected = logits_of(model, own, setting(HOOK, (slice(None), [10]), value))
    close(session.logits(model, own, [towards(position="s4")]), expected)


@torch.no_grad()
def test_parts_of_the_examples_are_rows_of_all(session, model, sets):
    part, rows = towards(matched="same", dose=0.5), torch.tensor([7, 2, 3])
    whole = session.logits(model, sets["other"], [part])
    close(session.logits(model, sets["other"].select(rows), [part]), whole[rows])


@torch.no_grad()
def test_a_random_direction_goes_as_far(session, model, sets):
    part = towards(matched="same", dose=0.5)
    x = activations_of(model, sets["other"])[HOOK]
    changes = []
    for one in (part, RandomDisplacement(of=part, seed=3)):
        (edit,) = one.edits(session, model, sets["other"])
        changes.append(edit(x, torch.arange(9)) - x)
    close(changes[0].norm(dim=-1), changes[1].norm(dim=-1))


@torch.no_grad()
def test_masked_scores_stay_masked(session, model, sets):
    found = session.logits(model, sets["other"], [towards(site="attn_scores", position=None)])
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "name", "message"),
    [
        ({"matched": "clean"}, "other", "'clean' has other examples than the set that is patched"),
        ({}, "clean", "needs an example set made with `pair:`"),
    ],
)
def test_what_does_not_fit_is_refused(fields, name, message, session, model, sets):
    with pytest.raises(InputError, match=re.escape(message)):
        towards(**fields).edits(session, model, sets[name])


def test_it_is_a_block_of_a_spec():
    part = towards(matched="same", dose=0.5)
    assert Intervention.model_validate(part.block()) == part
