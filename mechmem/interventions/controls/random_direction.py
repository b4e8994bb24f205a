"""RandomDirection: a displacement of the same size in a random direction."""

from __future__ import annotations

from collections.abc import Sequence

from mechmem.interventions.controls.control import OTHER, Control
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.models.architecture import Model


class RandomDirection(Control):
    """A displacement of the same norm at the same place, in a random direction."""

    def draws(
        self, interventions: Sequence[Intervention], model: Model
    ) -> list[list[Intervention]]:
        seeds = [self.seed + i for i in range(self.n)]
        return [
            [
                RandomDisplacement(of=part, seed=seed + OTHER * number)
                for number, part in enumerate(interventions)
            ]
            for seed in seeds
        ]
