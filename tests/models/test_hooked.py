"""The backend that runs every HookedTransformer: what it refuses, where it starts and stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_hooks import LLAMA, activations_of, close, logits_of, transformer
from torch import Tensor

from mechmem.models.backend import HOOKED
from mechmem.models.edits import At, Edit
from mechmem.models.hooked import SWITCHES
from mechmem.spec.errors import InputError

KINDS = {
    "ours": {},
    "llama": LLAMA,
    "alibi": {"positional_embedding_type": "alibi"},
    "local": {"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global"]},
    "capped": {"output_logits_soft_cap": 3.0},
    "parallel": {"parallel_attn_mlp": True},
}
every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)


def doubled(hook: str) -> Edit:
    return Edit(At(hook), lambda own, _: 2 * own)


def run(model: Any, examples, readout: int = 5, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    rows = torch.arange(len(examples))
    return HOOKED.run(model, examples.tokens, rows, readout, **options)


# Refusals


@pytest.mark.parametrize("use", ["edits", "capture"])
@pytest.mark.parametrize(
    ("hook", "switch"), [(f"blocks.1.{name}", switch) for name, switch in SWITCHES.items()]
)
def test_a_hook_that_is_switched_off_is_refused_until_it_is_on(hook, switch, use, examples):
    model = transformer()
    # Not doubled: a norm would take a factor out again.
    edit = Edit(At(hook), lambda own, _: own.tanh())
    options = {"edits": [edit]} if use == "edits" else {"capture": [hook]}
    message = rf"{hook} never fires in this model: set `model.cfg.{switch} = True`"
    with pytest.raises(InputError, match=message):
        run(model, examples, **options)
    setattr(model.cfg, switch, True)
    logits, found = run(model, examples, **options)
    if use == "capture":
        close(found[hook], activations_of(model, examples)[hook])
    else:
        close(
            logits, logits_of(model, examples, (hook, lambda activation, hook: activation.tanh()))
        )
        assert not torch.allclose(logits, logits_of(model, examples), atol=1e-3)


def test_every_hook_of_a_model_fires_or_is_refused(examples):
    """Nothing is edited in silence that nothing reads."""
    for fields in KINDS.values():
        model = transformer(**fields)
        fired = activations_of(model, examples)
        for hook in model.hook_dict:
            refused = HOOKED.refusal(model, [hook]) is not None
            if not refused and hook not in fired:
                with pytest.raises(InputError, match=f"{hook} never fires in this model"):
                    run(model, examples, edits=[doubled(hook)])
            assert not (refused and hook in fired), hook


def test_an_unknown_hook_is_refused_with_the_nearest(model, examples):
    with pytest.raises(InputError, match=r"no hook 'blocks.1.hook_resid_pots'; did you mean 'bl"):
        run(model, examples, capture=["blocks.1.hook_resid_pots"])
    with pytest.raises(InputError, match=r"no hook 'blocks.2.hook_resid_pre'"):
        run(model, examples, edits=[doubled("blocks.2.hook_resid_pre")])


def test_positions_that_are_not_embedded_are_refused(examples):
    alibi = transformer(positional_embedding_type="alibi")
    with pytest.raises(InputError, match=r"hook_pos_embed never fires .* alibi"):
        run(alibi, examples, capture=["hook_pos_embed"])
    with pytest.raises(InputError, match="hook_pos_embed"):
        run(transformer(**LLAMA), examples, capture=["hook_pos_embed"])


def test_a_hook_that_fires_three_times_has_no_gradient(model):
    hook = "blocks.0.ln1.hook_normalized"
    assert "three times" in (HOOKED.refusal(model, [hook], gradients=True) or "")
    assert HOOKED.refusal(model, [hook]) is None
    assert HOOKED.refusal(model, ["blocks.0.ln2.hook_normalized"], gradients=True) is None


# Where it starts and stops


@pytest.mark.parametrize(
    ("hooks", "n_run"),
    [
        (["hook_embed"], 0),
        (["blocks.0.attn.hook_z"], 1),
        (["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"], 2),
        (["blocks.2.hook_resid_post"], 3),
        (["ln_final.hook_normalized"], 3),
        (["blocks.0.hook_attn_out", "unembed.hook_out"], 3),
    ],
    ids=str,
)
def test_without_a_readout_it_stops_after_the_last_captured_layer(hooks, n_run, examples):
    model = transformer(n_layers=3)
    run_layers: list[int] = []
    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, layer=layer: run_layers.append(layer))
    logits, found = run(model, examples, readout=0, capture=hooks)
    assert run_layers == list(range(n_run))
    assert logits.shape[1] == 0
    expected = activations_of(model, examples)
    assert set(found) == set(hooks)
    for hook in hooks:
        close(found[hook], expected[hook])


@every_kind
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_forward_that_resumes_is_the_whole_one(layer, fields, examples):
    """Also after the last layer, where only the norm and the unembedding are left."""
    model = transformer(**fields)
    assert HOOKED.resumes(model)
    name = f"blocks.{layer}.hook_resid_pre" if layer < 2 else "blocks.1.hook_resid_post"
    resid = activations_of(model, examples)[name]
    resumed, _ = run(model, examples, resume=(layer, resid))
    close(resumed, logits_of(model, examples))


@every_kind
def test_a_resumed_forward_edits_and_captures_what_comes_after_its_start(fields, examples):
    model, hook = transformer(**fields), "blocks.1.hook_mlp_out"
    resid = activations_of(model, examples)["blocks.1.hook_resid_pre"]
    edits = [doubled(hook)]
    whole, expected = run(model, examples, edits=edits, capture=[hook])
    resumed, found = run(model, examples, edits=edits, capture=[hook], resume=(1, resid))
    close(resumed, whole)
    close(found[hook], expected[hook])
    assert not torch.allclose(whole, logits_of(model, examples), atol=1e-3)


@pytest.mark.parametrize("use", ["edits", "capture"])
def test_what_comes_before_the_start_is_refused(use, model, examples):
    hook = "blocks.0.hook_mlp_out"
    options = {"edits": [doubled(hook)]} if use == "edits" else {"capture": [hook]}
    resid = activations_of(model, examples)["blocks.1.hook_resid_pre"]
    with pytest.raises(InputError, match=f"{hook} never fires"):
        run(model, examples, resume=(1, resid), **options)


def test_models_whose_layers_read_more_than_the_residual_do_not_resume():
    """Shortformer's attention adds positions that the residual does not hold."""
    assert not HOOKED.resumes(transformer(positional_embedding_type="shortformer"))
    padded = transformer()
    padded.tokenizer = type("Tokenizer", (), {"padding_side": "left"})()
    assert not HOOKED.resumes(padded)


# Edits and captures


@pytest.mark.parametrize("n_readout", [1, 3, 14])
def test_any_number_of_positions_is_read_out(n_readout, model, examples):
    with torch.no_grad():
        expected = model(examples.tokens)[:, -n_readout:]
    close(run(model, examples, n_readout)[0].detach(), expected)


def test_edits_of_one_hook_follow_each_other_and_captures_see_them(model, examples):
    hook = "blocks.0.hook_mlp_out"
    edits = [Edit(At(hook), lambda own, _: own + 1), doubled(hook)]
    _, found = run(model, examples, edits=edits, capture=[hook])
    close(found[hook].detach(), 2 * (activations_of(model, examples)[hook] + 1))


def test_edits_come_after_the_users_own_hooks(random_models, examples):
    model, hook = random_models(0), "blocks.0.hook_mlp_out"
    plain = activations_of(model, examples)[hook]
    model.add_hook(hook, lambda activation, hook: activation + 1)
    _, found = run(model, examples, edits=[doubled(hook)], capture=[hook])
    close(found[hook].detach(), 2 * (plain + 1))


def test_no_hook_stays_behind_even_after_an_error(random_models, examples):
    model, hook = random_models(0), "blocks.1.hook_mlp_out"

    def failing(own: Tensor, rows: Tensor) -> Tensor:
        raise RuntimeError("a fault of the user's")

    with pytest.raises(RuntimeError, match="a fault of the user's"):
        run(model, examples, edits=[Edit(At(hook), failing)])
    assert not any(module._forward_hooks for module in model.modules())
    run(model, examples, edits=[doubled(hook)])
    assert not any(module._forward_hooks for module in model.modules())
