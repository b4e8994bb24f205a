"""RandomNeurons: the same intervention at as many random neurons."""

from __future__ import annotations

import torch

from mechmem.interventions.controls.control import Control
from mechmem.interventions.intervention import Intervention, UnitIntervention
from mechmem.models.architecture import Model
from mechmem.spec.errors import InputError


class RandomNeurons(Control):
    """The same intervention at as many neurons, drawn at random from all layers.

    Raises InputError for an intervention at another site than neurons.
    """

    def draws(self, intervention: Intervention, model: Model) -> list[list[Intervention]]:
        if not isinstance(intervention, UnitIntervention) or intervention.site not in (
            "neurons",
            "mlp_pre",
        ):
            raise InputError("control random_neurons stands beside interventions at `neurons` only")
        layers = (
            intervention.layer if isinstance(intervention.layer, tuple) else (intervention.layer,)
        )
        width = int(model.cfg.d_mlp or 0)
        k = len(layers) * (width if intervention.neurons is None else len(intervention.neurons))
        return [
            self._at_random(intervention, k, width, model.cfg.n_layers, self.seed + i)
            for i in range(self.n)
        ]

    @staticmethod
    def _at_random(
        like: UnitIntervention, k: int, width: int, n_layers: int, seed: int
    ) -> list[Intervention]:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(width * n_layers, generator=generator)[:k]
        sets = {
            layer: tuple(sorted((drawn[drawn // width == layer] % width).tolist()))
            for layer in range(n_layers)
        }
        return [
            like.model_copy(update={"layer": layer, "neurons": set_})
            for layer, set_ in sets.items()
            if set_
        ]
