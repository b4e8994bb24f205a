"""Logit: Logit of the label's token, minus that of another label if one is named."""

from __future__ import annotations

from typing import ClassVar

from mechmem.data.examples import AnyLabel, Examples
from mechmem.measures.measure import LabelMeasure, Logits, Values, of_labels


class Logit(LabelMeasure):
    """Logit of the label's token, minus that of another label's token if one is named.

    With `label: given, against: pair` it measures how far the model prefers the answer to this
    example over that to its minimal pair: the default metric of attribution and circuits. It is 0
    where both labels have the same token.
    """

    unit: ClassVar[str] = "nats"

    against: AnyLabel | None = None
    """The label whose logit is subtracted; by default, none."""

    @property
    def name(self) -> str:
        return super().name + (f"_less_{self.against}" if self.against else "")

    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        values = of_labels(logits, examples.labels(self.label))
        return (
            values
            if self.against is None
            else values - of_labels(logits, examples.labels(self.against))
        )

    def constant_on(self, examples: Examples) -> str | None:
        if self.against is None:
            return None
        if (examples.labels(self.label) == examples.labels(self.against)).all():
            return (
                f"the {self.label} and the {self.against} label of these examples are the same, so "
                f"{self.name} is 0; take logit_{self.label} or probability_{self.label}"
            )
        return None
