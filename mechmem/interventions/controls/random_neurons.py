"""RandomNeurons: the same intervention at equally many random neurons."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mechmem.interventions.controls.control import OTHER, Control
from mechmem.interventions.intervention import Intervention, UnitIntervention
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.spec.errors import InputError
from mechmem.spec.selection import Units


class RandomNeurons(Control):
    """The same intervention at equally many neurons, drawn at random.

    Raises InputError for an intervention at a site other than neurons.
    """

    layers: Units | None = None
    """Layers from which the neurons are drawn; by default, all layers."""

    def draws(
        self, interventions: Sequence[Intervention], model: Model
    ) -> list[list[Intervention]]:
        drawn = [self._draws_of(part, OTHER * i, model) for i, part in enumerate(interventions)]
        return [[part for parts in draw for part in parts] for draw in zip(*drawn, strict=True)]

    def _draws_of(self, part: Intervention, seed: int, model: Model) -> list[list[Intervention]]:
        is_of_units = isinstance(part, UnitIntervention)
        if not is_of_units or sites.site(part.site).name not in ("neurons", "mlp_pre"):
            raise InputError(
                "the control random_neurons only matches interventions at `neurons` or `mlp_pre`; "
                "choose random_direction for other sites"
            )
        n_layers = len(part.layer) if isinstance(part.layer, tuple) else 1
        width = int(model.cfg.d_mlp or 0)
        k = n_layers * (width if part.neurons is None else len(part.neurons))
        return [self.at_random(part, k, self.seed + seed + i, model) for i in range(self.n)]

    def at_random(
        self, like: UnitIntervention, k: int, seed: int, model: Model
    ) -> list[Intervention]:
        """The same intervention at k random neurons: one intervention per layer that has some.

        Args:
            like: the intervention to copy, at other layers and neurons.
            k: number of neurons.
            seed: seed of the draw.
            model: the model that has the neurons.
        """
        generator, width = torch.Generator().manual_seed(seed), int(model.cfg.d_mlp or 0)
        layers = tuple(range(model.cfg.n_layers)) if self.layers is None else self.layers
        drawn = torch.randperm(width * len(layers), generator=generator)[:k]
        found: list[Intervention] = []
        for i, layer in enumerate(layers):
            chosen = tuple(sorted((drawn[drawn // width == i] % width).tolist()))
            if chosen:
                found.append(like.model_copy(update={"layer": layer, "neurons": chosen}))
        return found
