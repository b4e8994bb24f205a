"""Hooks that a user has added to a model are in force in everything that a session computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from plain_hooks import activations_of, close, logits_of, setting
from torch import Tensor

from mechmem.interventions.ablate import Ablate
from mechmem.interventions.erase import Erase
from mechmem.interventions.patch import Patch
from mechmem.interventions.steer import Steer
from mechmem.interventions.swap_weights import SwapWeights
from mechmem.session import Session
from mechmem.spec.errors import InputError

HOOK = "blocks.0.hook_mlp_out"


def halve(activation: Tensor, hook: Any) -> Tensor:
    return activation / 2


@contextmanager
def added(model) -> Iterator[None]:
    model.add_hook(HOOK, halve)
    try:
        yield
    finally:
        model.reset_hooks()


@contextmanager
def permanent(model) -> Iterator[None]:
    model.add_hook(HOOK, halve, is_permanent=True)
    try:
        yield
    finally:
        model.reset_hooks(including_permanent=True)


@contextmanager
def within(model) -> Iterator[None]:
    with model.hooks(fwd_hooks=[(HOOK, halve)]):
        yield


@contextmanager
def of_torch(model) -> Iterator[None]:
    handle = model.blocks[0].mlp.register_forward_hook(lambda module, given, out: out / 2)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def of_torch_before(model) -> Iterator[None]:
    """The MLP reads half of its input; the last bias is left, so this differs from the others."""
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda module, given: (given[0] / 2,))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_forward(model) -> Iterator[None]:
    mlp = model.blocks[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) / 2
    try:
        yield
    finally:
        del mlp.forward


class Silent(torch.nn.Module):
    """Stands for an MLP, and writes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x


@contextmanager
def replaced_module(model) -> Iterator[None]:
    mlp = model.blocks[0].mlp
    model.blocks[0].mlp = Silent()
    try:
        yield
    finally:
        model.blocks[0].mlp = mlp


@contextmanager
def replaced_function(model) -> Iterator[None]:
    mlp = model.blocks[0].mlp
    plain = mlp.act_fn
    mlp.act_fn = torch.tanh
    try:
        yield
    finally:
        mlp.act_fn = plain


WAYS = [
    replaced_module,
    replaced_function,
    added,
    permanent,
    within,
    of_torch,
    of_torch_before,
    replaced_forward,
]
ways = pytest.mark.parametrize("hooked", WAYS, ids=lambda way: way.__name__)


@pytest.fixture
def model(random_models) -> Any:
    """A model of this test's own, as it is changed."""
    return random_models(0)


@pytest.fixture
def session(model, other_model, examples, others) -> Session:
    return Session({"after": model, "before": other_model}, {"noisy": examples, "clean": others})


@ways
def test_logits_and_activations_are_those_of_the_hooked_model(hooked, session, model, examples):
    hooks = [HOOK, "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"]
    plain = session.baseline(model, examples), session.activations(model, examples, hooks)
    with hooked(model):
        expected, there = logits_of(model, examples), activations_of(model, examples)
        close(session.logits(model, examples), expected)
        for hook, found in session.activations(model, examples, hooks).items():
            close(found, there[hook])
        assert session.backends["after"][0] == "hooked"
        assert any(
            word in session.backends["after"][1] for word in ("hooks at", "was replaced", "put in")
        )
    assert not torch.allclose(expected, plain[0], atol=1e-2)
    # and of the plain one again when they are gone
    assert torch.equal(session.logits(model, examples), plain[0])
    for hook, found in session.activations(model, examples, hooks).items():
        assert torch.equal(found, plain[1][hook])
        assert not torch.allclose(found, there[hook], atol=1e-3)
    session.logits(model, examples, [Ablate(site="z", layer=1)])
    assert session.backends["after"][0] == "fast"


@ways
@pytest.mark.parametrize("kept_before", [False, True])
def test_edited_logits_are_those_of_plain_hooks_after_the_users(
    hooked, kept_before, session, model, examples
):
    """Nothing that was kept of the plain model is where an edited forward starts."""
    if kept_before:
        session.baseline(model, examples)
    part = Ablate(site="z", layer=1, head=1, method="zero")
    zeroed = setting("blocks.1.attn.hook_z", (slice(None), slice(None), 1), 0.0)
    with hooked(model):
        expected = logits_of(model, examples, zeroed)
        close(session.logits(model, examples, [part]), expected)
    without = session.logits(model, examples, [part])
    close(without, logits_of(model, examples, zeroed))
    assert not torch.allclose(without, expected, atol=1e-3)


@ways
def test_gradients_are_those_of_the_hooked_model(hooked, session, model, examples):
    wrt = [HOOK, "blocks.1.hook_resid_pre"]

    def summed(logits: Tensor, rows: Tensor) -> Tensor:
        return logits[..., 3].sum()

    def gradients() -> dict[str, Tensor]:
        (found,) = session.gradients(model, examples, summed, wrt)
        return found.gradients

    before = gradients()
    with hooked(model):
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            kept[hook.name] = activation

        with model.hooks(fwd_hooks=[(name, keep) for name in wrt]):
            logits = model(examples.tokens)[:, -examples.n_answer :]
        expected = torch.autograd.grad(summed(logits, torch.arange(12)), [kept[n] for n in wrt])
        found = gradients()
    for name, gradient in zip(wrt, expected, strict=True):
        close(found[name], gradient)
    if hooked is not of_torch_before:  # which changes the values and hardly the slopes
        assert not torch.allclose(found[HOOK], before[HOOK], atol=1e-4)
    again = gradients()
    assert all(torch.equal(again[name], before[name]) for name in wrt)


@ways
def test_greedy_answers_are_those_of_the_hooked_model(hooked, session, model, examples):
    def decoded() -> Tensor:
        answer = examples.given.clone()
        for step in range(examples.n_answer):
            answer[:, step] = logits_of(model, examples.continued_with(answer))[:, step].argmax(-1)
        return answer

    before = session.greedy(model, examples)
    assert torch.equal(before, decoded())
    with hooked(model):
        assert torch.equal(session.greedy(model, examples), decoded())
    assert torch.equal(session.greedy(model, examples), before)


FITTED: dict[str, Callable[[Any], Any]] = {
    "mean": lambda other: Ablate(site="resid_pre", layer=1, reference_set="clean"),
    "steer": lambda other: Steer(
        site="resid_pre", layer=1, variable="carry_1", towards=1, away=0, on="clean"
    ),
    "erase": lambda other: Erase(
        site="resid_pre", layer=1, variable="carry_1", position="=", fit_on="clean"
    ),
    "patch": lambda other: Patch(site="resid_pre", layer=1, position="=", source=other),
    "swap": lambda other: SwapWeights(component="mlp", layer=1, source=other),
}


@pytest.mark.parametrize("of", ["after", "before"])
@pytest.mark.parametrize("kind", FITTED)
def test_what_is_learnt_from_data_is_learnt_anew_after_a_change_of_hooks(
    kind, of, session, random_models, model, examples
):
    """Means, directions, erasers and sources are cached; hooks on either model make them new."""
    other = random_models(1)
    part, hooked = FITTED[kind](other), {"after": model, "before": other}[of]

    def fresh() -> Tensor:
        return Session(session.models, session.example_sets).logits(model, examples, [part])

    first = session.logits(model, examples, [part])
    close(first, fresh())
    with added(hooked):
        close(session.logits(model, examples, [part]), fresh())
        changed = session.logits(model, examples, [part])
    assert torch.allclose(changed, first, atol=1e-4) == (of == "before" and kind not in ("patch",))
    close(session.logits(model, examples, [part]), first)


def test_a_hook_that_changes_its_mind_is_never_cached(session, model, examples):
    factor = [1.0]

    def scale(activation: Tensor, hook: Any) -> Tensor:
        return activation * factor[0]

    with model.hooks(fwd_hooks=[(HOOK, scale)]):
        first = session.baseline(model, examples)
        close(first, logits_of(model, examples))
        factor[0] = 3.0
        close(session.baseline(model, examples), logits_of(model, examples))
        assert not torch.allclose(session.baseline(model, examples), first, atol=1e-2)


def test_results_of_ones_own_are_made_anew_too(session, model, examples):
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    key = ("mine", model, examples)
    assert [session.cached(key, make) for _ in range(2)] == [0, 0]
    with added(model):
        assert [session.cached(key, make) for _ in range(2)] == [1, 2]
    assert session.cached(key, make) == 0


@ways
def test_the_backend_fast_refuses_and_says_why(hooked, model, examples):
    session = Session({"after": model}, backend="fast")
    session.logits(model, examples)
    with hooked(model), pytest.raises(InputError, match="`fast` cannot run this model"):
        session.logits(model, examples, [Ablate(site="z", layer=1)])


def test_hooks_of_the_user_stay_where_they_are(session, model, examples):
    seen: list[str] = []
    model.add_hook(HOOK, lambda activation, hook: seen.append(hook.name))
    session.logits(model, examples, [Ablate(site="z", layer=1, method="zero")])
    n_seen = len(seen)
    assert n_seen > 0
    model(examples.tokens)
    assert len(seen) == n_seen + 1
    model.reset_hooks()
