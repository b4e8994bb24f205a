from __future__ import annotations

import pytest
import torch
from plain_hooks import activations_of, close, logits_of, setting
from plugin import plugin

from mechmem.interventions.ablate import Ablate
from mechmem.interventions.applied import applied
from mechmem.interventions.freeze_pattern import FreezePattern
from mechmem.interventions.intervention import Intervention, SiteIntervention
from mechmem.interventions.patch import Patch, Source
from mechmem.models.edits import At, Edit
from mechmem.spec.errors import InputError

PATTERN, VALUES = "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_v"


@plugin
class FlippedQueries(SiteIntervention):
    """Gives every example the queries of another one."""

    site: str = "q"

    def edit(self, at, session, model, examples) -> Edit:
        return Edit(At(at.hook), lambda own, rows: own.flip(0), rowwise=False)


def test_alone_it_changes_nothing(session, model, examples):
    frozen = session.logits(model, examples, [FreezePattern()])
    close(frozen, session.logits(model, examples))


def test_the_patterns_stay_while_the_values_change(session, model, examples):
    ablation = Ablate(site="resid_pre", layer=1, method="resample", position="a0")
    edits = session.edits(model, examples, [ablation, FreezePattern(layer=1, head=0)])
    found = session.edited_activations(model, examples, edits, [PATTERN, VALUES])
    before = session.activations(model, examples, [PATTERN, VALUES])
    assert torch.equal(found[PATTERN][:, 0], before[PATTERN][:, 0])
    assert not torch.allclose(found[PATTERN][:, 1], before[PATTERN][:, 1], atol=1e-4)
    assert not torch.allclose(found[VALUES], before[VALUES], atol=1e-4)


def test_an_effect_through_queries_only_goes_away(session, model, examples):
    flipped = FlippedQueries(layer=1)
    changed = session.logits(model, examples, [flipped])
    kept = session.logits(model, examples, [flipped, FreezePattern()])
    assert not torch.allclose(changed, session.logits(model, examples), atol=1e-3)
    close(kept, session.logits(model, examples))


def test_the_patterns_of_another_run_are_those_of_a_patch(session, model, other_model, examples):
    hook, every = "blocks.0.attn.hook_pattern", torch.arange(len(examples))
    for source in (Source(checkpoint="before"), Source(examples="clean"), other_model):
        chosen = {"layer": 0, "position": "=", "source": source}
        (frozen,) = FreezePattern(**chosen).edits(session, model, examples)
        (patch,) = Patch(site="pattern", **chosen).edits(session, model, examples)
        before = session.activation(model, examples, hook)
        assert frozen.hook == hook
        assert torch.equal(frozen(before, every), patch(before, every))
        assert not torch.equal(frozen(before, every), before)


@torch.no_grad()
def test_the_session_applied_and_plain_hooks_agree(session, model, other_model, examples):
    parts = [Ablate(site="attn_out", layer=0), FreezePattern(source=Source(checkpoint="before"))]
    fast = session.logits(model, examples, parts)
    with applied(model, parts, examples, session):
        slow = model(examples.tokens)[:, -examples.n_answer :]
    close(fast, slow)
    own, theirs = activations_of(model, examples), activations_of(other_model, examples)
    mean = own["blocks.0.hook_attn_out"].mean(dim=0).expand(len(examples), -1, -1)
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in (0, 1)]
    hooks = [setting(hook, slice(None), theirs[hook]) for hook in patterns]
    plain = logits_of(model, examples, setting("blocks.0.hook_attn_out", slice(None), mean), *hooks)
    close(slow, plain)
    assert not torch.allclose(fast, session.logits(model, examples), atol=1e-3)


def test_what_is_not_there_is_refused(session, model, examples):
    with pytest.raises(InputError, match="layer 2 is out of range"):
        FreezePattern(layer=2).edits(session, model, examples)


def test_it_is_a_block_of_a_spec():
    part = FreezePattern(layer=(0, 1), source=Source(checkpoint="before"))
    assert Intervention.model_validate(part.block()) == part
    assert Intervention.model_validate("freeze_pattern") == FreezePattern()
