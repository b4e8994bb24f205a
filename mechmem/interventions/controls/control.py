"""Controls: the random interventions that stand beside a deliberate one, matched to it in size."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field

from mechmem.interventions.intervention import Intervention, UnitIntervention
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.models.architecture import Model
from mechmem.spec.registry import Component, InputError


class Control(Component, registry="control"):
    """Draws random interventions that are matched to a given one."""

    n: int = Field(20, ge=1)
    """Number of draws; a control's value for an example is its mean over them."""
    seed: int = 0

    @abstractmethod
    def draws(self, intervention: Intervention, model: Model) -> list[list[Intervention]]:
        """`n` lists of interventions, each list applied together."""


class RandomDirection(Control):
    """The same displacement, in norm and place, in a random direction."""

    def draws(self, intervention: Intervention, model: Model) -> list[list[Intervention]]:
        return [[RandomDisplacement(of=intervention, seed=self.seed + i)] for i in range(self.n)]


class RandomNeurons(Control):
    """The same intervention at as many neurons, drawn at random from all layers.

    Raises InputError for an intervention at another site than neurons.
    """

    def draws(self, intervention: Intervention, model: Model) -> list[list[Intervention]]:
        if not isinstance(intervention, UnitIntervention) or intervention.site not in ("neurons", "mlp_pre"):
            raise InputError("control random_neurons stands beside interventions at `neurons` only")
        layers = intervention.layer if isinstance(intervention.layer, tuple) else (intervention.layer,)
        width = int(model.cfg.d_mlp or 0)
        k = len(layers) * (width if intervention.neurons is None else len(intervention.neurons))
        return [self._at_random(intervention, k, width, model.cfg.n_layers, self.seed + i) for i in range(self.n)]

    @staticmethod
    def _at_random(like: UnitIntervention, k: int, width: int, n_layers: int, seed: int) -> list[Intervention]:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(width * n_layers, generator=generator)[:k]
        sets = {layer: tuple(sorted((drawn[drawn // width == layer] % width).tolist())) for layer in range(n_layers)}
        return [like.model_copy(update={"layer": layer, "neurons": set_}) for layer, set_ in sets.items() if set_]
