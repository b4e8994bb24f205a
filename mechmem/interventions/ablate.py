"""Ablate: knock an activation out, by zero, its mean, another example's value or noise."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import LACKING, UnitIntervention
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit, lacks, replacing
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.files import digest
from mechmem.spec.references import ExampleSetName
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

    by_example: ClassVar[bool] = True

    method: Swept[Literal["zero", "mean", "resample", "gaussian"]] = "mean"
    """`gaussian` draws from a normal distribution with the set's mean and standard deviation, anew
    for each example."""
    reference_set: Swept[ExampleSetName | None] = None
    """Set of the mean, the other examples or the spread, fed the same label's prefix as the patched
    one; the set that the examples are from unless given. Not looked at by `zero`."""
    seed: Swept[int] = 0
    """Seed of `resample` and `gaussian`: an example gets the same at every call, also when few of
    its set are run."""

    def edit(self, at: At, session: Session, model: Model, examples: Examples) -> Edit:
        if self.method == "zero":
            return Edit(at, lambda own, _: torch.zeros_like(own))
        chosen = examples.whole
        if self.reference_set is not None:
            chosen = session.examples(self.reference_set).with_prefix(examples.prefix)
        there = self.at(at.hook, model, chosen)
        values = session.activation(model, chosen, there)
        if self.method == "resample":
            lent = donors(examples.whole, chosen, self.seed)
            value, source = values[lent[examples.index].to(values.device)], "the other example"
        else:
            value, source = there.mean(values), "the mean"
        if self.method == "gaussian":
            spread = there.mean((values - value).pow(2)).sqrt()
            drawn = self._noise(at, model, examples).to(values)
            # Scores that are masked are -inf in all examples, and stay masked.
            value = torch.where(value.isneginf(), value, value + spread * drawn)
        session.demand(not lacks(value, at), f"{source} {LACKING.format(at.hook)}")
        return replacing(at, value, source)

    def _noise(self, at: At, model: Model, examples: Examples) -> Float[Tensor, "n ..."]:
        """The same numbers for an example at every call, whatever else is chosen with it."""
        n_positions = int(examples.whole.n_positions.max())
        names = sites.site(self.site).shape(model.cfg)[1:]
        shape = tuple(n_positions if isinstance(name, str) else name for name in names)
        drawn = noise(len(examples.whole), shape, int(digest([self.seed, at.hook]), 16))
        return at.take(drawn[examples.index], torch.arange(len(examples)))


def donors(examples: Examples, others: Examples, seed: int) -> Int[Tensor, " n"]:
    """For each example of a set, the row of `others` whose activations it gets: never its own."""
    if others.key == examples.key:
        return derangement(len(examples), seed)
    drawn = torch.randint(
        len(others), (len(examples),), generator=torch.Generator().manual_seed(seed)
    )
    rows = drawn.to(examples.prompt.device)
    for _ in range(len(others)):
        is_own = (others.prompt[rows] == examples.prompt).all(dim=1)
        if not is_own.any():
            return rows
        rows = torch.where(is_own, (rows + 1) % len(others), rows)
    raise InputError(
        "resample needs another example in the reference set: it holds none but the patched one"
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
