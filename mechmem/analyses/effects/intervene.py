"""Intervene: what any intervention of the registry does to the answers."""

from __future__ import annotations

from mechmem.analyses.effects.effect import EffectAnalysis, Interventions
from mechmem.interventions.intervention import Intervention
from mechmem.session import Session


class Intervene(EffectAnalysis):
    """One intervention, stated in full, and what it does to the answers.

    The general form of a knock-out or patching experiment; sweep any field of the intervention with
    `each:`, so that the deliberate site stands in one table with all others of its size. Source:
    ours.
    """

    intervention: Intervention

    def interventions(self, session: Session) -> Interventions:
        return [self.intervention]
