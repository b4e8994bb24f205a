"""Probability: Probability of the label's token; for a whole answer, the product over its
tokens."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.measures.measure import LabelMeasure, Logits, Values, of_labels


class Probability(LabelMeasure):
    """Probability of the label's token; for a whole answer, the product over its tokens."""

    unit: ClassVar[str] = "probability"

    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        return of_labels(logits.softmax(-1), examples.labels(self.label))

    def whole(self, values: Values) -> Float[Tensor, " n"]:
        """The probability of the whole answer under the prefix that the model is fed."""
        return values.prod(dim=1)
