"""Patch: activation patching from another example, checkpoint, training or mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from pydantic import Field, field_validator, model_serializer, model_validator
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import UnitIntervention
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.registry import Component


class Source(Component):
    """Where a patched activation comes from.

    `checkpoint` names another model of the experiment (which may be of another training),
    `examples` another set, row by row, `pair` the minimal pair of each row, `mean_over` the mean
    over a set at each position. A checkpoint goes with any of the others. From Python, a live model
    or `Examples` may be given as they are.
    """

    checkpoint: str | None = None
    examples: str | None = None
    pair: bool = False
    mean_over: str | None = None
    live: Any = Field(None, exclude=True, repr=False)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.live is not None and not isinstance(self.live, (torch.nn.Module, Examples)):
            raise InputError(
                f"a live source is a model or Examples, not {type(self.live).__name__}"
            )
        if isinstance(self.live, torch.nn.Module) and self.checkpoint is not None:
            raise InputError("a source takes either a live model or `checkpoint`")
        sets = [
            self.examples is not None,
            self.pair,
            self.mean_over is not None,
            isinstance(self.live, Examples),
        ]
        if sum(sets) > 1:
            raise InputError("a source takes one of `examples`, `pair` and `mean_over`")
        if not any((*sets, self.checkpoint, self.live is not None)):
            raise InputError("a source needs `checkpoint`, `examples`, `pair: true` or `mean_over`")
        return self

    @model_serializer(mode="plain")
    def _to_block(self) -> dict[str, Any]:
        if self.live is not None:
            raise InputError(
                "a live model or example set cannot be written into a spec; name it in the experiment"
            )
        return {name: value for name in type(self).model_fields if (value := getattr(self, name))}

    def activation(self, hook: str, model: Model, examples: Examples, session: Session) -> Tensor:
        """The source's activation at a hook for each of the examples, `n ...`, or `1 ...` for a
        mean."""
        source = self._model(model, session)
        if hook not in source.hook_dict:
            raise InputError(
                f"the source has no {hook!r}: it must be of one architecture with the patched model"
            )
        if self.mean_over is not None:
            everything = session.examples(self.mean_over).with_prefix(examples.prefix)
            return session.activation(source, everything, hook).mean(dim=0, keepdim=True)
        return session.activation(source, self._rows(examples, session), hook)

    def run(self, model: Model, examples: Examples, session: Session) -> tuple[Model, Examples]:
        """The forward pass that is patched in: which model on which examples."""
        return self._model(model, session), self._rows(examples, session)

    def _model(self, model: Model, session: Session) -> Model:
        if self.checkpoint is not None:
            return session.model(self.checkpoint)
        return model if self.live is None or isinstance(self.live, Examples) else self.live

    def _rows(self, examples: Examples, session: Session) -> Examples:
        if self.pair:
            if examples.counterfactual is None:
                raise InputError("`pair: true` needs an example set that was made with `pair:`")
            return examples.counterfactual
        if self.examples is None and not isinstance(self.live, Examples):
            return examples
        other = session.examples(self.examples) if self.examples is not None else self.live
        if int(examples.index.max()) >= len(other):
            raise InputError(
                f"the source has {len(other)} examples, fewer than the {len(examples)} that are patched"
            )
        return other.select(examples.index).with_prefix(examples.prefix)


class Patch(UnitIntervention):
    """Activation patching: put in the place of an activation its value from another forward pass.

    If the answer follows the source, the site carries what the answer depends on (sufficient, not
    always necessary).
    Touches: any site, `batch pos ...`, where chosen. Source: arXiv:2309.16042.
    """

    source: Source

    @field_validator("source", mode="before")
    @classmethod
    def _live(cls, value: Any) -> Any:
        return Source(live=value) if isinstance(value, (torch.nn.Module, Examples)) else value

    def replacement(
        self, hook: str, model: Model, examples: Examples, session: Session
    ) -> Callable[[Tensor], Tensor]:
        value = self.source.activation(hook, model, examples, session)
        return lambda activation: fitting(value, activation, hook)


def fitting(value: Tensor, activation: Tensor, hook: str) -> Tensor:
    """A value of `n ...` or `1 ...` in the shape of the activation. Raises InputError if it cannot
    take its place."""
    if value.shape[1:] != activation.shape[1:] or len(value) not in (1, len(activation)):
        raise InputError(
            f"at {hook} the source has shape {tuple(value.shape)}, the patched model {tuple(activation.shape)}: "
            "they must be of one architecture, and the model be run on the examples that the patch was made for"
        )
    return value.expand_as(activation)
