"""What `Examples` refuses, one fault at a time, over a set by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from mechmem.data.examples import Examples
from mechmem.spec.errors import InputError


@pytest.fixture
def pair_of_examples() -> Examples:
    """Prompts of two tokens and of one; answers of two."""
    return Examples(
        prompt=torch.tensor([[2, 3], [3, -1]]),
        given=torch.tensor([[0, 1], [1, 1]]),
        true=torch.tensor([[0, 1], [0, 1]]),
        is_noisy=torch.tensor([False, True]),
        variables={"sum": torch.tensor([1, 2])},
        positions={"a": 0, "b": torch.tensor([1, -1])},
        places=("s1", "s0"),
        vocabulary=tuple("0123"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Types and dtypes
        (
            {"prompt": [[2, 3], [3, 2]]},
            "prompt is a list; pass a tensor: torch.tensor(prompt)",
        ),
        (
            {"given": torch.ones(2, 2)},
            "given has dtype torch.float32; pass whole numbers: given.long()",
        ),
        ({"true": torch.ones(2, 2, dtype=torch.bool)}, "true has dtype torch.bool"),
        (
            {"is_noisy": torch.tensor([0, 1])},
            "is_noisy has dtype torch.int64; pass a mask: is_noisy.bool()",
        ),
        (
            {"variables": {"sum": torch.tensor([0.5, 1])}},
            "variables['sum'] has dtype torch.float32",
        ),
        # Shapes
        (
            {"prompt": torch.tensor([2, 3])},
            "prompt has shape 2, but it needs 2 dimension(s): pass one row per example",
        ),
        (
            {"is_noisy": torch.tensor([[True], [False]])},
            "is_noisy has shape 2 x 1, but it needs 1 dimension(s): pass one value per example",
        ),
        (
            {"given": torch.zeros(3, 2, dtype=torch.long)},
            "given has shape 3 x 2, but prompt has 2 row(s): pass one row per example",
        ),
        ({"is_noisy": torch.tensor([True])}, "is_noisy has shape 1, but prompt has 2 row(s)"),
        ({"index": torch.tensor([4])}, "index has shape 1, but prompt has 2 row(s)"),
        (
            {"variables": {"sum": torch.tensor([1, 2, 3])}},
            "variables['sum'] has shape 3, but prompt has 2 row(s)",
        ),
        (
            {"true": torch.zeros(2, 3, dtype=torch.long)},
            "given has shape 2 x 2 and true has shape 2 x 3; pass labels with the same number",
        ),
        (
            {"given": torch.zeros(2, 0).long(), "true": torch.zeros(2, 0).long()},
            "given has shape 2 x 0; an answer needs at least one token",
        ),
        # Places
        (
            {"places": ("s1",)},
            "places has 1 name(s), but the answers in given have 2 token(s)",
        ),
        ({"places": ("s1", "s0", "s2")}, "places has 3 name(s)"),
        ({"places": ("s1", "s1")}, "places has 's1' twice; name each answer token once"),
        # Tokens
        (
            {"given": torch.tensor([[0, 1], [1, 4]])},
            "given has the token 4 in row 1, column 1, but the vocabulary has 4 tokens: "
            "pass numbers from 0 to 3",
        ),
        ({"true": torch.tensor([[0, -1], [1, 1]])}, "true has the token -1 in row 0, column 1"),
        ({"prompt": torch.tensor([[2, 3], [3, -2]])}, "prompt has the token -2 in row 1"),
        (
            {"prompt": torch.tensor([[-1, 3], [3, -1]])},
            "prompt has a token after the filler -1 in row 0; write shorter prompts from the left",
        ),
        (
            {"prompt": torch.tensor([[2, 3], [-1, -1]])},
            "prompt is empty in row 1; pass at least one token per row",
        ),
        # Positions
        (
            {"positions": ["a", "b"]},
            "positions is a list; pass a dictionary from names to an index",
        ),
        ({"positions": {"a": 0.5}}, "positions['a'] is a float; pass an index"),
        (
            {"positions": {"a": 2}},
            "positions['a'] is 2, but the shortest input has 2 positions (the prompt and all but "
            "the last answer token); pass an index from 0 to 1, or a tensor",
        ),
        ({"positions": {"a": -1}}, "positions['a'] is -1, but the shortest input has 2 positions"),
        (
            {"positions": {"b": torch.tensor([2, 2])}},
            "positions['b'] has the index 2 in row 1, whose input has 2 positions",
        ),
        ({"positions": {"b": torch.tensor([-2, 0])}}, "positions['b'] has the index -2 in row 0"),
        ({"positions": {"b": torch.tensor([0])}}, "positions['b'] has shape 1, but prompt has 2"),
        ({"positions": {"b": torch.tensor([0.0, 0.0])}}, "positions['b'] has dtype torch.float32"),
        ({"positions": {"readout": 0}}, "positions has the name 'readout', which is reserved for"),
        # Other names
        (
            {"variables": {"given": torch.tensor([1, 2])}},
            "variables has the name 'given', which is a column",
        ),
        ({"prefix": "treu"}, "there is no prefix 'treu'; did you mean 'true'?"),
    ],
)
def test_a_fault_is_refused_in_one_line_with_its_remedy(pair_of_examples, change, message):
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        replace(pair_of_examples, **change)
    assert "\n" not in str(refused.value)


def changed(examples: Examples, **changes: Any) -> Examples:
    return replace(examples, counterfactual=None, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.select([0]), "counterfactual has 1 example(s), but prompt has 2 row(s)"),
        (lambda e: changed(e, places=("x", "y")), "counterfactual and examples differ in places"),
        (
            lambda e: changed(e, vocabulary=tuple("abcd")),
            "counterfactual and examples differ in vocabulary",
        ),
    ],
)
def test_counterfactuals_that_do_not_fit_are_refused(pair_of_examples, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        replace(pair_of_examples, counterfactual=change(pair_of_examples))


def test_counterfactuals_may_have_other_lengths(pair_of_examples):
    longer = changed(pair_of_examples, prompt=torch.tensor([[1, 1, 1], [1, 1, -1]]))
    paired = replace(pair_of_examples, counterfactual=longer)
    assert paired.counterfactual.lengths.tolist() == [3, 2]
    ((_, short), (_, long)) = paired.buckets()
    assert [short.counterfactual.lengths.tolist(), long.counterfactual.lengths.tolist()] == [
        [2],
        [3],
    ]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_whole_numbers_become_int64(pair_of_examples, dtype):
    label = torch.tensor([[0, 1], [1, 1]], dtype=dtype)
    assert replace(pair_of_examples, given=label).given.dtype == torch.int64


def test_tensors_of_a_caller_are_not_copied(pair_of_examples):
    label = torch.tensor([[0, 1], [1, 1]])
    assert replace(pair_of_examples, given=label).given is label


def test_a_dictionary_of_a_caller_can_change_without_effect(pair_of_examples):
    positions = {"a": 0}
    examples = replace(pair_of_examples, positions=positions)
    positions["a"] = 9
    assert examples.indices("a").tolist() == [[0], [0]]
