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
from mechmem.models.architecture import Model
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

    Of equally good penalties it takes the largest.

    Args:
        x: activations.
        values: the value of the variable in each row.
        penalties: of the squared weights, to choose from.
        seed: of the split into thirds.
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
    """Rows to fit on, to choose the penalty on, and to test on; rows of one number in `alike` stand
    in one third.

    Args:
        n: number of rows.
        seed: of the split.
        alike: the same number for rows that must not be parted.
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
    """The same number for examples whose activations at the position are the same, so that what is
    learnt of one is known of the other.

    Args:
        model: whose attention is causal or looks ahead.
        examples: the examples.
        position: name of the position.
    """
    numbers: dict[tuple[int, ...], int] = {}
    read = _read_tokens(model, examples, position)
    return torch.tensor([numbers.setdefault(tokens, len(numbers)) for tokens in read])


def _read_tokens(model: Model, examples: Examples, position: str) -> list[tuple[int, ...]]:
    """Of each prompt, what the activation at the position depends on: the tokens up to there, or
    the whole prompt where attention looks ahead."""
    prompts = examples.prompt.tolist()
    if model.cfg.attention_dir != "causal":
        return [tuple(prompt) for prompt in prompts]
    ends = examples.indices(position)[:, 0].tolist()
    return [tuple(prompt[: end + 1]) for prompt, end in zip(prompts, ends, strict=True)]


def check_fit(
    session: Session, model: Model, name: str, variable: str, seed: int, position: str
) -> None:
    """Raises InputError for a set to fit on if some of it is noisy, or if it is too small or too
    uniform to learn from.

    Args:
        session: gives the set.
        model: whose activations are read.
        name: of the set.
        variable: what is to be read.
        seed: of the split into thirds.
        position: name of the position.
    """
    examples = session.examples(name)
    if n_noisy := int(examples.is_noisy.sum()):
        raise InputError(
            f"a probe is fitted on clean instances only, and {n_noisy} of the {len(examples)} in "
            f"{name!r} are noisy; give `fit_on` a set made with `noisy: false`"
        )
    if len(examples) < FEWEST:
        raise InputError(
            f"{name!r} has {len(examples)} examples: a probe needs {FEWEST}, and better some "
            "hundreds"
        )
    train = thirds(len(examples), seed, alike(model, examples, position))[0]
    there = values_of(examples, variable)[train].unique()
    session.demand(
        len(there) > 1,
        f"in the third of {name!r} that a probe is fitted on, {variable} is always {there[0]}: "
        "nothing can be learnt from it",
    )


def unseen(
    session: Session, model: Model, name: str, fit: Examples, seed: int, position: str
) -> Examples:
    """The examples of a set whose activation at the position a probe on `fit` is neither fitted nor
    tuned on: of `fit` itself, the last third; of others, those that read the same as none of it.

    Args:
        session: gives the set.
        model: whose activations are read.
        name: of the set.
        fit: the set of the fit.
        seed: of the split into thirds.
        position: name of the position.

    Raises:
        InputError: if there are none.
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
        f"a probe is fitted on all that {name!r} has at this position: none is left to test it on",
    )
    return examples.select(is_new).as_set() if is_new.any() else examples


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

    Args:
        sets: the sets that share the labels.
        values: what labels are drawn from.
        by: names of variables; none for a label of each prompt's own.
        seed: of the draw.

    Source: arXiv:1909.03368 (control tasks).
    """
    types = [
        torch.stack([values_of(s, name) for name in by], dim=1) if by else s.prompt for s in sets
    ]
    width = max(kind.shape[1] for kind in types)
    # Prompts of several lengths end in filler; a wider set adds nothing but more of it.
    types = [torch.nn.functional.pad(kind, (0, width - kind.shape[1]), value=-1) for kind in types]
    _, of_row = torch.cat(types).unique(dim=0, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = values[torch.randint(len(values), (int(of_row.max()) + 1,), generator=generator)]
    return list(drawn[of_row].split([len(s) for s in sets]))
