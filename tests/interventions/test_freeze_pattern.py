from __future__ import annotations

import pytest
import torch

from mechmem.interventions.ablate import Ablate
from mechmem.interventions.applied import applied
from mechmem.interventions.freeze_pattern import FreezePattern
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.models.fast import Edit, forward
from mechmem.spec.errors import InputError


@torch.no_grad()
def test_alone_it_changes_nothing(session, model, examples):
    frozen = session.logits(model, examples, FreezePattern().edits(model, examples, session))
    torch.testing.assert_close(frozen, session.logits(model, examples), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_patterns_stay_while_the_values_change(session, model, examples):
    ablation = Ablate(site="resid_pre", layer=1, method="resample", position="a0")
    edits = [
        e
        for p in (ablation, FreezePattern(layer=1, head=0))
        for e in p.edits(model, examples, session)
    ]
    hooks = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_v"]
    _, found = forward(model, examples.tokens, 5, edits, hooks)
    before = session.activations(model, examples, hooks)
    assert torch.equal(found[hooks[0]][:, 0], before[hooks[0]][:, 0])
    assert not torch.allclose(found[hooks[0]][:, 1], before[hooks[0]][:, 1], atol=1e-4)
    assert not torch.allclose(found[hooks[1]], before[hooks[1]], atol=1e-4)


@torch.no_grad()
def test_an_effect_through_queries_only_goes_away(session, model, examples):
    edits = [Edit("blocks.1.attn.hook_q", lambda q: q.flip(0))]
    changed = session.logits(model, examples, edits)
    kept = session.logits(model, examples, edits + FreezePattern().edits(model, examples, session))
    assert not torch.allclose(changed, session.logits(model, examples), atol=1e-3)
    torch.testing.assert_close(kept, session.logits(model, examples), atol=1e-5, rtol=1e-5)


def test_the_patterns_of_another_run_are_those_of_a_patch(session, model, other_model, examples):
    hook = "blocks.0.attn.hook_pattern"
    for source in (Source(checkpoint="before"), Source(examples="clean"), other_model):
        edits = FreezePattern(layer=0, position="=", source=source).edits(model, examples, session)
        patch = Patch(site="pattern", layer=0, position="=", source=source).edits(
            model, examples, session
        )
        before = session.activation(model, examples, hook)
        assert [e.hook for e in edits] == [hook]
        assert torch.equal(edits[0].function(before), patch[0].function(before))
        assert not torch.equal(edits[0].function(before), before)


@torch.no_grad()
def test_the_fast_path_is_the_hook_path(session, model, examples):
    parts = [Ablate(site="attn_out", layer=0), FreezePattern(source=Source(checkpoint="before"))]
    fast = session.logits(
        model, examples, [e for p in parts for e in p.edits(model, examples, session)]
    )
    with applied(model, parts, examples, session):
        slow = model(examples.tokens)[:, -examples.n_answer :]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_what_is_not_there_is_refused(session, model, examples):
    with pytest.raises(InputError, match="layer 2 is out of range"):
        FreezePattern(layer=2).edits(model, examples, session)


def test_it_is_a_block_of_a_spec():
    part = FreezePattern(layer=(0, 1), source=Source(checkpoint="before"))
    assert Intervention.model_validate(part.block()) == part
    assert Intervention.model_validate("freeze_pattern") == FreezePattern()
