"""What every task offers, over every member of the registry."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechmem.data.examples import Examples
from mechmem.data.minimal_pair import MinimalPair
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.data.tasks.task import Task
from mechmem.data.tasks.two_hop_reasoning import TwoHopReasoning
from mechmem.spec.errors import InputError
from mechmem.spec.registry import Component

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


# What every sample passes through


@pytest.fixture
def plain(monkeypatch):
    """A maker of tasks that answer with one token, and whose `sample` returns what it is given."""
    monkeypatch.setitem(Component.registries, "task", dict(Component.registries["task"]))

    def made(returned, *, context: int = 2) -> Task:
        class Plain(Task):
            @property
            def vocabulary(self):
                return tuple("abc")

            @property
            def n_context(self):
                return context

            @property
            def chance(self):
                return 1 / 3

            def sample(self, split):
                return returned

            def answers(self, prompt):
                return prompt[:, :1]

            def counterfactuals(self, examples, pair, generator):
                return torch.arange(len(examples)), None

        return Plain()

    return made


def copying(prompt: list[list[int]], vocabulary: str = "abc") -> Examples:
    """Examples in which the answer is the first token."""
    tokens = torch.tensor(prompt, dtype=torch.long).reshape(len(prompt), -1)
    return Examples(
        prompt=tokens,
        given=tokens[:, :1],
        true=tokens[:, :1],
        is_noisy=torch.zeros(len(tokens), dtype=torch.bool),
        variables={"first": tokens[:, 0]} if len(tokens) else {},
        positions={},
        places=("copy",),
        vocabulary=tuple(vocabulary),
    )


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([[0, 1]], "plain.sample('train') returned a list; return `Examples`"),
        (
            copying([[0, 1], [1, 2]]).select([]),
            "plain.sample('train') returned no example; leave 'train' out of `splits`",
        ),
        (
            copying([[0, 1]], "abcd"),
            "plain.sample('train') has a vocabulary of 4 tokens that is not the task's (3 tokens)",
        ),
        (
            copying([[0, 1, 2], [0, -1, -1]]),
            "plain.sample('train') has inputs of up to 3 positions (the prompt and all but the "
            "last answer token), but n_context is 2; raise n_context to 3",
        ),
    ],
)
def test_a_sample_that_does_not_fit_its_task_is_refused(plain, returned, message):
    with pytest.raises(InputError, match=re.escape(message)):
        plain(returned).sample("train")
    with pytest.raises(InputError, match=re.escape(message)):
        plain(returned).training_set()


def test_a_split_that_a_task_lacks_is_refused_for_it(plain):
    with pytest.raises(InputError, match="plain has no split 'trian'; did you mean 'train'"):
        plain(copying([[0, 1]])).sample("trian")


def test_counterfactuals_that_are_no_examples_are_refused(plain):
    task = plain(copying([[0, 1]]))
    with pytest.raises(InputError, match=r"plain\.counterfactuals returned a NoneType"):
        task.pairs(task.sample("train"), MinimalPair(flip="first"))


def test_a_task_may_keep_what_it_samples(plain):
    kept = copying([[0, 1], [1, 2]])
    task = plain(kept)
    sampled = task.sample("train")
    assert sampled.prompt.tolist() == kept.prompt.tolist()
    sampled.prompt[:] = 2
    sampled.variables["first"][:] = 2
    assert kept.prompt.tolist() == [[0, 1], [1, 2]]
    assert kept.variables["first"].tolist() == [0, 1]


@pytest.mark.parametrize("task", [SUMS, WORLD])
def test_editing_a_sample_changes_no_later_one_and_nothing_else_of_it(task):
    for split in task.splits:
        before, edited = task.sample(split), task.sample(split)
        edited.given[:] = 1
        assert torch.equal(edited.true, before.true)
        for name, value in before.variables.items():
            assert torch.equal(edited.variables[name], value)
            edited.variables[name][:] = -7
        edited.prompt[:] = 0
        after = task.sample(split)
        for name in ("prompt", "given", "true", "is_noisy"):
            assert torch.equal(getattr(after, name), getattr(before, name))
        assert torch.equal(task.answers(after.prompt), after.true)


@pytest.mark.parametrize("task", [SUMS, WORLD])
def test_pairs_carry_the_name_and_are_valid(task):
    flip = {"four_digit_addition": "carry_1", "two_hop_reasoning": "bridge"}[task.kind]
    paired = task.pairs(task.sample("train").with_name("clean"), MinimalPair(flip=flip))
    assert paired.name == paired.counterfactual.name == "clean"
    replace(paired)
    replace(paired.counterfactual)
