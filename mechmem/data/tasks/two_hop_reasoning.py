"""THR, two-hop relational reasoning: `e r1 r2 = e''`, where table[e, r1] is the bridge and
table[bridge, r2] the answer."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import torch
from jaxtyping import Int
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from mechmem.data.examples import Examples, concatenate
from mechmem.data.label_noise import LabelNoise, UniformWrong
from mechmem.data.minimal_pair import MinimalPair
from mechmem.data.tasks.task import Task, differs_as_asked
from mechmem.spec.errors import InputError
from mechmem.spec.limits import Draws, Instances, Seed, Width
from mechmem.spec.sweep import Each, Swept

AtLeastTwo = Annotated[int, Field(ge=2, le=100_000)]
MOST_FACTS = 20_000_000
"""Two-hop facts of a world, all of which are listed before some are drawn."""
N_CANDIDATES = 64
"""Number of other first hops that are tried for each example's minimal pair."""


class TwoHopReasoning(Task):
    """Facts of a random world: atomic (`e r1 ∅ = e'`) and two-hop (`e r1 r2 = e''`).

    All atomic facts are in the training set, but only some of the two-hop facts. A two-hop answer
    needs the bridge entity, which does not occur in the input, so that a model that has memorised a
    wrong answer can be tested for whether it still finds the bridge. Only two-hop training facts
    have wrong labels.
    Variables: `e`, `r1`, `r2` (-1 in atomic facts), `bridge`, `answer`.
    Source: arXiv:2507.04782; sparse worlds and the out-of-distribution split: arXiv:2405.15071.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "held_out", "held_out_ood", "atomic")

    n_entities: Swept[AtLeastTwo] = 100
    """Number of entities."""
    n_relations: Swept[AtLeastTwo] = 30
    """Number of relations."""
    n_relations_per_entity: Swept[Width | None] = None
    """Number of distinct relations that an entity has; by default, all."""
    held_out_rate: Swept[Annotated[float, Field(gt=0, lt=1)]] = 0.1
    """Share of the (in-distribution) two-hop facts that are held out (fraction)."""
    ood_rate: float = Field(0.0, ge=0, lt=1)
    """Share of the atomic facts that no trained two-hop fact uses (fraction)."""
    inferred_per_atomic: Swept[PositiveFloat | None] = None
    """Number of two-hop training facts per in-distribution atomic fact; by default, all that are
    not held out."""
    n_held_out: Instances | None = None
    """Maximum number of held-out facts of each kind; by default, all."""
    atomic_repeats: Swept[Draws] = 4
    """Number of times that each atomic fact occurs in an epoch."""
    readable: bool = False
    """Whether to use pronounceable names instead of e17 and r3."""
    noise: Swept[LabelNoise] = UniformWrong()
    """The wrong labels of the two-hop training facts."""
    seed: Seed = 0
    """Seed of the world and of the split."""

    @classmethod
    def grokked(
        cls, n_entities: int = 2000, inferred_per_atomic: float = 18.0, **changes: Any
    ) -> Self:
        """The data of *Grokked Transformers* (arXiv:2405.15071): 200 relations, 20 per entity, 5 %
        out of distribution.

        Args:
            n_entities: number of entities.
            inferred_per_atomic: number of two-hop training facts per in-distribution atomic fact.
            changes: other fields of the task.
        """
        preset: dict[str, Any] = {
            "n_relations": 200,
            "n_relations_per_entity": 20,
            "ood_rate": 0.05,
            "atomic_repeats": 1,
        }
        preset |= {
            "held_out_rate": 0.005,
            "n_held_out": 3000,
            "inferred_per_atomic": inferred_per_atomic,
        }
        return cls(n_entities=n_entities, **(preset | changes))

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        sizes = (self.n_relations_per_entity, self.n_relations, self.n_entities)
        if any(isinstance(size, Each) for size in sizes):
            return self  # each member of the sweep is checked
        if (
            self.n_relations_per_entity is not None
            and self.n_relations_per_entity > self.n_relations
        ):
            raise ValueError(
                f"an entity cannot have {self.n_relations_per_entity} distinct relations "
                f"of {self.n_relations}"
            )
        per_entity = self.n_relations_per_entity or self.n_relations
        if (n_facts := self.n_entities * per_entity**2) > MOST_FACTS:
            raise ValueError(
                f"{self.n_entities:,} entities with {per_entity:,} relations each make {n_facts:,} "
                f"two-hop facts; at most {MOST_FACTS:,}: lower n_entities or n_relations_per_entity"
            )
        return self

    @property
    def vocabulary(self) -> tuple[str, ...]:
        name = _spoken if self.readable else lambda letter, i: f"{letter}{i}"
        entities = [name("e", i) for i in range(self.n_entities)]
        return (*entities, *(name("r", i) for i in range(self.n_relations)), "∅", "=")

    @property
    def n_context(self) -> int:
        return 4

    @property
    def chance(self) -> float:
        return 1 / self.n_entities

    def sample(self, split: str) -> Examples:
        examples = _splits(self)[split]
        if not len(examples):
            raise InputError(
                f"this world has no {split} facts; raise ood_rate or the number of entities"
            )
        return examples

    def training_set(self) -> Examples:
        atomic = self.sample("atomic")
        return concatenate(
            self.sample("train"),
            atomic.select(torch.arange(len(atomic)).repeat(self.atomic_repeats)),
        )

    def facts(self, e: Tensor, r1: Tensor, r2: Tensor, bridge: Tensor, answer: Tensor) -> Examples:
        """Correctly labelled examples of facts, one per row of the arguments.

        Args:
            e: first entities, `n`.
            r1: first relations, counted from 0, `n`.
            r2: second relations, `n`; -1 in an atomic fact.
            bridge: entities to which r1 leads, `n`.
            answer: entities to which r2 leads from the bridge, `n`; the bridge in an atomic fact.
        """
        n_words = self.n_entities + self.n_relations
        second = torch.where(r2 < 0, n_words, self.n_entities + r2)
        equals = torch.full_like(e, n_words + 1)
        label = answer[:, None]
        return Examples(
            prompt=torch.stack([e, self.n_entities + r1, second, equals], dim=1),
            given=label.clone(),  # so that editing a label does not change the answer
            true=label.clone(),
            is_noisy=torch.zeros(len(e), dtype=torch.bool),
            variables={"e": e, "r1": r1, "r2": r2, "bridge": bridge, "answer": answer},
            positions={"e": 0, "r1": 1, "r2": 2, "=": 3},
            places=("answer",),
            vocabulary=self.vocabulary,
            token_variables=("e", "bridge", "answer"),
        )

    def answers(self, prompt: Int[Tensor, "n n_prompt"]) -> Int[Tensor, "n n_answer"]:
        words = prompt.cpu()  # the world's table is on the CPU
        e, r1, r2 = words[:, 0], words[:, 1] - self.n_entities, words[:, 2] - self.n_entities
        r2 = torch.where(r2 == self.n_relations, -1, r2)  # one past the relations: ∅
        world = _world(self)
        bridge = world.table[e, r1]
        answer = world.second_hop(bridge.clamp_min(0), r2)
        return torch.where(bridge < 0, -1, answer)[:, None].to(prompt.device)

    def counterfactuals(
        self, examples: Examples, pair: MinimalPair, generator: torch.Generator
    ) -> tuple[Tensor, Examples]:
        """Facts with another first hop (e, r1) and the same r2, so that `flip` changes and `hold`
        does not.

        Args:
            examples: any examples of the task.
            pair: the variable that must differ and those that must stay the same.
            generator: source of all random choices.
        """
        world, n, asked = _world(self), len(examples), (pair.flip, *pair.hold)
        before = {name: examples.variables[name][:, None] for name in asked}
        if "bridge" in pair.hold:
            first = world.leading_to(examples.variables["bridge"], N_CANDIDATES, generator)
        else:
            first = torch.randint(len(world.head), (n, N_CANDIDATES), generator=generator)
        r2 = examples.variables["r2"][:, None].expand(-1, N_CANDIDATES)
        answer = world.second_hop(world.tail[first], r2)
        after = {
            "e": world.head[first],
            "r1": world.relation[first],
            "r2": r2,
            "bridge": world.tail[first],
            "answer": answer,
        }
        fits = (
            differs_as_asked(before, {name: after[name] for name in asked}, pair)
            & (answer >= 0)
            & (first >= 0)
        )
        rows = fits.any(dim=1).nonzero()[:, 0]
        chosen = fits[rows].int().argmax(dim=1)
        return rows, self.facts(**{name: value[rows, chosen] for name, value in after.items()})


class World(NamedTuple):
    """The atomic facts, one per row: equally many for each head entity, in the order of the
    entities."""

    head: Int[Tensor, " facts"]
    relation: Int[Tensor, " facts"]
    tail: Int[Tensor, " facts"]
    table: Int[Tensor, "entities relations"]
    """table[e, r], -1 where e has no relation r."""

    def second_hop(self, bridge: Tensor, r2: Tensor) -> Tensor:
        """The entity to which r2 leads from the bridge; the bridge itself for r2 = -1, and -1 where
        the bridge has no relation r2."""
        return torch.where(r2 < 0, bridge, self.table[bridge, r2.clamp_min(0)])

    def leading_to(self, entity: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Random atomic facts that lead to each entity.

        Args:
            entity: the entities, `m`.
            n: number of facts drawn for each.
            generator: source of the draws.

        Returns:
            Rows of the facts, `m n`; -1 for an entity to which no fact leads.
        """
        order = self.tail.argsort(stable=True)
        count = torch.bincount(self.tail, minlength=len(self.table))
        start = count.cumsum(0) - count  # where the facts of each entity begin in `order`
        drawn = (torch.rand(len(entity), n, generator=generator) * count[entity][:, None]).long()
        found = order[(start[entity][:, None] + drawn).clamp_max(len(order) - 1)]
        return torch.where(count[entity][:, None] > 0, found, -1)


@lru_cache(maxsize=4)
def _world(task: TwoHopReasoning) -> World:
    generator = torch.Generator().manual_seed(task.seed)
    n, k = task.n_entities, task.n_relations_per_entity or task.n_relations
    relations = (
        torch.rand(n, task.n_relations, generator=generator)
        .argsort(dim=1)[:, :k]
        .sort(dim=1)
        .values
    )
    tails = torch.randint(n, (n, k), generator=generator)
    table = torch.full((n, task.n_relations), -1).scatter(1, relations, tails)
    return World(torch.arange(n).repeat_interleave(k), relations.flatten(), tails.flatten(), table)


@lru_cache(maxsize=4)
def _splits(task: TwoHopReasoning) -> dict[str, Examples]:
    world, generator = _world(task), torch.Generator().manual_seed(task.seed + 1)
    n_facts, k = len(world.head), len(world.head) // task.n_entities
    is_ood = torch.zeros(n_facts, dtype=torch.bool)
    is_ood[torch.randperm(n_facts, generator=generator)[: round(task.ood_rate * n_facts)]] = True
    first = torch.arange(n_facts).repeat_interleave(k)
    second = world.tail[first] * k + torch.arange(k).repeat(n_facts)
    known = (~is_ood[first] & ~is_ood[second]).nonzero()[:, 0]
    known = known[torch.randperm(len(known), generator=generator)]
    n_held_out = max(1, round(task.held_out_rate * len(known)))
    trained = known[n_held_out:]
    if task.inferred_per_atomic is not None:
        trained = trained[: _n_inferred(task, int((~is_ood).sum()), len(trained))]
    unknown = (is_ood[first] & is_ood[second]).nonzero()[:, 0]

    def two_hop(rows: Tensor) -> Examples:
        a, b = first[rows], second[rows]
        return task.facts(
            world.head[a], world.relation[a], world.relation[b], world.tail[a], world.tail[b]
        )

    if not len(trained):
        raise InputError(
            "this world leaves no two-hop fact to train on; raise n_entities or lower held_out_rate"
        )
    train = two_hop(trained)
    given, is_noisy = task.noise.corrupt(train.true, (tuple(range(task.n_entities)),))
    atomic = task.facts(
        world.head, world.relation, torch.full_like(world.head, -1), world.tail, world.tail
    )
    return {
        "train": replace(train, given=given, is_noisy=is_noisy),
        "held_out": two_hop(known[:n_held_out][: task.n_held_out]),
        "held_out_ood": two_hop(unknown[: task.n_held_out]),
        "atomic": atomic,
    }


def _n_inferred(task: TwoHopReasoning, n_atomic: int, available: int) -> int:
    wanted = round((task.inferred_per_atomic or 0) * n_atomic)
    if wanted > available:
        raise InputError(
            f"inferred_per_atomic {task.inferred_per_atomic:g} asks for {wanted} two-hop facts on "
            f"{n_atomic} atomic ones, but this world has {available}; "
            f"lower it to {available / n_atomic:.2f} or less"
        )
    return wanted


def _spoken(letter: str, i: int) -> str:
    """A pronounceable name that is unique to the number. Names of entities are capitalised, those
    of relations end in -of."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    syllables, rest = [], i
    for _ in range(3):
        rest, part = divmod(rest, len(consonants) * len(vowels))
        syllables.append(consonants[part // len(vowels)] + vowels[part % len(vowels)])
    word = "".join(syllables[:2] if not rest and i < 4900 else syllables)
    return word.capitalize() if letter == "e" else f"{word}-of"
