"""NeuronTopK: the most shifted neurons restored, compared with random ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field, NonNegativeInt

from mechmem.analyses.effects.effect import AnswerAnalysis, Interventions
from mechmem.analyses.neurons.neuron_shift import NeuronShift
from mechmem.interventions.controls.random_neurons import RandomNeurons
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.selection import Indices
from mechmem.spec.sweep import Swept


class NeuronTopK(AnswerAnalysis):
    """Patches the k most shifted neurons back to their values in the checkpoint `before`.

    If a few shifted neurons restore the true answers, and equally many random neurons of the same
    layers do not, the memory is in them. Sweep `k` for the cumulative curve, and `layer` for one
    layer at a time.
    Source: ours, for claim C7.
    """

    columns: ClassVar[Mapping[str, str]] = {
        **AnswerAnalysis.columns,
        "k": "number of neurons patched",
    }

    before: CheckpointName = CheckpointName("before")
    """The checkpoint whose values the neurons get."""
    layer: Swept[Indices]
    """Layers whose neurons are ranked together."""
    k: Swept[NonNegativeInt]
    """Number of neurons that are patched."""
    ranked_on: ExampleSetName = ExampleSetName("noisy")
    """The noisy set whose shifts rank the neurons."""
    matched: ExampleSetName = ExampleSetName("clean")
    """The clean set with which the noisy one is compared."""
    n_random: int = Field(20, ge=1)
    """Number of draws of k random neurons."""
    seed: int = 0
    """Seed of the first of these draws."""

    @property
    def layers(self) -> tuple[int, ...]:
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)

    def interventions(self, session: Session) -> Interventions:
        shift = NeuronShift(
            before=self.before, after=self.model, examples=self.ranked_on, matched=self.matched
        )
        table = shift.kept(session)
        ranked = table[table["layer"].isin(self.layers)].sort_values(
            "shift_noisy", ascending=False, kind="stable"
        )
        if self.k > len(ranked):
            raise InputError(
                f"k {self.k} is more than the {len(ranked)} neurons of layers {self.layers}"
            )
        return self._patches(ranked[["layer", "neuron"]].to_numpy()[: self.k])

    def controls(
        self, session: Session, interventions: Interventions
    ) -> dict[str, list[list[Intervention]]]:
        control = RandomNeurons(n=self.n_random, layers=self.layers)
        like = Patch(site="neurons", layer=self.layers[0], source=Source(checkpoint=self.before))
        seeds = range(self.seed, self.seed + self.n_random)
        model = session.model(self.model)
        return {"control": [control.at_random(like, self.k, seed, model) for seed in seeds]}

    def _patches(self, chosen: np.ndarray) -> list[Intervention]:
        source = Source(checkpoint=self.before)
        found: list[Intervention] = []
        for layer in self.layers:
            neurons = tuple(sorted(int(n) for at, n in chosen if at == layer))
            if neurons:
                found.append(Patch(site="neurons", layer=layer, neurons=neurons, source=source))
        return found
