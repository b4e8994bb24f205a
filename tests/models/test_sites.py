from __future__ import annotations

import re

import pytest
import torch

from mechmem.models import sites
from mechmem.models.sites import SITES
from mechmem.spec.errors import InputError


@pytest.mark.parametrize("name", SITES)
def test_every_site_is_a_hook_of_the_model_with_the_stated_axes(name, model, examples):
    site = SITES[name]
    _, cache = model.run_with_cache(examples.tokens)
    activation = cache[sites.checked_hook(model.cfg, name, 1 if site.has_layer else None)]
    named = {
        "batch": len(examples),
        "pos": examples.tokens.shape[1],
        "key_pos": examples.tokens.shape[1],
    }
    assert activation.shape == tuple(named.get(size, size) for size in site.shape(model.cfg))


@pytest.mark.parametrize("name", SITES)
def test_hook_names_the_layer(name):
    hook = SITES[name].hook(3)
    assert ("blocks.3." in hook) == SITES[name].has_layer
    assert "{" not in hook


def test_axis_finds_an_axis_or_says_that_there_is_none():
    assert SITES["z"].axis("head") == 2
    assert SITES["pattern"].axis("head") == 1
    assert SITES["neurons"].axis("head") == -1


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


@pytest.mark.parametrize("name", [site.name for site in SITES.values() if site.in_mlp])
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
    assert list(table.index) == list(SITES)
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
        ({"attn_only": True}, {"norm_mlp", "mlp_pre", "neurons", "mlp_out"}),
        ({"norm": None}, {"norm_attn", "norm_mlp", "norm_final"}),
    ],
)
def test_table_leaves_out_what_the_model_does_not_have(fields, missing, random_models):
    assert set(SITES) - set(sites.table(random_models(**fields).cfg)["site"]) == missing


def test_on_axis_lays_a_vector_along_one_axis():
    laid = sites.on_axis(torch.tensor([1, 2, 3]), 1, 4)
    assert laid.shape == (1, 3, 1, 1)
    assert laid[0, :, 0, 0].tolist() == [1, 2, 3]
