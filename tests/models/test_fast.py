from __future__ import annotations

import itertools

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from mechmem.models import sites
from mechmem.models.fast import Edit, forward
from mechmem.models.sites import SITES
from mechmem.spec.errors import InputError

MLPS = [
    {"n_layers": n, "activation": activation, "norm": norm}
    for n, activation, norm in itertools.product(
        (1, 2, 3), ("relu", "gelu", "silu"), ("layer_norm", "rms_norm", None)
    )
]
ATTENTIONS = [
    {"n_layers": n, "attn_only": True, "norm": norm, "d_head": 5}
    for n, norm in itertools.product((1, 2, 3), ("layer_norm", "rms_norm", None))
]
ODD_HEADS = [{"n_heads": 3, "d_head": 7}, {"n_heads": 1, "d_head": 1}]
ARCHITECTURES = [*MLPS, *ATTENTIONS, *ODD_HEADS]
FEW = [
    {"n_layers": 3},
    {"n_layers": 2, "norm": "rms_norm", "activation": "silu", "d_head": 3},
    ATTENTIONS[-1],
]


def named(fields: dict) -> str:
    return "-".join(map(str, fields.values()))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def hooks_of(model) -> list[str]:
    """Every hook that the sites name in this model."""
    table = sites.table(model.cfg)
    layers = [range(model.cfg.n_layers) if has_layers else [None] for has_layers in table["layers"]]
    return [
        SITES[name].hook(layer)
        for name, at in zip(table["site"], layers, strict=True)
        for layer in at
    ]


@pytest.mark.parametrize("fields", ARCHITECTURES, ids=named)
@torch.no_grad()
def test_logits_are_those_of_the_hooked_transformer(fields, random_models, examples):
    model, n = random_models(2, **fields), examples.n_answer
    logits, _ = forward(model, examples.tokens, n)
    close(logits, model(examples.tokens)[:, -n:])
    assert logits.std() > 0.1  # the models are not trivial


@pytest.mark.parametrize("n_readout", [1, 3, 14])
@torch.no_grad()
def test_any_number_of_positions_is_read_out(n_readout, model, examples):
    close(forward(model, examples.tokens, n_readout)[0], model(examples.tokens)[:, -n_readout:])


@pytest.mark.parametrize("fields", ARCHITECTURES, ids=named)
@torch.no_grad()
def test_activations_are_those_of_run_with_cache_at_every_site(fields, random_models, examples):
    model = random_models(2, **fields)
    hooks = hooks_of(model)
    logits, found = forward(model, examples.tokens, examples.n_answer, capture=hooks)
    expected, cache = model.run_with_cache(examples.tokens, names_filter=hooks)
    assert found.keys() == set(hooks)
    for hook in hooks:
        close(found[hook], cache[hook])
    close(logits, expected[:, -examples.n_answer :])


@pytest.mark.parametrize("name", SITES)
@torch.no_grad()
def test_a_site_captured_alone_is_whole(name, model, examples):
    hook = SITES[name].hook(1)
    _, found = forward(model, examples.tokens, 1, capture=[hook])
    close(found[hook], model.run_with_cache(examples.tokens, names_filter=hook)[1][hook])


@pytest.mark.parametrize("name", SITES)
@torch.no_grad()
def test_a_forward_that_reads_nothing_out_still_captures(name, model, examples):
    hook = SITES[name].hook(0)
    _, found = forward(model, examples.tokens, 0, capture=[hook])
    close(found[hook], model.run_with_cache(examples.tokens, names_filter=hook)[1][hook])


@pytest.mark.parametrize("fields", FEW, ids=named)
@torch.no_grad()
def test_a_forward_resumed_at_any_layer_is_the_whole_one(fields, random_models, examples):
    model = random_models(3, **fields)
    residuals = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)]
    expected, cache = forward(model, examples.tokens, examples.n_answer, capture=residuals)
    for layer, hook in enumerate(residuals):
        close(
            forward(model, examples.tokens, examples.n_answer, start=(layer, cache[hook]))[0],
            expected,
        )


@torch.no_grad()
def test_a_resumed_forward_edits_what_lies_behind_its_start(random_models, examples):
    model, tokens = random_models(3, n_layers=3), examples.tokens
    edits = [
        Edit("blocks.1.hook_attn_out", torch.tanh),
        Edit("blocks.2.mlp.hook_post", lambda x: x * 2),
    ]
    _, cache = forward(model, tokens, 1, capture=["blocks.1.hook_resid_pre"])
    whole, _ = forward(model, tokens, 5, edits)
    resumed, _ = forward(model, tokens, 5, edits, start=(1, cache["blocks.1.hook_resid_pre"]))
    close(resumed, whole)
    assert not torch.allclose(resumed, forward(model, tokens, 5)[0], atol=1e-2)


@pytest.mark.parametrize(
    "hook", ["hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre", "blocks.0.attn.hook_z"]
)
@pytest.mark.parametrize("use", ["edit", "capture"])
def test_edits_and_captures_before_the_start_are_refused(hook, use, model, examples):
    edits, capture = ([Edit(hook, torch.zeros_like)], []) if use == "edit" else ([], [hook])
    residual = torch.zeros(len(examples), 14, 16)
    with pytest.raises(ValueError, match="lies before layer 1, at which the forward starts"):
        forward(model, examples.tokens, 5, edits, capture, start=(1, residual))


@pytest.mark.parametrize(
    "hook", ["blocks.0.attn.hook_result", "blocks.0.ln1.hook_scale", "blocks.2.hook_attn_out", "x"]
)
@pytest.mark.parametrize("use", ["edit", "capture"])
def test_an_edit_or_capture_that_the_forward_does_not_come_by_is_refused(
    hook, use, model, examples
):
    edits, capture = ([Edit(hook, torch.zeros_like)], []) if use == "edit" else ([], [hook])
    with pytest.raises(InputError, match=f"this model has no activation '{hook}'"):
        forward(model, examples.tokens, 5, edits, capture)


@torch.no_grad()
def test_edits_of_one_hook_follow_each_other_and_captures_see_them(model, examples):
    hook = "blocks.0.hook_mlp_out"
    edits = [Edit(hook, lambda x: x + 1), Edit(hook, lambda x: x * 2)]
    _, plain = forward(model, examples.tokens, 5, capture=[hook])
    _, edited = forward(model, examples.tokens, 5, edits, [hook])
    close(edited[hook], (plain[hook] + 1) * 2)


@pytest.mark.parametrize("name", sorted(SITES.keys() - sites.READ_ONLY.keys()))
@torch.no_grad()
def test_an_edit_at_every_site_does_what_a_hook_does(name, model, examples):
    hook = SITES[name].hook(1)
    edited, _ = forward(model, examples.tokens, 5, [Edit(hook, lambda x: 0.5 * x.roll(1, dims=-1))])
    with model.hooks(fwd_hooks=[(hook, lambda x, hook: 0.5 * x.roll(1, dims=-1))]):
        expected = model(examples.tokens)[:, -5:]
    close(edited, expected)
    assert not torch.allclose(edited, model(examples.tokens)[:, -5:], atol=1e-3)


@pytest.mark.parametrize("fields", [*FEW, {"norm": None, "activation": "gelu"}], ids=named)
def test_gradients_are_those_of_the_hooked_transformer(fields, random_models, examples):
    model = random_models(4, **fields)
    n, targets = examples.n_answer, examples.given.flatten()
    parameters = dict(model.named_parameters())
    fast = F.cross_entropy(forward(model, examples.tokens, n)[0].flatten(0, 1), targets)
    slow = F.cross_entropy(model(examples.tokens)[:, -n:].flatten(0, 1), targets)
    found, expected = (torch.autograd.grad(loss, parameters.values()) for loss in (fast, slow))
    for name, f, e in zip(parameters, found, expected, strict=True):
        torch.testing.assert_close(
            f, e, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all(
        e.abs().sum() > 0 for name, e in zip(parameters, expected, strict=True) if "b_K" not in name
    )


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("hook_embed", -1),
        ("hook_pos_embed", -1),
        ("blocks.0.hook_resid_pre", 0),
        ("blocks.12.attn.hook_z", 12),
    ],
)
def test_an_edit_knows_its_layer(hook, layer):
    assert Edit(hook, torch.tanh).layer == layer


@pytest.mark.parametrize("hook", ["ln_final.hook_normalized", "unembed.hook_out"])
def test_what_follows_the_last_layer_comes_after_every_layer(hook):
    assert Edit(hook, torch.tanh).layer > 1000


def test_shapes_are_checked_in_tests(model, examples):
    with pytest.raises(jaxtyping.TypeCheckError, match="batch pos"):
        forward(model, examples.tokens[0], 5)
