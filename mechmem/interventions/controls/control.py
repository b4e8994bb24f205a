"""Controls: the random interventions that stand beside a deliberate one, matched to it in size."""

from __future__ import annotations

from abc import abstractmethod

from pydantic import Field

from mechmem.interventions.intervention import Intervention
from mechmem.models.architecture import Model
from mechmem.spec.registry import Component


class Control(Component, registry="control"):
    """Draws random interventions that are matched to a given one."""

    n: int = Field(20, ge=1)
    """Number of draws; a control's value for an example is its mean over them."""
    seed: int = 0

    @abstractmethod
    def draws(self, intervention: Intervention, model: Model) -> list[list[Intervention]]:
        """`n` lists of interventions, each list applied together."""
