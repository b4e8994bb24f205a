"""RandomDirection: the same displacement in a random direction."""

from __future__ import annotations

from mechmem.interventions.controls.control import Control
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.models.architecture import Model


class RandomDirection(Control):
    """The same displacement, in norm and place, in a random direction."""

    def draws(self, intervention: Intervention, model: Model) -> list[list[Intervention]]:
        return [[RandomDisplacement(of=intervention, seed=self.seed + i)] for i in range(self.n)]
