"""Example sets: the examples of a task that an experiment uses."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mechmem.data.examples import Examples, Label
from mechmem.data.minimal_pair import MinimalPair
from mechmem.data.tasks.task import Task
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.limits import Instances, Seed
from mechmem.spec.registry import Component

N_SHOWN = 12
"""Maximum number of a variable's values that an error lists."""


class ExampleSet(Component):
    """A choice of examples: the split, noisy or clean ones, the values of variables, the number,
    and the minimal pairs."""

    split: str = "train"
    """A split of the task."""
    noisy: bool | None = None
    """Whether to take only noisy (true) or only clean (false) instances; by default, both."""
    where: dict[str, int] = {}
    """Take only instances in which these variables of the task have these values."""
    n: Instances | None = 500
    """Maximum number of examples, drawn with `seed`; `null` takes all."""
    skip: int = Field(0, ge=0, le=10_000_000)
    """Number of drawn examples to leave out first: two sets with the same seed share no example if
    one skips the other's `n`."""
    prefix: Label = "given"
    """The label whose earlier tokens the model is fed."""
    pair: MinimalPair | None = None
    """The kind of minimal pair that each example gets; examples without one are left out."""
    also_pair: MinimalPair | None = None
    """Another kind of pair that each example must have too, without getting it. Two sets that swap
    `pair` and `also_pair` hold the same examples with either pair."""
    seed: Seed = 0
    """Seed of the draw."""

    @model_validator(mode="after")
    def _gets_a_pair(self) -> Self:
        if self.also_pair is not None and self.pair is None:
            raise ValueError("`also_pair` only restricts a set that has a `pair`; give it one")
        return self

    def of(self, task: Task) -> Examples:
        """These examples of a task; `requested` is set if fewer than `n` exist.

        Raises InputError if the split, a variable or a value is unknown, or no example is left.
        """
        examples = task.sample(self.split)
        rows = self._chosen(examples).nonzero()[:, 0]
        if not len(rows):
            raise InputError(self._none_found(examples))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        if self.pair is None:
            drawn = self._drawn(rows[order])
            return self._finished(examples.select(drawn.sort().values))
        pairs = self._paired(task, examples.select(rows[order]), self.pair)
        return self._finished(pairs.select(self._drawn(torch.arange(len(pairs)))))

    def _paired(self, task: Task, examples: Examples, pair: MinimalPair) -> Examples:
        """The examples that have every kind of pair that is asked for, with those of `pair`."""
        pairs = task.pairs(examples, pair)
        if self.also_pair is None:
            return pairs
        others = {tuple(prompt) for prompt in task.pairs(examples, self.also_pair).prompt.tolist()}
        has_both = torch.tensor([tuple(prompt) in others for prompt in pairs.prompt.tolist()])
        if not has_both.any():
            raise InputError(
                f"no example has both a pair that changes {pair.flip} and one that changes "
                f"{self.also_pair.flip}; choose another `flip`, or a shorter `hold`"
            )
        return pairs.select(has_both)

    def _drawn(self, rows: Tensor) -> Tensor:
        """The rows that remain after `skip` and `n`."""
        if self.skip >= len(rows):
            raise InputError(
                f"skip {self.skip} leaves no example: {len(rows)} of split {self.split!r} match; "
                f"lower skip to {len(rows) - 1} or less"
            )
        return rows[self.skip :][: self.n]

    def _finished(self, examples: Examples) -> Examples:
        is_short = self.n is not None and len(examples) < self.n
        return (
            examples.with_prefix(self.prefix).as_set().with_requested(self.n if is_short else None)
        )

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

    def _none_found(self, examples: Examples) -> str:
        kind = {True: "noisy ", False: "clean ", None: ""}[self.noisy]
        wanted = ", ".join(f"{name} {value}" for name, value in self.where.items())
        known = [
            f"{name} is one of {_shown(examples.variables[name])}"
            for name, value in self.where.items()
            if not (examples.variables[name] == value).any()
        ]
        found = f"split {self.split!r} has no {kind}example" + (f" with {wanted}" if wanted else "")
        return "; ".join([found, *known])


def _shown(values: Tensor) -> str:
    known = [str(value) for value in values.unique().tolist()]
    if len(known) <= N_SHOWN:
        return ", ".join(known)
    return f"{', '.join(known[: N_SHOWN - 1])}, ..., {known[-1]} ({len(known)} values)"
