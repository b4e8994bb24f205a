"""Logit: Logit of the label's token, less that of another label where one is named."""

from __future__ import annotations

from typing import ClassVar

from mechmem.data.examples import AnyLabel, Examples
from mechmem.measures.measure import LabelMeasure, Logits, Values, of_labels


class Logit(LabelMeasure):
    """Logit of the label's token, less that of another label's token where one is named.

    With `label: given, against: pair` it says how far the model answers this example and not its
    minimal pair, and is 0 where both labels have the same token: what attribution and circuits are
    measured by.
    """

    unit: ClassVar[str] = "nats"

    against: AnyLabel | None = None
    """Whose label is subtracted."""

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
