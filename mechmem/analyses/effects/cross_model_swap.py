"""CrossModelSwap: components exchanged between a training and its twin, by their weights or by what
they give out."""

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
"""What the components of a layer give out."""
OUTSIDE = {"embed": ("embed", "pos_embed"), "unembed": ("logits",)}
"""What the others do."""


class CrossModelSwap(EffectAnalysis):
    """Exchanges a component between a model and its twin, and asks whether the memory moves with
    it.

    Of two trainings from the same weights on the same instances, only one had wrong labels to
    remember. `weights`: the component computes as the other model's does, on the host's own inputs;
    if true answers come back, what was remembered lay in its weights. `activations`: it gives out
    what it does in the other model, whose own inputs to it come along. The memory is *in* a
    component if it leaves the model with it and enters the twin with it. Clean and held-out
    instances say what an exchange breaks by itself; `baseline` and `source` are the two whole
    models. For `embed` both ways are one; the activation of `unembed` is the other model's answer.
    Source: ours.
    """

    columns: ClassVar[Mapping[str, str]] = {
        **EffectAnalysis.columns,
        "condition": "baseline (the host, whole), patched (with the other's component), control "
        "(mean over its draws) "
        "or source (the other model, whole)",
    }

    twin: Swept[CheckpointName] = CheckpointName("twin")
    """The checkpoint of the other training, of one architecture with `model`."""
    into: Swept[Literal["model", "twin"]] = "model"
    """The host, which gets a component of the other: `model` (does the memory leave?) or `twin`
    (does it come?)."""
    method: Swept[Literal["weights", "activations"]] = "weights"
    component: Swept[Part | Parts]
    """What is exchanged, as in `swap_weights`; of several, all together."""
    layer: Swept[Indices | None] = None
    """Layers of `attn` and `mlp`; every layer unless given."""

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
        """The whole other model, which reads the same examples, and so has an answer of its own
        too."""
        fed = super()._source_readings(session, examples)
        whole = self.readings(session, session.model(self.twin), examples, []).values
        answered = {key: values for key, values in whole.items() if key[0] == "greedy"}
        return fed and Readings({**fed.values, **answered})
