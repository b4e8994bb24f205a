from __future__ import annotations

import pytest
import torch
from plain_hooks import LLAMA, close, logits_of, setting, transformer

from mechmem.interventions.ablate import Ablate
from mechmem.interventions.applied import InterventionError, applied
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.swap_weights import SwapWeights
from mechmem.models.edits import At, Edit
from mechmem.session import Session
from mechmem.spec.errors import InputError


@pytest.fixture
def part(other_model) -> Patch:
    return Patch(site="attn_out", layer=1, source=other_model)


class OneEdit:
    """An intervention of one edit, whatever the hook."""

    def is_by_example(self):
        return False

    def __init__(self, hook, function=lambda own, rows: torch.zeros_like(own)) -> None:
        self.made = [Edit(At(hook), function)]

    def edits_after(self, earlier, session, model, examples):
        return self.made

    def derive(self, session, model):
        return model


def n_hooks(model) -> int:
    on_model = (
        len(model._forward_pre_hooks) + len(model._forward_hooks) + ("forward" in vars(model))
    )
    return on_model + sum(len(point._forward_hooks) for point in model.hook_dict.values())


@pytest.fixture(autouse=True)
def no_hook_is_left(model):
    assert n_hooks(model) == 0
    yield
    assert n_hooks(model) == 0
    model.reset_hooks()


def test_the_model_is_the_same_one_edited_inside_and_as_before_outside(model, part, examples):
    before = model(examples.tokens)
    with applied(model, [part], examples) as edited:
        assert edited is model
        inside = model(examples.tokens)
    assert not torch.allclose(inside, before, atol=1e-2)
    assert torch.equal(model(examples.tokens), before)


def test_a_body_that_never_runs_the_model_is_an_error(model, part, examples):
    with (
        pytest.raises(InterventionError, match="the model was never run inside applied"),
        applied(model, [part], examples),
    ):
        pass


def test_edits_fire_once_in_each_of_several_forwards(model, part, examples):
    with applied(model, [part], examples):
        first, second = model(examples.tokens), model(examples.tokens)
    assert torch.equal(first, second)


def test_run_with_cache_sees_the_edited_activation(model, other_model, part, examples):
    with applied(model, [part], examples):
        _, cache = model.run_with_cache(examples.tokens)
    _, source = other_model.run_with_cache(examples.tokens)
    torch.testing.assert_close(
        cache["blocks.1.hook_attn_out"], source["blocks.1.hook_attn_out"], atol=1e-5, rtol=1e-5
    )


def test_a_forward_that_stops_before_the_edit_is_an_error(model, part, examples):
    def run_twice():
        with applied(model, [part], examples):
            model(examples.tokens)
            model(examples.tokens, stop_at_layer=1)

    with pytest.raises(
        InterventionError,
        match=r"the edit at blocks\.1\.hook_attn_out fired 1 times in 2 forward passes",
    ):
        run_twice()


def test_a_site_that_is_switched_off_is_an_error(model, examples):
    """Such a hook exists in every model, and never fires: refused before the body."""
    part = OneEdit("blocks.0.attn.hook_result")
    with (
        pytest.raises(InputError, match=r"never fires in this model: set `model\.cfg\.use_attn_re"),
        applied(model, [part], examples),
    ):
        pytest.fail("the body ran")
    with pytest.raises(
        InputError, match=r"never fires in this model: set `model\.cfg\.use_attn_re"
    ):
        Session().logits(model, examples, [part])


def test_a_hook_that_fires_three_times_is_an_error(model, examples):
    with (
        pytest.raises(InterventionError, match="hook_normalized fired 3 times in 1 forward passes"),
        applied(model, [OneEdit("blocks.0.ln1.hook_normalized")], examples),
    ):
        model(examples.tokens)


def test_an_unknown_hook_is_refused_before_the_body(model, examples):
    part = OneEdit("blocks.7.hook_attn_out")
    with (
        pytest.raises(InputError, match=r"no hook 'blocks\.7\.hook_attn_out'"),
        applied(model, [part], examples),
    ):
        pytest.fail("the body ran")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"site": "atn_out"}, "did you mean 'attn_out'"),
        ({"layer": 2}, "layers 0 to 1"),
        ({"position": "s8"}, "there is no position 's8'"),
        ({"site": "z", "head": 5}, r"head \[5\] is out of range"),
        ({"site": "neurons", "neurons": (99,)}, r"neurons \[99\] is out of range"),
    ],
)
def test_names_are_checked_before_the_body(fields, message, model, other_model, examples):
    part = Patch(**({"site": "attn_out", "layer": 1, "source": other_model} | fields))
    with pytest.raises(InputError, match=message), applied(model, [part], examples):
        pytest.fail("the body ran")


def test_an_edit_that_changes_the_shape_is_an_error(model, examples):
    part = OneEdit("blocks.0.hook_attn_out", lambda own, rows: own[:1])
    with (
        pytest.raises(InputError, match=r"returned \(1, 14, 16\) for \(12, 14, 16\)"),
        applied(model, [part], examples),
    ):
        model(examples.tokens)


def others_of(examples) -> dict[str, torch.Tensor]:
    """Tokens other than those that the interventions were made for."""
    changed = examples.tokens.clone()
    changed[3, 7] = (changed[3, 7] + 1) % 10
    return {
        "one token": changed,
        "another order": examples.tokens.flip(0),
        "fewer": examples.tokens[:5],
        "shorter": examples.tokens[:, :-1],
    }


@pytest.mark.parametrize("kind", ["one token", "another order", "fewer", "shorter"])
def test_other_tokens_are_refused_also_of_the_same_size(kind, model, part, examples):
    tokens = others_of(examples)[kind]
    with (
        pytest.raises(
            InputError,
            match=r"inside applied\(\) the model may only be run on the `examples\.tokens`",
        ),
        applied(model, [part], examples),
    ):
        model(tokens)


def test_other_tokens_are_refused_by_name_and_with_hooks_and_caches(model, part, examples):
    tokens = examples.tokens.flip(0)
    ways = [
        lambda: model(input=tokens),
        lambda: model.run_with_cache(tokens),
        lambda: model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda x, hook: None)]),
        lambda: model.forward(tokens),
    ]
    for run in ways:
        with (
            pytest.raises(InputError, match="the model may only be run on the `examples"),
            applied(model, [part], examples),
        ):
            run()
    with applied(model, [part], examples):
        by_name = model(input=examples.tokens.clone())
    with applied(model, [part], examples):
        assert torch.equal(model(examples.tokens), by_name)


def test_the_examples_under_another_prefix_are_other_tokens(model, part, examples):
    with (
        pytest.raises(InputError, match="the model may only be run on the `examples"),
        applied(model, [part], examples.with_prefix("true")),
    ):
        model(examples.tokens)


def test_the_error_of_the_body_comes_through_and_the_hooks_go(model, part, examples):
    before = model(examples.tokens)
    with pytest.raises(KeyError, match="mine"), applied(model, [part], examples):
        raise KeyError("mine")
    assert torch.equal(model(examples.tokens), before)


@pytest.mark.parametrize("is_permanent", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_hooks_of_the_user_survive(is_permanent, fails, model, part, examples):
    fired = []
    model.add_hook(
        "blocks.1.hook_attn_out", lambda x, hook: fired.append(hook.name), is_permanent=is_permanent
    )
    try:
        with applied(model, [part], examples):
            model(examples.tokens)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert len(fired) == 1
    model(examples.tokens)
    assert len(fired) == 2
    model.reset_hooks(including_permanent=True)


def test_hooks_of_the_user_survive_around_and_inside(model, part, examples):
    seen = []

    def watch(activation, hook):
        seen.append(hook.name)

    with model.hooks(fwd_hooks=[("hook_embed", watch)]):
        with applied(model, [part], examples):
            model(examples.tokens)
            model.run_with_hooks(examples.tokens, fwd_hooks=[("blocks.1.hook_resid_post", watch)])
        model(examples.tokens)
    assert seen == ["hook_embed", "hook_embed", "blocks.1.hook_resid_post", "hook_embed"]


def test_interventions_nest(model, other_model, part, examples):
    outer = Patch(site="mlp_out", layer=0, source=other_model)
    with applied(model, [outer, part], examples):
        together = model(examples.tokens)
    with applied(model, [outer], examples), applied(model, [part], examples):
        assert torch.equal(model(examples.tokens), together)


@pytest.fixture
def swap() -> SwapWeights:
    return SwapWeights(component="mlp", source=Source(checkpoint="before"))


def test_swapped_weights_are_in_force_in_the_model_that_is_yielded(swap, session, model, examples):
    before = logits_of(model, examples)
    with applied(model, [swap], examples, session) as derived:
        assert derived is not model
        inside = derived(examples.tokens)[:, -examples.n_answer :]
    close(inside, session.logits(model, examples, [swap]))
    assert not torch.allclose(inside, before, atol=1e-2)
    assert torch.equal(logits_of(model, examples), before)
    assert n_hooks(derived) == 0


@pytest.mark.parametrize("with_an_edit", [False, True])
def test_running_the_original_instead_of_the_yielded_model_is_an_error(
    with_an_edit, swap, part, session, model, examples
):
    parts = [swap, part] if with_an_edit else [swap]
    with (
        pytest.raises(
            InterventionError, match=r"never run inside.*run the model that applied\(\) y"
        ),
        applied(model, parts, examples, session),
    ):
        model(examples.tokens)


def test_other_tokens_are_refused_by_a_derived_model_too(swap, session, model, examples):
    with (
        pytest.raises(InputError, match="the model may only be run on the `examples"),
        applied(model, [swap], examples, session) as derived,
    ):
        derived(examples.tokens.flip(0))


def test_edits_fire_in_a_derived_model(swap, session, model, examples):
    ablation = Ablate(site="z", layer=1, head=1, method="zero")
    with applied(model, [swap, ablation], examples, session) as derived:
        found = derived(examples.tokens)[:, -examples.n_answer :]
    zeroed = setting("blocks.1.attn.hook_z", (slice(None), slice(None), 1), 0.0)
    close(found, logits_of(swap.derive(session, model), examples, zeroed))


def test_hooks_of_the_user_are_in_force_in_a_derived_model(swap, session, model, examples):
    doubled = ("blocks.0.hook_mlp_out", lambda activation, hook: 2 * activation)
    with model.hooks(fwd_hooks=[doubled]):
        with applied(model, [swap], examples, session) as derived:
            found = derived(examples.tokens)[:, -examples.n_answer :]
        in_session = session.logits(model, examples, [swap])
    close(found, logits_of(swap.derive(session, model), examples, doubled))
    close(in_session, found)
    assert not torch.allclose(found, session.logits(model, examples, [swap]), atol=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        LLAMA,
        {"positional_embedding_type": "alibi"},
        {"parallel_attn_mlp": True},
        {"attn_scores_soft_cap": 2.0},
        {"n_key_value_heads": 2},
    ],
    ids=str,
)
def test_it_is_right_on_models_that_are_not_ours(fields, examples):
    model, other = transformer(1, **fields), transformer(2, **fields)
    found = {}
    for source in (model, other):
        patch = Patch(site="z", layer=1, head=2, position="=", source=source)
        with applied(model, [patch], examples):
            found[source] = model(examples.tokens)[:, -examples.n_answer :]
    close(found[model], logits_of(model, examples))  # from itself it changes nothing
    theirs = other.run_with_cache(examples.tokens)[1]["blocks.1.attn.hook_z"]
    plain = logits_of(model, examples, setting("blocks.1.attn.hook_z", (slice(None), 9, 2), theirs))
    close(found[other], plain)
    assert not torch.allclose(found[other], found[model], atol=1e-4)
