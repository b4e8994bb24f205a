"""FreezePattern: attention weights are fixed to those of an unedited run."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import field_validator

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.models.architecture import Model
from mechmem.models.edits import Edit
from mechmem.session import Session
from mechmem.spec.selection import Indices, Names
from mechmem.spec.sweep import Swept


class FreezePattern(Intervention):
    """Fixes attention patterns to those of an unedited run, while the rest of the model is edited.

    An effect that remains passes through the values that heads move; an effect that disappears
    passes through queries and keys, which determine where heads attend. Alone and without a source,
    it changes nothing.
    Touches: `pattern`, `batch head pos key_pos`, of the chosen layers, heads and query positions.
    Raises: InputError for a layer, head or position that the model or task does not have.
    Source: Elhage et al. 2021, A mathematical framework for transformer circuits (no arXiv id).
    """

    by_example: ClassVar[bool] = True

    layer: Swept[Indices | None] = None
    """One layer or several; by default, every layer."""
    head: Swept[Indices | None] = None
    """One head or several; by default, every head."""
    position: Swept[Names | None] = None
    """Named query positions; by default, every position."""
    source: Source | None = None
    """The run whose patterns are used; by default, that of the same model on the same examples."""

    @field_validator("source", mode="before")
    @classmethod
    def _live(cls, value: Any) -> Any:
        return Source(live=value) if isinstance(value, (torch.nn.Module, Examples)) else value

    def edits(self, session: Session, model: Model, examples: Examples) -> list[Edit]:
        layers = tuple(range(model.cfg.n_layers)) if self.layer is None else self.layer
        patch = Patch(
            site="pattern",
            layer=layers,
            head=self.head,
            position=self.position,
            source=self.source or Source(live=model),
        )
        return patch.edits(session, model, examples)
