"""Accuracy: Share of answer tokens, or of whole answers, that equal the label."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.measures.measure import LabelMeasure, Logits, Values


class Accuracy(LabelMeasure):
    """Share of answer tokens, or of whole answers, that equal the label.

    On noisy instances, `label: true` measures answers by the rule and `label: given` answers from
    memory.
    """

    unit: ClassVar[str] = "fraction"
    judges_answers: ClassVar[bool] = True

    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        return (logits.argmax(-1) == examples.labels(self.label)).to(logits.dtype)

    def whole(self, values: Values) -> Float[Tensor, " n"]:
        """1 where every token of the answer is right, otherwise 0."""
        return values.amin(dim=1)
