"""The backend that refuses: what it refuses, and that it computes what `hooked` computes. That it
does so on every architecture it implements is tested by test_zoo.py."""

from __future__ import annotations

import itertools
from dataclasses import fields as fields_of
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from plain_hooks import activations_of, close, logits_of, transformer
from torch import Tensor
from transformer_lens.components import MLP, RMSNorm
from transformer_lens.config import HookedTransformerConfig

from mechmem.models import sites
from mechmem.models.backend import FAST, HOOKED
from mechmem.models.edits import At, Edit
from mechmem.models.fast import DEFAULT, plain_logits
from mechmem.models.sites import SITES
from mechmem.session import Session
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
GROUPED = {"n_key_value_heads": 2, "gated_mlp": True, "act_fn": "silu"}
GROUPED |= {"normalization_type": "RMS"}


def named(fields: dict) -> str:
    return "-".join(map(str, fields.values()))


def halved(hook: str) -> Edit:
    return Edit(At(hook), lambda own, _: own / 2)


@torch.no_grad()
def run(model: Any, examples, readout: int = 5, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    rows = torch.arange(len(examples))
    return FAST.run(model, examples.tokens, rows, readout, **options)


def places_of(model) -> list[tuple[str, int | None]]:
    layers = range(model.cfg.n_layers)
    return [
        (name, layer)
        for name in sites.table(model)["site"]
        for layer in (layers if SITES[name].has_layer else [None])
    ]


def hooks_of(model) -> list[str]:
    """Every hook that the sites name in this model."""
    return [sites.hook_of(model, *place) for place in places_of(model)]


# Refusals


@pytest.fixture
def own(random_models) -> Any:
    """A model of this test's own, as it is changed."""
    return random_models(0)


def refused(model) -> str:
    """The reason, which auto gives for taking `hooked`."""
    reason = FAST.refusal(model)
    assert reason is not None
    assert "\n" not in reason
    return reason


def test_our_own_models_are_not_refused(random_models):
    for fields in ARCHITECTURES:
        model = random_models(0, **fields)
        assert FAST.refusal(model, hooks_of(model)) is None
        assert FAST.refusal(model.double()) is None


def test_a_hook_of_the_user_is_refused(own):
    own.add_hook("blocks.1.hook_mlp_out", lambda activation, hook: activation)
    assert refused(own) == "there are hooks at blocks.1.hook_mlp_out"
    own.reset_hooks()
    assert FAST.refusal(own) is None


def test_a_backward_hook_of_the_user_is_refused(own):
    own.add_hook("blocks.1.hook_mlp_out", lambda gradient, hook: None, dir="bwd")
    assert refused(own) == "there are hooks at blocks.1.hook_mlp_out"


TORCH_HOOKS = {
    "register_forward_hook": lambda module, given, out: None,
    "register_forward_pre_hook": lambda module, given: None,
    "register_full_backward_hook": lambda module, given, out: None,
    "register_full_backward_pre_hook": lambda module, out: None,
}


@pytest.mark.parametrize("register", TORCH_HOOKS)
@pytest.mark.parametrize("path", ["", "blocks.0.attn", "blocks.1.mlp.hook_post", "unembed"])
def test_a_torch_hook_is_refused_wherever_it_is(path, register, own):
    handle = getattr(own.get_submodule(path), register)(TORCH_HOOKS[register])
    assert refused(own) == f"there are hooks at {path or 'the model'}"
    handle.remove()
    assert FAST.refusal(own) is None


@pytest.mark.parametrize("path", ["", "blocks.0.attn", "blocks.1.ln1", "embed"])
def test_a_replaced_forward_is_refused(path, own):
    module = own.get_submodule(path)
    module.forward = type(module).forward.__get__(module)
    assert refused(own) == f"forward of {path or 'the model'} was replaced"


def test_any_replaced_method_is_refused(own):
    """TransformerLens's forward calls it: with this one, attention looks ahead."""
    own.blocks[0].attn.apply_causal_mask = lambda scores, *_: scores
    assert refused(own) == "apply_causal_mask of blocks.0.attn was replaced"


def test_a_replaced_activation_function_is_refused(own):
    own.blocks[1].mlp.act_fn = torch.tanh
    assert refused(own) == "the activation function of blocks.1.mlp was replaced"


@pytest.mark.parametrize("made", [torch.nn.Identity, lambda: torch.nn.Linear(16, 16)])
@pytest.mark.parametrize("name", ["attn", "mlp"])
def test_a_replaced_module_is_refused(name, made, own):
    setattr(own.blocks[1], name, made())
    kind = type(made()).__name__
    article = "an" if kind == "Identity" else "a"
    expected = f"blocks.1.{name} is {article} {kind}, which was put in by the user"
    assert refused(own) == expected


@pytest.mark.parametrize("name", ["attn", "mlp", "whole"])
@pytest.mark.parametrize(
    "fields",
    [
        {"positional_embedding_type": "rotary", "rotary_dim": 4},
        {"attn_scores_soft_cap": 1.0},
        {"parallel_attn_mlp": True},
    ],
    ids=str,
)
def test_a_part_of_a_model_that_is_not_implemented_is_refused(fields, name):
    """The model's own config does not tell what a part computes that was taken from another."""
    model, other = transformer(), transformer(1, **fields)
    if name == "whole":
        model.blocks[1] = other.blocks[1]
    else:
        setattr(model.blocks[1], name, getattr(other.blocks[1], name))
    assert "is of another model: its config has" in refused(model)


def test_a_part_of_a_model_that_is_implemented_is_computed_as_it_is(examples):
    model, other = transformer(), transformer(1, n_key_value_heads=2, use_attn_scale=False)
    model.blocks[1].attn = other.blocks[1].attn
    assert FAST.refusal(model) is None
    close(run(model, examples)[0], logits_of(model, examples))


@pytest.mark.parametrize("path", ["blocks.0.mlp", "blocks.1.ln2", "unembed"])
def test_a_module_of_a_users_class_is_refused(path, own):
    """Also one that is derived from TransformerLens's and has its name."""
    module = own.get_submodule(path)
    name = type(module).__name__
    module.__class__ = type(name, (type(module),), {"__module__": "mine"})
    assert refused(own) == f"{path} is a {name}, which was put in by the user"


def test_a_norm_of_another_kind_than_the_config_names_is_computed_as_it_is(own, examples):
    """TransformerLens runs the modules; so does this."""
    own.blocks[1].ln2 = RMSNorm(own.cfg)
    assert FAST.refusal(own) is None
    close(run(own, examples)[0], logits_of(own, examples))


def test_an_mlp_of_another_size_is_computed_as_it_is(own, examples):
    wide = HookedTransformerConfig(**{**own.cfg.to_dict(), "d_mlp": 40})
    torch.manual_seed(0)
    own.blocks[0].mlp = MLP(wide)
    for parameter in own.blocks[0].mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert FAST.refusal(own) is None
    close(run(own, examples)[0], logits_of(own, examples))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype, own):
    assert str(dtype) in refused(own.to(dtype))


def test_half_precision_that_the_config_does_not_tell_is_refused(own):
    for parameter in own.parameters():
        parameter.data = parameter.data.bfloat16()
    assert refused(own) == "its parameters are of torch.bfloat16"


def test_mixed_dtypes_are_refused(own):
    own.blocks[1].mlp.double()
    assert refused(own) == "its parameters are of torch.float32, torch.float64"


@pytest.mark.parametrize(("side", "is_refused"), [("left", True), ("right", False)])
def test_a_tokenizer_that_pads_on_the_left_is_refused(side, is_refused, own):
    own.tokenizer = type("Tokenizer", (), {"padding_side": side})()
    assert ("pads on the left" in (FAST.refusal(own) or "")) == is_refused


def test_a_field_of_the_config_that_nobody_knows_is_refused(own):
    own.cfg.flux_capacitor = True
    assert refused(own) == "its config has the unknown field 'flux_capacitor'"


@pytest.mark.parametrize("name", DEFAULT)
def test_every_field_that_must_have_its_default_is_refused_if_it_has_not(name, own):
    known = {field.name: field.default for field in fields_of(HookedTransformerConfig)}
    others = [True, 7] if known[name] in (None, False) else [not known[name], 99]
    for other in others:
        setattr(own.cfg, name, other)
        assert refused(own) == f"its config has {name} {other!r}"
    setattr(own.cfg, name, known[name])
    assert FAST.refusal(own) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalization_type", "L2"),
        ("act_fn", "solu_ln"),
        ("act_fn", "solu"),
        ("positional_embedding_type", "rotary"),
        ("attention_dir", "bidirectional"),
        ("original_architecture", "Olmo2ForCausalLM"),
        ("dtype", torch.bfloat16),
    ],
)
def test_a_value_of_the_config_that_is_not_implemented_is_refused(name, value, own):
    setattr(own.cfg, name, value)
    assert refused(own) == f"its config has {name} {value!r}"


@pytest.mark.parametrize("hook", ["blocks.0.attn.hook_result", "blocks.0.ln1.hook_scale", "x"])
def test_a_hook_that_it_does_not_come_by_is_refused(hook, own):
    own.cfg.use_attn_result = True
    assert FAST.refusal(own, ["hook_embed", hook]) == f"it has no hook {hook}"


@pytest.mark.parametrize("hook", ["blocks.2.hook_attn_out", "blocks.0.mlp.hook_pre_linear"])
def test_a_hook_that_the_model_lacks_is_refused(hook, own):
    assert "this model has no hook" in (FAST.refusal(own, [hook]) or "")


@pytest.mark.parametrize(
    "hook", ["blocks.0.attn.hook_result", "blocks.0.ln1.hook_scale", "blocks.2.hook_attn_out", "x"]
)
@pytest.mark.parametrize("use", ["edits", "capture"])
def test_a_forward_that_was_not_asked_whether_it_refuses_never_ignores_a_hook(
    hook, use, model, examples
):
    options = {"edits": [halved(hook)]} if use == "edits" else {"capture": [hook]}
    with pytest.raises(InputError, match=f"{hook} never fires in this model"):
        run(model, examples, **options)


# What it computes


@pytest.mark.parametrize("fields", ARCHITECTURES, ids=named)
def test_logits_and_activations_are_those_of_transformer_lens(fields, random_models, examples):
    model = random_models(2, **fields)
    hooks = hooks_of(model)
    expected, cache = logits_of(model, examples), activations_of(model, examples)
    alone, captured_at_once = run(model, examples)[0], run(model, examples, capture=hooks)
    close(alone, expected)
    close(captured_at_once[0], expected)
    assert captured_at_once[1].keys() == set(hooks)
    for hook, found in captured_at_once[1].items():
        close(found, cache[hook])
    assert expected.std() > 0.1  # the models are not trivial


@pytest.mark.parametrize("n_readout", [1, 3, 13, 14])
@pytest.mark.parametrize("fields", [{}, {"n_layers": 1}, {"attn_only": True}], ids=str)
def test_a_readout_of_some_positions_is_the_end_of_the_full_forward(
    n_readout, fields, random_models, examples
):
    """The last layer is computed at these positions alone."""
    model = random_models(0, **fields)
    full, _ = run(model, examples, 14)
    close(full, model(examples.tokens).detach())
    close(run(model, examples, n_readout)[0], full[:, -n_readout:])


def every_site(model) -> list[str]:
    return [hook for hook in hooks_of(model) if "ln1" not in hook]


@pytest.mark.parametrize("n_readout", [0, 1, 5])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_site_captured_alone_is_whole_whatever_is_read_out(
    n_readout, n_layers, random_models, examples
):
    model = random_models(0, n_layers=n_layers)
    cache = activations_of(model, examples)
    for hook in hooks_of(model):
        logits, found = run(model, examples, n_readout, capture=[hook])
        close(found[hook], cache[hook])
        assert logits.shape[1] == n_readout


@pytest.mark.parametrize("n_readout", [1, 5])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_an_edit_alone_does_what_a_hook_does_whatever_is_read_out(
    n_readout, n_layers, random_models, examples
):
    """At every site: one that needs the other positions is computed at all of them."""
    model = random_models(0, n_layers=n_layers)
    plain = logits_of(model, examples)
    for hook in every_site(model):

        def moved(activation: Tensor, hook: Any = None) -> Tensor:
            return 0.5 * activation.roll(1, dims=1)

        found, _ = run(model, examples, n_readout, edits=[Edit(At(hook), moved)])
        expected = logits_of(model, examples, (hook, moved))
        close(found, expected[:, -n_readout:])
        assert not torch.allclose(expected, plain, atol=1e-3), hook


@pytest.mark.parametrize("length", [14, 40])
@pytest.mark.parametrize("readout", [3, 14])
def test_long_and_short_sequences_are_computed_alike(length, readout):
    """Beyond 32 positions attention is torch's own, unless someone looks at its pattern."""
    model = transformer(n_ctx=40)
    tokens = torch.randint(12, (3, length), generator=torch.Generator().manual_seed(0))
    rows, hook = torch.arange(3), "blocks.1.attn.hook_pattern"
    for options in ({}, {"capture": [hook]}, {"edits": [halved(hook)]}):
        ours, found = FAST.run(model, tokens, rows, readout, **options)
        theirs, expected = HOOKED.run(model, tokens, rows, readout, **options)
        close(ours, theirs)
        for name in found:
            close(found[name], expected[name])


def test_captures_are_those_after_the_edits(model, examples):
    hook = "blocks.0.hook_mlp_out"
    edits = [Edit(At(hook), lambda own, _: own + 1), halved(hook)]
    _, found = run(model, examples, edits=edits, capture=[hook, "blocks.1.hook_resid_pre"])
    expected = activations_of(
        model, examples, (hook, lambda activation, hook: (activation + 1) / 2)
    )
    for name in found:
        close(found[name], expected[name])


def test_captures_of_every_site_are_those_after_edits_of_every_site(model, examples):
    hooks = every_site(model)
    edits = [halved(hook) for hook in hooks]
    logits, found = run(model, examples, edits=edits, capture=hooks)
    plain = [(hook, lambda activation, hook: activation / 2) for hook in hooks]
    close(logits, logits_of(model, examples, *plain))
    expected = activations_of(model, examples, *plain)
    for hook in hooks:
        close(found[hook], expected[hook])


def test_nothing_that_was_captured_shares_memory_with_the_weights(own, examples):
    before = {name: p.clone() for name, p in own.named_parameters()}
    _, found = run(own, examples, capture=hooks_of(own))
    edited, _ = run(
        own,
        examples,
        edits=[Edit(At(hook), lambda part, _: part.zero_()) for hook in every_site(own)],
    )
    assert edited.isfinite().all()
    for name, parameter in own.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert found["hook_pos_embed"].shape == (12, 14, 16)


# Where it starts


@pytest.mark.parametrize("fields", FEW, ids=named)
def test_a_forward_resumed_at_any_layer_is_the_whole_one(fields, random_models, examples):
    model = random_models(3, **fields)
    assert FAST.resumes(model)
    residuals = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)]
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    expected, cache = run(model, examples, capture=[*residuals, last])
    for layer, hook in enumerate([*residuals, last]):
        close(run(model, examples, resume=(layer, cache[hook]))[0], expected)


def test_a_resumed_forward_edits_and_captures_what_comes_after_its_start(random_models, examples):
    model = random_models(3, n_layers=3)
    edits = [Edit(At("blocks.1.hook_attn_out"), lambda own, _: own.tanh())]
    edits += [Edit(At("blocks.2.mlp.hook_post"), lambda own, _: own * 2)]
    late = ["blocks.1.hook_resid_mid", "blocks.2.hook_mlp_out"]
    _, cache = run(model, examples, capture=["blocks.1.hook_resid_pre"])
    start = (1, cache["blocks.1.hook_resid_pre"])
    whole, expected = run(model, examples, edits=edits, capture=late)
    resumed, found = run(model, examples, edits=edits, capture=late, resume=start)
    close(resumed, whole)
    for hook in late:
        close(found[hook], expected[hook])
    assert not torch.allclose(resumed, run(model, examples)[0], atol=1e-2)


@pytest.mark.parametrize(
    "hook", ["hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre", "blocks.0.attn.hook_z"]
)
@pytest.mark.parametrize("use", ["edits", "capture"])
def test_edits_and_captures_before_the_start_are_refused(hook, use, model, examples):
    options = {"edits": [halved(hook)]} if use == "edits" else {"capture": [hook]}
    residual = torch.zeros(len(examples), 14, 16)
    with pytest.raises(ValueError, match="lies before layer 1, where it resumes"):
        run(model, examples, resume=(1, residual), **options)


# Gradients


@pytest.mark.parametrize("fields", [*FEW, {"norm": None, "activation": "gelu"}], ids=named)
def test_gradients_of_weights_are_those_of_transformer_lens(fields, random_models, examples):
    model = random_models(4, **fields)
    n, targets = examples.n_answer, examples.given.flatten()
    parameters = dict(model.named_parameters())
    fast = F.cross_entropy(plain_logits(model, examples.tokens, n).flatten(0, 1), targets)
    slow = F.cross_entropy(model(examples.tokens)[:, -n:].flatten(0, 1), targets)
    found, expected = (torch.autograd.grad(loss, parameters.values()) for loss in (fast, slow))
    for name, f, e in zip(parameters, found, expected, strict=True):
        torch.testing.assert_close(
            f, e, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all(
        e.abs().sum() > 0 for name, e in zip(parameters, expected, strict=True) if "b_K" not in name
    )


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("fields", [{}, GROUPED], ids=["ours", "grouped"])
def test_gradients_at_every_site_are_those_of_hooked(fields, edited, examples):
    model = transformer(**fields)
    wrt, edits = every_site(model), [halved("blocks.0.hook_mlp_out")] if edited else []
    wrt.remove("hook_pos_embed")  # no part of the graph, which starts at the token embedding

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        return logits.log_softmax(-1)[rows - 2, :, 3].sum()

    given = (model, examples.tokens[2:7], torch.arange(2, 7), 5, loss, wrt)
    ours, theirs = (backend.gradients(*given, edits=edits) for backend in (FAST, HOOKED))
    close(ours[0], theirs[0])
    for hook in wrt:
        close(ours[1][hook], theirs[1][hook])
        close(ours[2][hook], theirs[2][hook])
        assert ours[2][hook].abs().sum() > 0 or "scores" in hook, hook


def test_shapes_are_checked_in_tests(model, examples):
    with pytest.raises(jaxtyping.TypeCheckError, match="batch pos"):
        FAST.run(model, examples.tokens[0], torch.arange(1), 5)


def test_a_session_gives_the_reason_that_it_was_refused_for(own, examples):
    own.add_hook("hook_embed", lambda activation, hook: activation)
    session = Session({"mine": own})
    session.logits(own, examples)
    assert session.backends == {"mine": ("hooked", "`fast` refuses: there are hooks at hook_embed")}
