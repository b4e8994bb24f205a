"""Controls: random interventions that are matched in size to a deliberate one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from pydantic import Field

from mechmem.interventions.intervention import Intervention
from mechmem.models.architecture import Model
from mechmem.spec.registry import Component

OTHER = 10**6
"""Between the seeds for the interventions of one list: no two move in the same direction."""


class Control(Component, registry="control"):
    """Draws random interventions that are matched to given ones."""

    n: int = Field(20, ge=1)
    """Number of draws; a control's value for an example is its mean over them."""
    seed: int = 0

    @abstractmethod
    def draws(
        self, interventions: Sequence[Intervention], model: Model
    ) -> list[list[Intervention]]:
        """`n` lists of interventions, each list applied together as the given ones are."""
