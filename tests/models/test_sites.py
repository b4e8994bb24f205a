from __future__ import annotations

import re

import pytest
from plain_hooks import LLAMA, transformer

from mechmem.models import sites
from mechmem.models.sites import SITES
from mechmem.spec.errors import InputError

IN_MLP = {"norm_mlp", "mlp_pre", "mlp_pre_linear", "neurons", "mlp_out", "resid_mid"}
OF_OTHERS = {"rot_q", "rot_k", "mlp_pre_linear"}
"""Sites that no model of `Architecture` has."""

CONFIGS = {
    "ours": {},
    "grouped": {"n_heads": 4, "d_head": 4, "n_key_value_heads": 2},
    "llama": LLAMA,
    "parallel": {"parallel_attn_mlp": True},
    "alibi": {"positional_embedding_type": "alibi"},
    "attention only": {"attn_only": True},
    "no norm": {"normalization_type": None},
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_every_site_is_a_hook_of_the_model_with_the_stated_axes(fields, examples):
    model = transformer(**fields)
    _, cache = model.run_with_cache(examples.tokens)
    n_pos = examples.tokens.shape[1]
    named = {"batch": len(examples), "pos": n_pos, "key_pos": n_pos}
    for name in sites.table(model)["site"]:
        site = SITES[name]
        activation = cache[sites.hook_of(model, name, 1 if site.has_layer else None)]
        stated = tuple(named.get(size, size) for size in site.shape(model.cfg))
        assert activation.shape == stated, name


def test_a_site_that_is_left_out_of_the_table_never_fires(examples):
    """So nothing that could be edited is hidden."""
    for fields in CONFIGS.values():
        model = transformer(**fields)
        _, cache = model.run_with_cache(examples.tokens)
        for name in set(SITES) - set(sites.table(model)["site"]):
            site = SITES[name]
            assert site.hook(1) not in cache, (fields, name)
            with pytest.raises(InputError, match=f"this model has no site '{name}'"):
                sites.hook_of(model, name, 1 if site.has_layer else None)


def test_every_activation_that_fires_is_a_site_but_for_scales_and_what_is_unembedded(examples):
    for fields in CONFIGS.values():
        model = transformer(**fields)
        _, cache = model.run_with_cache(examples.tokens)
        for hook in cache:
            if not hook.endswith(("hook_scale", "unembed.hook_in")):
                assert sites.hook_of(model, hook) == hook


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({}, {"z": 4, "k": 4, "pattern": 4, "neurons": 24, "resid_pre": 0, "logits": 0}),
        ({"n_key_value_heads": 2}, {"z": 4, "q": 4, "k": 2, "v": 2, "rot_k": 2, "pattern": 4}),
        (
            {"n_key_value_heads": 2, "ungroup_grouped_query_attention": True},
            {"z": 4, "k": 4, "v": 4},
        ),
    ],
)
def test_heads_and_neurons_are_counted(fields, sizes):
    config = transformer(**fields).cfg
    assert {name: SITES[name].n_units(config) for name in sizes} == sizes


@pytest.mark.parametrize("name", SITES)
def test_hook_names_the_layer(name):
    hook = SITES[name].hook(3)
    assert ("blocks.3." in hook) == SITES[name].has_layer
    assert "{" not in hook


@pytest.mark.parametrize(
    ("name", "axis"),
    [("z", "head"), ("k", "key_head"), ("pattern", "head"), ("neurons", "d_mlp"), ("embed", None)],
)
def test_units_are_heads_or_neurons(name, axis):
    assert SITES[name].units == axis


@pytest.mark.parametrize("name", SITES)
def test_a_hook_name_is_accepted_for_its_site(name):
    assert sites.site(SITES[name].hook(3)) is SITES[name]


def test_a_hook_name_takes_no_layer_of_its_own(model):
    with pytest.raises(InputError, match="already names its layer; leave `layer` out"):
        sites.hook_of(model, "blocks.1.attn.hook_z", 1)
    with pytest.raises(InputError, match="layer 5 is out of range"):
        sites.hook_of(model, "blocks.5.attn.hook_z")


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("neuron", 0, "did you mean 'neurons'?"),
        ("resid_por", 0, "did you mean 'resid_p"),
        ("attn_out", None, "site 'attn_out' needs a layer, 0 to 1"),
        ("embed", 0, "site 'embed' has no layers"),
        ("attn_out", 2, "layer 2 is out of range: the model has layers 0 to 1"),
        ("attn_out", -1, "layer -1 is out of range"),
    ],
)
def test_what_a_model_does_not_have_is_refused(name, layer, message, model):
    with pytest.raises(InputError, match=re.escape(message)):
        sites.checked_hook(model.cfg, name, layer)


@pytest.mark.parametrize("name", sorted(IN_MLP))
def test_an_attention_only_model_has_no_mlp_sites(name, random_models):
    with pytest.raises(InputError, match=f"this model has no site '{name}'.*no MLP"):
        sites.checked_hook(random_models(attn_only=True).cfg, name, 0)


@pytest.mark.parametrize("name", ["norm_attn", "norm_mlp", "norm_final"])
def test_a_model_without_norms_has_no_norm_sites(name, random_models):
    config = random_models(norm=None).cfg
    with pytest.raises(InputError, match=f"this model has no site '{name}'.*no normalisation"):
        sites.checked_hook(config, name, 0 if SITES[name].has_layer else None)


def test_table_lists_the_sites_of_a_model(model):
    table = sites.table(model.cfg).set_index("site")
    assert table.equals(sites.table(model).set_index("site"))
    assert list(table.index) == [name for name in SITES if name not in OF_OTHERS]
    assert table.loc["neurons"].to_dict() == {
        "hook": "blocks.{layer}.mlp.hook_post",
        "layers": "0..1",
        "axes": "batch pos d_mlp",
        "shape": "batch x pos x 24",
        "editable": True,
        "meaning": "neurons after the activation",
    }
    assert table.loc["logits", "layers"] == ""
    assert table.index[~table["editable"]].tolist() == ["norm_attn"]


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"attn_only": True}, IN_MLP - {"mlp_pre_linear"}),
        ({"norm": None}, {"norm_attn", "norm_mlp", "norm_final"}),
    ],
)
def test_table_leaves_out_what_the_model_does_not_have(fields, missing, random_models):
    assert set(SITES) - set(sites.table(random_models(**fields).cfg)["site"]) == missing | OF_OTHERS
