"""Steer: push an activation along the direction that tells two values of a variable apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import UnitIntervention
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.sweep import Swept


class Steer(UnitIntervention):
    """Adds `factor` times the difference between the mean activations of two values of a variable.

    If the answer changes as if the variable had the value `towards`, the model reads the variable
    along this direction. The direction is that of each position, at the site itself; factor 1
    carries the mean of `away` to that of `towards`, factor 0 changes nothing.
    Touches: any site, `batch pos ...`, where chosen.
    Raises: InputError for an unknown set or variable, or a value that no example of the set has.
    Source: arXiv:2312.06681 (contrastive activation addition).
    """

    variable: Swept[str]
    """A variable of the task."""
    towards: Swept[int]
    """Value of the variable to push to."""
    away: Swept[int]
    """Value to push from."""
    on: Swept[str] = "clean"
    """The example set of the means, fed the same label's prefix as the patched one."""
    factor: Swept[float] = 1.0
    """In units of the distance between the two means."""

    def replacement(
        self, hook: str, model: Model, examples: Examples, session: Session
    ) -> Callable[[Tensor], Tensor]:
        on = session.examples(self.on).with_prefix(examples.prefix)
        values = session.activation(model, on, hook)
        ends = [self._mean(values, on, value, session) for value in (self.towards, self.away)]
        step = self.factor * (ends[0] - ends[1])
        return lambda activation: activation + step

    def _mean(
        self, values: Tensor, on: Examples, value: int, session: Session
    ) -> Float[Tensor, "..."]:
        if self.variable not in on.variables:
            raise InputError(
                f"there is no variable {self.variable!r}; {suggest(self.variable, on.variables)}"
            )
        rows = on.variables[self.variable] == value
        if rows.any():
            return values[rows.to(values.device)].mean(dim=0)
        if session.is_rehearsal:
            return torch.zeros_like(values[0])
        known = sorted(set(on.variables[self.variable].tolist()))
        raise InputError(f"no example of {self.on!r} has {self.variable} {value}; there is {known}")
