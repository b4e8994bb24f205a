"""The choice of a backend."""

from __future__ import annotations

import pytest
from plain_hooks import LLAMA, transformer

from mechmem.models.backend import FAST, HOOKED, choose
from mechmem.spec.errors import InputError

EDITED = ["blocks.1.attn.hook_z", "hook_embed"]
SCALE = "blocks.0.ln2.hook_scale"
"""A hook that every model of ours has and `fast` does not come by."""


def test_auto_takes_fast_where_it_implements_the_model(model):
    assert choose("auto", model, EDITED) == (FAST, "it implements the model")


@pytest.mark.parametrize(
    ("fields", "hooks", "reason"),
    [
        (LLAMA, EDITED, "positional_embedding_type 'rotary'"),
        ({"output_logits_soft_cap": 3.0}, [], "output_logits_soft_cap 3.0"),
        ({}, [SCALE], f"it has no hook {SCALE}"),
    ],
    ids=["rotary", "capped", "a hook"],
)
def test_auto_takes_hooked_and_names_what_fast_refuses(fields, hooks, reason):
    runner, found = choose("auto", transformer(**fields), hooks)
    assert runner is HOOKED
    assert found.startswith("`fast` refuses: ")
    assert reason in found


def test_hooked_is_taken_if_it_is_asked_for(model):
    assert choose("hooked", model, EDITED) == (HOOKED, "it was asked for")


def test_fast_is_taken_if_it_is_asked_for(model):
    assert choose("fast", model, EDITED)[0] is FAST


@pytest.mark.parametrize(("fields", "hooks"), [(LLAMA, []), ({}, [SCALE])], ids=["model", "hook"])
def test_fast_that_is_asked_for_and_refuses_is_one_line_with_the_way_out(fields, hooks):
    with pytest.raises(InputError, match=r"`fast` cannot run this .*; use `auto`$") as raised:
        choose("fast", transformer(**fields), hooks)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("choice", ["auto", "hooked", "fast"])
@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.7.hook_resid_pre", "no hook 'blocks.7.hook_resid_pre'"),
        ("blocks.1.hook_resid_prr", "did you mean 'blocks.1.hook_resid_pre'"),
        ("blocks.1.attn.hook_rot_q", "no hook"),
        ("blocks.1.attn.hook_result", "set `model.cfg.use_attn_result = True`"),
    ],
)
def test_a_hook_that_the_model_lacks_is_refused_whatever_is_chosen(choice, hook, message, model):
    with pytest.raises(InputError, match=message):
        choose(choice, model, [*EDITED, hook])


@pytest.mark.parametrize("choice", ["auto", "hooked", "fast"])
def test_gradients_at_a_hook_that_fires_three_times_are_refused(choice, model):
    hook = "blocks.1.ln1.hook_normalized"
    with pytest.raises(InputError, match="three times"):
        choose(choice, model, [hook], gradients=True)
    choose(choice, model, [hook])
