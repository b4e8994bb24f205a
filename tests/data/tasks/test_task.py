"""What every task offers, over every member of the registry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.data.tasks.two_hop_reasoning import TwoHopReasoning

SUMS = FourDigitAddition(n_train=200, n_held_out=50)
WORLD = TwoHopReasoning(
    n_entities=12, n_relations=5, n_relations_per_entity=3, ood_rate=0.2, seed=1
)


@pytest.mark.parametrize(
    "task", [SUMS, SUMS.model_copy(update={"answer_order": "least_significant_first"}), WORLD]
)
def test_the_rule_answers_every_example_truly(task):
    for split in task.splits:
        examples = task.sample(split)
        assert torch.equal(task.answers(examples.prompt), examples.true), split


@given(st.integers(1000, 9999), st.integers(1000, 9999))
def test_the_rule_answers_any_sum(a, b):
    prompt = [SUMS.vocabulary.index(c) for c in f"{a}+{b}="]
    answer = SUMS.answers(torch.tensor([prompt]))[0].tolist()
    assert "".join(SUMS.vocabulary[t] for t in answer) == f"{a + b:05}"


def test_the_rule_answers_any_two_hops_and_has_no_answer_where_a_relation_is_missing():
    atomic = {
        (int(e), int(r)): int(t)
        for e, r, t in zip(
            *(WORLD.sample("atomic").variables[n] for n in ("e", "r1", "answer")), strict=True
        )
    }
    every = torch.cartesian_prod(torch.arange(12), torch.arange(5), torch.arange(5))
    prompt = torch.stack(
        [every[:, 0], 12 + every[:, 1], 12 + every[:, 2], torch.full((300,), 18)], dim=1
    )
    expected = [atomic.get((atomic.get((e, r1), -1), r2), -1) for e, r1, r2 in every.tolist()]
    assert WORLD.answers(prompt)[:, 0].tolist() == expected
    assert -1 in expected
