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


CARRY = MinimalPair(flip="carry_2", hold=("digit_sum_0",))
SAME_CARRY = MinimalPair(flip="digit_sum_1", hold=("carry_2",))
BRIDGE = MinimalPair(flip="bridge", hold=("r2",))
SAME_BRIDGE = MinimalPair(flip="e", hold=("bridge", "r2"))


@pytest.mark.parametrize(
    ("task", "first", "second", "value"),
    [(TASK, CARRY, SAME_CARRY, "carry_2"), (WORLD, BRIDGE, SAME_BRIDGE, "bridge")],
    ids=["sums", "facts"],
)
@pytest.mark.parametrize("n", [7, None])
def test_sets_that_swap_their_pairs_hold_the_same_examples(n, task, first, second, value):
    here = ExampleSet(n=n, pair=first, also_pair=second).of(task)
    there = ExampleSet(n=n, pair=second, also_pair=first).of(task)
    for name in ("prompt", "given", "true", "is_noisy", "index"):
        assert torch.equal(getattr(here, name), getattr(there, name))
    own, flipped, same = (e.variables[value] for e in (here, *_pairs(here, there)))
    assert (flipped != own).all()
    assert torch.equal(same, own)
    assert (here.prompt != there.counterfactual.prompt).any(dim=1).all()
    whole = ExampleSet(n=None, pair=first).of(task)
    assert len(here) <= len(whole)


def _pairs(*sets):
    return [examples.counterfactual for examples in sets]


def test_examples_that_lack_the_other_pair_are_left_out():
    rare = MinimalPair(flip="carry_4", hold=("digit_sum_3",))
    some = ExampleSet(n=None, pair=rare).of(TASK)
    both = ExampleSet(n=None, pair=MinimalPair(flip="out_0"), also_pair=rare).of(TASK)
    known = {tuple(prompt) for prompt in some.prompt.tolist()}
    assert {tuple(prompt) for prompt in both.prompt.tolist()} == known
    assert 0 < len(both) < 60


def test_another_pair_alone_is_refused():
    with pytest.raises(ValueError, match="`also_pair` only restricts a set that has a `pair`"):
        ExampleSet(also_pair=CARRY)


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
