"""Intervene: the effect of any single intervention on the answers."""

from __future__ import annotations

from mechmem.analyses.effects.effect import EffectAnalysis, Interventions
from mechmem.interventions.intervention import Intervention
from mechmem.session import Session


class Intervene(EffectAnalysis):
    """Applies one intervention, written out in full, and measures the answers.

    The general form of a knock-out or patching experiment. Sweep any field of the intervention with
    `each:`, so that one table compares the site of interest with all others of its size.
    Source: ours.
    """

    intervention: Intervention
    """The intervention, with its kind and fields."""

    def interventions(self, session: Session) -> Interventions:
        return [self.intervention]
