"""Label noise: the choice of wrong training labels."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from mechmem.spec.errors import InputError
from mechmem.spec.limits import Seed, Width
from mechmem.spec.registry import Component
from mechmem.spec.sweep import Swept


class LabelNoise(Component, registry="noise"):
    """Replaces a share of the training labels by wrong ones. The choice of instances and of wrong
    labels depends on `seed` only."""

    rate: Swept[Annotated[float, Field(ge=0, le=1)]] = 0.05
    """Share of the training instances whose label is wrong (fraction)."""
    seed: Seed = 0
    """Seed of the choice of instances and of their labels; independent of the split and of the
    model."""

    def corrupt(
        self, true: Int[Tensor, "n k"], alphabets: tuple[tuple[int, ...], ...]
    ) -> tuple[Int[Tensor, "n k"], Bool[Tensor, " n"]]:
        """The given labels and the mask of the noisy instances.

        Args:
            true: the true labels.
            alphabets: for each answer place, the tokens that are possible there.

        Raises:
            InputError: if no wrong label exists for some instance.
        """
        generator = torch.Generator().manual_seed(self.seed)
        noisy = (
            torch.randperm(len(true), generator=generator)[: round(self.rate * len(true))]
            .sort()
            .values
        )
        given, is_noisy = true.clone(), torch.zeros(len(true), dtype=torch.bool)
        if len(noisy):
            given[noisy] = self.wrong(true, noisy, alphabets, generator)
            is_noisy[noisy] = True
        if (given[noisy] == true[noisy]).all(dim=1).any():
            raise InputError(
                f"{self.kind} noise found no wrong label for some instance: there are too few "
                "different labels"
            )
        return given, is_noisy

    @abstractmethod
    def wrong(
        self,
        true: Int[Tensor, "n k"],
        noisy: Int[Tensor, " m"],
        alphabets: tuple[tuple[int, ...], ...],
        generator: torch.Generator,
    ) -> Int[Tensor, "m k"]:
        """A wrong label for each noisy row.

        Args:
            true: the true labels of all instances.
            noisy: the rows that get a wrong label.
            alphabets: for each answer place, the tokens that are possible there.
            generator: source of all random choices.
        """


class UniformWrong(LabelNoise):
    """The label of another training instance, drawn at random, but never equal to the true one.

    Such labels carry no information about the inputs, so fitting them requires memorisation.
    Source: arXiv:2507.04782 (main setting).
    """

    def wrong(self, true, noisy, alphabets, generator):  # noqa: ANN001, ANN201
        return _redrawn(
            true[noisy], lambda n: true[torch.randint(len(true), (n,), generator=generator)]
        )


class Permuted(LabelNoise):
    """The noisy instances exchange their labels among themselves.

    The distribution of labels is exactly preserved.
    """

    def wrong(self, true, noisy, alphabets, generator):  # noqa: ANN001, ANN201
        labels = true[noisy]
        order = torch.randperm(len(noisy), generator=generator)
        for _ in range(1000):
            clash = (labels[order] == labels).all(dim=1).nonzero()[:, 0]
            if not len(clash):
                return labels[order]
            partners = torch.randint(len(noisy), clash.shape, generator=generator)
            for i, j in zip(clash.tolist(), partners.tolist(), strict=True):
                order[[i, j]] = order[[j, i]]
        raise InputError(
            f"permuted noise cannot give {len(noisy)} instances each other's labels: raise the rate"
        )


class Digit(LabelNoise):
    """One answer token, at a random place, is replaced by another one.

    The rest of the label stays true, so memory only has to override the rule at a single place.
    """

    places: tuple[int, ...] | None = None
    """Answer places that may be altered, counted from 0 in written order; by default, all."""

    def wrong(self, true, noisy, alphabets, generator):  # noqa: ANN001, ANN201
        labels = true[noisy].clone()
        usable = [
            place
            for place, alphabet in enumerate(alphabets)
            if len(alphabet) > 1 and (self.places is None or place in self.places)
        ]
        if not usable:
            raise InputError(
                "digit noise needs an answer place with at least two tokens; change `places`"
            )
        chosen = torch.tensor(usable)[
            torch.randint(len(usable), (len(noisy),), generator=generator)
        ]
        for row, place in enumerate(chosen.tolist()):
            others = [token for token in alphabets[place] if token != labels[row, place].item()]
            labels[row, place] = others[int(torch.randint(len(others), (1,), generator=generator))]
        return labels


class Systematic(LabelNoise):
    """Every answer token is shifted by `shift` in its alphabet: a fixed wrong rule.

    A control: this noise is a second rule, which can be fitted without memorisation.
    """

    shift: Swept[Width] = 1
    """Number of steps, cyclic, in the alphabet of each place."""

    def wrong(self, true, noisy, alphabets, generator):  # noqa: ANN001, ANN201
        labels = true[noisy].clone()
        for place, alphabet in enumerate(alphabets):
            following = {
                token: alphabet[(i + self.shift) % len(alphabet)]
                for i, token in enumerate(alphabet)
            }
            labels[:, place] = torch.tensor(
                [following[token] for token in labels[:, place].tolist()]
            )
        return labels


def _redrawn(labels: Tensor, draw) -> Tensor:  # noqa: ANN001
    wrong = draw(len(labels))
    for _ in range(1000):
        same = (wrong == labels).all(dim=1)
        if not same.any():
            return wrong
        wrong[same] = draw(int(same.sum()))
    raise InputError(
        "uniform_wrong noise found no wrong label: every training instance has the same label; "
        "choose a task with several answers"
    )
