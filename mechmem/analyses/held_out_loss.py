"""HeldOutLoss: what a model gets wrong that a reference model gets right, on the same instances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from mechmem.analyses.analysis import Analysis
from mechmem.session import Session
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import LEVEL, ratio
from mechmem.statistics.rows import Row, over_examples

Hits = Float[np.ndarray, " n"]


class HeldOutLoss(Analysis):
    """How much accuracy a model lost compared with a reference, and how many times the errors.

    After memorisation a model may answer instances wrongly that it never saw. The fair reference
    was trained as long, without the wrong labels: a noise-free twin at the same step. Both answer
    the same instances by greedy decoding, against their true labels, so differences are paired.
    Accuracies have exact intervals that count n (Clopper-Pearson); take 1,000 instances or more.
    The ratio of errors shows what a difference near an accuracy of 1 hides: from 0.99 to 0.97 is
    two points and three times the errors.
    Source: claim C2 of arXiv:2507.04782; interval of the ratio: Katz et al. 1978, for pairs.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "condition": "model, reference, or lost (by the model compared with the reference)",
        "measure": "accuracy of whole answers against the true label; for lost: accuracy "
        "(reference minus model) and error_ratio (errors of the model over those of the "
        "reference)",
        "unit": "unit of the measure",
        "value": "mean over the examples; the ratio is undefined if the reference makes no error",
        "low": "lower end of the 95 % interval: exact for an accuracy, bootstrap over examples for "
        "the difference, of the logarithm for the ratio; undefined if the model makes no error",
        "high": "upper end of that interval; undefined likewise",
        "n": "number of examples",
        "per_example": "1 for each right answer, otherwise 0, in the order of the set; for the "
        "difference 1, 0 or -1; for the ratio contributions to first order",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint that may have lost something."""
    reference: Swept[CheckpointName] = CheckpointName("twin")
    """The checkpoint that it is compared with."""
    examples: Swept[ExampleSetName] = ExampleSetName("held_out")
    """Instances that neither model was trained on."""

    def table(self, session: Session) -> pd.DataFrame:
        examples = session.examples(self.examples)
        hits = {}
        for condition, name in (("model", self.model), ("reference", self.reference)):
            answer = session.greedy(session.model(name), examples)
            hits[condition] = (answer == examples.true).all(dim=1).double().cpu().numpy()
        rows = [{"condition": name} | accuracy(values) for name, values in hits.items()]
        rows.append({"condition": "lost", "measure": "accuracy", "unit": "fraction"})
        rows[-1] |= over_examples(hits["reference"] - hits["model"])
        rows.append({"condition": "lost"} | error_ratio(**hits))
        return pd.DataFrame(rows).assign(examples=self.examples)[[*self.columns]]


def accuracy(hits: Hits) -> Row:
    """The share of right answers with its Clopper-Pearson interval."""
    found = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(LEVEL, method="exact")
    row = over_examples(hits) | {"low": float(found.low), "high": float(found.high)}
    return row | {"measure": "accuracy", "unit": "fraction"}


def error_ratio(model: Hits, reference: Hits) -> Row:
    """The errors of the model over those of the reference, on the same examples.

    With b and c the numbers of examples that only one of the two answers wrongly, the logarithm
    has the variance (b + c) / (errors of the model x errors of the reference).

    Args:
        model: 1 for each right answer of the model, otherwise 0.
        reference: the same for the reference.
    """
    wrong, other = 1 - model, 1 - reference
    labels: dict[str, Any] = {"measure": "error_ratio", "unit": "times", "n": len(model)}
    contributions = ratio(wrong, other, 0.5 / len(model)).astype(np.float32)
    nothing = float("nan")
    if not other.any():
        undefined = {"value": nothing, "low": nothing, "high": nothing}
        return labels | undefined | {"per_example": contributions}
    value = float(wrong.sum() / other.sum())
    low = high = nothing
    if value > 0:
        spread = np.sqrt((wrong != other).sum() / (wrong.sum() * other.sum()))
        width = float(stats.norm.ppf((1 + LEVEL) / 2) * spread)
        low, high = value * np.exp(-width), value * np.exp(width)
    return labels | {"value": value, "low": low, "high": high, "per_example": contributions}
