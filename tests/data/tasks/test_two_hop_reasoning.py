from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from pydantic import ValidationError

from mechmem.data.label_noise import Digit, Permuted, Systematic, UniformWrong
from mechmem.data.minimal_pair import MinimalPair
from mechmem.data.tasks.two_hop_reasoning import TwoHopReasoning
from mechmem.spec.errors import InputError

SMALL = TwoHopReasoning(n_entities=12, n_relations=5, noise=UniformWrong(rate=0.25))
SPARSE = TwoHopReasoning(
    n_entities=30,
    n_relations=9,
    n_relations_per_entity=4,
    ood_rate=0.25,
    held_out_rate=0.1,
    inferred_per_atomic=1.5,
    noise=UniformWrong(rate=0.1),
)
PRESET = TwoHopReasoning.grokked(n_entities=100, inferred_per_atomic=3.6)

Fact = tuple[int, int, int]


def atomic(task: TwoHopReasoning) -> dict[tuple[int, int], int]:
    """The world as a Python dictionary, read from the prompts and labels."""
    examples = task.sample("atomic")
    assert (
        examples.prompt[:, 2] == task.n_entities + task.n_relations
    ).all()  # ∅ in the place of r2
    return {
        (e, r - task.n_entities): t
        for (e, r, *_), (t,) in zip(examples.prompt.tolist(), examples.true.tolist(), strict=True)
    }


def two_hop(task: TwoHopReasoning, split: str) -> list[Fact]:
    """(e, r1, r2) of every fact of a split, as the prompts spell them."""
    n = task.n_entities
    return [(e, r1 - n, r2 - n) for e, r1, r2, _ in task.sample(split).prompt.tolist()]


def inferred(world: dict[tuple[int, int], int], known: set[tuple[int, int]]) -> set[Fact]:
    """Every two-hop fact of which both hops are among `known`, by brute force."""
    return {(e, r1, r2) for e, r1 in known for (b, r2) in known if b == world[e, r1]}


# --- the world


@pytest.mark.parametrize("task", [SMALL, SPARSE, PRESET])
def test_every_entity_has_its_number_of_distinct_relations(task):
    world = atomic(task)
    k = task.n_relations_per_entity or task.n_relations
    assert len(world) == task.n_entities * k
    for entity in range(task.n_entities):
        assert len({r for e, r in world if e == entity}) == k
    assert set(world.values()) <= set(range(task.n_entities))


@pytest.mark.parametrize("task", [SMALL, SPARSE])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_and_bridges_are_two_looks_into_the_world(task, split):
    world, examples = atomic(task), task.sample(split)
    for i, (e, r1, r2) in enumerate(two_hop(task, split)):
        bridge = world[e, r1]
        assert examples.variables["bridge"][i] == bridge
        assert examples.true[i, 0] == examples.variables["answer"][i] == world[bridge, r2]
        assert [examples.variables[name][i].item() for name in ("e", "r1", "r2")] == [e, r1, r2]


def test_a_world_by_hand():
    # Two entities and two relations: four atomic facts, eight two-hop facts, of which one eighth is
    # held out.
    task = TwoHopReasoning(
        n_entities=2, n_relations=2, held_out_rate=0.125, noise=UniformWrong(rate=0)
    )
    world = atomic(task)
    facts = {(e, r1, r2): world[world[e, r1], r2] for e, r1, r2 in product((0, 1), repeat=3)}
    assert (len(task.sample("train")), len(task.sample("held_out"))) == (7, 1)
    assert set(two_hop(task, "train")) | set(two_hop(task, "held_out")) == set(facts)
    assert len(task.training_set()) == 7 + 4 * 4  # each atomic fact stands four times


# --- the splits, by the rules of arXiv:2405.15071


def test_without_out_of_distribution_facts_the_splits_are_all_there_is():
    # 12 entities with 5 relations: 60 atomic facts, each with 5 second hops; a tenth of 300 is held
    # out.
    train, held_out = (two_hop(SMALL, split) for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (270, 30)
    assert set(train).isdisjoint(held_out)
    world = atomic(SMALL)
    assert set(train) | set(held_out) == inferred(world, set(world))


def test_counts_of_a_sparse_world():
    # 120 atomic facts, a quarter of them out of distribution: 90 are left, with 1.5 training facts
    # each.
    train, held_out, ood = (
        two_hop(SPARSE, split) for split in ("train", "held_out", "held_out_ood")
    )
    assert len(atomic(SPARSE)) == 120
    assert len(train) == 135
    assert len(set(train)) == len(train)
    world = atomic(SPARSE)
    used = {(e, r1) for e, r1, _ in train + held_out} | {
        (world[e, r1], r2) for e, r1, r2 in train + held_out
    }
    unknown = {(e, r1) for e, r1, _ in ood} | {(world[e, r1], r2) for e, r1, r2 in ood}
    assert used.isdisjoint(unknown)
    assert len(used) <= 90
    assert len(unknown) <= 30
    assert set(train).isdisjoint(held_out)


def test_the_out_of_distribution_split_is_all_facts_of_two_unknown_hops():
    task = SPARSE.model_copy(update={"inferred_per_atomic": None})
    world = atomic(task)
    train, held_out, ood = (
        set(two_hop(task, split)) for split in ("train", "held_out", "held_out_ood")
    )
    known = {(e, r1) for e, r1, _ in train | held_out} | {
        (world[e, r1], r2) for e, r1, r2 in train | held_out
    }
    in_distribution = inferred(world, known)
    assert train | held_out == in_distribution
    assert len(held_out) == round(0.1 * len(in_distribution))
    unknown = set(world) - known
    assert len(unknown) == 30  # a quarter of 120
    assert ood == inferred(world, unknown)


def test_the_preset_is_the_papers():
    # 100 entities with 20 of 200 relations: 2,000 atomic facts, 5 % (100) out of distribution, 3.6
    # for each of 1,900.
    assert (PRESET.n_relations, PRESET.n_relations_per_entity, PRESET.ood_rate) == (200, 20, 0.05)
    assert len(atomic(PRESET)) == 2000
    assert len(PRESET.sample("train")) == round(3.6 * 1900) == 6840
    assert TwoHopReasoning.grokked().n_entities == 2000


def test_the_held_out_sets_are_cut_to_their_size():
    task = SPARSE.model_copy(update={"n_held_out": 3})
    assert [len(task.sample(split)) for split in ("held_out", "held_out_ood")] == [3, 3]


# --- noise


@pytest.mark.parametrize("kind", [UniformWrong, Permuted, Digit, Systematic])
def test_noise_falls_on_two_hop_training_facts_only(kind):
    task = SMALL.model_copy(update={"noise": kind(rate=0.25)})
    train = task.sample("train")
    assert train.is_noisy.sum() == round(0.25 * 270)
    assert torch.equal(train.given[:, 0] != train.true[:, 0], train.is_noisy)
    assert train.given.max() < task.n_entities  # a wrong entity, never a relation
    for split in ("atomic", "held_out"):
        assert torch.equal(task.sample(split).given, task.sample(split).true)
        assert not task.sample(split).is_noisy.any()


def test_split_noise_and_world_have_their_own_seeds():
    other_noise = SMALL.model_copy(update={"noise": UniformWrong(rate=0.25, seed=1)})
    assert torch.equal(SMALL.sample("train").prompt, other_noise.sample("train").prompt)
    assert not torch.equal(SMALL.sample("train").is_noisy, other_noise.sample("train").is_noisy)
    other_world = SMALL.model_copy(update={"seed": 1})
    assert atomic(other_world) != atomic(SMALL)


# --- minimal pairs


@pytest.mark.parametrize("hold", [("r2",), ("r2", "r1"), ("r2", "answer")])
def test_a_pair_with_another_bridge(hold):
    paired = SMALL.pairs(SMALL.sample("train"), MinimalPair(flip="bridge", hold=hold))
    before, after = paired.variables, paired.counterfactual.variables
    assert (before["bridge"] != after["bridge"]).all()
    assert all(torch.equal(before[name], after[name]) for name in hold)
    world = atomic(SMALL)
    for e, r1, r2, answer in zip(
        *(after[name].tolist() for name in ("e", "r1", "r2")),
        paired.counterfactual.true[:, 0].tolist(),
        strict=True,
    ):
        assert world[world[e, r1], r2] == answer


def test_a_pair_with_the_same_bridge_has_the_same_true_answer_and_another_first_hop():
    paired = SMALL.pairs(SMALL.sample("train"), MinimalPair(flip="e", hold=("bridge", "r2")))
    other = paired.counterfactual
    assert torch.equal(paired.true, other.true)
    assert torch.equal(other.given, other.true)  # the wrong label does not follow
    assert (paired.variables["e"] != other.variables["e"]).all()
    assert paired.is_noisy.any()


# --- names, positions, errors


def test_positions_places_and_words():
    examples = SMALL.sample("train")
    assert dict(examples.positions) == {"e": 0, "r1": 1, "r2": 2, "=": 3}
    assert examples.places == ("answer",)
    assert SMALL.n_context == examples.tokens.shape[1] == 4
    assert re.fullmatch(r"e\d+ r\d+ r\d+ = e\d+.*", examples.text(0))
    assert re.fullmatch(r"e\d+ r\d+ ∅ = e\d+", SMALL.sample("atomic").text(0))


@pytest.mark.parametrize("size", [100, 5000])
def test_names_can_be_said_and_are_all_different(size):
    sizes = {"n_entities": size, "n_relations": 200, "n_relations_per_entity": 20}
    words = TwoHopReasoning(**sizes, readable=True).vocabulary
    assert len(set(words)) == len(words) == size + 202
    assert all(word.isalpha() and word[0].isupper() for word in words[:size])
    assert all(word.endswith("-of") for word in words[size:-2])


def test_a_world_of_more_facts_than_can_be_listed_is_refused():
    with pytest.raises(ValueError, match=r"make 90,000,000 two-hop facts; at most 20,000,000"):
        TwoHopReasoning(n_entities=100_000)


def test_names_change_nothing_else():
    spoken = SMALL.model_copy(update={"readable": True})
    assert torch.equal(SMALL.sample("train").tokens, spoken.sample("train").tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"n_entities": 1},
        {"n_relations": 1},
        {"held_out_rate": 1.0},
        {"ood_rate": 1.0},
        {"atomic_repeats": 0},
    ],
)
def test_sizes_that_cannot_be_are_refused(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        TwoHopReasoning(**change)


def test_more_relations_for_an_entity_than_there_are_is_refused():
    with pytest.raises(ValidationError, match="an entity cannot have 6 distinct relations of 5"):
        TwoHopReasoning(n_relations=5, n_relations_per_entity=6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"inferred_per_atomic": 9.0},
            "asks for 540 two-hop facts on 60 atomic ones, but this world has 270; lower it to",
        ),
        ({"inferred_per_atomic": 0.001}, "leaves no two-hop fact to train on"),
    ],
)
def test_a_world_without_enough_facts_says_how_many_there_are(change, message):
    with pytest.raises(InputError, match=message):
        SMALL.model_copy(update=change).sample("train")


def test_a_split_without_facts_says_what_to_change():
    with pytest.raises(InputError, match="no held_out_ood facts; raise ood_rate"):
        SMALL.sample("held_out_ood")
    with pytest.raises(InputError, match="did you mean 'held_out'"):
        SMALL.sample("heldout")
