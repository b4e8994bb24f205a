from __future__ import annotations

import re
from itertools import cycle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechmem.data.label_noise import Digit, UniformWrong
from mechmem.data.minimal_pair import MinimalPair
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.spec.errors import InputError

OPERANDS = st.lists(
    st.tuples(st.integers(1000, 9999), st.integers(1000, 9999)), min_size=1, max_size=20
)
TASK = FourDigitAddition(n_train=300, n_held_out=80, noise=UniformWrong(rate=0.2))
LEAST_FIRST = TASK.model_copy(update={"answer_order": "least_significant_first"})
SETS = ("prompt", "given", "true", "is_noisy")


def examples_of(*pairs: tuple[int, int], task: FourDigitAddition = TASK):
    a, b = zip(*pairs, strict=True)
    return task.examples(torch.tensor(a), torch.tensor(b))


def operands(examples) -> tuple[list[int], list[int]]:
    """The operands as the prompt spells them, read by Python."""
    words = ["".join(examples.vocabulary[t] for t in row) for row in examples.prompt.tolist()]
    return [int(w[:4]) for w in words], [int(w[5:9]) for w in words]


def same(first, second) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in SETS)


@pytest.mark.parametrize(
    ("a", "b", "written", "reversed_"),
    [
        (9999, 9999, "9 9 9 9 + 9 9 9 9 = 1 9 9 9 8", "9 9 9 9 + 9 9 9 9 = 8 9 9 9 1"),
        (1000, 1000, "1 0 0 0 + 1 0 0 0 = 0 2 0 0 0", "1 0 0 0 + 1 0 0 0 = 0 0 0 2 0"),
        (3471, 2908, "3 4 7 1 + 2 9 0 8 = 0 6 3 7 9", "3 4 7 1 + 2 9 0 8 = 9 7 3 6 0"),
        (4999, 5001, "4 9 9 9 + 5 0 0 1 = 1 0 0 0 0", "4 9 9 9 + 5 0 0 1 = 0 0 0 0 1"),
    ],
)
def test_sums_as_written_by_hand(a, b, written, reversed_):
    assert examples_of((a, b)).text(0) == written
    assert examples_of((a, b), task=LEAST_FIRST).text(0) == reversed_


def test_variables_of_a_sum_by_hand():
    # 4999 + 5001: every place carries
    found = {name: int(value[0]) for name, value in examples_of((4999, 5001)).variables.items()}
    assert found == {
        **{"digit_sum_0": 10, "digit_sum_1": 9, "digit_sum_2": 9, "digit_sum_3": 9},
        **{"carry_1": 1, "carry_2": 1, "carry_3": 1, "carry_4": 1},
        **{"out_0": 0, "out_1": 0, "out_2": 0, "out_3": 0, "out_4": 1},
        **{"a_0": 9, "a_1": 9, "a_2": 9, "a_3": 4, "b_0": 1, "b_1": 0, "b_2": 0, "b_3": 5},
    }


@given(OPERANDS)
def test_variables_agree_with_integer_arithmetic(pairs):
    variables = examples_of(*pairs).variables
    for row, (a, b) in enumerate(pairs):
        for place in range(4):
            digit_sum = int(f"{a:05}"[4 - place]) + int(f"{b:05}"[4 - place])
            assert variables[f"digit_sum_{place}"][row] == digit_sum
            assert variables[f"a_{place}"][row] == int(f"{a:05}"[4 - place])
            assert variables[f"b_{place}"][row] == int(f"{b:05}"[4 - place])
            assert variables[f"carry_{place + 1}"][row] == (
                a % 10 ** (place + 1) + b % 10 ** (place + 1)
            ) // 10 ** (place + 1)
        assert [variables[f"out_{place}"][row] for place in range(5)] == [
            int(d) for d in f"{a + b:05}"[::-1]
        ]


@given(OPERANDS, st.sampled_from([TASK, LEAST_FIRST]))
def test_the_answer_is_the_zero_padded_sum_in_the_asked_order(pairs, task):
    examples = examples_of(*pairs, task=task)
    step = 1 if task is TASK else -1
    assert ["".join(map(str, row)) for row in examples.true.tolist()] == [
        f"{a + b:05}"[::step] for a, b in pairs
    ]
    assert torch.equal(examples.given, examples.true)
    assert operands(examples) == ([a for a, _ in pairs], [b for _, b in pairs])


@pytest.mark.parametrize(
    ("task", "places"),
    [(TASK, ["s4", "s3", "s2", "s1", "s0"]), (LEAST_FIRST, ["s0", "s1", "s2", "s3", "s4"])],
)
def test_positions_name_what_stands_there(task, places):
    examples = examples_of((1234, 5678), task=task)
    digits = (
        {f"a{i}": 4 - i for i in range(4)} | {f"b{i}": 8 - i for i in range(4)} | {"+": 10, "=": 11}
    )
    digits |= {f"s{i}": int("06912"[4 - i]) for i in range(5)}
    assert list(examples.positions) == [
        "a3",
        "a2",
        "a1",
        "a0",
        "+",
        "b3",
        "b2",
        "b1",
        "b0",
        "=",
        *places[:-1],
    ]
    assert [digits[name] for name in examples.positions] == examples.tokens[0].tolist()
    assert list(examples.places) == places
    assert [digits[name] for name in places] == examples.true[0].tolist()


def test_the_context_fits_exactly():
    examples = TASK.sample("train")
    assert examples.tokens.shape == (300, TASK.n_context)
    assert int(examples.tokens.max()) < len(TASK.vocabulary) == 12


@pytest.mark.parametrize(("split", "n"), [("train", 300), ("held_out", 80)])
def test_splits_have_the_asked_size_and_operands_in_range(split, n):
    a, b = operands(TASK.sample(split))
    assert len(a) == n
    assert all(1000 <= number <= 9999 for number in a + b)


def test_no_instance_stands_twice_nor_in_both_sets():
    # of 20,000 draws from 81 million pairs about two are repeated
    task = FourDigitAddition(n_train=15_000, n_held_out=5_000)
    pairs = [
        pair for split in task.splits for pair in zip(*operands(task.sample(split)), strict=True)
    ]
    assert len(set(pairs)) == 20_000


def test_repeated_draws_are_dropped_in_the_order_of_drawing(monkeypatch):
    from mechmem.data.tasks import four_digit_addition

    last = 9000 * 9000 - 1
    drawn = cycle(
        [torch.tensor([8999, 0, 8999, 0, 8999, 0]), torch.tensor([0, last, 3, 8999, last, 1])]
    )
    monkeypatch.setattr(four_digit_addition.torch, "randint", lambda *_, **__: next(drawn))
    task = FourDigitAddition(n_train=2, n_held_out=1, noise=UniformWrong(rate=0), seed=987)
    found = [operands(task.sample(split)) for split in task.splits]
    assert found == [([1000, 1000], [9999, 1000]), ([9999], [9999])]


def test_operands_are_uniform():
    task = FourDigitAddition(n_train=9000, n_held_out=1)
    for numbers in operands(task.sample("train")):
        counts = torch.bincount(torch.tensor(numbers) // 1000, minlength=10)[1:].double()
        assert (
            (counts - 1000) ** 2 / 1000
        ).sum() < 26.1  # chi-squared, 8 degrees of freedom, p = 0.001


def test_the_same_seed_gives_the_same_bytes():
    from mechmem.data.tasks.four_digit_addition import _sample

    first = TASK.sample("train")
    _sample.cache_clear()
    again = FourDigitAddition.model_validate(TASK.block()).sample("train")
    assert again is not first
    assert same(first, again)


def test_another_seed_gives_other_operands():
    other = TASK.model_copy(update={"seed": 1})
    assert set(zip(*operands(TASK.sample("train")), strict=True)).isdisjoint(
        zip(*operands(other.sample("train")), strict=True)
    )


def test_sampling_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    FourDigitAddition(n_train=50, n_held_out=5, seed=77).sample("train")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("noise", [UniformWrong(rate=0.2, seed=1), UniformWrong(rate=0.7)])
def test_the_noise_changes_neither_operands_nor_held_out_set(noise):
    other = TASK.model_copy(update={"noise": noise})
    train, noised = TASK.sample("train"), other.sample("train")
    assert torch.equal(train.prompt, noised.prompt)
    assert torch.equal(train.true, noised.true)
    assert not torch.equal(train.is_noisy, noised.is_noisy)
    assert same(TASK.sample("held_out"), other.sample("held_out"))


def test_only_the_noisy_training_instances_have_wrong_labels():
    train, held_out = TASK.sample("train"), TASK.sample("held_out")
    assert int(train.is_noisy.sum()) == 60
    assert torch.equal((train.given != train.true).any(dim=1), train.is_noisy)
    assert torch.equal(held_out.given, held_out.true)
    a, b = operands(train)
    assert ["".join(map(str, row)) for row in train.true.tolist()] == [
        f"{x + y:05}" for x, y in zip(a, b, strict=True)
    ]


@pytest.mark.parametrize("order", ["most_significant_first", "least_significant_first"])
def test_a_wrong_sum_still_begins_with_0_or_1(order):
    task = FourDigitAddition(n_train=200, n_held_out=1, answer_order=order, noise=Digit(rate=1))
    train = task.sample("train")
    first = train.places.index("s4")
    assert set(train.given[:, first].tolist()) == {0, 1}
    assert (train.given[:, first] != train.true[:, first]).any()


def test_an_unknown_split_is_named_with_the_nearest():
    with pytest.raises(
        InputError, match="four_digit_addition has no split 'heldout'; did you mean 'held_out'"
    ):
        TASK.sample("heldout")


def test_chance_is_one_in_the_number_of_sums():
    sums = {a + b for a in (1000, 9999) for b in range(1000, 10000)}  # every sum occurs among these
    assert 1 / len(sums) == TASK.chance


PAIRS = [
    MinimalPair(flip="carry_1"),
    MinimalPair(flip="carry_2", hold=("carry_1",)),
    MinimalPair(flip="carry_3", hold=("carry_1", "carry_2", "carry_4")),
    MinimalPair(flip="out_0", hold=("carry_1",)),
    MinimalPair(flip="digit_sum_3", hold=("carry_4",)),
]


@pytest.mark.parametrize("task", [TASK, LEAST_FIRST])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.flip)
def test_minimal_pairs_flip_and_hold_and_change_one_operand_digit(pair, task):
    examples = task.pairs(task.sample("train"), pair)
    other = examples.counterfactual
    assert (examples.variables[pair.flip] != other.variables[pair.flip]).all()
    for name in pair.hold:
        assert torch.equal(examples.variables[name], other.variables[name])
    assert ((examples.prompt != other.prompt).sum(dim=1) == 1).all()
    a, b = operands(other)
    assert all(1000 <= number <= 9999 for number in a + b)  # no operand loses its first digit
    assert same(
        other, examples_of(*zip(a, b, strict=True), task=task)
    )  # labels and variables are those of the sums
    assert torch.equal(examples.index, torch.arange(len(examples)))
    assert torch.equal(other.index, torch.arange(len(examples)))


def test_exactly_the_examples_that_have_a_pair_get_one():
    # one digit can make or break the first carry unless both last digits are 0
    train = TASK.sample("train")
    paired = TASK.pairs(train, MinimalPair(flip="carry_1"))
    has_one = [a % 10 + b % 10 > 0 for a, b in zip(*operands(train), strict=True)]
    assert not all(has_one)
    assert same(paired, train.select(torch.tensor(has_one)))
    # the sum passes 9999 with the same thousands only where the carry into them decides
    decides = examples_of((4500, 5499), (1000, 1000))
    assert operands(TASK.pairs(decides, MinimalPair(flip="out_4", hold=("digit_sum_3",)))) == (
        [4500],
        [5499],
    )


def test_pairs_follow_their_seed_and_nothing_else():
    train = TASK.sample("train")
    first, again, other = (
        TASK.pairs(train, MinimalPair(flip="carry_2", seed=seed)).counterfactual.prompt
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_pairs_keep_the_labels_and_the_prefix_of_the_examples():
    train = TASK.sample("train").with_prefix("true")
    paired = TASK.pairs(train, MinimalPair(flip="out_0"))  # which every instance has
    assert paired.prefix == paired.counterfactual.prefix == "true"
    assert int(paired.is_noisy.sum()) == 60
    assert same(paired, train)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            MinimalPair(flip="cary_1"),
            "four_digit_addition has no variable 'cary_1'; did you mean 'carry_1'?",
        ),
        (
            MinimalPair(flip="carry_1", hold=("carry_0",)),
            "four_digit_addition has no variable 'carry_0'; did you mean",
        ),
        (
            MinimalPair(flip="carry_4", hold=("out_4",)),
            "no example has a pair that changes carry_4 and holds out_4",
        ),
    ],
)
def test_pairs_that_cannot_be_are_refused(pair, message):
    with pytest.raises(InputError, match=re.escape(message)):
        TASK.pairs(TASK.sample("train"), pair)
