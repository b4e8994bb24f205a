from __future__ import annotations

import re

import pytest
import torch
from plain_hooks import LLAMA, activations_of, close, logits_of, setting, transformer

from mechmem.interventions.ablate import Ablate
from mechmem.interventions.applied import applied
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.swap_weights import SwapWeights
from mechmem.session import Session
from mechmem.spec.errors import InputError

BEFORE = Source(checkpoint="before")
PARTS = ("embed", "attn", "mlp", "unembed")
POST_NORM = {"use_normalization_before_and_after": True, "normalization_type": "RMS"}
ARCHITECTURES = [
    {"n_layers": 3},
    {"norm": "rms_norm", "activation": "gelu"},
    {"norm": None, "d_head": 5},
    {"attn_only": True},
]


def swapped(session, model, examples, *parts) -> torch.Tensor:
    return session.logits(model, examples, parts)


@torch.no_grad()
def captured(session, model, examples, *parts) -> dict[str, torch.Tensor]:
    """All activations, by the plain hook path."""
    with applied(model, parts, examples, session) as edited:
        _, cache = edited.run_with_cache(examples.tokens)
    return dict(cache)


@pytest.mark.parametrize("fields", ARCHITECTURES, ids=str)
def test_with_all_components_of_another_model_it_is_the_other_model(
    fields, random_models, examples
):
    model, other = random_models(1, **fields), random_models(2, **fields)
    parts = tuple(part for part in PARTS if part != "mlp" or not model.cfg.attn_only)
    found = swapped(Session(), model, examples, SwapWeights(component=parts, source=other))
    close(found, logits_of(other, examples))
    one_by_one = [SwapWeights(component=part, source=other) for part in parts]
    close(swapped(Session(), model, examples, *one_by_one), found)


@pytest.mark.parametrize("fields", [{}, LLAMA, {"n_key_value_heads": 2}, POST_NORM])
def test_all_components_of_another_model_of_any_config_make_the_other_model(fields, examples):
    model, other = transformer(1, **fields), transformer(2, **fields)
    part = SwapWeights(component=PARTS, source=other)
    derived = part.derive(Session(), model)
    theirs = dict(other.named_parameters())
    for name, parameter in derived.named_parameters():
        assert parameter.data_ptr() == theirs[name].data_ptr(), name
    close(swapped(Session(), model, examples, part), logits_of(other, examples))


def test_the_derived_model_shares_all_parameters_and_the_original_stays(
    session, model, other_model, examples
):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plain = logits_of(model, examples)
    part = SwapWeights(component="mlp", layer=1, source=BEFORE)
    derived = part.derive(session, model)
    own, theirs = dict(model.named_parameters()), dict(other_model.named_parameters())
    changed = set()
    for name, parameter in derived.named_parameters():
        is_own = parameter.data_ptr() == own[name].data_ptr()
        assert is_own != (parameter.data_ptr() == theirs[name].data_ptr()), name
        changed |= set() if is_own else {name}
    assert changed == {name for name in own if name.startswith(("blocks.1.mlp.", "blocks.1.ln2."))}
    swapped(session, model, examples, part)
    assert derived is not model
    assert all(torch.equal(own[name], before[name]) for name in own)
    assert torch.equal(logits_of(model, examples), plain)
    assert part.derive(session, model) is derived  # made once


def test_a_derived_model_is_made_anew_after_a_change_of_weights(random_models, examples):
    model, other, session = random_models(1), random_models(2), Session()
    part = SwapWeights(component="mlp", layer=1, source=other)
    swapped(session, model, examples, part)
    with torch.no_grad():
        other.blocks[1].mlp.b_out += 1
        model.blocks[0].mlp.W_out.data *= 0.5
    close(swapped(session, model, examples, part), swapped(Session(), model, examples, part))


@pytest.mark.parametrize("component", PARTS)
def test_from_itself_it_changes_nothing(component, session, model, examples):
    found = swapped(session, model, examples, SwapWeights(component=component, source=model))
    close(found, logits_of(model, examples))


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
    part = SwapWeights(component=component, layer=1, source=other)
    found = swapped(Session(), model, examples, part)
    close(found, logits_of(hybrid, examples))
    assert not torch.allclose(found, logits_of(model, examples), atol=1e-2)


def test_the_inputs_are_the_edited_runs_own(session, model, other_model, examples):
    part = SwapWeights(component="mlp", layer=1, source=BEFORE)
    ablation = Ablate(site="attn_out", layer=1, method="zero")
    found = captured(session, model, examples, ablation, part)
    normed = other_model.blocks[1].ln2(found["blocks.1.hook_resid_pre"])
    close(found["blocks.1.hook_mlp_out"], other_model.blocks[1].mlp(normed).detach())
    patch = Patch(site="mlp_out", layer=1, source=BEFORE)
    patched = captured(session, model, examples, ablation, patch)
    close(found["blocks.1.hook_resid_pre"], patched["blocks.1.hook_resid_pre"])
    assert not torch.allclose(patched["blocks.1.hook_mlp_out"], found["blocks.1.hook_mlp_out"])


def test_what_lies_before_the_component_stays_as_it_was(session, model, examples):
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.1.mlp.hook_post"]
    part = SwapWeights(component="mlp", layer=1, source=BEFORE)
    edited, plain = captured(session, model, examples, part), activations_of(model, examples)
    for hook in hooks[:2]:
        assert torch.equal(edited[hook], plain[hook])
    assert not torch.allclose(edited[hooks[2]], plain[hooks[2]])  # its own weights are new


@pytest.mark.parametrize("component", [*PARTS, ("attn", "mlp"), PARTS])
@torch.no_grad()
def test_the_fast_path_is_the_hook_path(component, session, model, examples):
    part = SwapWeights(component=component, source=BEFORE)
    session.activations(model, examples, ["blocks.1.hook_resid_pre"])
    fast = session.logits(model, examples, [part])
    with applied(model, [part], examples, session) as derived:
        slow = derived(examples.tokens)[:, -examples.n_answer :]
        again = derived(examples.tokens)[:, -examples.n_answer :]
    close(fast, slow)
    close(again, slow)
    assert not torch.allclose(fast, session.logits(model, examples), atol=1e-3)


def test_together_with_edits_it_is_the_derived_model_under_plain_hooks(
    session, model, other_model, examples
):
    parts = [SwapWeights(component="attn", source=BEFORE), Ablate(site="z", layer=1, method="zero")]
    derived = parts[0].derive(session, model)
    plain = logits_of(derived, examples, setting("blocks.1.attn.hook_z", slice(None), 0.0))
    close(session.logits(model, examples, parts), plain)


def test_a_later_layer_resumes(session, model, examples):
    part = SwapWeights(component="attn", layer=1, source=BEFORE)
    expected = session.logits(model, examples, [part])
    session.activation(model, examples, "blocks.1.hook_resid_pre")
    close(session.logits(model, examples, [part]), expected)


@pytest.mark.parametrize("component", PARTS)
def test_a_kept_residual_of_the_whole_model_does_not_hide_a_swap(component, session, model):
    """Forwards resume at kept residuals of the unedited model: never behind a swapped weight."""
    sets = session.example_sets["noisy"]
    session.baseline(model, sets)
    part = SwapWeights(component=component, source=BEFORE)
    close(
        session.logits(model, sets, [part]),
        Session(models=session.models).logits(model, sets, [part]),
    )
    close(session.logits(model, sets, [part]), logits_of(part.derive(session, model), sets))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"source": {"checkpoint": "before", "mean_over": "clean"}},
            "weights must come from a checkpoint",
        ),
        ({"source": {"pair": True}}, "weights must come from a checkpoint"),
        ({"component": ("embed", "unembed"), "layer": 1}, "embed and unembed have no layers"),
        ({"component": "attention"}, "'attn'"),
    ],
)
def test_what_cannot_be_is_refused_as_it_is_written(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SwapWeights(**({"component": "attn", "source": {"checkpoint": "before"}} | fields))


def test_what_a_model_does_not_have_is_refused(random_models, session, model, examples):
    with pytest.raises(InputError, match="layer 2 is out of range"):
        SwapWeights(component="attn", layer=2, source=BEFORE).derive(session, model)
    with pytest.raises(InputError, match="models of the same architecture"):
        swapped(
            session, model, examples, SwapWeights(component="attn", source=random_models(d_mlp=32))
        )
    bare = random_models(attn_only=True)
    with pytest.raises(InputError, match="no MLP"):
        SwapWeights(component="mlp", source=bare).derive(session, bare)


def test_models_that_differ_in_their_config_alone_are_refused(examples):
    """The parameters of both have the same shapes, and yet they mean something else."""
    model, other = transformer(1), transformer(2, parallel_attn_mlp=True)
    with pytest.raises(InputError, match="models of the same architecture"):
        swapped(Session(), model, examples, SwapWeights(component="attn", source=other))


def test_it_is_a_block_of_a_spec():
    part = SwapWeights(component=("attn", "mlp"), layer=(0, 1), source=BEFORE)
    assert Intervention.model_validate(part.block()) == part
