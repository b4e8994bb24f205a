"""Patch: activation patching from another example, checkpoint, training run or mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, field_validator, model_serializer, model_validator
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import LACKING, UnitIntervention
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit, lacks, replacing
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.registry import Component


class Source(Component):
    """The forward pass from which a patched activation comes.

    Give another model, other inputs, or both: `checkpoint` can be combined with any one of the
    other fields. From Python, a model or `Examples` may be passed directly.
    """

    checkpoint: CheckpointName | None = None
    """Another model of the experiment, possibly of another training run."""
    examples: ExampleSetName | None = None
    """Another example set, aligned row by row."""
    pair: bool = False
    """The minimal pair of each example."""
    mean_over: ExampleSetName | None = None
    """The mean over an example set, at each position."""
    live: Any = Field(None, exclude=True, repr=False)
    """From Python only: a model or `Examples`."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.live is not None and not isinstance(self.live, (torch.nn.Module, Examples)):
            kind = type(self.live).__name__
            raise InputError(f"a live source must be a model or Examples, not {kind}")
        if isinstance(self.live, torch.nn.Module) and self.checkpoint is not None:
            raise InputError("a source takes either a live model or `checkpoint`")
        live = isinstance(self.live, Examples)
        sets = [self.examples is not None, self.pair, self.mean_over is not None, live]
        if sum(sets) > 1:
            raise InputError("a source takes one of `examples`, `pair` and `mean_over`")
        if not any((*sets, self.checkpoint, self.live is not None)):
            raise InputError("a source needs `checkpoint`, `examples`, `pair: true` or `mean_over`")
        return self

    @model_serializer(mode="plain")
    def _to_block(self) -> dict[str, Any]:
        if self.live is not None:
            raise InputError(
                "a live model or example set can't be written into a spec; "
                "name it in the experiment"
            )
        return {name: value for name in type(self).model_fields if (value := getattr(self, name))}

    def activation(
        self,
        place: Callable[[Examples], At],
        session: Session,
        model: Model,
        examples: Examples,
    ) -> Tensor:
        """The source's activation for each of the examples, `n ...`, or `1 ...` for a mean.

        Args:
            place: maps the source's examples to the hook, positions and units that are read.
            session: gives models, sets and activations.
            model: the patched model, which is also the source if no other is named.
            examples: the patched examples.
        """
        source = self.model_of(session, model)
        rows = self._rows(session, examples)
        if self.mean_over is not None:
            rows = session.examples(self.mean_over).with_prefix(examples.prefix)
        at = place(rows)
        try:
            sites.hook_of(source, at.hook)
        except InputError as error:
            raise InputError(
                f"the source has no {at.hook!r}, as it must to be patched in from: {error}"
            ) from error
        value = session.activation(source, rows, at)
        return value if self.mean_over is None else at.mean(value)

    def run(self, session: Session, model: Model, examples: Examples) -> tuple[Model, Examples]:
        """The forward pass that is patched in, as its model and its examples.

        Args:
            session: gives models and sets.
            model: the patched model.
            examples: the patched examples.
        """
        return self.model_of(session, model), self._rows(session, examples)

    def model_of(self, session: Session, model: Model) -> Model:
        """The model from which activations or weights come: another one, or the edited one."""
        if self.checkpoint is not None:
            return session.model(self.checkpoint)
        return model if self.live is None or isinstance(self.live, Examples) else self.live

    def _rows(self, session: Session, examples: Examples) -> Examples:
        if self.pair:
            if examples.counterfactual is None:
                raise InputError("`pair: true` needs an example set that was made with `pair:`")
            return examples.counterfactual
        if self.examples is None and not isinstance(self.live, Examples):
            return examples
        other = session.examples(self.examples) if self.examples is not None else self.live
        if int(examples.index.max()) >= len(other):
            raise InputError(
                f"the source has {len(other)} examples, fewer than the {len(examples)} that are "
                "patched"
            )
        return other.select(examples.index).with_prefix(examples.prefix)


class Patch(UnitIntervention):
    """Activation patching: replaces an activation by its value from another forward pass.

    If the answer then follows the source, the site carries information that determines the answer
    (sufficient, but not always necessary).
    Touches: any site, `batch pos ...`, at the chosen layers, positions and units.
    Source: arXiv:2309.16042.
    """

    by_example: ClassVar[bool] = True

    source: Source
    """The forward pass from which the value comes."""

    @field_validator("source", mode="before")
    @classmethod
    def _live(cls, value: Any) -> Any:
        return Source(live=value) if isinstance(value, (torch.nn.Module, Examples)) else value

    def edit(self, at: At, session: Session, model: Model, examples: Examples) -> Edit:
        def place(rows: Examples) -> At:
            return self.at(at.hook, model, rows)

        value = self.source.activation(place, session, model, examples)
        session.demand(not lacks(value, at), f"the source {LACKING.format(at.hook)}")
        return replacing(at, value)
