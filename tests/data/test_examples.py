from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from mechmem.data.examples import Examples, concatenate
from mechmem.spec.errors import InputError

PROMPT, GIVEN, TRUE = (
    [[4, 5], [6, 4], [5, 5]],
    [[1, 2, 3], [0, 0, 0], [3, 1, 2]],
    [[1, 3, 3], [0, 0, 0], [2, 1, 2]],
)
"""Three instances of answers with three tokens, the first and the last of them noisy."""


@pytest.fixture
def three() -> Examples:
    return Examples(
        prompt=torch.tensor(PROMPT),
        given=torch.tensor(GIVEN),
        true=torch.tensor(TRUE),
        is_noisy=torch.tensor([True, False, True]),
        variables={"sum": torch.tensor([9, 10, 11]), "even": torch.tensor([0, 1, 0])},
        positions={"a": 0, "b": 1, "s2": 2, "s1": 3},
        places=("s2", "s1", "s0"),
        vocabulary=("0", "1", "2", "3", "x", "y", "z"),
    )


@pytest.fixture
def paired(three: Examples) -> Examples:
    """Each with the next one as its pair."""
    return replace(three, counterfactual=three.select(torch.tensor([1, 2, 0])).as_set())


@pytest.mark.parametrize(
    ("prefix", "tokens"),
    [
        ("given", [[4, 5, 1, 2], [6, 4, 0, 0], [5, 5, 3, 1]]),
        ("true", [[4, 5, 1, 3], [6, 4, 0, 0], [5, 5, 2, 1]]),
    ],
)
def test_the_model_reads_the_prompt_and_the_earlier_tokens_of_the_prefix(three, prefix, tokens):
    assert three.with_prefix(prefix).tokens.tolist() == tokens
    assert len(three.positions) == three.with_prefix(prefix).tokens.shape[1]


def test_a_change_of_prefix_is_a_new_set_and_leaves_the_old_one(three):
    before = three.tokens.clone()
    other = three.with_prefix("true")
    assert not torch.equal(other.tokens, before)
    assert torch.equal(three.tokens, before)
    assert torch.equal(other.with_prefix("given").tokens, before)


def test_the_pairs_are_fed_the_same_prefix(paired):
    assert paired.with_prefix("true").counterfactual.tokens.tolist() == [
        [6, 4, 0, 0],
        [5, 5, 2, 1],
        [4, 5, 1, 3],
    ]


def test_an_answer_of_the_models_own_is_fed_whatever_the_prefix_was(three):
    own = torch.tensor([[3, 3, 3], [2, 2, 2], [1, 1, 1]])
    fed = three.with_prefix("true").continued_with(own)
    assert fed.tokens.tolist() == [[4, 5, 3, 3], [6, 4, 2, 2], [5, 5, 1, 1]]
    assert torch.equal(fed.true, three.true)


def test_labels_by_name(paired):
    assert paired.labels("given").tolist() == GIVEN
    assert paired.labels("true").tolist() == TRUE
    assert paired.labels("pair").tolist() == [TRUE[1], TRUE[2], TRUE[0]]


def test_the_label_of_a_pair_needs_a_pair(three):
    with pytest.raises(InputError, match="made with `pair:`"):
        three.labels("pair")


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_selected_rows_stay_aligned_and_know_where_they_come_from(paired, rows):
    chosen = paired.select(rows)
    order = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
    assert chosen.index.tolist() == order.tolist()
    assert chosen.prompt.tolist() == [PROMPT[i] for i in order]
    assert chosen.given.tolist() == [GIVEN[i] for i in order]
    assert chosen.true.tolist() == [TRUE[i] for i in order]
    assert chosen.is_noisy.tolist() == [i != 1 for i in order]
    assert chosen.variables["sum"].tolist() == [9 + i for i in order]
    assert chosen.counterfactual.prompt.tolist() == [PROMPT[(i + 1) % 3] for i in order]
    assert len(chosen) == 2


def test_rows_count_in_the_first_set_through_any_number_of_selections(paired):
    chosen = paired.select(torch.tensor([2, 0])).select(torch.tensor([1, 0, 1]))
    assert chosen.index.tolist() == [0, 2, 0]
    assert chosen.as_set().index.tolist() == [0, 1, 2]
    assert chosen.as_set().prompt.tolist() == chosen.prompt.tolist()
    assert chosen.as_set().counterfactual.index.tolist() == [0, 1, 2]


def test_the_whole_of_a_selection_is_the_set_its_index_counts_in(paired):
    whole = paired.select(torch.tensor([2])).select(torch.tensor([0])).with_prefix("true").whole
    assert whole.prompt.tolist() == PROMPT
    assert whole.prefix == "true"
    alone = paired.select(torch.tensor([2])).as_set()
    assert alone.whole is alone


def test_an_empty_selection_is_a_set_of_nothing(three):
    none = three.select(torch.tensor([False] * 3))
    assert len(none) == 0
    assert none.tokens.shape == (0, 4)


def test_the_key_is_of_what_the_model_reads(three):
    assert three.key == replace(three, variables={}, true=three.given).key
    assert three.key != three.with_prefix("true").key
    assert three.key != three.select(torch.tensor([1, 0, 2])).key
    assert three.key != three.select(torch.tensor([0, 1])).key


def test_written_as_a_person_would(three):
    assert three.text(0) == "x y 1 2 3   (true: 1 3 3)"
    assert three.text(1) == "z x 0 0 0"


def test_concatenated_sets_stand_one_after_the_other_with_the_variables_they_share(paired):
    less = replace(paired.select(torch.tensor([1])), variables={"sum": torch.tensor([7])})
    both = concatenate(paired, less)
    assert both.prompt.tolist() == [*PROMPT, PROMPT[1]]
    assert both.given.tolist() == [*GIVEN, GIVEN[1]]
    assert both.is_noisy.tolist() == [True, False, True, False]
    assert {name: value.tolist() for name, value in both.variables.items()} == {
        "sum": [9, 10, 11, 7]
    }
    assert both.index.tolist() == [0, 1, 2, 3]
    assert both.counterfactual is None


def test_moved_to_another_device_everything_goes(paired):
    moved = paired.to("meta")
    parts = [
        moved.prompt,
        moved.given,
        moved.true,
        moved.is_noisy,
        moved.index,
        *moved.variables.values(),
    ]
    assert {part.device.type for part in [*parts, moved.counterfactual.prompt]} == {"meta"}
    assert paired.prompt.device.type == "cpu"


def test_examples_are_frozen(three):
    with pytest.raises(FrozenInstanceError):
        three.prefix = "true"
