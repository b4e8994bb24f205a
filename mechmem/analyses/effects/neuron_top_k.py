"""NeuronTopK: the most shifted neurons put back, against random ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, model_validator

from mechmem.analyses.effects.effect import EffectAnalysis, Interventions
from mechmem.analyses.neurons.neuron_shift import NeuronShift
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.sweep import Swept


class NeuronTopK(EffectAnalysis):
    """Patches the k most shifted neurons back to `before`, beside k random ones of the same layers.

    If few shifted neurons bring back the true answers and as many random ones do not, the memory
    sits in them. Sweep `k` for the cumulative curve, and `layer` for one layer at a time. Source:
    ours, for claim C7.
    """

    columns: ClassVar[Mapping[str, str]] = {
        **EffectAnalysis.columns,
        "k": "number of neurons patched",
    }

    before: str = "before"
    layer: Swept[int | tuple[int, ...]]
    k: Swept[NonNegativeInt]
    ranked_on: str = "noisy"
    """The noisy set whose shifts rank the neurons."""
    matched: str = "clean"
    n_random: int = Field(20, ge=1)
    """Draws of k random neurons."""
    seed: int = 0

    @model_validator(mode="after")
    def _brings_its_control(self) -> Self:
        if self.control is not None:
            raise ValueError(
                "neuron_top_k draws its own control, `n_random` times; leave `control` out"
            )
        return self

    @property
    def layers(self) -> tuple[int, ...]:
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)

    def parts(self, session: Session) -> Interventions:
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

    def control_draws(self, session: Session, parts: Interventions) -> list[list[Intervention]]:
        width = int(session.model(self.model).cfg.d_mlp or 0)
        every = np.array([(layer, neuron) for layer in self.layers for neuron in range(width)])
        generators = (torch.Generator().manual_seed(self.seed + i) for i in range(self.n_random))
        return [
            self._patches(every[torch.randperm(len(every), generator=g)[: self.k].numpy()])
            for g in generators
        ]

    def _patches(self, chosen: np.ndarray) -> list[Intervention]:
        sets = {
            layer: tuple(sorted(int(n) for at, n in chosen if at == layer)) for layer in self.layers
        }
        source = Source(checkpoint=self.before)
        return [
            Patch(site="neurons", layer=layer, neurons=n, source=source)
            for layer, n in sets.items()
            if n
        ]
