"""Examples: a set of task instances with their given and true labels, variables and named
positions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechmem.spec.errors import InputError

Label = Literal["given", "true"]
AnyLabel = Literal["given", "true", "pair"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Instances of one task, aligned row by row.

    `given` are the labels of the training set (wrong where `is_noisy`), `true` the right ones.
    `prefix` says which of the two the model is fed before each answer token: an accuracy depends on
    it, so nothing here mixes the two.
    """

    prompt: Int[Tensor, "n n_prompt"]
    given: Int[Tensor, "n n_answer"]
    true: Int[Tensor, "n n_answer"]
    is_noisy: Bool[Tensor, " n"]
    variables: Mapping[str, Int[Tensor, " n"]]
    positions: Mapping[str, int]
    """Name of every input position -> its index in `tokens`."""
    places: tuple[str, ...]
    """Name of every answer token, in the order of the answer."""
    vocabulary: tuple[str, ...]
    prefix: Label = "given"
    index: Int[Tensor, " n"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Row of each example in the set it was selected from."""
    counterfactual: Examples | None = None
    """The minimal pair of each row, where the set was made with pairs."""
    parent: Examples | None = None
    """The set that these rows were selected from; none for a set of its own."""
    token_variables: tuple[str, ...] = ()
    """Variables whose values are tokens."""
    weight: float = 1.0
    """How many examples each stands for, where a few rehearse what is done to many."""

    def __post_init__(self) -> None:
        if len(self.index) != len(self):
            object.__setattr__(self, "index", torch.arange(len(self)))

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def n_answer(self) -> int:
        """Number of answer tokens; the logits that score them stand at the last `n_answer` input
        positions."""
        return self.given.shape[1]

    @property
    def whole(self) -> Examples:
        """The set that `index` counts in, fed the same label's prefix."""
        return self if self.parent is None else self.parent.with_prefix(self.prefix)

    def labels(self, label: AnyLabel) -> Int[Tensor, "n n_answer"]:
        """The given labels, the true ones, or the true ones of the minimal pairs (InputError where
        there are none)."""
        if label == "pair":
            if self.counterfactual is None:
                raise InputError(
                    "a measure of the pair's label needs an example set that was made with `pair:`"
                )
            return self.counterfactual.true
        return self.given if label == "given" else self.true

    @cached_property
    def tokens(self) -> Int[Tensor, "n pos"]:
        """What the model reads: the prompt and all but the last token of the `prefix` label."""
        return torch.cat([self.prompt, self.labels(self.prefix)[:, :-1]], dim=1)

    def with_prefix(self, prefix: Label) -> Self:
        """The same examples, the model being fed the earlier tokens of this label."""
        counterfactual = self.counterfactual and self.counterfactual.with_prefix(prefix)
        return replace(self, prefix=prefix, counterfactual=counterfactual)

    def continued_with(self, answer: Int[Tensor, "n n_answer"]) -> Self:
        """The same examples, the model being fed the earlier tokens of `answer` (greedy
        decoding)."""
        return replace(self, given=answer, prefix="given")

    def select(self, rows: Tensor) -> Self:
        """The examples of these rows (indices or a mask)."""
        return replace(
            self,
            **{
                name: getattr(self, name)[rows]
                for name in ("prompt", "given", "true", "is_noisy", "index")
            },
            variables={name: value[rows] for name, value in self.variables.items()},
            counterfactual=self.counterfactual and self.counterfactual.select(rows),
            parent=self if self.parent is None else self.parent,
        )

    def as_set(self) -> Self:
        """The same examples as a set of their own: their rows count from 0."""
        counterfactual = self.counterfactual and self.counterfactual.as_set()
        return replace(
            self, index=torch.arange(len(self)), counterfactual=counterfactual, parent=None
        )

    def represented_by(self, n: int) -> Self:
        """The first n, at most, as a set in which each stands for as many as it takes to be all."""
        few = self.select(torch.arange(min(n, len(self)))).as_set()
        weight = len(self) / len(few)
        return replace(
            few,
            weight=weight,
            counterfactual=few.counterfactual and replace(few.counterfactual, weight=weight),
        )

    def to(self, device: torch.device | str) -> Self:
        """The same examples on another device."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("prompt", "given", "true", "is_noisy", "index")
        }
        variables = {name: value.to(device) for name, value in self.variables.items()}
        others = {
            n: e and e.to(device)
            for n, e in (("counterfactual", self.counterfactual), ("parent", self.parent))
        }
        return replace(self, **moved, **others, variables=variables)

    @cached_property
    def key(self) -> str:
        """A hash of what the model reads, for caches of activations."""
        return (
            hashlib.sha256(self.tokens.cpu().numpy().tobytes()).hexdigest()[:16] + f"-{len(self)}"
        )

    def text(self, row: int) -> str:
        """One example as a person would write it: `3 4 7 1 + 2 9 0 8 = 0 6 3 7 9`."""
        words = [
            self.vocabulary[t] for t in (*self.prompt[row].tolist(), *self.given[row].tolist())
        ]
        wrong = (
            ""
            if torch.equal(self.given[row], self.true[row])
            else "   (true: {})".format(
                " ".join(self.vocabulary[t] for t in self.true[row].tolist())
            )
        )
        return " ".join(words) + wrong


def concatenate(first: Examples, second: Examples) -> Examples:
    """Both sets of one task, one after the other; variables that only one of them has are
    dropped."""
    shared = first.variables.keys() & second.variables.keys()
    return replace(
        first,
        **{
            n: torch.cat([getattr(first, n), getattr(second, n)])
            for n in ("prompt", "given", "true", "is_noisy")
        },
        variables={
            n: torch.cat([first.variables[n], second.variables[n]])
            for n in first.variables
            if n in shared
        },
        index=torch.arange(len(first) + len(second)),
        counterfactual=None,
        parent=None,
    )
