"""Classifier: a linear probe fitted on clean instances, and the choice of instances to test it
on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.inlp import logistic_regression
from mechmem.interventions.subspace import float64
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.errors import InputError, suggest

PENALTIES = (1.0, 10.0, 100.0)
"""Default penalties of the squared weights to choose from."""
FEWEST = 4
"""Minimum number of examples: their first third then has two examples to fit on."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """A fitted multinomial logistic regression of a variable."""

    weight: Float64[Tensor, "n_values d"]
    bias: Float64[Tensor, " n_values"]
    values: Int[Tensor, " n_values"]
    """The values of the variable, one per class."""
    penalty: float

    def __call__(self, x: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """The predicted value for each row."""
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
    """The classifier fitted on the first third of the rows, with the penalty of highest accuracy on
    the second third. Of equally good penalties, the largest is chosen.

    Args:
        x: activations, one row per example.
        values: the value of the variable in each row.
        penalties: penalties of the squared weights to choose from.
        seed: seed of the split into thirds.
        alike: as in `thirds`.
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
    """Rows for fitting, for choosing the penalty and for testing.

    Args:
        n: number of rows.
        seed: seed of the split.
        alike: group number of each row; rows of a group are always in the same third. By default,
            every row is a group of its own.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if alike is None:
        return order.tensor_split(3)
    numbers, of_row = alike[order].unique(return_inverse=True)
    first = torch.full_like(numbers, n).scatter_reduce(0, of_row, torch.arange(n), "amin")
    rank = first.argsort().argsort()
    ends = torch.tensor([len(part) for part in rank.tensor_split(3)]).cumsum(0)
    third = torch.bucketize(rank[of_row], ends, right=True)
    return tuple(order[third == i] for i in range(3))


def alike(model: Model, examples: Examples, position: str) -> Int[Tensor, " n"]:
    """A group number per example: the same for examples with the same activation at the position,
    which must not be split between fitting and testing.

    Args:
        model: the model, whose attention may or may not be causal.
        examples: the examples.
        position: name of the position.
    """
    numbers: dict[tuple[int, ...], int] = {}
    read = _read_tokens(model, examples, position)
    return torch.tensor([numbers.setdefault(tokens, len(numbers)) for tokens in read])


def _read_tokens(model: Model, examples: Examples, position: str) -> list[tuple[int, ...]]:
    """The tokens on which each example's activation at the position depends: those up to the
    position, or the whole prompt if attention is not causal."""
    prompts = examples.prompt.tolist()
    if model.cfg.attention_dir != "causal":
        return [tuple(prompt) for prompt in prompts]
    ends = examples.indices(position)[:, 0].tolist()
    return [tuple(prompt[: end + 1]) for prompt, end in zip(prompts, ends, strict=True)]


def check_fit(
    session: Session, model: Model, name: str, variable: str, seed: int, position: str
) -> None:
    """Check that a probe can be fitted on a set.

    Args:
        session: gives the set.
        model: the model whose activations are read.
        name: name of the set.
        variable: the variable to read.
        seed: seed of the split into thirds.
        position: name of the position.

    Raises:
        InputError: if some examples are noisy, there are too few, or the variable is constant.
    """
    examples = session.examples(name)
    if n_noisy := int(examples.is_noisy.sum()):
        raise InputError(
            f"a probe is fitted on clean instances only, and {n_noisy} of the {len(examples)} in "
            f"{name!r} are noisy; give `fit_on` a set made with `noisy: false`"
        )
    if len(examples) < FEWEST:
        raise InputError(
            f"{name!r} has {len(examples)} examples: a probe needs at least {FEWEST}, preferably "
            "hundreds; raise its `n`"
        )
    train = thirds(len(examples), seed, alike(model, examples, position))[0]
    there = values_of(examples, variable)[train].unique()
    session.demand(
        len(there) > 1,
        f"in the third of {name!r} that a probe is fitted on, {variable} is always {there[0]}; "
        "choose a set in which it varies",
    )


def unseen(
    session: Session, model: Model, name: str, fit: Examples, seed: int, position: str
) -> Examples:
    """The examples of a set on which a probe fitted on `fit` can be tested: those whose activation
    at the position it was neither fitted nor tuned on. Of `fit` itself, this is the last third.

    Args:
        session: gives the set.
        model: the model whose activations are read.
        name: name of the set to test on.
        fit: the set on which the probe is fitted.
        seed: seed of the split into thirds.
        position: name of the position.

    Raises:
        InputError: if no example is left.
    """
    examples = session.examples(name)
    train, dev, _ = thirds(len(fit), seed, alike(model, fit, position))
    seen = set(_read_tokens(model, fit.select(torch.cat([train, dev])), position))
    read = _read_tokens(model, examples, position)
    is_new = torch.tensor([tokens not in seen for tokens in read])
    if is_new.all():
        return examples
    session.demand(
        bool(is_new.any()),
        f"the probe is fitted on every activation that {name!r} has at this position, so none is "
        "left for testing; choose another set or a later position",
    )
    return examples.select(is_new).as_set() if is_new.any() else examples


def values_of(examples: Examples, variable: str) -> Int[Tensor, " n"]:
    """The value of the variable for each example. Raises InputError for an unknown variable."""
    if variable not in examples.variables:
        raise InputError(
            f"there is no variable {variable!r}; {suggest(variable, examples.variables)}"
        )
    return examples.variables[variable]


def shuffled_labels(
    sets: Sequence[Examples], values: Int[Tensor, " m"], by: Sequence[str], seed: int
) -> list[Int[Tensor, " n"]]:
    """Random labels: one per prompt, or one per combination of the variables `by`,
    the control task of a random function of them.

    Args:
        sets: the sets that share the labels.
        values: values from which labels are drawn, with their frequencies.
        by: names of variables; if empty, each prompt gets a label of its own.
        seed: seed of the draw.

    Returns:
        The labels of each set.

    Source: arXiv:1909.03368 (control tasks).
    """
    types = [
        torch.stack([values_of(s, name) for name in by], dim=1) if by else s.prompt for s in sets
    ]
    width = max(kind.shape[1] for kind in types)
    # Prompts of several lengths end in filler; a wider set only has more of it.
    types = [torch.nn.functional.pad(kind, (0, width - kind.shape[1]), value=-1) for kind in types]
    _, of_row = torch.cat(types).unique(dim=0, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = values[torch.randint(len(values), (int(of_row.max()) + 1,), generator=generator)]
    return list(drawn[of_row].split([len(s) for s in sets]))
