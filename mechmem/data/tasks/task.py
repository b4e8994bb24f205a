"""Task: the interface of every reasoning task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.data.minimal_pair import MinimalPair
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.registry import Component


class Task(Component, registry="task"):
    """A reasoning task whose training set has wrong labels. All its sets are determined by its own
    seeds.

    A task of your own implements `sample`, `vocabulary`, `n_context`, `chance`, `answers` and
    `counterfactuals`, and sets `splits` if they differ from these. It may cache the result of
    `sample`: callers of `sample` get a checked copy.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "held_out")
    """Names of the splits that `sample` accepts."""

    @classmethod
    def __pydantic_init_subclass__(cls, registry: str | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(registry=registry, **kwargs)
        # Users call the `sample` that a task overrides. Wrapping it when the class is created is
        # the only way to check every sample, whoever calls it.
        if "sample" in vars(cls) and not getattr(cls.sample, "__isabstractmethod__", False):
            cls.sample = _checked(cls.sample)  # ty: ignore[invalid-assignment]

    @abstractmethod
    def sample(self, split: str) -> Examples:
        """All examples of a split, the same at every call; the caller may change them.

        Raises InputError for an unknown split, or for examples that are inconsistent with the task.
        """

    @property
    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """The readable form of every token."""

    @property
    @abstractmethod
    def n_context(self) -> int:
        """Largest number of input positions of an example: its prompt and all but the last answer
        token."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of guessing from the label distribution (fraction)."""

    @abstractmethod
    def answers(self, prompt: Int[Tensor, "n n_prompt"]) -> Int[Tensor, "n n_answer"]:
        """The true answers to any prompts, also ones outside all splits; -1 where a prompt has no
        answer."""

    def training_set(self) -> Examples:
        """The examples of one epoch of training."""
        return self.sample("train")

    def pairs(self, examples: Examples, pair: MinimalPair) -> Examples:
        """The examples that have a minimal pair, with the pairs as `counterfactual`.

        Raises InputError for an unknown variable, or if no example has such a pair.
        """
        for name in (pair.flip, *pair.hold):
            if name not in examples.variables:
                raise InputError(
                    f"{self.kind} has no variable {name!r}; {suggest(name, examples.variables)}"
                )
        generator = torch.Generator().manual_seed(pair.seed)
        rows, counterfactual = self.counterfactuals(examples, pair, generator)
        if not len(rows):
            held = f" and holds {', '.join(pair.hold)}" if pair.hold else ""
            raise InputError(
                f"no example has a pair that changes {pair.flip}{held}; choose another `flip`, or "
                "a shorter `hold`"
            )
        if not isinstance(counterfactual, Examples):
            raise InputError(
                f"{self.kind}.counterfactuals returned a {type(counterfactual).__name__}; "
                "return the rows and their `Examples`"
            )
        counterfactual = counterfactual.with_prefix(examples.prefix).with_name(examples.name)
        return replace(examples.select(rows), counterfactual=counterfactual.as_set()).as_set()

    @abstractmethod
    def counterfactuals(
        self, examples: Examples, pair: MinimalPair, generator: torch.Generator
    ) -> tuple[Tensor, Examples]:
        """Minimal pairs of the examples that have one.

        Args:
            examples: any examples of the task.
            pair: the variable that must differ and those that must stay the same.
            generator: source of all random choices.

        Returns:
            The rows of `examples` that have a counterfactual, and their counterfactuals.
        """

    def check_split(self, split: str) -> None:
        """Raises InputError for an unknown split."""
        if split not in self.splits:
            raise InputError(f"{self.kind} has no split {split!r}; {suggest(split, self.splits)}")


def differs_as_asked(
    before: dict[str, Tensor], after: dict[str, Tensor], pair: MinimalPair
) -> Tensor:
    """The mask of the candidates in which `flip` differs and every variable of `hold` is the same.

    Args:
        before: variables of the examples, of shapes that broadcast with those of `after`.
        after: variables of the candidates.
        pair: the variable that must differ and those that must stay the same.
    """
    held: Sequence[Tensor] = [before[name] == after[name] for name in pair.hold]
    return torch.stack([before[pair.flip] != after[pair.flip], *held]).all(dim=0)


def _checked(sample: Callable[[Any, str], Examples]) -> Callable[[Any, str], Examples]:
    @wraps(sample)
    def checked(task: Task, split: str) -> Examples:
        task.check_split(split)
        examples = sample(task, split)
        _check(task, split, examples)
        return examples.clone()  # the task may cache its own

    return checked


def _check(task: Task, split: str, examples: Examples) -> None:
    where = f"{task.kind}.sample({split!r})"
    if not isinstance(examples, Examples):
        raise InputError(f"{where} returned a {type(examples).__name__}; return `Examples`")
    if not len(examples):
        raise InputError(f"{where} returned no example; leave {split!r} out of `splits`")
    if examples.vocabulary != tuple(task.vocabulary):
        raise InputError(
            f"{where} has a vocabulary of {len(examples.vocabulary)} tokens that is not the task's "
            f"({len(task.vocabulary)} tokens); pass `vocabulary=self.vocabulary`"
        )
    longest = int(examples.n_positions.max())
    if longest > task.n_context:
        raise InputError(
            f"{where} has inputs of up to {longest} positions (the prompt and all but the last "
            f"answer token), but n_context is {task.n_context}; raise n_context to {longest}"
        )
