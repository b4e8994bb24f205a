"""Laws of every intervention at every site, and of the choice of layers, positions, heads and
neurons."""

from __future__ import annotations

import re

import pytest
import torch

from mechmem.analyses.effects.effect import edits_of
from mechmem.interventions.applied import applied
from mechmem.interventions.intervention import position_indices
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.models import sites
from mechmem.models.fast import forward
from mechmem.models.sites import SITES
from mechmem.session import Session
from mechmem.spec.errors import InputError

EDITABLE = sorted(SITES.keys() - sites.READ_ONLY.keys())
SOURCES = {
    "checkpoint": Source(checkpoint="before"),
    "examples": Source(examples="clean"),
    "mean": Source(mean_over="clean"),
}


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def patch(site: str, layer: int = 1, source: Source = SOURCES["checkpoint"], **chosen) -> Patch:
    return Patch(site=site, layer=layer if SITES[site].has_layer else None, source=source, **chosen)


def fast(session, model, examples, parts):
    return session.logits(model, examples, edits_of(parts, model, examples, session))


def slow(session, model, examples, parts):
    with torch.no_grad(), applied(model, parts, examples, session) as edited:
        return edited(examples.tokens)[:, -examples.n_answer :]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("site", EDITABLE)
def test_fast_path_and_hook_path_agree_at_every_site(site, source, layer, session, model, examples):
    part = patch(site, layer, source)
    expected = slow(session, model, examples, [part])
    close(fast(session, model, examples, [part]), expected)
    is_the_same = (
        site == "pos_embed" and source.checkpoint is None
    )  # positions are embedded alike in all examples
    assert torch.allclose(expected, session.logits(model, examples), atol=1e-3) == is_the_same


@pytest.mark.parametrize("site", EDITABLE)
def test_both_paths_agree_on_a_scrambled_patch_at_every_site(site, session, model, examples):
    part = RandomDisplacement(
        of=patch(site, position="readout") if SITES[site].axis("pos") == 1 else patch(site)
    )
    close(fast(session, model, examples, [part]), slow(session, model, examples, [part]))


@pytest.mark.parametrize("site", EDITABLE)
def test_both_paths_agree_on_a_choice_at_every_site(site, session, model, examples):
    chosen = {"position": ("=", "s4")}
    chosen |= {"head": 1} if SITES[site].axis("head") >= 0 else {}
    chosen |= {"neurons": (0, 5, 23)} if SITES[site].axis("d_mlp") >= 0 else {}
    part = patch(site, **chosen)
    close(fast(session, model, examples, [part]), slow(session, model, examples, [part]))


@pytest.mark.parametrize(
    "fields", [{"norm": "rms_norm", "d_head": 5}, {"norm": None, "attn_only": True}], ids=str
)
def test_both_paths_agree_in_other_architectures(fields, random_models, examples):
    model, source = random_models(5, **fields), random_models(6, **fields)
    for site in set(sites.table(model.cfg)["site"]) & set(EDITABLE):
        part = patch(site, source=source)
        close(fast(Session(), model, examples, [part]), slow(Session(), model, examples, [part]))


def test_both_paths_agree_on_several_interventions_together(session, model, examples):
    parts = [
        patch("attn_out", 0),
        patch("neurons", 0, neurons=(1, 2)),
        patch("z", 1, SOURCES["mean"], head=(0, 1)),
    ]
    close(fast(session, model, examples, parts), slow(session, model, examples, parts))


def test_several_layers_in_one_intervention_are_one_at_each(session, model, examples):
    together = fast(
        session,
        model,
        examples,
        [Patch(site="mlp_out", layer=(0, 1), source=SOURCES["checkpoint"])],
    )
    close(together, fast(session, model, examples, [patch("mlp_out", 0), patch("mlp_out", 1)]))


def upstream(site: str) -> list[str]:
    """The hooks that come before a site of layer 1: those of layer 0, and of layer 1 what the table
    names earlier."""
    earlier = [SITES[name] for name in list(SITES)[: list(SITES).index(site)]]
    layer_0 = [found.hook(0) for found in SITES.values() if found.has_layer and "embed" not in site]
    return [*layer_0, *(found.hook(1) for found in earlier)]


@pytest.mark.parametrize("site", [name for name in EDITABLE if name != "embed"])
def test_what_lies_before_the_site_stays_as_it_was(site, session, model, examples):
    before = upstream(site)
    edits = edits_of([patch(site)], model, examples, session)
    _, edited = forward(model, examples.tokens, 14, edits, before)
    for hook, plain in session.activations(model, examples, before).items():
        assert torch.equal(edited[hook], plain), hook


def test_earlier_positions_never_feel_a_later_one(session, model, examples):
    edits = edits_of([patch("resid_pre", 0, position="b0")], model, examples, session)
    _, edited = forward(model, examples.tokens, 14, edits, ["unembed.hook_out"])
    plain, at = session.activation(model, examples, "unembed.hook_out"), examples.positions["b0"]
    close(edited["unembed.hook_out"][:, :at], plain[:, :at])
    assert not torch.allclose(edited["unembed.hook_out"][:, at:], plain[:, at:], atol=1e-3)


@pytest.mark.parametrize(
    ("site", "chosen", "where"),
    [
        ("z", {"head": 1}, (slice(None), slice(None), [1])),
        ("pattern", {"head": 0}, (slice(None), [0])),
        ("neurons", {"neurons": (3, 7)}, (slice(None), slice(None), [3, 7])),
        ("mlp_pre", {"position": "=", "neurons": (4,)}, (slice(None), [9], [4])),
        ("resid_post", {"position": ("a3", "s3")}, (slice(None), [0, 11])),
        ("attn_out", {"position": "readout"}, (slice(None), [9, 10, 11, 12, 13])),
        ("q", {"position": "+", "head": (0,)}, (slice(None), [4], [0])),
    ],
)
def test_only_what_is_chosen_changes_and_it_becomes_the_source(
    site, chosen, where, session, model, other_model, examples
):
    hook = SITES[site].hook(1)
    edits = edits_of([patch(site, **chosen)], model, examples, session)
    _, edited = forward(model, examples.tokens, 14, edits, [hook])
    expected = session.activation(model, examples, hook).clone()
    expected[where] = session.activation(other_model, examples, hook)[where]
    assert torch.equal(edited[hook], expected)


def test_edits_leave_the_activations_they_are_given_alone(session, model, examples):
    part, hook = patch("resid_pre", 1), "blocks.1.hook_resid_pre"
    kept = session.activation(model, examples, hook)
    before = kept.clone()
    session.logits(model, examples, edits_of([part], model, examples, session))
    for edit in part.edits(model, examples, session):
        edit.function(kept)
    assert torch.equal(kept, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"site": "neuron"}, "there is no site 'neuron'; did you mean 'neurons'?"),
        (
            {"site": "norm_attn"},
            "site 'norm_attn' can only be read: its hook fires three times a layer",
        ),
        ({"site": "neurons", "layer": None}, "site 'neurons' needs a layer, 0 to 1"),
        ({"site": "embed"}, "site 'embed' has no layers"),
        ({"site": "z", "layer": 2}, "layer 2 is out of range: the model has layers 0 to 1"),
        ({"site": "z", "layer": (0, 5)}, "layer 5 is out of range"),
        ({"site": "z", "head": 2}, "head [2] is out of range: the model has 0 to 1"),
        ({"site": "z", "head": -1}, "head [-1] is out of range"),
        ({"site": "z", "position": "s9"}, "there is no position 's9'"),
        (
            {"site": "z", "position": ("a3", "readouts")},
            "there is no position 'readouts'; did you mean 'readout'?",
        ),
        (
            {"site": "neurons", "neurons": (0, 24, 30)},
            "d_mlp [24, 30] is out of range: the model has 0 to 23",
        ),
        ({"site": "neurons", "neurons": ()}, "d_mlp [] is out of range"),
        ({"site": "attn_out", "head": 0}, "site 'attn_out' has no axis 'head' to choose from"),
        ({"site": "z", "neurons": (1,)}, "site 'z' has no axis 'd_mlp' to choose from"),
    ],
)
def test_what_is_not_there_is_refused_with_what_was_meant(
    fields, message, session, model, examples
):
    part = Patch(**({"layer": 1, "source": {"checkpoint": "before"}} | fields))
    with pytest.raises(InputError, match=re.escape(message)):
        part.edits(model, examples, session)


def test_neurons_of_a_model_without_mlp_are_refused(random_models, session, examples):
    with pytest.raises(InputError, match="no MLP"):
        patch("neurons").edits(random_models(attn_only=True), examples, session)


def test_positions_are_found_by_name(examples):
    assert position_indices("a3", examples) == [0]
    assert position_indices(("b0", "="), examples) == [8, 9]
    assert position_indices("readout", examples) == [9, 10, 11, 12, 13]
    assert [name for name, i in examples.positions.items() if i == 13] == ["s1"]
