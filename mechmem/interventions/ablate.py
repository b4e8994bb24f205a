"""Ablate: knock an activation out, by zero, its mean, another example's value or noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import UnitIntervention
from mechmem.interventions.patch import fitting
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.files import digest
from mechmem.spec.sweep import Swept


class Ablate(UnitIntervention):
    """Knocks an activation out: puts zero, a mean, another example's value or noise in its place.

    What the model then fails at, it needs this site's information for; zero also takes away what is
    the same for all examples, and so overstates the loss. `mean` and `gaussian` are of a stated
    set, per position and unit, so that every head and neuron gets its own. `resample` is the
    activation of another example, the same one at every site.
    Touches: any site, `batch pos ...`, where chosen.
    Raises: InputError for an unknown set, or for `resample` where there is no other example.
    Source: arXiv:2211.00593 (means), arXiv:2409.09951 (a comparison).
    """

    method: Swept[Literal["zero", "mean", "resample", "gaussian"]] = "mean"
    """`gaussian` draws from a normal distribution with the set's mean and standard deviation, anew
    for each example."""
    reference_set: Swept[str | None] = None
    """Set of the mean, the other examples or the spread, fed the same label's prefix as the patched
    one; the set that the examples are from unless given. Not looked at by `zero`."""
    seed: Swept[int] = 0
    """Seed of `resample` and `gaussian`: an example gets the same at every call, also when few of
    its set are run."""

    def replacement(
        self, hook: str, model: Model, examples: Examples, session: Session
    ) -> Callable[[Tensor], Tensor]:
        if self.method == "zero":
            return torch.zeros_like
        over = (
            examples.whole
            if self.reference_set is None
            else session.examples(self.reference_set).with_prefix(examples.prefix)
        )
        value = self._value(session.activation(model, over, hook), hook, examples, over)
        return lambda activation: fitting(value, activation, hook)

    def _value(self, values: Tensor, hook: str, examples: Examples, over: Examples) -> Tensor:
        if self.method == "mean":
            return values.mean(dim=0, keepdim=True)
        rows = examples.index.to(values.device)
        if self.method == "resample":
            return values[donors(examples.whole, over, self.seed).to(values.device)[rows]]
        drawn = noise(len(examples.whole), values.shape[1:], int(digest([self.seed, hook]), 16)).to(
            values
        )[rows]
        return values.mean(dim=0) + values.std(dim=0, correction=0) * drawn


def donors(examples: Examples, over: Examples, seed: int) -> Int[Tensor, " n"]:
    """For each example of a set, the row of `over` whose activations it gets: never its own."""
    if over.key == examples.key:
        return derangement(len(examples), seed)
    drawn = torch.randint(
        len(over), (len(examples),), generator=torch.Generator().manual_seed(seed)
    )
    rows = drawn.to(examples.prompt.device)
    for _ in range(len(over)):
        is_own = (over.prompt[rows] == examples.prompt).all(dim=1)
        if not is_own.any():
            return rows
        rows = torch.where(is_own, (rows + 1) % len(over), rows)
    raise InputError(
        "resample needs another example in the set `over`: it holds none but the patched one"
    )


def derangement(n: int, seed: int) -> Int[Tensor, " n"]:
    """A random permutation of 0..n-1, a single cycle, that leaves nothing in its place. Raises
    InputError for n < 2."""
    if n < 2:
        raise InputError(f"resample needs at least two examples, the set has {n}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def noise(n: int, shape: tuple[int, ...], seed: int) -> Float[Tensor, "n ..."]:
    """Standard normal numbers, the same for a row at every call."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
