"""Rank: Number of tokens that are more likely than the label's."""

from __future__ import annotations

from typing import ClassVar

from mechmem.data.examples import Examples
from mechmem.measures.measure import LabelMeasure, Logits, Values, of_labels


class Rank(LabelMeasure):
    """Number of tokens that are more likely than the label's; averaged over a whole answer."""

    unit: ClassVar[str] = "rank, 0 is best"

    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        labelled = of_labels(logits, examples.labels(self.label))
        return (logits > labelled[..., None]).sum(-1).to(logits.dtype)
