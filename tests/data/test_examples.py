from __future__ import annotations

import pickle
import re
from copy import deepcopy
from dataclasses import FrozenInstanceError, replace

import hypothesis
import pytest
import torch
from data.sets import example_sets
from hypothesis import strategies as st

from mechmem.data.examples import Examples, concatenate, third_labels
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


# Prompts of several lengths, by hand


@pytest.fixture
def mixed() -> Examples:
    """Prompts of two, one and three tokens."""
    return Examples(
        prompt=torch.tensor([[4, 5, -1, -1], [6, -1, -1, -1], [5, 5, 4, -1]]),
        given=torch.tensor([[1, 2], [0, 0], [3, 1]]),
        true=torch.tensor([[1, 3], [0, 0], [3, 1]]),
        is_noisy=torch.tensor([True, False, False]),
        variables={"sum": torch.tensor([9, 10, 11])},
        positions={"a": 0, "b": torch.tensor([1, -1, 1]), "s1": torch.tensor([2, 1, 3])},
        places=("s1", "s0"),
        vocabulary=("0", "1", "2", "3", "x", "y", "z"),
    )


def test_a_mixed_set_knows_its_lengths_and_drops_spare_filler(mixed):
    assert mixed.lengths.tolist() == [2, 1, 3]
    assert mixed.n_positions.tolist() == [3, 2, 4]
    assert not mixed.is_rectangular
    assert mixed.prompt.shape == (3, 3)


def test_a_mixed_set_has_no_single_tensor_of_tokens(mixed):
    with pytest.raises(InputError, match=r"have 1 to 3 tokens.*examples\.buckets\(\)"):
        _ = mixed.tokens


def test_buckets_are_rectangular_parts_in_ascending_length(mixed):
    found = [(rows.tolist(), part.tokens.tolist()) for rows, part in mixed.buckets()]
    assert found == [([1], [[6, 0]]), ([0], [[4, 5, 1]]), ([2], [[5, 5, 4, 3]])]
    assert [part.positions["s1"].tolist() for _, part in mixed.buckets()] == [[1], [2], [3]]


def test_a_rectangular_set_is_its_own_single_bucket(three):
    ((rows, part),) = three.buckets()
    assert part is three
    assert rows.tolist() == [0, 1, 2]


def test_indices_of_positions_in_each_example(mixed, three):
    assert mixed.indices("b").tolist() == [[1], [-1], [1]]
    assert mixed.indices(["s1", "a"]).tolist() == [[2, 0], [1, 0], [3, 0]]
    assert mixed.indices("readout").tolist() == [[1, 2], [0, 1], [2, 3]]
    assert three.indices("readout").tolist() == [[1, 2, 3]] * 3
    assert three.indices(("s1", "b")).tolist() == [[3, 1]] * 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no position is named; choose from: a, b, s1, readout"),
        (["a", "a"], "position 'a' is named twice"),
        (["a", "s2"], "there is no position 's2'; choose from a, b, s1, readout"),
        ("", "there is no position ''; choose from a, b, s1, readout"),
        (["s1", "readout"], "the positions s1, readout overlap"),
    ],
)
def test_empty_unknown_and_repeated_positions_are_refused(mixed, names, message):
    with pytest.raises(InputError, match=re.escape(message)):
        mixed.indices(names)


def test_positions_that_an_example_lacks_do_not_overlap(mixed):
    without = replace(mixed, positions={"b": mixed.positions["b"], "c": torch.tensor([0, -1, 0])})
    assert without.indices(["b", "c"]).tolist() == [[1, 0], [-1, -1], [1, 0]]


def test_a_mixed_selection_of_one_length_is_rectangular(mixed):
    alone = mixed.select([1])
    assert alone.is_rectangular
    assert alone.tokens.tolist() == [[6, 0]]
    assert alone.positions["b"].tolist() == [-1]


def test_mixed_sets_are_written_without_filler(mixed):
    assert mixed.text(1) == "z 0 0"
    assert repr(mixed) == (
        "<Examples: 3 examples, 1 noisy, prompts of 1 to 3 tokens, prefix given; "
        "the first: x y 1 2   (true: 1 3)>"
    )


def test_concatenated_sets_may_differ_in_length_and_positions(mixed, three):
    short = replace(
        three,
        given=three.given[:, :2],
        true=three.true[:, :2],
        places=("s1", "s0"),
        positions={"a": 0, "c": 1},
    )
    both = concatenate(mixed, short)
    assert both.lengths.tolist() == [2, 1, 3, 2, 2, 2]
    assert both.positions["a"] == 0
    assert both.positions["b"].tolist() == [1, -1, 1, -1, -1, -1]
    assert both.positions["c"].tolist() == [-1, -1, -1, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prefix": "true"}, "prefix"),
        ({"places": tuple("abc")}, "places"),
        ({"vocabulary": tuple("abcdefgh")}, "vocabulary"),
    ],
)
def test_sets_that_do_not_fit_are_not_concatenated(three, change, field):
    with pytest.raises(InputError, match=f"the two sets differ in {field}"):
        concatenate(three, replace(three, **change))


# One example, the repr and the table


def test_a_set_is_shown_with_its_name_size_noise_and_prefix(three):
    assert repr(three.with_name("noisy").with_prefix("true")) == (
        "<Examples 'noisy': 3 examples, 2 noisy, prefix true; the first: x y 1 2 3   (true: 1 3 3)>"
    )
    assert repr(three.select([])) == "<Examples: 0 examples, 0 noisy, prefix given>"
    assert "3 of the 500 requested examples exist" in repr(three.with_requested(500))


def test_a_number_gives_one_example(three):
    assert repr(three[0]) == "x y 1 2 3   (true: 1 3 3)"
    assert repr(three[-2]) == "z x 0 0 0"
    one = three.select([2])[0]
    assert (one.index, one.prompt, one.given, one.true) == (2, "y y", "3 1 2", "2 1 2")
    assert one.is_noisy is True
    assert one.variables == {"sum": 11, "even": 0}
    assert [example.given for example in three] == ["1 2 3", "0 0 0", "3 1 2"]


@pytest.mark.parametrize("row", [3, -4])
def test_a_row_that_is_not_there_is_an_index_error(three, row):
    with pytest.raises(IndexError, match=f"there is no example {row}: rows are numbered 0 to 2"):
        three[row]


@pytest.mark.parametrize(
    "rows",
    [
        slice(0, 3, 2),
        [0, 2],
        range(0, 3, 2),
        torch.tensor([0, 2]),
        [True, False, True],
        torch.tensor([True, False, True]),
        torch.tensor([0, 2], dtype=torch.uint8),
    ],
    ids=str,
)
def test_several_rows_give_examples(three, rows):
    assert three[rows].index.tolist() == [0, 2]
    assert three.select(rows).prompt.tolist() == [PROMPT[0], PROMPT[2]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([True, False], "the mask has 2 value(s), but the set has 3 examples"),
        (torch.tensor([[0, 1]]), "shape (1, 2); pass a list of row numbers"),
        ([0.5], "torch.float32 tensor"),
    ],
)
def test_rows_that_are_none_are_refused(three, rows, message):
    with pytest.raises(InputError, match=re.escape(message)):
        three.select(rows)


def test_the_table_of_a_selection(three):
    frame = three.select([2, 1]).to_frame()
    assert list(frame.columns) == ["text", "given", "true", "is_noisy", "sum", "even"]
    assert list(frame.index) == [2, 1]
    assert frame.loc[2].tolist() == ["y y 3 1 2   (true: 2 1 2)", "3 1 2", "2 1 2", True, 11, 0]


# Names


def test_the_name_goes_to_counterfactuals_and_through_derivations(paired):
    named = replace(paired, name="clean")
    assert named.counterfactual.name == "clean"
    assert named.select([0]).as_set().with_prefix("true").counterfactual.name == "clean"
    assert named.with_name("other").counterfactual.name == "other"


def test_how_many_were_asked_for_is_dropped_by_a_selection(three):
    short = three.with_requested(7)
    assert (short.with_prefix("true").as_set().requested, short.select([0]).requested) == (7, None)
    assert three.note == ""


# Changes in place


@pytest.mark.parametrize("field", ["prompt", "given"])
def test_tokens_and_key_notice_a_change_in_place(three, field):
    tokens, key = three.tokens.clone(), three.key
    getattr(three, field)[0, 0] = 6
    assert three.tokens[0].tolist() == ([6, 5, 1, 2] if field == "prompt" else [4, 5, 6, 2])
    assert three.key != key
    getattr(three, field)[0, 0] = {"prompt": 4, "given": 1}[field]
    assert torch.equal(three.tokens, tokens)
    assert three.key == key


def test_a_change_is_seen_through_every_set_that_shares_the_tensor(three):
    fed = three.with_prefix("true")
    before = fed.tokens.clone()
    three.true[1] = 2
    assert before[1].tolist() == [6, 4, 0, 0]
    assert fed.tokens[1].tolist() == [6, 4, 2, 2]


def test_changed_tokens_do_not_stay(three):
    three.tokens[:] = 0
    assert three.tokens[0].tolist() == [4, 5, 1, 2]


def test_lengths_notice_a_change_in_place(mixed):
    assert mixed.lengths.tolist() == [2, 1, 3]
    mixed.prompt[1, 1] = 5
    assert mixed.lengths.tolist() == [2, 2, 3]


def test_what_is_unchanged_is_computed_once(three):
    assert three.tokens is three.tokens


def test_nothing_is_kept_in_inference_mode(three):
    with torch.inference_mode():
        assert three.tokens.tolist()[0] == [4, 5, 1, 2]
    assert not three.tokens.is_inference()


def test_copies_and_pickles_forget_what_was_kept(three):
    assert three.tokens[0, 0] == 4
    three.prompt[0, 0] = 6
    for copied in (pickle.loads(pickle.dumps(three)), deepcopy(three)):
        assert copied.tokens[0].tolist() == [6, 5, 1, 2]


def test_a_clone_shares_nothing(paired):
    clone = paired.clone()
    for name in ("prompt", "given", "true", "is_noisy", "index"):
        getattr(clone, name)[:] = 0
    clone.variables["sum"][:] = 0
    clone.counterfactual.given[:] = 0
    assert paired.prompt.tolist() == PROMPT
    assert paired.given.tolist() == GIVEN
    assert paired.variables["sum"].tolist() == [9, 10, 11]
    assert paired.counterfactual.given.tolist() == [GIVEN[1], GIVEN[2], GIVEN[0]]


# Laws


DERIVATIONS = {
    "with_prefix": lambda e: e.with_prefix("true"),
    "with_name": lambda e: e.with_name("other"),
    "with_requested": lambda e: e.with_requested(9),
    "with_true": lambda e: e.with_true(e.given),
    "continued_with": lambda e: e.continued_with(e.true),
    "select": lambda e: e.select(torch.arange(len(e)).flip(0)[: len(e) // 2]),
    "as_set": lambda e: e.select(torch.arange(len(e)) % 2 == 0).as_set(),
    "to": lambda e: e.to("cpu"),
    "clone": lambda e: e.clone(),
    "whole": lambda e: e.select([]).with_prefix("true").whole,
    "buckets": lambda e: e.buckets()[-1][1],
    "__getitem__": lambda e: e[1:],
}


def test_every_derivation_is_among_these():
    found = {
        name
        for name, member in vars(Examples).items()
        if not name.startswith("_") or name == "__getitem__"
        for function in [getattr(member, "fget", member)]
        if callable(function)
        and re.search(r"Self|Examples|Any", str(function.__annotations__.get("return", "")))
    }
    assert found == DERIVATIONS.keys()


@hypothesis.given(example_sets())
def test_what_is_derived_is_valid_and_named_as_before(examples):
    for name, derive in DERIVATIONS.items():
        derived = derive(examples)
        again = replace(derived)  # validates
        assert torch.equal(again.prompt, derived.prompt)  # no spare filler is left
        assert derived.name == ("other" if name == "with_name" else examples.name)
        if derived.counterfactual is not None:
            replace(derived.counterfactual)
            assert derived.counterfactual.name == derived.name


@hypothesis.given(example_sets(n_answer=2), example_sets(n_answer=2))
def test_sets_of_any_lengths_can_be_concatenated_and_taken_apart(first, second):
    both = concatenate(first, second.with_prefix(first.prefix))
    replace(both)
    parts = (both[: len(first)], both[len(first) :])
    for part, whole in zip(parts, (first, second), strict=True):
        assert [e.text for e in part] == [e.text for e in whole]
        for name in whole.positions:
            assert torch.equal(part.indices(name), whole.indices(name))


@hypothesis.given(example_sets())
def test_buckets_partition_the_rows(examples):
    rows = torch.cat([rows for rows, _ in examples.buckets()])
    assert sorted(rows.tolist()) == list(range(len(examples)))
    lengths = [part.prompt.shape[1] for _, part in examples.buckets()]
    assert lengths == sorted(set(lengths))
    for chosen, part in examples.buckets():
        assert part.is_rectangular
        assert (part.prompt >= 0).all()
        assert [e.text for e in part] == [examples[row].text for row in chosen.tolist()]


@hypothesis.given(example_sets())
def test_indices_agree_with_the_tokens(examples):
    for rows, part in examples.buckets():
        for name in ("first", "last", *examples.places[:-1]):
            found = part.tokens.gather(1, part.indices(name))[:, 0]
            fed = examples.labels(examples.prefix)[rows]
            expected = {
                "first": examples.prompt[rows, 0],
                "last": examples.prompt[rows, examples.lengths[rows] - 1],
            } | {place: fed[:, i] for i, place in enumerate(examples.places)}
            assert torch.equal(found, expected[name])
        width = part.tokens.shape[1]
        readout = list(range(width - part.n_answer, width))
        assert part.indices("readout").tolist() == [readout] * len(part)
        assert (part.n_positions == width).all()


@hypothesis.given(example_sets(), st.data())
def test_selecting_commutes_with_buckets_and_indices(examples, data):
    some = st.lists(st.integers(0, len(examples) - 1)) if len(examples) else st.just([])
    chosen = torch.tensor(data.draw(some), dtype=torch.long)
    selected = examples.select(chosen)
    assert torch.equal(selected.lengths, examples.lengths[chosen])
    for name in [*examples.positions, "readout"]:
        assert torch.equal(selected.indices(name), examples.indices(name)[chosen])
    tokens = {
        row: line
        for rows, part in examples.buckets()
        for row, line in zip(rows.tolist(), part.tokens.tolist(), strict=True)
    }
    for rows, part in selected.buckets():
        assert part.tokens.tolist() == [tokens[row] for row in chosen[rows].tolist()]


@hypothesis.given(example_sets())
def test_a_table_holds_everything_that_a_row_has(examples):
    frame = examples.to_frame()
    numbers = {word: i for i, word in enumerate(examples.vocabulary)}
    for label in ("given", "true"):
        found = [[numbers[word] for word in words.split()] for words in frame[label]]
        assert found == examples.labels(label).tolist()
    texts = [text.split("   (true")[0].split() for text in frame["text"]]
    prompts = [[numbers[word] for word in words[: -examples.n_answer]] for words in texts]
    assert prompts == [[t for t in row if t >= 0] for row in examples.prompt.tolist()]
    assert frame["is_noisy"].tolist() == examples.is_noisy.tolist()
    for name, value in examples.variables.items():
        assert frame[name].tolist() == value.tolist()


@hypothesis.given(example_sets(), example_sets())
def test_keys_are_equal_where_the_model_reads_the_same(first, second):
    def read(examples: Examples) -> list:
        return [(rows.tolist(), part.tokens.tolist()) for rows, part in examples.buckets()]

    assert first.key == first.clone().with_name("other").key
    reversed_ = first.select(torch.arange(len(first)).flip(0))
    for other in (second, reversed_, first.with_prefix("true")):
        if len(other) and len(first):
            assert (other.key == first.key) == (read(other) == read(first))


def test_third_labels_are_other_examples_given_ones(examples):
    found = third_labels(examples, 0)
    given = {tuple(row) for row in examples.given.tolist()}
    assert {tuple(row) for row in found.tolist()} <= given
    for label in (examples.given, examples.true):
        assert not (found == label).all(1).any()
    assert torch.equal(found, third_labels(examples, 0))
    assert not torch.equal(found, third_labels(examples, 1))


def test_there_is_no_third_label_of_two(examples):
    with pytest.raises(InputError, match="an example has no third label"):
        third_labels(examples.select([0, 0]))


def test_true_labels_can_be_replaced(examples):
    changed = examples.with_true(examples.given)
    assert torch.equal(changed.true, examples.given)
    assert changed.content_key != examples.content_key
