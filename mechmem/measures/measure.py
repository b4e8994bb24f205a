"""Measure: logits and examples -> a value for every example and answer token."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from mechmem.data.examples import AnyLabel, Examples
from mechmem.spec.registry import Component

Logits = Float[Tensor, "n n_answer d_vocab"]
Values = Float[Tensor, "n n_answer"]


class Measure(Component, registry="measure"):
    """A number for each answer token of each example."""

    unit: ClassVar[str] = ""

    @classmethod
    def shorthand(cls, word: str) -> dict[str, Any]:
        """`accuracy_true` is `{kind: accuracy, label: true}`; another word is a kind."""
        kind, _, label = word.rpartition("_")
        member = cls.kinds().get(kind)
        if (
            label in ("true", "given", "pair")
            and member is not None
            and "label" in member.model_fields
        ):
            return {"kind": kind, "label": label}
        return {"kind": word}

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.kind

    @abstractmethod
    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        """The value at each answer token; `baseline` are the logits of the same model without
        intervention."""

    def whole(self, values: Values) -> Float[Tensor, " n"]:
        """The value of the whole answer; the mean over its tokens unless a measure says
        otherwise."""
        return values.mean(dim=1)


class LabelMeasure(Measure):
    """A measure of one of the two labels; in a spec also written `accuracy_true`,
    `accuracy_given`."""

    label: AnyLabel = "true"
    """Whose label: the given one, the true one, or the true one of the minimal pair."""

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.label}"

    @abstractmethod
    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values: ...


def of_labels(
    values: Float[Tensor, "n n_answer d_vocab"], labels: Int[Tensor, "n n_answer"]
) -> Values:
    """The entry of each label."""
    return values.gather(-1, labels[..., None])[..., 0]
