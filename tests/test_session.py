"""Session: names, what is kept and for how long, the budget, and the choice of the backend."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mechmem.analyses.neurons.neuron_shift import NeuronShift
from mechmem.interventions.ablate import Ablate
from mechmem.interventions.patch import Patch, Source
from mechmem.models.backend import FAST
from mechmem.session import Session
from mechmem.session.budget import Budget
from mechmem.spec.errors import InputError
from mechmem.spec.references import References

RESID = "blocks.1.hook_resid_post"


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layer at which each forward of the session began."""
    begun: list[int] = []
    plain = FAST.run

    def recorded(*arguments: Any, **options: Any) -> Any:
        resume = options.get("resume")
        begun.append(0 if resume is None else resume[0])
        return plain(*arguments, **options)

    monkeypatch.setattr(FAST, "run", recorded)
    return begun


def right(model: Any, tokens: Tensor, hook: str) -> Tensor:
    return model.run_with_cache(tokens)[1][hook]


# Names


def test_unknown_names_are_refused_with_the_nearest(session):
    with pytest.raises(InputError, match="no checkpoint 'befor'; did you mean 'before'"):
        session.model("befor")
    with pytest.raises(InputError, match="no example set 'noise'; did you mean 'noisy'"):
        session.examples("noise")


def test_what_is_not_declared_is_refused_while_something_is(session):
    with session.declaring(References(checkpoints=frozenset(["after"]))):
        assert session.model("after") is session.models["after"]
        with pytest.raises(InputError, match="'noisy' is used without being declared"):
            session.examples("noisy")
    assert session.examples("noisy") is session.example_sets["noisy"]


def test_a_component_refers_to_what_its_fields_name(session):
    shift = NeuronShift(before="before", after="after", examples="noisy", matched="clean")
    found = session.referred(shift)
    everything = [*session.models.values(), *session.example_sets.values()]
    assert {id(part) for part in found} == {id(part) for part in everything}


# What is kept


def test_an_activation_is_computed_once_and_only_what_is_missing(session, model, examples, starts):
    hooks = ["blocks.0.hook_attn_out", "blocks.1.hook_attn_out"]
    first = session.activation(model, examples, hooks[0])
    assert session.activation(model, examples, hooks[0]) is first
    both = session.activations(model, examples, hooks)
    assert both[hooks[0]] is first
    assert len(starts) == 2
    assert session.n_forwarded == 2 * len(examples)


def test_models_examples_and_prefixes_are_kept_apart(session, model, other_model, examples, others):
    variants = [
        (model, examples),
        (other_model, examples),
        (model, others),
        (model, examples.with_prefix("true")),
        (model, examples.select(torch.arange(6))),
    ]
    for _ in range(2):
        for one, chosen in variants:
            found = session.activation(one, chosen, RESID)
            torch.testing.assert_close(found, right(one, chosen.tokens, RESID))


def test_a_model_lives_as_long_as_its_activations_are_kept(random_models, examples):
    """A new model could take over the address of a forgotten one."""
    model, session = random_models(0, n_layers=1), Session()
    session.activation(model, examples, "hook_embed")
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is not None
    del session
    gc.collect()
    assert seen() is None


def test_the_longest_unused_activation_is_forgotten_first(model, examples, starts, monkeypatch):
    size = 12 * 14 * 16 * 4  # one residual: examples, positions, d_model, bytes
    session = Session(memory=4 * size)  # half of it is for what is kept
    monkeypatch.setattr(Budget, "rows_at_once", lambda *_: 12)
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


def in_place(model: Any) -> None:
    model.blocks[0].mlp.W_in.mul_(1.5)


def through_data(model: Any) -> None:
    model.blocks[0].attn.W_Q.data[0, 0, 0] += 0.5


def replaced(model: Any) -> None:
    model.blocks[1].mlp.W_out.data = model.blocks[1].mlp.W_out.data * 2


@torch.no_grad()
@pytest.mark.parametrize("change", [in_place, through_data, replaced])
def test_a_change_of_weights_is_noticed(change: Callable[[Any], None], random_models, examples):
    model = random_models(3)
    session = Session(models={"after": model}, example_sets={"noisy": examples})
    session.baseline(model, examples)
    session.activation(model, examples, RESID)
    assert session.cached(("mine", model), lambda: 1) == 1
    change(model)
    torch.testing.assert_close(
        session.activation(model, examples, RESID), right(model, examples.tokens, RESID)
    )
    logits = model(examples.tokens)[:, -examples.n_answer :]
    torch.testing.assert_close(session.baseline(model, examples), logits, atol=1e-5, rtol=1e-5)
    assert session.cached(("mine", model), lambda: 2) == 2


def test_a_change_of_examples_is_noticed(session, model, examples):
    own = examples.clone()
    session.baseline(model, own)
    own.prompt[:, 0] = 1
    tokens = own.tokens
    assert (tokens[:, 0] == 1).all()
    logits = model(tokens)[:, -own.n_answer :].detach()
    torch.testing.assert_close(session.baseline(model, own), logits, atol=1e-5, rtol=1e-5)


def test_a_label_that_is_not_read_decides_a_result_too(session, examples):
    own = examples.clone()
    assert session.cached(("mine", own), lambda: 1) == 1
    own.given[:, -1] = (own.given[:, -1] + 1) % 10  # no input: the model never reads it
    assert session.cached(("mine", own), lambda: 2) == 2


def test_an_activation_that_someone_changed_is_not_handed_out_again(session, model, examples):
    session.activation(model, examples, RESID).zero_()
    found = session.activation(model, examples, RESID)
    torch.testing.assert_close(found, right(model, examples.tokens, RESID))


def test_within_steady_a_model_is_looked_at_once(session, model, monkeypatch):
    from mechmem.session import state

    looks = []
    plain = state.state_of_model
    monkeypatch.setattr(state, "state_of_model", lambda m: looks.append(m) or plain(m))
    with session.steady():
        for i in range(3):
            session.cached((i, model), lambda: 0)
    assert len(looks) == 1
    session.cached((3, model), lambda: 0)
    assert len(looks) == 2


# Forwards


@pytest.mark.parametrize(("site", "start"), [("attn_out", 1), ("neurons", 1), ("logits", 1)])
def test_an_edited_forward_resumes_at_its_first_layer(
    site, start, session, model, examples, starts
):
    layer = None if site == "logits" else 1
    part = Ablate(site=site, layer=layer, method="zero")
    cold = Session().logits(model, examples, [part])
    session.baseline(model, examples)
    starts.clear()
    torch.testing.assert_close(session.logits(model, examples, [part]), cold, atol=1e-5, rtol=1e-5)
    assert starts == [start]


def test_nothing_asks_for_gradients(session, model, examples):
    assert not session.logits(model, examples).requires_grad
    assert not session.activation(model, examples, "hook_embed").requires_grad


def test_what_a_model_cannot_read_is_one_line(session, random_models, examples):
    short = random_models(0)
    short.cfg.n_ctx = 9
    with pytest.raises(InputError, match="have 14 input positions, the model reads 9"):
        session.baseline(short, examples)
    short.cfg.n_ctx, short.cfg.d_vocab = 14, 5
    with pytest.raises(InputError, match="have the token 11, the model knows 5 tokens"):
        session.baseline(short, examples)


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_chunks_give_the_numbers_of_the_whole(
    rows, model, other_model, examples, others, monkeypatch
):
    sets = {"noisy": examples, "clean": others}
    models = {"after": model, "before": other_model}
    whole, chunked = Session(models, sets), Session(models, sets)
    patch = Patch(site="resid_pre", layer=1, position="=", source=Source(checkpoint="before"))

    def found(session: Session) -> list[Tensor]:
        loss = lambda logits, rows: logits.log_softmax(-1)[..., 0].sum()  # noqa: E731
        batches = [*session.gradients(model, examples, loss, [RESID])]
        return [
            session.logits(model, examples),
            session.logits(model, examples, [patch]),
            session.greedy(model, examples, [patch]),
            session.activation(model, examples, RESID),
            torch.cat([batch.gradients[RESID] for batch in batches]),
        ]

    expected = found(whole)
    monkeypatch.setattr(Budget, "rows_at_once", lambda *_: rows)
    for ours, theirs in zip(found(chunked), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_small_budget_runs_few_rows_and_a_large_one_all(model, examples):
    assert Budget(1).rows_at_once(model, examples) == 1
    assert Budget(2**31).rows_at_once(model, examples) > 10_000
    few, many = (Budget(m).rows_at_once(model, examples) for m in (2**22, 2**23))
    assert many == pytest.approx(2 * few, abs=1)
    assert Budget(2**22).rows_at_once(model, examples, gradients=True) < few


# The backend


def test_the_choice_is_recorded_and_a_slow_one_is_said(model, examples):
    said: list[str] = []
    session = Session({"after": model}, {"noisy": examples}, say=said.append)
    session.baseline(model, examples)
    assert session.backends == {"after": ("fast", "it implements the model")}
    assert said == []
    model.add_hook("blocks.0.hook_attn_out", lambda activation, hook: activation)
    try:
        session.activation(model, examples, RESID)
        session.activation(model, examples, RESID)
    finally:
        model.reset_hooks()
    assert session.backends["after"][0] == "hooked"
    assert len(said) == 1
    assert "there are hooks at blocks.0.hook_attn_out" in said[0]


def test_a_backend_can_be_insisted_on(model, examples, starts):
    session = Session({"after": model}, {"noisy": examples}, backend="hooked")
    expected = model(examples.tokens)[:, -examples.n_answer :].detach()
    torch.testing.assert_close(session.baseline(model, examples), expected)
    assert session.backends == {"after": ("hooked", "it was asked for")}
    assert starts == []


def test_a_device_moves_the_models(random_models, examples):
    model = random_models(0)
    session = Session({"after": model}, {"noisy": examples}, device="meta")
    assert session.model("after").embed.W_E.device.type == "meta"
