"""Classifier: a linear probe as it is fitted on clean instances, and the instances that it is
tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.inlp import logistic_regression
from mechmem.interventions.subspace import float64
from mechmem.session import Session
from mechmem.spec.errors import InputError, suggest

PENALTIES = (1.0, 10.0, 100.0)
FEWEST = 4
"""Examples that thirds can be made of, two of them to fit on."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """A fitted multinomial logistic regression of a variable."""

    weight: Float64[Tensor, "n_values d"]
    bias: Float64[Tensor, " n_values"]
    values: Int[Tensor, " n_values"]
    """The values of the variable that it tells apart."""
    penalty: float

    def __call__(self, x: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """The value that it reads in each row."""
        return self.values[
            (float64(x) @ self.weight.T + self.bias).argmax(dim=1).to(self.values.device)
        ]


def fitted(
    x: Float[Tensor, "n d"],
    values: Int[Tensor, " n"],
    penalties: Sequence[float],
    seed: int,
    alike: Int[Tensor, " n"] | None = None,
) -> Classifier:
    """The classifier fitted on the first third of the rows, with the penalty that reads most of the
    second third right.

    Of equally good penalties it takes the largest. `alike` as in `thirds`.
    """
    train, dev, _ = thirds(len(x), seed, alike)
    there, labels = values[train].unique(return_inverse=True)
    found, right = [], []
    for penalty in sorted(penalties, reverse=True):
        weight, bias = logistic_regression(x[train], labels.to(x.device), len(there), penalty)
        found.append(Classifier(weight, bias, there, penalty))
        right.append(int((found[-1](x[dev]) == values[dev]).sum()))
    return found[right.index(max(right))]


def thirds(n: int, seed: int, alike: Int[Tensor, " n"] | None = None) -> tuple[Tensor, ...]:
    """Rows to fit on, to choose the penalty on, and to test on; rows of one number in `alike` stand
    in one third."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if alike is None:
        return order.tensor_split(3)
    numbers, of_row = alike[order].unique(return_inverse=True)
    first = torch.full_like(numbers, n).scatter_reduce(0, of_row, torch.arange(n), "amin")
    rank = first.argsort().argsort()
    ends = torch.tensor([len(part) for part in rank.tensor_split(3)]).cumsum(0)
    third = torch.bucketize(rank[of_row], ends, right=True)
    return tuple(order[third == i] for i in range(3))


def alike(examples: Examples, position: int) -> Int[Tensor, " n"]:
    """The same number for examples whose prompts are the same up to the position: attention is
    causal, so that their activations there are the same too, and what is learnt of one is known of
    the other."""
    return examples.prompt[:, : position + 1].unique(dim=0, return_inverse=True)[1]


def check_fit(session: Session, name: str, variable: str, seed: int, position: int) -> None:
    """Raises InputError for a set to fit on if some of it is noisy, or if it is too small or too
    uniform to learn from."""
    examples = session.examples(name)
    if n_noisy := int(examples.is_noisy.sum()):
        raise InputError(
            f"a probe is fitted on clean instances only, and {n_noisy} of the {len(examples)} in {name!r} are noisy; "
            "give `fit_on` a set made with `noisy: false`"
        )
    if len(examples) < FEWEST:
        raise InputError(
            f"{name!r} has {len(examples)} examples: a probe needs {FEWEST}, and better some hundreds"
        )
    there = values_of(examples, variable)[
        thirds(len(examples), seed, alike(examples, position))[0]
    ].unique()
    if len(there) < 2 and not session.is_rehearsal:
        raise InputError(
            f"in the third of {name!r} that a probe is fitted on, {variable} is always {there.item()}: "
            "nothing can be learnt from it"
        )


def unseen(session: Session, name: str, fit: Examples, seed: int, position: int) -> Examples:
    """The examples of a set whose activation at the position a probe on `fit` is neither fitted nor
    tuned on: of `fit` itself, the last third; of others, those whose prompt is another one up to
    the position.

    Raises InputError if there are none.
    """
    examples = session.examples(name)
    train, dev, _ = thirds(len(fit), seed, alike(fit, position))
    seen = {tuple(row) for row in fit.prompt[torch.cat([train, dev]), : position + 1].tolist()}
    is_new = torch.tensor(
        [tuple(row) not in seen for row in examples.prompt[:, : position + 1].tolist()]
    )
    if is_new.all() or session.is_rehearsal:
        return examples
    if not is_new.any():
        raise InputError(
            f"a probe is fitted on all that {name!r} has at this position: none is left to test it on"
        )
    return examples.select(is_new).as_set()


def values_of(examples: Examples, variable: str) -> Int[Tensor, " n"]:
    """The variable of each example. Raises InputError for one that the task does not have."""
    if variable not in examples.variables:
        raise InputError(
            f"there is no variable {variable!r}; {suggest(variable, examples.variables)}"
        )
    return examples.variables[variable]


def shuffled_labels(
    sets: Sequence[Examples], values: Int[Tensor, " m"], by: Sequence[str], seed: int
) -> list[Int[Tensor, " n"]]:
    """For every prompt, or for every combination of the variables `by`, a label drawn at random
    from `values`.

    Source: arXiv:1909.03368 (control tasks).
    """
    types = [
        torch.stack([values_of(s, name) for name in by], dim=1) if by else s.prompt for s in sets
    ]
    _, of_row = torch.cat(types).unique(dim=0, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = values[torch.randint(len(values), (int(of_row.max()) + 1,), generator=generator)]
    return list(drawn[of_row].split([len(s) for s in sets]))
