from __future__ import annotations

import re

import pytest
import torch

from mechmem.data.example_set import ExampleSet
from mechmem.data.label_noise import UniformWrong
from mechmem.data.minimal_pair import MinimalPair
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.data.tasks.two_hop_reasoning import TwoHopReasoning
from mechmem.spec.errors import InputError

TASK = FourDigitAddition(n_train=60, n_held_out=30, noise=UniformWrong(rate=0.2))
"""12 noisy and 48 clean training instances."""
WORLD = TwoHopReasoning(n_entities=30, n_relations=4)


@pytest.mark.parametrize(
    ("n", "found", "requested"), [(5, 5, None), (12, 12, None), (13, 12, 13), (None, 12, None)]
)
def test_a_set_with_fewer_examples_than_asked_for_carries_the_number(n, found, requested):
    examples = ExampleSet(noisy=True, n=n).of(TASK)
    assert (len(examples), examples.requested) == (found, requested)
    assert examples.note == (f"12 of the {n} requested examples exist" if requested else "")


def test_pairs_that_are_fewer_than_asked_for_carry_the_number():
    pair = MinimalPair(flip="carry_4", hold=("digit_sum_3",))
    examples = ExampleSet(n=60, pair=pair).of(TASK)
    assert len(examples) < examples.requested == 60
    assert ExampleSet(n=len(examples), pair=pair).of(TASK).requested is None


@pytest.mark.parametrize(
    ("task", "chosen", "message"),
    [
        (
            TASK,
            ExampleSet(where={"carry_1": 2}),
            "split 'train' has no example with carry_1 2; carry_1 is one of 0, 1",
        ),
        (
            TASK,
            ExampleSet(noisy=True, where={"out_4": 1, "carry_4": 0}),
            "split 'train' has no noisy example with out_4 1, carry_4 0",
        ),
        (
            WORLD,
            ExampleSet(where={"e": 99}),
            "no example with e 99; e is one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ..., 29 "
            "(30 values)",
        ),
        (
            TASK,
            ExampleSet(noisy=True, skip=12),
            "skip 12 leaves no example: 12 of split 'train' match; lower skip to 11 or less",
        ),
        (
            TASK,
            ExampleSet(split="held_out", pair=MinimalPair(flip="out_0"), skip=30),
            "skip 30 leaves no example: 30 of split 'held_out' match",
        ),
    ],
)
def test_a_set_without_examples_is_refused_with_what_is_known(task, chosen, message):
    with pytest.raises(InputError, match=re.escape(message)):
        chosen.of(task)


def test_a_set_is_the_callers_own():
    chosen = ExampleSet(n=5)
    kept = chosen.of(TASK).given.clone()
    chosen.of(TASK).given[:] = 7
    assert torch.equal(chosen.of(TASK).given, kept)
