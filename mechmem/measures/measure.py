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
    """Whether the value depends on the most likely tokens only, so that greedy answers have one."""

    @classmethod
    def shorthand(cls, word: str) -> dict[str, Any]:
        """`accuracy_true` is `{kind: accuracy, label: true}`; another word is a kind."""
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
        """How tables call it."""
        return self.kind

    @abstractmethod
    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values:
        """The value at each answer token.

        Args:
            logits: of the answer tokens, `n n_answer d_vocab`.
            examples: whose answers they are, with the prefix that the model was fed.
            baseline: the logits of the same model without intervention.
        """

    def of_answer(
        self, answer: Int[Tensor, "n n_answer"], examples: Examples, d_vocab: int
    ) -> Values | None:
        """The value of a decoded answer; None where an answer alone does not have one.

        A measure whose value depends on the most likely tokens only says so with `judges_answers`,
        and then has one without further code.

        Args:
            answer: the greedy answer.
            examples: whose answer it is.
            d_vocab: number of tokens that the model answers with.
        """
        if not self.judges_answers:
            return None
        certain = one_hot(answer, d_vocab).float()
        return self(certain, examples, certain)

    def constant_on(self, examples: Examples) -> str | None:
        """What to measure instead where this is the same for every model on these examples by
        definition; None where it is not."""
        return None

    def whole(self, values: Values) -> Float[Tensor, " n"]:
        """The value of the whole answer; by default the mean over its tokens."""
        return values.mean(dim=1)


class LabelMeasure(Measure):
    """A measure of one of the two labels; in a spec also written `accuracy_true`,
    `accuracy_given`."""

    label: AnyLabel = "true"
    """Whose label: the given one, the true one, or the true one of the minimal pair."""

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.label}"

    @abstractmethod
    def __call__(self, logits: Logits, examples: Examples, baseline: Logits) -> Values: ...


def of_labels(
    values: Float[Tensor, "n n_answer d_vocab"], labels: Int[Tensor, "n n_answer"]
) -> Values:
    """The entry of each label."""
    return values.gather(-1, labels[..., None])[..., 0]
