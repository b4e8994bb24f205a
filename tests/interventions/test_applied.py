from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mechmem.interventions.applied import InterventionError, applied
from mechmem.interventions.patch import Patch
from mechmem.models.fast import Edit
from mechmem.spec.errors import InputError


@pytest.fixture
def part(other_model) -> Patch:
    return Patch(site="attn_out", layer=1, source=other_model)


def edit(hook: str, function=torch.zeros_like) -> SimpleNamespace:
    """An intervention of one edit, whatever the hook."""
    return SimpleNamespace(edits=lambda *_: [Edit(hook, function)])


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
        InterventionError, match=r"the edit at blocks\.1\.hook_attn_out fired 1 times in 2 forwards"
    ):
        run_twice()


def test_a_site_that_is_switched_off_is_an_error(model, examples):
    with (
        pytest.raises(InterventionError, match="hook_result fired 0 times in 1 forwards"),
        applied(model, [edit("blocks.0.attn.hook_result")], examples),
    ):
        model(examples.tokens)


def test_a_hook_that_fires_three_times_is_an_error(model, examples):
    with (
        pytest.raises(InterventionError, match="hook_normalized fired 3 times in 1 forwards"),
        applied(model, [edit("blocks.0.ln1.hook_normalized")], examples),
    ):
        model(examples.tokens)


def test_an_unknown_hook_is_refused_before_the_body(model, examples):
    part = edit("blocks.7.hook_attn_out")
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
        ({"site": "neurons", "neurons": (99,)}, r"d_mlp \[99\] is out of range"),
    ],
)
def test_names_are_checked_before_the_body(fields, message, model, other_model, examples):
    part = Patch(**({"site": "attn_out", "layer": 1, "source": other_model} | fields))
    with pytest.raises(InputError, match=message), applied(model, [part], examples):
        pytest.fail("the body ran")


def test_an_edit_that_changes_the_shape_is_an_error(model, examples):
    part = edit("blocks.0.hook_attn_out", lambda x: x[:1])
    with (
        pytest.raises(InterventionError, match=r"turned \(12, 14, 16\) into \(1, 14, 16\)"),
        applied(model, [part], examples),
    ):
        model(examples.tokens)


def test_another_batch_than_the_edits_were_made_for_is_an_error(model, part, examples):
    with (
        pytest.raises(InputError, match="run on the examples that the patch was made for"),
        applied(model, [part], examples),
    ):
        model(examples.tokens[:5])


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
