"""LogitDifference: Logit of the true token minus that of the given one."""

from __future__ import annotations

from typing import ClassVar

from mechmem.data.examples import Examples
from mechmem.measures.measure import Logits, Measure, Values, of_labels


class LogitDifference(Measure):
    """Logit of the true token minus that of the given one; 0 where both labels have the same token.

    Positive if the rule wins over the memory. On clean instances it is 0 by definition.
    """

    unit: ClassVar[str] = "nats"

    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        return of_labels(logits, examples.true) - of_labels(logits, examples.given)

    def constant_on(self, examples: Examples) -> str | None:
        if (examples.true == examples.given).all():
            return (
                "the two labels of these examples are the same, so logit_difference is 0; "
                "take logit_true, probability_true or accuracy_true"
            )
        return None
