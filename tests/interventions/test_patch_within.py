from __future__ import annotations

import pytest
import torch
from plain_hooks import activations_of, close, logits_of

from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.patch_within import PatchWithin
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.session import Session
from mechmem.spec.errors import InputError


def patch(source, **fields) -> PatchWithin:
    return PatchWithin(**({"site": "attn_out", "layer": 1, "source": Source(live=source)} | fields))


def moved(model, examples, part) -> torch.Tensor:
    """The change of the residual stream after layer 1's attention and MLP."""
    session, hooks = Session(), ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
    edits = session.edits(model, examples, [part])
    after = session.edited_activations(model, examples, edits, hooks)
    hook = edits[-1].hook
    return after[hook] - session.activation(model, examples, hook)


@pytest.mark.parametrize("backend", ["fast", "hooked"])
def test_an_output_is_moved_towards_the_source(model, other_model, examples, backend):
    hook = "blocks.1.hook_attn_out"
    own, theirs = (activations_of(m, examples)[hook] for m in (model, other_model))
    change = theirs - own
    size = change.norm(dim=-1, keepdim=True)
    assert size.min() < 6.2 < size.max()
    value = own + change * (6.2 / size).clamp_max(1)
    expected = logits_of(model, examples, (hook, lambda activation, hook: value))
    part = patch(other_model, norm=6.2)
    close(Session(backend=backend).logits(model, examples, [part]), expected)


@pytest.mark.parametrize("site", ["neurons", "z", "attn_out"])
def test_without_a_limit_it_is_the_patch(model, other_model, examples, site):
    source = Source(live=other_model)
    whole = Patch(site=site, layer=1, source=source)
    session = Session()
    expected = session.logits(model, examples, [whole])
    for norm in (None, 1e6):
        part = patch(other_model, site=site, norm=norm)
        close(session.logits(model, examples, [part]), expected)


@pytest.mark.parametrize("site", ["neurons", "z"])
def test_units_are_measured_where_they_write(model, other_model, examples, site):
    size = moved(model, examples, patch(other_model, site=site, norm=0.5)).norm(dim=-1)
    assert size.max() == pytest.approx(0.5, rel=1e-4)
    whole = moved(model, examples, patch(other_model, site=site)).norm(dim=-1)
    torch.testing.assert_close(size, whole.clamp_max(0.5), atol=1e-4, rtol=1e-4)


def test_a_dose_of_nothing_changes_nothing(model, other_model, examples):
    session = Session()
    found = session.logits(model, examples, [patch(other_model, site="neurons", norm=0)])
    close(found, session.baseline(model, examples))


def test_no_site_is_moved_further_than_the_others_could_be(model, other_model, examples):
    both = ("neurons", "attn_out")
    whole = [moved(model, examples, patch(other_model, site=s)).norm(dim=-1) for s in both]
    for norm in (None, 1.0):
        least = torch.minimum(*whole) if norm is None else torch.minimum(*whole).clamp_max(norm)
        for site in both:
            part = patch(other_model, site=site, norm=norm, within=both)
            size = moved(model, examples, part).norm(dim=-1)
            torch.testing.assert_close(size, least, atol=1e-4, rtol=1e-4)


def test_a_random_displacement_is_as_large_in_the_residual_stream(model, other_model, examples):
    part = patch(other_model, site="neurons", norm=1.0)
    sizes = [moved(model, examples, p).norm(dim=-1) for p in (part, RandomDisplacement(of=part))]
    torch.testing.assert_close(*sizes, atol=1e-4, rtol=1e-4)


def test_a_site_outside_of_the_residual_stream_is_refused(model, examples):
    with pytest.raises(InputError, match="a change of 'pattern' has no size in the residual"):
        Session().logits(model, examples, [patch(model, site="pattern")])
    with pytest.raises(InputError, match="a change of 'q' has no size"):
        Session().logits(model, examples, [patch(model, within=("q",))])
