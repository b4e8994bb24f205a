"""Rank: Number of tokens that are more likely than the label's; ties count half."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.measures.measure import LabelMeasure, Logits, Values, of_labels


class Rank(LabelMeasure):
    """Number of tokens that are more likely than the label's; averaged over a whole answer.

    Each other token that is equally likely counts half, so that a model for which all tokens are
    equally likely is at chance.
    """

    unit: ClassVar[str] = "rank, 0 is best"

    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        labelled = of_labels(logits, examples.labels(self.label))
        return mean_rank(logits, labelled)


def mean_rank(logits: Float[Tensor, "*n d_vocab"], of: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The rank of one logit among all, from 0; the mean of the best and the worst rank of a tie.

    Args:
        logits: of every token.
        of: the logit of one of them.
    """
    higher, tied = logits > of[..., None], logits == of[..., None]
    others = tied.sum(-1) - 1  # the token is tied with itself
    return (higher.sum(-1) + others / 2).to(logits.dtype)
