"""Accuracy: Share of answer tokens, or of whole answers, that are the label."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.measures.measure import LabelMeasure, Logits, Values


class Accuracy(LabelMeasure):
    """Share of answer tokens, or of whole answers, that are the label.

    With `label: true` on noisy instances it is the rule that answers, with `label: given` the
    memory.
    """

    unit: ClassVar[str] = "fraction"
    judges_answers: ClassVar[bool] = True

    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        return (logits.argmax(-1) == examples.labels(self.label)).to(logits.dtype)

    def whole(self, values: Values) -> Float[Tensor, " n"]:
        """A whole answer is right when every token is."""
        return values.amin(dim=1)
