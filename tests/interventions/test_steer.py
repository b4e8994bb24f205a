from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from mechmem.interventions.applied import applied
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.steer import Steer
from mechmem.session import Bench
from mechmem.spec.registry import InputError

HOOK = "blocks.0.hook_resid_post"


def steer(**fields) -> Steer:
    base = {"site": "resid_post", "layer": 0, "variable": "carry_1", "towards": 1, "away": 0}
    return Steer(**(base | fields))


def steered(part, bench, model, examples):
    before = bench.activation(model, examples, HOOK)
    return part.edits(model, examples, bench)[0].function(before), before


def test_by_hand(model, examples, bench):
    ones = replace(examples, variables={"up": torch.tensor([1, 0, 1] + [2] * 9)})
    bench = Bench(example_sets={"clean": ones})
    after, before = steered(steer(variable="up", factor=3, position="b0"), bench, model, examples)
    direction = (before[0, 8] + before[2, 8]) / 2 - before[1, 8]
    torch.testing.assert_close(after[:, 8], before[:, 8] + 3 * direction, atol=1e-5, rtol=1e-5)
    assert torch.equal(after[:, 9], before[:, 9])


def test_factor_1_carries_one_mean_to_the_other(bench, model, others):
    after, before = steered(steer(), bench, model, others)
    carry = others.variables["carry_1"]
    torch.testing.assert_close(after[carry == 0].mean(0), before[carry == 1].mean(0), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_factor_0_changes_nothing(bench, model, examples):
    found = bench.logits(model, examples, steer(factor=0).edits(model, examples, bench))
    assert torch.equal(found, bench.logits(model, examples))


def test_there_and_back(bench, model, examples):
    after, before = steered(steer(factor=2), bench, model, examples)
    back = steer(towards=0, away=1, factor=2).edits(model, examples, bench)[0].function(after)
    torch.testing.assert_close(back, before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after, before, atol=1e-2)


@torch.no_grad()
def test_the_fast_path_is_the_hook_path(bench, model, examples):
    part = steer(site="neurons", layer=(0, 1), neurons=(1, 2, 5), factor=-4.0)
    fast = bench.logits(model, examples, part.edits(model, examples, bench))
    with applied(model, [part], examples, bench):
        slow = model(examples.tokens)[:, -examples.n_answer :]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(fast, bench.logits(model, examples), atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variable": "cary_1"}, "did you mean 'carry_1'?"),
        ({"towards": 7}, "no example of 'clean' has carry_1 7; there is [0, 1]"),
        ({"on": "celan"}, "did you mean 'clean'?"),
    ],
)
def test_what_is_not_there_is_refused(fields, message, bench, model, examples):
    with pytest.raises(InputError, match=re.escape(message)):
        steer(**fields).edits(model, examples, bench)


def test_a_rehearsal_does_without_a_value_that_few_examples_lack(bench, model, examples):
    bench.is_rehearsal = True
    assert steer(towards=7).edits(model, examples, bench)


def test_it_is_a_block_of_a_spec():
    part = steer(factor=0.5, position="readout")
    assert Intervention.model_validate(part.block()) == part
