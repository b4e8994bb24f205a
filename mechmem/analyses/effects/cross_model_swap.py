"""CrossModelSwap: components swapped between a model and its twin, by their weights or by their
activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import pandas as pd
from pydantic import model_validator
from torch import Tensor

from mechmem.analyses.effects.effect import EffectAnalysis, Interventions, Readings
from mechmem.data.examples import Examples
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.swap_weights import Part, Parts, SwapWeights
from mechmem.session import Session
from mechmem.spec.references import CheckpointName
from mechmem.spec.selection import Indices
from mechmem.spec.sweep import Each, Swept

IN_LAYERS = {"attn": "attn_out", "mlp": "mlp_out"}
"""Site of the output of each component of a layer."""
OUTSIDE = {"embed": ("embed", "pos_embed"), "unembed": ("logits",)}
"""Sites of the outputs of the components outside the layers."""


class CrossModelSwap(EffectAnalysis):
    """Swaps a component between a model and its twin to see whether the memory moves with it.

    The two models were trained from the same initial weights on the same instances, but only one of
    them on wrong labels. With `weights`, the component computes with the other model's weights on
    the host's own inputs; if true answers come back, the memory was in its weights. With
    `activations`, its output is the one it has in the other model, so that the other model's inputs
    to it count too. The memory is *in* a component if it leaves the model with the component and
    enters the twin with it. Clean and held-out instances show how much a swap breaks by itself;
    `baseline` and `source` are the two unmodified models. For `embed` the two methods are the same;
    the activation of `unembed` is the other model's answer.
    Source: ours.
    """

    columns: ClassVar[Mapping[str, str]] = {
        **EffectAnalysis.columns,
        "condition": "baseline (the unmodified host), intervened (with the other model's "
        "component), control (mean over its draws) or source (the unmodified other model)",
    }

    twin: Swept[CheckpointName] = CheckpointName("twin")
    """The checkpoint of the other training run, with the same architecture as `model`."""
    into: Swept[Literal["model", "twin"]] = "model"
    """The host, which receives a component of the other model: `model` (does the memory leave?) or
    `twin` (does it arrive?)."""
    method: Swept[Literal["weights", "activations"]] = "weights"
    """Whether the component's weights or its output activations come from the other model."""
    component: Swept[Part | Parts]
    """The component to swap, as in `swap_weights`; several are swapped together."""
    layer: Swept[Indices | None] = None
    """Layers of `attn` and `mlp`; by default, every layer."""

    @model_validator(mode="after")
    def _has_layers(self) -> Self:
        if (
            not isinstance(self.component, Each)
            and self.layer is not None
            and not IN_LAYERS.keys() & self._components
        ):
            raise ValueError(f"{' and '.join(self._components)} have no layers; leave `layer` out")
        return self

    @property
    def _components(self) -> tuple[Part, ...]:
        return self.component if isinstance(self.component, tuple) else (self.component,)

    def table(self, session: Session) -> pd.DataFrame:
        if self.into == "model":
            return super().table(session)
        return self.model_copy(
            update={"model": self.twin, "twin": self.model, "into": "model"}
        ).table(session)

    def interventions(self, session: Session) -> Interventions:
        source, layers = Source(checkpoint=self.twin), self.layer
        if self.method == "weights":
            return [SwapWeights(component=self.component, layer=layers, source=source)]
        every = tuple(range(session.model(self.model).cfg.n_layers)) if layers is None else layers
        inside = [
            Patch(site=IN_LAYERS[c], layer=every, source=source)
            for c in self._components
            if c in IN_LAYERS
        ]
        sites = [site for c in self._components for site in OUTSIDE.get(c, ())]
        return [*inside, *(Patch(site=site, source=source) for site in sites)]

    def target(self, session: Session, examples: Examples) -> Tensor:
        return session.baseline(session.model(self.twin), examples)

    def _source_readings(self, session: Session, examples: Examples) -> Readings | None:
        """The unmodified other model on the same examples, with its own greedy answers too."""
        fed = super()._source_readings(session, examples)
        whole = self.readings(session, session.model(self.twin), examples, []).values
        answered = {key: values for key, values in whole.items() if key[0] == "greedy"}
        return fed and Readings({**fed.values, **answered})
