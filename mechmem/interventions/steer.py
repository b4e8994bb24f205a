"""Steer: move an activation along the difference between two values of a variable."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import LACKING, UnitIntervention
from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit, lacks
from mechmem.session import Session
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.references import ExampleSetName
from mechmem.spec.sweep import Swept


class Steer(UnitIntervention):
    """Adds `factor` times the difference between the mean activations of two values of a variable.

    If the answer changes as if the variable had the value `towards`, the model reads the variable
    along this direction. Each site and position has a direction of its own. Factor 1 moves the mean
    of `away` to that of `towards`; factor 0 changes nothing.
    Touches: any site, `batch pos ...`, at the chosen layers, positions and units.
    Raises: InputError for an unknown set or variable, or a value that no example of the set has.
    Source: arXiv:2312.06681 (contrastive activation addition).
    """

    by_example: ClassVar[bool] = True

    variable: Swept[str]
    """A variable of the task."""
    towards: Swept[int]
    """Value of the variable to steer towards."""
    away: Swept[int]
    """Value of the variable to steer away from."""
    on: Swept[ExampleSetName] = ExampleSetName("clean")
    """The example set of the means, fed the prefix of the same label as the steered examples."""
    factor: Swept[float] = 1.0
    """Size of the step, in units of the difference between the two means."""

    def edit(self, at: At, session: Session, model: Model, examples: Examples) -> Edit:
        chosen = session.examples(self.on).with_prefix(examples.prefix)
        there = self.at(at.hook, model, chosen)
        values = session.activation(model, chosen, there)
        ends = [self._mean(values, chosen, value, session) for value in (self.towards, self.away)]
        for end in ends:
            session.demand(not lacks(end[None], at), f"the mean {LACKING.format(at.hook)}")
        step = self.factor * (ends[0] - ends[1])
        # Masked scores are -inf in both means: their difference is NaN, and they must stay masked.
        return Edit(at, lambda own, _: torch.where(own.isneginf(), own, own + step))

    def _mean(
        self, values: Tensor, chosen: Examples, value: int, session: Session
    ) -> Float[Tensor, "..."]:
        if self.variable not in chosen.variables:
            known = suggest(self.variable, chosen.variables)
            raise InputError(f"there is no variable {self.variable!r}; {known}")
        rows = chosen.variables[self.variable] == value
        there = sorted(set(chosen.variables[self.variable].tolist()))
        session.demand(
            bool(rows.any()),
            f"no example of {self.on!r} has {self.variable} {value}; choose from {there}",
        )
        if not rows.any():
            return torch.zeros_like(values[0])
        found = values[rows.to(values.device)]
        # The value of an example without the position is NaN.
        return found.nanmean(dim=0) if found.isnan().any() else found.mean(dim=0)
