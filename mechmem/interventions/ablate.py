"""Ablate: replace an activation by zero, its mean, another example's value or noise."""

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
from mechmem.spec.limits import Seed
from mechmem.spec.references import ExampleSetName
from mechmem.spec.sweep import Swept


class Ablate(UnitIntervention):
    """Replaces an activation by zero, a mean, another example's value or noise.

    If the model then fails, it needs the site's information for its answer. `zero` also removes
    information that is the same for all examples, and so overstates the loss. `mean` and `gaussian`
    use statistics of a reference set per position and unit, so that every head and neuron gets its
    own. `resample` uses the activation of another example, the same one at every site.
    Touches: any site, `batch pos ...`, at the chosen layers, positions and units.
    Raises: InputError for an unknown set, or for `resample` without another example.
    Source: arXiv:2211.00593 (means), arXiv:2409.09951 (a comparison).
    """

    by_example: ClassVar[bool] = True

    method: Swept[Literal["zero", "mean", "resample", "gaussian"]] = "mean"
    """The value that replaces the activation; `gaussian` draws it for each example from a normal
    distribution with the set's mean and standard deviation."""
    reference_set: Swept[ExampleSetName | None] = None
    """Set of the mean, the other examples or the spread, fed the prefix of the same label as the
    ablated set; by default, the ablated set itself. `zero` does not use it."""
    seed: Swept[Seed] = 0
    """Seed of `resample` and `gaussian`; an example gets the same value at every call, also when
    only part of its set is run."""

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
        """Normal numbers that are the same for an example at every call, whichever other examples
        are run with it."""
        n_positions = int(examples.whole.n_positions.max())
        names = sites.site(self.site).shape(model.cfg)[1:]
        shape = tuple(n_positions if isinstance(name, str) else name for name in names)
        drawn = noise(len(examples.whole), shape, int(digest([self.seed, at.hook]), 16))
        return at.take(drawn[examples.index], torch.arange(len(examples)))


def donors(examples: Examples, others: Examples, seed: int) -> Int[Tensor, " n"]:
    """For each example of a set, a random row of `others` with another prompt, whose activation
    replaces its own.

    Args:
        examples: the whole set that is ablated.
        others: the set from which the activations come; may be the same.
        seed: seed of the draw.

    Raises:
        InputError: if `others` has no other example.
    """
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
        "resample needs another example in the reference set, but it has only the ablated one; "
        "choose a larger `reference_set`"
    )


def derangement(n: int, seed: int) -> Int[Tensor, " n"]:
    """A random cyclic permutation of 0..n-1, so that no number stays in its place. Raises
    InputError for n < 2."""
    if n < 2:
        raise InputError(f"resample needs at least two examples, but the set has {n}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def noise(n: int, shape: tuple[int, ...], seed: int) -> Float[Tensor, "n ..."]:
    """Standard normal numbers, the same at every call with these arguments.

    Args:
        n: number of rows.
        shape: shape of each row.
        seed: seed of the draw.
    """
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
