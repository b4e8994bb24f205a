"""Controls: random interventions of the same size as the ones under test."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from mechmem.interventions.intervention import Intervention
from mechmem.models.architecture import Model
from mechmem.spec.limits import Draws, Seed
from mechmem.spec.registry import Component

OTHER = 10**6
"""Offset between the seeds of the interventions of one list, so that their directions differ."""


class Control(Component, registry="control"):
    """Draws random interventions that match given ones."""

    n: Draws = 20
    """Number of draws; the control's value for an example is its mean over them."""
    seed: Seed = 0
    """Seed of the first draw."""

    @abstractmethod
    def draws(
        self, interventions: Sequence[Intervention], model: Model
    ) -> list[list[Intervention]]:
        """`n` lists of random interventions; those of a list are applied together.

        Args:
            interventions: the interventions to match, which are applied together.
            model: the model that is intervened on.
        """
