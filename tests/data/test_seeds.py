from __future__ import annotations

import itertools

import numpy as np
import pytest

from mechmem.data.seeds import PARTS, derived, seeded
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.data.tasks.two_hop_reasoning import TwoHopReasoning

TASKS = [
    FourDigitAddition(n_train=200, n_held_out=50),
    TwoHopReasoning(n_entities=12, n_relations=4),
]


def test_seed_0_is_the_draw_of_the_recipe():
    assert [derived(0, part, 7) for part in PARTS] == [7] * 4
    assert seeded(TASKS[0], 0) == TASKS[0]


def test_a_part_is_a_child_of_the_seed_s_own_sequence():
    child = np.random.SeedSequence([3, 7], spawn_key=(1,))
    assert derived(3, "noise", 7) == child.generate_state(1)[0]


def test_all_parts_of_all_replications_differ_and_none_is_a_small_number():
    found = [derived(s, part, own) for s in range(1, 20) for part in PARTS for own in (0, 1)]
    assert len(set(found)) == len(found)
    assert min(found) > 1000


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_replications_share_neither_instances_nor_wrong_labels(task):
    samples = [seeded(task, seed).sample("train") for seed in (0, 1, 2)]
    for a, b in itertools.combinations(samples, 2):
        assert not (a.prompt == b.prompt).all(dim=1).all()
        assert not (a.is_noisy == b.is_noisy).all()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_what_does_not_vary_stays(task):
    only_noise = seeded(task, 5, ("noise",)).sample("train")
    assert (only_noise.prompt == task.sample("train").prompt).all()
    assert not (only_noise.is_noisy == task.sample("train").is_noisy).all()
    assert seeded(task, 5, ("weights", "batches")) == task
