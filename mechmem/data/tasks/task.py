"""Task: what every reasoning task offers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.data.minimal_pair import MinimalPair
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.registry import Component


class Task(Component, registry="task"):
    """A reasoning task whose training set has wrong labels; every set it gives follows from its own
    seeds."""

    splits: ClassVar[tuple[str, ...]] = ("train", "held_out")

    @abstractmethod
    def sample(self, split: str) -> Examples:
        """All examples of a split, the same ones at every call."""

    @property
    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens, as a person reads them."""

    @property
    @abstractmethod
    def n_context(self) -> int:
        """Number of input positions."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of a guess from the label distribution (fraction)."""

    @abstractmethod
    def answers(self, prompt: Int[Tensor, "n n_prompt"]) -> Int[Tensor, "n n_answer"]:
        """What the rule answers to any prompts, also ones that no split holds; -1 where it has no
        answer."""

    def training_set(self) -> Examples:
        """What an epoch of training goes through."""
        return self.sample("train")

    def pairs(self, examples: Examples, pair: MinimalPair) -> Examples:
        """The examples that have a minimal pair, each with it as `counterfactual`.

        Raises InputError for a variable that the task does not have, or if no example has such a
        pair.
        """
        for name in (pair.flip, *pair.hold):
            if name not in examples.variables:
                raise InputError(
                    f"{self.kind} has no variable {name!r}; {suggest(name, examples.variables)}"
                )
        rows, counterfactual = self.counterfactuals(
            examples, pair, torch.Generator().manual_seed(pair.seed)
        )
        if not len(rows):
            raise InputError(
                f"no example has a pair that changes {pair.flip} and holds {', '.join(pair.hold)}"
            )
        return replace(
            examples.select(rows),
            counterfactual=replace(counterfactual, prefix=examples.prefix).as_set(),
        ).as_set()

    @abstractmethod
    def counterfactuals(
        self, examples: Examples, pair: MinimalPair, generator: torch.Generator
    ) -> tuple[Tensor, Examples]:
        """The rows that have a counterfactual, and the counterfactuals."""

    def check_split(self, split: str) -> None:
        if split not in self.splits:
            raise InputError(f"{self.kind} has no split {split!r}; {suggest(split, self.splits)}")


def differs_as_asked(
    before: dict[str, Tensor], after: dict[str, Tensor], pair: MinimalPair
) -> Tensor:
    """Where `flip` differs and every variable of `hold` is the same."""
    held: Sequence[Tensor] = [before[name] == after[name] for name in pair.hold]
    return torch.stack([before[pair.flip] != after[pair.flip], *held]).all(dim=0)
