"""Measure: logits and examples -> a value for every example and answer token."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from mechmem.data.examples import AnyLabel, Examples
from mechmem.spec.registry import Component

Logits = Float[Tensor, "n n_answer d_vocab"]
Values = Float[Tensor, "n n_answer"]


class Measure(Component, registry="measure"):
    """A number for each answer token of each example."""

    unit: ClassVar[str] = ""
    judges_answers: ClassVar[bool] = False
    """Whether the value depends only on the most likely tokens, so that it is defined for greedy
    answers."""

    @classmethod
    def shorthand(cls, word: str) -> dict[str, Any]:
        """`accuracy_true` is short for `{kind: accuracy, label: true}`; any other word is a
        kind."""
        kind, _, label = word.rpartition("_")
        member = cls.kinds().get(kind)
        if (
            label in ("true", "given", "pair")
            and member is not None
            and "label" in member.model_fields
        ):
            return {"kind": kind, "label": label}
        return {"kind": word}

    @property
    def name(self) -> str:
        """The name in tables."""
        return self.kind

    @abstractmethod
    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        """The value at each answer token.

        Args:
            logits: logits of the answer tokens, `n n_answer d_vocab`.
            examples: the answered examples, with the prefix that the model was fed.
            baseline: logits of the same model without intervention, `n n_answer d_vocab`.
        """

    def of_answer(
        self, answer: Int[Tensor, "n n_answer"], examples: Examples, d_vocab: int
    ) -> Values | None:
        """The value of a decoded answer; None if the measure needs logits.

        For a measure with `judges_answers`, this needs no further code.

        Args:
            answer: tokens of the greedy answers, `n n_answer`.
            examples: the answered examples.
            d_vocab: size of the model's output vocabulary.
        """
        if not self.judges_answers:
            return None
        certain = one_hot(answer, d_vocab).float()
        return self(certain, examples, certain)

    def constant_on(self, examples: Examples) -> str | None:
        """The reason, with an alternative, if the measure is by definition the same for every model
        on these examples; otherwise None."""
        return None

    def whole(self, values: Values) -> Float[Tensor, " n"]:
        """The value of the whole answer; by default the mean over its tokens."""
        return values.mean(dim=1)


class LabelMeasure(Measure):
    """A measure of one label; a spec may write it as `accuracy_true` or `accuracy_given`."""

    label: AnyLabel = "true"
    """The given label, the true label, or (`pair`) the true label of the minimal pair."""

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.label}"

    @abstractmethod
    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values: ...


def of_labels(
    values: Float[Tensor, "n n_answer d_vocab"], labels: Int[Tensor, "n n_answer"]
) -> Values:
    """The value at the token of each label."""
    return values.gather(-1, labels[..., None])[..., 0]
