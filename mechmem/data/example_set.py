"""Example sets: which examples of a task an experiment looks at."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mechmem.data.examples import Examples, Label
from mechmem.data.minimal_pair import MinimalPair
from mechmem.data.tasks.task import Task
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.registry import Component


class ExampleSet(Component):
    """Which examples: a split, noisy or clean ones, with which values, how many, and with which
    minimal pairs."""

    split: str = "train"
    noisy: bool | None = None
    """Only noisy, or only clean instances; all unless given."""
    where: dict[str, int] = {}
    """Only instances in which these variables of the task have these values."""
    n: int | None = Field(500, ge=1)
    """How many, at most, drawn with `seed`; all if none is given."""
    skip: int = Field(0, ge=0)
    """How many of those drawn to leave out first: two sets of one seed share none if one skips the
    other's `n`."""
    prefix: Label = "given"
    pair: MinimalPair | None = None
    seed: int = 0

    def of(self, task: Task) -> Examples:
        """Raises InputError if the split or a variable is unknown, or no such example is there."""
        examples = task.sample(self.split)
        rows = self._chosen(examples).nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        drawn = slice(self.skip, None if self.n is None else self.skip + self.n)
        examples = examples.select(rows[order] if self.pair else rows[order[drawn]].sort().values)
        if not len(examples):
            kind = {True: "noisy ", False: "clean ", None: ""}[self.noisy]
            values = (
                f" with {', '.join(f'{name} {value}' for name, value in self.where.items())}"
                if self.where
                else ""
            )
            raise InputError(f"split {self.split!r} holds no {kind}example{values}")
        if self.pair is not None:
            examples = task.pairs(examples, self.pair)
            examples = examples.select(torch.arange(len(examples))[drawn])
        return examples.with_prefix(self.prefix).as_set()

    def _chosen(self, examples: Examples) -> Tensor:
        chosen = torch.ones(len(examples), dtype=torch.bool)
        if self.noisy is not None:
            chosen &= examples.is_noisy == self.noisy
        for name, value in self.where.items():
            if name not in examples.variables:
                raise InputError(
                    f"there is no variable {name!r}; {suggest(name, examples.variables)}"
                )
            chosen &= examples.variables[name] == value
        return chosen
