"""Laws of every intervention at every site, and of the choice of layers, positions, heads and
neurons."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from plain_hooks import LLAMA, activations_of, close, logits_of, setting, transformer

from mechmem.interventions.ablate import Ablate
from mechmem.interventions.applied import applied
from mechmem.interventions.erase import Erase
from mechmem.interventions.freeze_pattern import FreezePattern
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.patch_contributions import PatchContributions
from mechmem.interventions.patch_path import Receiver
from mechmem.interventions.patch_towards import PatchTowards
from mechmem.interventions.patch_within import PatchWithin
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.interventions.steer import Steer
from mechmem.interventions.swap_weights import SwapWeights
from mechmem.models import sites
from mechmem.models.sites import SITES
from mechmem.session import Session
from mechmem.spec.errors import InputError

EDITABLE = sorted(SITES.keys() - sites.READ_ONLY.keys())
OF_OTHER_MODELS = ("rot_q", "rot_k", "mlp_pre_linear")
"""Sites that need rotary positions or a gated MLP."""
HERE = [name for name in EDITABLE if name not in OF_OTHER_MODELS]
BEFORE = Source(checkpoint="before")
SOURCES = {
    "checkpoint": BEFORE,
    "examples": Source(examples="clean"),
    "mean": Source(mean_over="clean"),
}


class Setting(NamedTuple):
    """Two models that have the site, and a session that holds them."""

    session: Session
    model: Any
    other: Any


@pytest.fixture(scope="module")
def llamas() -> tuple[Any, Any]:
    return transformer(1, **LLAMA), transformer(2, **LLAMA)


@pytest.fixture
def around(site, llamas, model, other_model, examples, others) -> Setting:
    """The setting for the site that a test is about."""
    pair = llamas if site in OF_OTHER_MODELS else (model, other_model)
    models = dict(zip(("after", "before"), pair, strict=True))
    return Setting(Session(models, {"noisy": examples, "clean": others}), *pair)


def patch(site: str, layer: int = 1, source: Source = BEFORE, **chosen) -> Patch:
    return Patch(site=site, layer=layer if SITES[site].has_layer else None, source=source, **chosen)


@torch.no_grad()
def by_applied(session, model, examples, parts) -> torch.Tensor:
    with applied(model, parts, examples, session) as edited:
        return edited(examples.tokens)[:, -examples.n_answer :]


def by_hooked(session, model, examples, parts) -> torch.Tensor:
    """The session's logits on the backend that is TransformerLens's own forward."""
    sets = session.example_sets
    return Session(session.models, sets, backend="hooked").logits(model, examples, parts)


def value_of(source: Source, hook: str, around: Setting, examples, others) -> torch.Tensor:
    """What the source puts in, by plain caches."""
    if source.checkpoint is not None:
        return activations_of(around.other, examples)[hook]
    found = activations_of(around.model, others)[hook]
    return found if source.examples is not None else found.mean(0, keepdim=True).expand_as(found)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("site", EDITABLE)
def test_both_backends_applied_and_plain_hooks_agree_at_every_site(
    site, source, layer, around, examples, others
):
    part, (session, model, _) = patch(site, layer, source), around
    hook = SITES[site].hook(layer)
    plain = setting(hook, slice(None), value_of(source, hook, around, examples, others))
    expected = logits_of(model, examples, plain)
    close(session.logits(model, examples, [part]), expected)
    close(by_hooked(session, model, examples, [part]), expected)
    close(by_applied(session, model, examples, [part]), expected)
    # Positions are embedded alike in all examples.
    is_the_same = site == "pos_embed" and source.checkpoint is None
    assert torch.allclose(expected, logits_of(model, examples), atol=1e-3) == is_the_same


@pytest.mark.parametrize("site", EDITABLE)
def test_all_paths_agree_on_a_random_displacement_at_every_site(site, around, examples):
    session, model, _ = around
    part = RandomDisplacement(of=patch(site, position="readout"))
    expected = by_applied(session, model, examples, [part])
    close(session.logits(model, examples, [part]), expected)
    close(by_hooked(session, model, examples, [part]), expected)
    assert expected.isfinite().all()
    assert not torch.allclose(expected, logits_of(model, examples), atol=1e-3)


def chosen_at(site: str) -> dict[str, Any]:
    """Positions, and heads or neurons where the site has them."""
    units = SITES[site].units
    of_units = {None: {}, "d_mlp": {"neurons": (0, 5, 23)}}.get(units, {"head": 1})
    return {"position": ("=", "s4"), **of_units}


def index_at(site: str) -> tuple[Any, ...]:
    """The same, as an index of the activation."""
    every, positions = slice(None), torch.tensor([9, 10])
    if "key_pos" in SITES[site].axes:
        return every, 1, positions
    units = SITES[site].units
    if units == "d_mlp":
        return every, positions[:, None], torch.tensor([0, 5, 23])
    return (every, positions) if units is None else (every, positions, 1)


@pytest.mark.parametrize("site", EDITABLE)
def test_all_paths_agree_on_a_choice_at_every_site(site, around, examples, others):
    (session, model, _), part = around, patch(site, **chosen_at(site))
    hook = SITES[site].hook(1)
    value = value_of(BEFORE, hook, around, examples, others)
    expected = logits_of(model, examples, setting(hook, index_at(site), value))
    close(session.logits(model, examples, [part]), expected)
    close(by_hooked(session, model, examples, [part]), expected)
    close(by_applied(session, model, examples, [part]), expected)
    assert not torch.allclose(expected, logits_of(model, examples), atol=1e-4)


@pytest.mark.parametrize("site", EDITABLE)
def test_a_hook_name_is_a_site_with_its_layer(site, around, examples):
    session, model, _ = around
    chosen = chosen_at(site)
    by_name = Patch(site=SITES[site].hook(1), source=BEFORE, **chosen)
    named = patch(site, **chosen)
    found = session.logits(model, examples, [by_name])
    assert torch.equal(found, session.logits(model, examples, [named]))
    close(by_applied(session, model, examples, [by_name]), found)


@pytest.mark.parametrize(
    "part",
    [
        RandomDisplacement(of=patch("attn_scores", source=SOURCES["examples"])),
        Steer(site="attn_scores", layer=1, variable="carry_1", towards=1, away=0, factor=2),
        *(
            Ablate(site="attn_scores", layer=1, method=method)
            for method in ("mean", "resample", "gaussian")
        ),
    ],
    ids=lambda part: getattr(part, "method", part.kind),
)
def test_what_attention_cannot_see_stays_hidden(part, session, model, examples):
    """Masked scores are -inf, and their differences are no numbers: TransformerLens makes a pattern
    of zeros of a row that holds one, without an error."""
    pattern, scores = "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"
    edits = session.edits(model, examples, [part])
    found = session.edited_activations(model, examples, edits, [pattern, scores])
    close(found[pattern].sum(-1), torch.ones(12, 2, 14))
    assert not found[pattern].triu(1).any()
    assert not torch.allclose(found[pattern], session.activation(model, examples, pattern))
    assert torch.equal(
        found[scores].isfinite(), session.activation(model, examples, scores).isfinite()
    )


def test_every_kind_takes_a_hook_name_for_its_site(session, model, examples):
    hook, place = "blocks.1.hook_resid_pre", {"site": "resid_pre", "layer": 1}
    fields = {"variable": "carry_1", "towards": 1, "away": 0}
    for kind, more in ((Ablate, {}), (Steer, fields), (Erase, {"variable": "carry_1"})):
        found = session.logits(model, examples, [kind(site=hook, position="=", **more)])
        named = session.logits(model, examples, [kind(position="=", **place, **more)])
        assert torch.equal(found, named)
        assert not torch.allclose(found, session.baseline(model, examples), atol=1e-4)


def test_a_hook_name_is_refused_as_a_site_is(session, model, examples):
    for site, message in (
        ("blocks.7.attn.hook_z", "layer 7 is out of range"),
        ("blocks.1.ln1.hook_normalized", "can only be read"),
        ("blocks.1.attn.hook_zz", "there is no site 'blocks.1.attn.hook_zz'"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            Patch(site=site, source=BEFORE).edits(session, model, examples)
    with pytest.raises(InputError, match="already names its layer; leave `layer` out"):
        Patch(site="blocks.1.attn.hook_z", layer=1, source=BEFORE).edits(session, model, examples)


@pytest.mark.parametrize(
    "fields", [{"norm": "rms_norm", "d_head": 5}, {"norm": None, "attn_only": True}], ids=str
)
def test_all_paths_agree_in_other_architectures(fields, random_models, examples):
    model, source = random_models(5, **fields), random_models(6, **fields)
    for site in set(sites.table(model.cfg)["site"]) & set(EDITABLE):
        part = patch(site, source=source)
        hook = SITES[site].hook(1)
        plain = setting(hook, slice(None), activations_of(source, examples)[hook])
        expected = logits_of(model, examples, plain)
        close(Session().logits(model, examples, [part]), expected)
        close(by_applied(Session(), model, examples, [part]), expected)


def test_all_paths_agree_on_several_interventions_together(session, model, examples):
    parts = [
        patch("attn_out", 0),
        patch("neurons", 0, neurons=(1, 2)),
        patch("z", 1, SOURCES["mean"], head=(0, 1)),
    ]
    expected = by_applied(session, model, examples, parts)
    close(session.logits(model, examples, parts), expected)
    close(by_hooked(session, model, examples, parts), expected)


def test_several_layers_in_one_intervention_are_one_at_each(session, model, examples):
    both = Patch(site="mlp_out", layer=(0, 1), source=BEFORE)
    together = session.logits(model, examples, [both])
    close(together, session.logits(model, examples, [patch("mlp_out", 0), patch("mlp_out", 1)]))


def upstream(site: str, model) -> list[str]:
    """The hooks that come before a site of layer 1: those of layer 0, and of layer 1 what the table
    names earlier."""
    earlier = [SITES[name] for name in list(SITES)[: list(SITES).index(site)]]
    layer_0 = [found.hook(0) for found in SITES.values() if found.has_layer and "embed" not in site]
    hooks = [*layer_0, *(found.hook(1) for found in earlier)]
    return [hook for hook in hooks if hook in model.hook_dict]


@pytest.mark.parametrize("site", [name for name in EDITABLE if name != "embed"])
def test_what_lies_before_the_site_stays_as_it_was(site, around, examples):
    session, model, _ = around
    before = upstream(site, model)
    edits = session.edits(model, examples, [patch(site)])
    edited = session.edited_activations(model, examples, edits, before)
    for hook, plain in session.activations(model, examples, before).items():
        assert torch.equal(edited[hook], plain), hook


def test_earlier_positions_never_feel_a_later_one(session, model, examples):
    hook, at = "unembed.hook_out", examples.positions["b0"]
    edits = session.edits(model, examples, [patch("resid_pre", 0, position="b0")])
    edited = session.edited_activations(model, examples, edits, [hook])[hook]
    plain = activations_of(model, examples)[hook]
    close(edited[:, :at], plain[:, :at])
    assert not torch.allclose(edited[:, at:], plain[:, at:], atol=1e-3)


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
    edits = session.edits(model, examples, [patch(site, **chosen)])
    edited = session.edited_activations(model, examples, edits, [hook])[hook]
    expected = session.activation(model, examples, hook).clone()
    expected[where] = session.activation(other_model, examples, hook)[where]
    assert torch.equal(edited, expected)


def test_edits_leave_the_activations_they_are_given_alone(session, model, examples):
    part, hook = patch("resid_pre", 1), "blocks.1.hook_resid_pre"
    kept = session.activation(model, examples, hook)
    before = kept.clone()
    session.logits(model, examples, [part])
    for edit in part.edits(session, model, examples):
        edit(kept, torch.arange(len(examples)))
    assert torch.equal(kept, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"site": "neuron"}, "there is no site 'neuron'; did you mean 'neurons'?"),
        (
            {"site": "norm_attn"},
            "site 'norm_attn' can only be read: its hook fires three times per layer",
        ),
        ({"site": "neurons", "layer": None}, "site 'neurons' needs a layer, 0 to 1"),
        ({"site": "embed"}, "site 'embed' has no layers"),
        ({"site": "z", "layer": 2}, "layer 2 is out of range: the model has layers 0 to 1"),
        ({"site": "z", "layer": (0, 5)}, "layer 5 is out of range"),
        ({"site": "z", "head": 2}, "head [2] is out of range: this site has 0 to 1"),
        ({"site": "z", "head": -1}, "head [-1] is out of range"),
        ({"site": "z", "position": "s9"}, "there is no position 's9'"),
        (
            {"site": "z", "position": ("a3", "readouts")},
            "there is no position 'readouts'; did you mean 'readout'?",
        ),
        (
            {"site": "neurons", "neurons": (0, 24, 30)},
            "neurons [24, 30] is out of range: this site has 0 to 23",
        ),
        ({"site": "attn_out", "head": 0}, "site 'attn_out' has no head to choose from"),
        ({"site": "z", "neurons": (1,)}, "site 'z' has no neurons to choose from"),
    ],
)
def test_what_is_not_there_is_refused_with_what_was_meant(
    fields, message, session, model, examples
):
    part = Patch(**({"layer": 1, "source": {"checkpoint": "before"}} | fields))
    with pytest.raises(InputError, match=re.escape(message)):
        part.edits(session, model, examples)


def test_neurons_of_a_model_without_mlp_are_refused(random_models, session, examples):
    with pytest.raises(InputError, match="no MLP"):
        patch("neurons").edits(session, random_models(attn_only=True), examples)


PLACE = {"site": "z", "layer": 0}
SELECTIONS = [
    *((Patch, {**PLACE, "source": BEFORE}, f) for f in ("layer", "head", "neurons", "position")),
    *((PatchTowards, PLACE, f) for f in ("layer", "head", "neurons", "position")),
    *(
        (PatchContributions, {**PLACE, "site": "neurons", "source": BEFORE}, f)
        for f in ("layer", "head", "neurons", "position")
    ),
    *(
        (PatchWithin, {**PLACE, "source": BEFORE}, f)
        for f in ("layer", "head", "neurons", "position")
    ),
    *((Ablate, PLACE, f) for f in ("layer", "head", "neurons", "position")),
    *(
        (Steer, {**PLACE, "variable": "carry_1", "towards": 1, "away": 0}, f)
        for f in ("layer", "head", "neurons", "position")
    ),
    *(
        (Erase, {"site": "resid_pre", "layer": 0, "variable": "carry_1"}, f)
        for f in ("layer", "position")
    ),
    *((FreezePattern, {}, f) for f in ("layer", "head", "position")),
    *((SwapWeights, {"component": "mlp", "source": BEFORE}, f) for f in ("layer", "component")),
    *((Receiver, {"site": "q"}, f) for f in ("layer", "head", "position")),
]
"""A kind, fields with which it is valid, and a field in which several things may be chosen."""
TWO = {"position": ("a3", "b3"), "component": ("attn", "mlp")}


def test_every_field_with_a_choice_is_among_the_selections():
    """An intervention that gains such a field must be listed above."""
    choices = {"layer", "head", "neurons", "position", "component"}
    listed = {(kind, field) for kind, _, field in SELECTIONS}
    ours = [k for k in Intervention.kinds().values() if k.__module__.startswith("mechmem.")]
    for kind in (*ours, Receiver):
        for field in choices & kind.model_fields.keys():
            assert (kind, field) in listed, (kind, field)


@pytest.mark.parametrize(
    ("kind", "fields", "field"), SELECTIONS, ids=lambda value: getattr(value, "__name__", value)
)
def test_an_empty_and_a_repeated_selection_are_refused(kind, fields, field):
    one, two = TWO.get(field, (0, 1))
    assert kind(**{**fields, field: (one, two)})  # that much is fine
    with pytest.raises(ValueError, match="nothing is chosen; name at least one, or leave the"):
        kind(**{**fields, field: ()})
    with pytest.raises(ValueError, match=re.escape(f"{one!r} is listed twice")):
        kind(**{**fields, field: (one, two, one)})
    if kind is not Receiver:  # the receivers are swept as a whole
        with pytest.raises(ValueError, match="nothing is chosen"):
            kind(**{**fields, field: {"each": [[one], []]}})


def test_two_names_of_one_position_are_refused(session, model, examples):
    """`readout` is `=` among others: the position would be edited twice."""
    for kind, more in ((Ablate, {}), (Steer, {"variable": "carry_1", "towards": 1, "away": 0})):
        part = kind(site="resid_pre", layer=0, position=("readout", "="), **more)
        with pytest.raises(InputError, match="name each input position once"):
            part.edits(session, model, examples)


def test_positions_are_found_by_name(examples):
    def found(names) -> list[int]:
        indices = examples.indices(names)
        assert (indices == indices[:1]).all()
        return indices[0].tolist()

    assert found("a3") == [0]
    assert found(("b0", "=")) == [8, 9]
    assert found("readout") == [9, 10, 11, 12, 13]
    assert [name for name, i in examples.positions.items() if i == 13] == ["s1"]


# Grouped queries: keys and values have a number of heads of their own.


@pytest.fixture(scope="module")
def grouped() -> tuple[Any, Any]:
    fields = {"n_key_value_heads": 2}
    return transformer(1, **fields), transformer(2, **fields)


@pytest.mark.parametrize("site", ["q", "k", "v", "z", "pattern"])
def test_key_and_value_heads_have_their_own_count(site, grouped, examples):
    model, other = grouped
    n = {"k": 2, "v": 2}.get(site, 4)
    hook, axis = SITES[site].hook(1), 1 if site == "pattern" else 2
    theirs = activations_of(other, examples)[hook]
    assert theirs.shape[axis] == n
    for head in (0, n - 1):
        where = (slice(None),) * axis + (head,)
        expected = logits_of(model, examples, setting(hook, where, theirs))
        part = patch(site, source=other, head=head)
        for backend in ("fast", "hooked"):
            close(Session(backend=backend).logits(model, examples, [part]), expected)
        assert not torch.allclose(expected, logits_of(model, examples), atol=1e-4)
    for kind, fields in ((Patch, {"source": other}), (Ablate, {"method": "zero"})):
        part = kind(site=site, layer=1, head=(0, n), **fields)
        with pytest.raises(InputError, match=rf"head \[{n}\] is out of range: this site has 0 to"):
            Session().logits(model, examples, [part])


def test_ungrouped_keys_have_as_many_heads_as_queries(examples):
    fields = {"n_key_value_heads": 2, "ungroup_grouped_query_attention": True}
    model, other = transformer(1, **fields), transformer(2, **fields)
    theirs = activations_of(other, examples)["blocks.1.attn.hook_v"]
    where = (slice(None), slice(None), 3)
    expected = logits_of(model, examples, setting("blocks.1.attn.hook_v", where, theirs))
    close(Session().logits(model, examples, [patch("v", source=other, head=3)]), expected)
    with pytest.raises(InputError, match=r"head \[4\] is out of range"):
        Session().logits(model, examples, [patch("v", source=other, head=4)])
