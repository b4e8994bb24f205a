from __future__ import annotations

import gc
import weakref

import pytest
import torch

import mechmem.session.session
from mechmem.analyses.neurons.neuron_shift import NeuronShift
from mechmem.models.fast import Edit, forward
from mechmem.session import Session
from mechmem.spec.errors import InputError


@pytest.fixture
def starts(monkeypatch) -> list[int]:
    """The layer at which each forward of the session began."""
    begun = []

    def recorded(model, tokens, n_readout, edits=(), capture=(), start=None):
        begun.append(0 if start is None else start[0])
        return forward(model, tokens, n_readout, edits, capture, start)

    monkeypatch.setattr(mechmem.session, "forward", recorded)
    return begun


def test_unknown_names_are_refused_with_the_nearest(session):
    with pytest.raises(InputError, match="no checkpoint 'befor'; did you mean 'before'"):
        session.model("befor")
    with pytest.raises(InputError, match="no example set 'noise'; did you mean 'noisy'"):
        session.examples("noise")


@torch.no_grad()
def test_activations_are_those_of_the_model(session, model, examples):
    hooks = ["blocks.0.mlp.hook_post", "blocks.1.hook_resid_post"]
    _, cache = model.run_with_cache(examples.tokens)
    for hook, found in session.activations(model, examples, hooks).items():
        torch.testing.assert_close(found, cache[hook], atol=1e-5, rtol=1e-5)


def test_an_activation_is_computed_once_and_only_what_is_missing(session, model, examples, starts):
    first = session.activation(model, examples, "blocks.0.hook_attn_out")
    assert session.activation(model, examples, "blocks.0.hook_attn_out") is first
    both = session.activations(
        model, examples, ["blocks.0.hook_attn_out", "blocks.1.hook_attn_out"]
    )
    assert both["blocks.0.hook_attn_out"] is first
    assert len(starts) == 2
    assert session.n_forwarded == 2 * len(examples)


def test_models_examples_and_prefixes_are_kept_apart(session, model, other_model, examples, others):
    hook = "blocks.1.hook_resid_post"
    variants = [
        (model, examples),
        (other_model, examples),
        (model, others),
        (model, examples.with_prefix("true")),
        (model, examples.select(torch.arange(6))),
    ]
    for _ in range(2):
        for trained_run, chosen in variants:
            found = session.activation(trained_run, chosen, hook)
            expected = forward(trained_run, chosen.tokens, 1, capture=[hook])[1][hook]
            torch.testing.assert_close(found, expected)


def test_a_model_lives_as_long_as_its_activations_are_kept(random_models, examples):
    """Activations are kept by the model's identity, which a new model could take over from a
    forgotten one."""
    model, session = random_models(0, n_layers=1), Session()
    session.activation(model, examples, "hook_embed")
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is not None
    del session
    gc.collect()
    assert seen() is None


def test_what_does_not_fit_into_memory_is_forgotten_oldest_use_first(model, examples, starts):
    size = 12 * 14 * 16 * 4  # one residual: examples, positions, d_model, bytes
    session = Session(memory=2 * size)
    first, second, third = (
        f"blocks.{i}.hook_{name}" for i, name in ((0, "attn_out"), (0, "mlp_out"), (1, "attn_out"))
    )
    assert session.activation(model, examples, first).nbytes == size
    session.activation(model, examples, second)
    session.activation(model, examples, first)  # used again, so `second` is now the oldest
    session.activation(model, examples, third)
    assert len(starts) == 3
    session.activation(model, examples, first)
    assert len(starts) == 3
    session.activation(model, examples, second)
    assert len(starts) == 4


def test_more_than_the_memory_holds_is_still_returned(model, examples):
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (0, 1)]
    found = Session(memory=1).activations(model, examples, hooks)
    _, expected = forward(model, examples.tokens, 1, capture=hooks)
    for hook in hooks:
        torch.testing.assert_close(found[hook], expected[hook].detach())


@pytest.mark.parametrize(
    ("hook", "start"),
    [
        ("hook_embed", 0),
        ("blocks.0.hook_attn_out", 0),
        ("blocks.1.hook_resid_pre", 1),
        ("blocks.1.mlp.hook_post", 1),
        ("unembed.hook_out", 1),
        ("ln_final.hook_normalized", 1),
    ],
)
def test_edited_logits_resume_at_the_first_edited_layer(
    hook, start, session, model, examples, starts
):
    session.activation(model, examples, "blocks.1.hook_resid_pre")
    edits = [Edit("unembed.hook_out", torch.tanh), Edit(hook, lambda x: x.roll(1, dims=-1))]
    found = session.logits(model, examples, edits)
    assert starts == [0, start]
    torch.testing.assert_close(
        found, forward(model, examples.tokens, 5, edits)[0].detach(), atol=1e-5, rtol=1e-5
    )


def test_logits_without_a_kept_residual_are_the_same(session, model, examples, starts):
    edits = [Edit("blocks.1.mlp.hook_post", torch.zeros_like)]
    cold = session.logits(model, examples, edits)
    session.activation(model, examples, "blocks.1.hook_resid_pre")
    torch.testing.assert_close(session.logits(model, examples, edits), cold, atol=1e-5, rtol=1e-5)
    assert starts == [0, 0, 1]


def test_nothing_of_the_bench_asks_for_gradients(session, model, examples):
    assert not session.logits(model, examples).requires_grad
    assert not session.activation(model, examples, "hook_embed").requires_grad


def test_what_a_component_names_is_told_apart_from_what_had_the_name_before(session, other_model):
    shift = NeuronShift(before="before", after="after", examples="noisy", matched="clean")
    assert set(session.named(shift)) == {*session.models.values(), *session.example_sets.values()}
    first = shift.kept(session)
    assert shift.kept(session) is first
    session.models = {**session.models, "after": other_model}
    assert (
        shift.kept(session)["shift_noisy"] == 0
    ).all()  # the same model before and after, and no longer the first
