"""KL: KL divergence of the next-token distribution from that of the same model without
intervention."""

from __future__ import annotations

from typing import ClassVar

from mechmem.data.examples import Examples
from mechmem.measures.measure import Logits, Measure, Values


class KL(Measure):
    """KL divergence of the next-token distribution from that of the same model without
    intervention.

    How much the intervention changes the answer at all, in whichever direction.
    """

    unit: ClassVar[str] = "nats"

    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        before, after = baseline.log_softmax(-1), logits.log_softmax(-1)
        return (before.exp() * (before - after)).sum(-1)
