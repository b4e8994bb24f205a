"""OffLabelRate: how often the answer matches none of the labels."""

from __future__ import annotations

from typing import ClassVar

import torch

from mechmem.data.examples import Examples
from mechmem.measures.measure import Logits, Measure, Values


class OffLabelRate(Measure):
    """Share of answer tokens that match no label: not given, not true, nor (with pairs) the pair's.

    It is high if an intervention breaks the model instead of redirecting it.
    """

    unit: ClassVar[str] = "fraction"
    judges_answers: ClassVar[bool] = True

    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        answer = logits.argmax(-1)
        labels = [
            examples.given,
            examples.true,
            *([examples.counterfactual.true] if examples.counterfactual else []),
        ]
        return torch.stack([answer != label for label in labels]).all(dim=0).to(logits.dtype)
