from __future__ import annotations

import re

import pytest
import torch

from mechmem.interventions.ablate import Ablate
from mechmem.interventions.applied import applied
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.swap_weights import SwapWeights
from mechmem.models.fast import forward
from mechmem.session import Session
from mechmem.spec.errors import InputError

BEFORE = Source(checkpoint="before")
PARTS = ("embed", "attn", "mlp", "unembed")
ARCHITECTURES = [
    {"n_layers": 3},
    {"norm": "rms_norm", "activation": "gelu"},
    {"norm": None, "d_head": 5},
    {"attn_only": True},
]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def swapped(session, model, examples, *parts, capture=()):
    edits = [edit for part in parts for edit in part.edits(model, examples, session)]
    return forward(model, examples.tokens, examples.n_answer, edits, capture)


@pytest.mark.parametrize("fields", ARCHITECTURES, ids=str)
def test_with_all_components_of_another_model_it_is_the_other_model(
    fields, random_models, examples
):
    model, other = random_models(1, **fields), random_models(2, **fields)
    parts = tuple(part for part in PARTS if part != "mlp" or not model.cfg.attn_only)
    found, _ = swapped(Session(), model, examples, SwapWeights(component=parts, source=other))
    close(found, swapped(Session(), other, examples)[0])
    one_by_one = [SwapWeights(component=part, source=other) for part in parts]
    close(swapped(Session(), model, examples, *one_by_one)[0], found)


@pytest.mark.parametrize("component", PARTS)
def test_from_itself_it_changes_nothing(component, session, model, examples):
    found, _ = swapped(session, model, examples, SwapWeights(component=component, source=model))
    close(found, swapped(session, model, examples)[0])


@pytest.mark.parametrize(("component", "weights"), [("attn", "attn"), ("mlp", "mlp")])
@torch.no_grad()
def test_it_is_the_model_with_these_weights(component, weights, random_models, examples):
    model, other, hybrid = (random_models(i) for i in (1, 2, 1))
    norm = "ln1" if component == "attn" else "ln2"
    names = [
        n
        for n in dict(model.named_parameters())
        if n.startswith((f"blocks.1.{weights}.", f"blocks.1.{norm}."))
    ]
    hybrid.load_state_dict(hybrid.state_dict() | {n: other.state_dict()[n] for n in names})
    found, _ = swapped(
        Session(), model, examples, SwapWeights(component=component, layer=1, source=other)
    )
    close(found, swapped(Session(), hybrid, examples)[0])
    assert not torch.allclose(found, swapped(Session(), model, examples)[0], atol=1e-2)


def test_the_inputs_are_the_edited_runs_own(session, model, other_model, examples):
    part, ablation = (
        SwapWeights(component="mlp", layer=1, source=BEFORE),
        Ablate(site="attn_out", layer=1, method="zero"),
    )
    names = ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"]
    _, found = swapped(session, model, examples, ablation, part, capture=names)
    normed = other_model.blocks[1].ln2(found[names[0]])
    close(found[names[1]], other_model.blocks[1].mlp(normed))
    patched = Patch(site="mlp_out", layer=1, source=BEFORE)
    assert not torch.allclose(
        swapped(session, model, examples, patched, capture=names)[1][names[1]], found[names[1]]
    )


def test_what_lies_before_the_component_stays_as_it_was(session, model, examples):
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.1.mlp.hook_post"]
    part = SwapWeights(component="mlp", layer=1, source=BEFORE)
    _, edited = swapped(session, model, examples, part, capture=hooks)
    for hook, plain in session.activations(model, examples, hooks).items():
        assert torch.equal(edited[hook], plain)


@pytest.mark.parametrize("component", [*PARTS, ("attn", "mlp"), PARTS])
@torch.no_grad()
def test_the_fast_path_is_the_hook_path(component, session, model, examples):
    part = SwapWeights(component=component, source=BEFORE)
    session.activations(model, examples, ["blocks.1.hook_resid_pre"])
    fast = session.logits(model, examples, part.edits(model, examples, session))
    with applied(model, [part], examples, session):
        slow = model(examples.tokens)[:, -examples.n_answer :]
        few = model(examples.tokens)[:, -examples.n_answer :]
    close(fast, slow)
    close(few, slow)
    assert not torch.allclose(fast, session.logits(model, examples), atol=1e-3)


@torch.no_grad()
def test_a_later_layer_resumes(session, model, examples):
    part = SwapWeights(component="attn", layer=1, source=BEFORE)
    expected = session.logits(model, examples, part.edits(model, examples, session))
    session.activation(model, examples, "blocks.1.hook_resid_pre")
    close(session.logits(model, examples, part.edits(model, examples, session)), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"source": {"checkpoint": "before", "mean_over": "clean"}},
            "weights come from a checkpoint",
        ),
        ({"source": {"pair": True}}, "weights come from a checkpoint"),
        ({"component": ("embed", "unembed"), "layer": 1}, "embed and unembed have no layers"),
        ({"component": "attention"}, "'attn'"),
    ],
)
def test_what_cannot_be_is_refused_as_it_is_written(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SwapWeights(**({"component": "attn", "source": {"checkpoint": "before"}} | fields))


def test_what_a_model_does_not_have_is_refused(random_models, session, model, examples):
    with pytest.raises(InputError, match="layer 2 is out of range"):
        SwapWeights(component="attn", layer=2, source=BEFORE).edits(model, examples, session)
    with pytest.raises(InputError, match="one architecture only"):
        SwapWeights(component="attn", source=random_models(d_mlp=32)).edits(
            model, examples, session
        )
    bare = random_models(attn_only=True)
    with pytest.raises(InputError, match="no MLP"):
        SwapWeights(component="mlp", source=bare).edits(bare, examples, session)


def test_it_is_a_block_of_a_spec():
    part = SwapWeights(component=("attn", "mlp"), layer=(0, 1), source=BEFORE)
    assert Intervention.model_validate(part.block()) == part
