"""PatchGrid: activation patching at any site, layer, position, head or neuron set, over a grid."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor

from mechmem.analyses.effects.effect import EffectAnalysis, Interventions
from mechmem.data.examples import Examples
from mechmem.interventions.patch import Patch, Source
from mechmem.session import Session
from mechmem.spec.selection import Indices, Names, Units
from mechmem.spec.sweep import Swept


class PatchGrid(EffectAnalysis):
    """Replaces an activation by its value from another forward pass and measures the answers.

    Sweep any field with `each:` to make the grid. Denoising: `model` and `examples` are the
    corrupted run and `source` the clean one. Noising: the other way round. If patching a site
    brings the source's answer, the site carries information that the answer depends on.
    Source: arXiv:2309.16042; across checkpoints: ours.
    """

    site: Swept[str]
    """A name of the sites table, or a TransformerLens hook name."""
    layer: Swept[Indices | None] = None
    """One layer or several; None for a site without layers."""
    position: Swept[Names | None] = None
    """Named positions; by default, all."""
    head: Swept[Indices | None] = None
    """Heads, at sites that have them; by default, all."""
    neurons: Swept[Units | None] = None
    """Neurons, at `neurons` and `mlp_pre`; by default, all."""
    source: Source
    """The run that is patched in."""

    @field_validator("source", mode="before")
    @classmethod
    def _live(cls, value: Any) -> Any:
        return Source(live=value) if isinstance(value, (torch.nn.Module, Examples)) else value

    def interventions(self, session: Session) -> Interventions:
        chosen = {
            name: getattr(self, name)
            for name in ("site", "layer", "position", "head", "neurons", "source")
        }
        return [Patch(**chosen)]

    def target(self, session: Session, examples: Examples) -> Tensor | None:
        if self.source.mean_over is not None:
            return None
        model, rows = self.source.run(session, session.model(self.model), examples)
        return session.baseline(model, rows)
