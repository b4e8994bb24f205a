"""KL: KL divergence between the next-token distributions without and with the intervention."""

from __future__ import annotations

from typing import ClassVar

from mechmem.data.examples import Examples
from mechmem.measures.measure import Logits, Measure, Values


class KL(Measure):
    """KL(baseline || intervened) of the next-token distributions of the same model.

    It measures how much an intervention changes the answer, in any direction.
    """

    unit: ClassVar[str] = "nats"

    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        before, after = baseline.log_softmax(-1), logits.log_softmax(-1)
        return (before.exp() * (before - after)).sum(-1)
