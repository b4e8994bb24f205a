from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from mechmem.experiment.dry_run import DryRun
from mechmem.interventions.applied import applied
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.steer import Steer
from mechmem.session import Session
from mechmem.spec.errors import InputError

HOOK = "blocks.0.hook_resid_post"


def steer(**fields) -> Steer:
    base = {"site": "resid_post", "layer": 0, "variable": "carry_1", "towards": 1, "away": 0}
    return Steer(**(base | fields))


def steered(part, session, model, examples):
    before = session.activation(model, examples, HOOK)
    (edit,) = part.edits(session, model, examples)
    return edit(before, torch.arange(len(examples))), before


def test_by_hand(model, examples, session):
    ones = replace(examples, variables={"up": torch.tensor([1, 0, 1] + [2] * 9)})
    session = Session(example_sets={"clean": ones})
    after, before = steered(steer(variable="up", factor=3, position="b0"), session, model, examples)
    direction = (before[0, 8] + before[2, 8]) / 2 - before[1, 8]
    torch.testing.assert_close(after[:, 8], before[:, 8] + 3 * direction, atol=1e-5, rtol=1e-5)
    assert torch.equal(after[:, 9], before[:, 9])


def test_factor_1_carries_one_mean_to_the_other(session, model, others):
    after, before = steered(steer(), session, model, others)
    carry = others.variables["carry_1"]
    torch.testing.assert_close(
        after[carry == 0].mean(0), before[carry == 1].mean(0), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_factor_0_changes_nothing(session, model, examples):
    found = session.logits(model, examples, [steer(factor=0)])
    assert torch.equal(found, session.logits(model, examples))


def test_there_and_back(session, model, examples):
    after, before = steered(steer(factor=2), session, model, examples)
    (edit,) = steer(towards=0, away=1, factor=2).edits(session, model, examples)
    back = edit(after, torch.arange(len(examples)))
    torch.testing.assert_close(back, before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after, before, atol=1e-2)


@torch.no_grad()
def test_the_fast_path_is_the_hook_path(session, model, examples):
    part = steer(site="neurons", layer=(0, 1), neurons=(1, 2, 5), factor=-4.0)
    fast = session.logits(model, examples, [part])
    with applied(model, [part], examples, session):
        slow = model(examples.tokens)[:, -examples.n_answer :]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(fast, session.logits(model, examples), atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variable": "cary_1"}, "did you mean 'carry_1'?"),
        ({"towards": 7}, "no example of 'clean' has carry_1 7; choose from [0, 1]"),
        ({"on": "celan"}, "did you mean 'clean'?"),
    ],
)
def test_what_is_not_there_is_refused(fields, message, session, model, examples):
    with pytest.raises(InputError, match=re.escape(message)):
        steer(**fields).edits(session, model, examples)


def test_a_dry_run_does_without_a_value_that_few_examples_lack(model, examples, others):
    sets = {"clean": others}
    session = DryRun({"clean": 500}, models={"after": model}, example_sets=sets)
    (edit,) = steer(towards=7).edits(session, model, examples)
    activation = session.activation(model, examples, HOOK)
    assert edit(activation, torch.arange(len(examples))).isfinite().all()


def test_it_is_a_block_of_a_spec():
    part = steer(factor=0.5, position="readout")
    assert Intervention.model_validate(part.block()) == part
