from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechmem.data.label_noise import Digit, LabelNoise, Permuted, Systematic, UniformWrong
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.data.tasks.two_hop_reasoning import TwoHopReasoning
from mechmem.spec.errors import InputError

KINDS = [pytest.param(noise, id=kind) for kind, noise in LabelNoise.kinds().items()]
DIGITS = tuple(range(10))
SUMS = ((0, 1), DIGITS, DIGITS, DIGITS, DIGITS)
"""The alphabets of a sum's five places."""


def sums(n: int, seed: int = 0) -> torch.Tensor:
    """Labels of n random sums."""
    total = torch.randint(2000, 19999, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([total // 10**place % 10 for place in range(4, -1, -1)], dim=1)


def rows(labels: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in labels.tolist()]


class Shifty(LabelNoise):
    """Leaves every label as it is: what no noise may do."""

    registry: ClassVar[str | None] = None  # stands on no registry, so that no other test meets it

    def wrong(self, true, noisy, alphabets, generator):
        return true[noisy]


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize(("rate", "n_noisy"), [(0, 0), (0.05, 20), (0.5, 200), (1, 400)])
def test_exactly_the_asked_share_is_noisy_and_none_of_it_true(noise, rate, n_noisy):
    true = sums(400)
    given, is_noisy = noise(rate=rate).corrupt(true, SUMS)
    assert int(is_noisy.sum()) == n_noisy
    assert torch.equal((given != true).any(dim=1), is_noisy)


@pytest.mark.parametrize("noise", KINDS)
def test_every_token_stays_in_the_alphabet_of_its_place(noise):
    given, _ = noise(rate=1).corrupt(sums(400), SUMS)
    for place, alphabet in enumerate(SUMS):
        assert set(given[:, place].tolist()) <= set(alphabet)


@pytest.mark.parametrize("noise", KINDS)
def test_the_true_labels_are_not_written_to(noise):
    true = sums(100)
    before = true.clone()
    noise(rate=0.5).corrupt(true, SUMS)
    assert torch.equal(true, before)


@pytest.mark.parametrize("noise", KINDS)
def test_noise_follows_its_seed_and_leaves_the_global_random_state_alone(noise):
    true, state = sums(200), torch.get_rng_state()
    first, again, other = (noise(rate=0.3, seed=seed).corrupt(true, SUMS) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("noise", KINDS)
def test_which_instances_are_noisy_depends_on_the_seed_alone(noise):
    _, is_noisy = noise(rate=0.3, seed=5).corrupt(sums(200), SUMS)
    _, reference = UniformWrong(rate=0.3, seed=5).corrupt(sums(200, seed=9), SUMS)
    assert torch.equal(is_noisy, reference)


@given(rate=st.floats(0, 1), n=st.integers(2, 60))
def test_the_share_is_rounded_to_whole_instances(rate, n):
    _, is_noisy = Systematic(rate=rate).corrupt(sums(n), SUMS)
    assert abs(int(is_noisy.sum()) - rate * n) <= 0.5


@given(st.integers(2, 80), st.integers(0, 5))
def test_permuted_noise_keeps_the_multiset_of_labels(n, seed):
    true = sums(n, seed)
    given, _ = Permuted(rate=1, seed=seed).corrupt(true, SUMS)
    assert sorted(rows(given)) == sorted(rows(true))


def test_permuted_noise_exchanges_among_the_noisy_instances_only():
    true = sums(200)
    given, is_noisy = Permuted(rate=0.2).corrupt(true, SUMS)
    assert sorted(rows(given[is_noisy])) == sorted(rows(true[is_noisy]))


def test_permuted_noise_finds_the_only_exchange_that_there_is():
    # two labels, two of each: whoever has one must get the other
    true = torch.tensor([[0], [1], [0], [1]])
    for seed in range(20):
        given, _ = Permuted(rate=1, seed=seed).corrupt(true, ((0, 1),))
        assert rows(given) == [(1,), (0,), (1,), (0,)]


def test_digit_noise_changes_one_place_and_every_place_sometimes():
    true = sums(400)
    given, is_noisy = Digit(rate=0.5).corrupt(true, SUMS)
    changed = given != true
    assert torch.equal(changed.sum(dim=1), is_noisy.long())
    assert (changed.sum(dim=0) > 20).all()  # 40 of 200 expected at each of five places


def test_digit_noise_draws_every_other_digit():
    true = torch.zeros(300, 1, dtype=torch.long)
    given, _ = Digit(rate=1).corrupt(true, (DIGITS,))
    assert set(given[:, 0].tolist()) == set(range(1, 10))


def test_digit_noise_leaves_alone_a_place_with_one_token():
    true = torch.tensor([[7, 0]] * 30)
    given, _ = Digit(rate=1).corrupt(true, ((7,), DIGITS))
    assert set(given[:, 0].tolist()) == {7}


def test_systematic_noise_by_hand():
    true = torch.tensor([[0, 2, 9], [1, 0, 5]])
    assert Systematic(rate=1).corrupt(true, ((0, 1), DIGITS, DIGITS))[0].tolist() == [
        [1, 3, 0],
        [0, 1, 6],
    ]
    assert Systematic(rate=1, shift=3).corrupt(true, ((0, 1), DIGITS, DIGITS))[0].tolist() == [
        [1, 5, 2],
        [0, 3, 8],
    ]


def test_systematic_noise_is_a_function_of_the_true_label_that_no_seed_changes():
    true = sums(300)
    rules = [Systematic(rate=1, seed=seed).corrupt(true, SUMS)[0] for seed in (0, 1)]
    assert torch.equal(*rules)
    rule = dict(zip(rows(true), rows(rules[0]), strict=True))
    given, is_noisy = Systematic(rate=0.4, seed=3).corrupt(true.flip(0), SUMS)
    assert [rule[label] for label in rows(true.flip(0)[is_noisy])] == rows(given[is_noisy])


def test_uniform_wrong_draws_from_the_labels_that_there_are_in_their_shares():
    true = torch.tensor([[0]] * 600 + [[1]] * 300 + [[2]] * 100)
    given, _ = UniformWrong(rate=1).corrupt(true, (DIGITS,))
    drawn_for_0 = torch.bincount(given[:600, 0], minlength=10).tolist()
    assert sum(drawn_for_0[1:3]) == 600
    assert (
        abs(drawn_for_0[1] - 450) < 45
    )  # 3 to 1, as 1 and 2 stand in the labels; four standard deviations


def test_uniform_wrong_labels_may_share_some_tokens_with_the_true_one():
    true = torch.tensor([[0, 0]] * 20 + [[0, 1]] * 20)
    given, _ = UniformWrong(rate=1).corrupt(true, (DIGITS, DIGITS))
    assert torch.equal(given, true.flip(0))


@pytest.mark.parametrize(
    ("noise", "true", "alphabets", "message"),
    [
        (
            UniformWrong(rate=0.5),
            [[3]] * 4,
            (DIGITS,),
            "every training instance has the same label",
        ),
        (
            Permuted(rate=0.25),
            [[1], [2], [3], [4]],
            (DIGITS,),
            "cannot give 1 instances each other's labels",
        ),
        (Permuted(rate=1), [[1], [1], [1], [4]], (DIGITS,), "raise the rate"),
        (Digit(rate=1), [[3]] * 4, ((3,),), "an answer place with at least two tokens"),
        (
            Systematic(rate=1, shift=10),
            [[3]] * 4,
            (DIGITS,),
            "systematic noise found no wrong label",
        ),
        (Shifty(rate=1), [[3]] * 4, (DIGITS,), "shifty noise found no wrong label"),
    ],
)
def test_noise_that_cannot_be_is_refused(noise, true, alphabets, message):
    with pytest.raises(InputError, match=message):
        noise.corrupt(torch.tensor(true), alphabets)


@pytest.mark.parametrize("noise", KINDS)
def test_noise_in_the_tasks(noise):
    for task in (
        FourDigitAddition(n_train=100, n_held_out=10, noise=noise(rate=0.2)),
        TwoHopReasoning(n_entities=12, n_relations=4, noise=noise(rate=0.2)),
    ):
        train = task.sample("train")
        assert int(train.is_noisy.sum()) == round(0.2 * len(train))
        assert torch.equal((train.given != train.true).any(dim=1), train.is_noisy)


@pytest.mark.parametrize("fields", [{"rate": -0.1}, {"rate": 1.1}, {"rate": float("nan")}])
def test_a_rate_is_a_share(fields):
    with pytest.raises(ValueError, match="rate"):
        UniformWrong(**fields)


def test_digit_noise_keeps_to_its_places():
    true = sums(200)
    given, _ = Digit(rate=1, places=(1, 4)).corrupt(true, SUMS)
    altered = (given != true).any(dim=0)
    assert altered.tolist() == [False, True, False, False, True]
    with pytest.raises(InputError, match="change `places`"):
        Digit(places=(5,)).corrupt(true, SUMS)
