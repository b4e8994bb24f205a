"""Erase: remove the linearly decodable information about a variable from an activation."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.inlp import inlp
from mechmem.interventions.intervention import SiteIntervention, shared
from mechmem.interventions.subspace import (
    Eraser,
    class_code,
    leace,
    random_subspace,
    variance_matched,
)
from mechmem.models import sites
from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit
from mechmem.session import Session
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.limits import Index, Seed, Width
from mechmem.spec.references import ExampleSetName
from mechmem.spec.sweep import Swept

LEAST = 0.05
"""Minimum share of the variance that must remain. With less, the activation is as good as gone, and
an effect would not be due to the variable."""


class Erase(SiteIntervention):
    """Erases a variable from an activation, so that no linear classifier can read it there.

    If the answer is lost with the variable, but not with a matched control, the model uses this
    information. There is one eraser for each hook and position, fitted on unedited activations of
    `fit_on`. `leace` is the smallest change that erases the variable, around the mean. `inlp`
    removes the directions of one classifier after another and is not centred. There are two
    controls: `random` projects out a random subspace of equal rank, and `variance_matched` one that
    also removes equal variance (a random subspace, rotated towards the directions of most or least
    variance as far as needed). If an activation is constant, or INLP's first classifier is no
    better than chance, nothing is removed; `erasers` then shows rank 0.
    Touches: sites of `batch pos d_model` and `batch pos d_mlp`, all dimensions, at the chosen
    positions.
    Raises: InputError for another site, an unknown variable or set, a variable with one value, and
    where less than 5 % of the variance would remain or the variable has more values than the
    activation has dimensions (then give `n_codes`).
    Source: arXiv:2306.03819 (LEACE), arXiv:2004.07667 (INLP); the matched variance: ours.
    """

    by_example: ClassVar[bool] = True

    variable: Swept[str]
    """A variable of the task."""
    method: Swept[Literal["leace", "inlp", "random", "variance_matched"]] = "leace"
    """How the erased directions are found; the last two are controls."""
    fit_on: Swept[ExampleSetName] = ExampleSetName("clean")
    """The example set of the fit: clean instances, fed the prefix of the same label as the erased
    ones."""
    matched_to: Swept[Literal["leace", "inlp"]] = "leace"
    """The method whose rank and variance the controls `random` and `variance_matched` match."""
    rank: Swept[Index | None] = None
    """Number of dimensions that the controls remove; by default, the rank of `matched_to`."""
    n_codes: Swept[Width | None] = None
    """For a variable with many values: LEACE erases the `n_codes` principal directions of the class
    means instead of all classes."""
    seed: Swept[Seed] = 0
    """Seed of the random subspaces."""
    split_seed: Seed = 0
    """Seed of INLP's held-out rows."""

    @model_validator(mode="after")
    def _fits_method(self) -> Self:
        if self.rank is not None and self.method in ("leace", "inlp"):
            raise ValueError(
                f"{self.method} finds its own rank; `rank` is for random and variance_matched"
            )
        if self.n_codes is not None and "inlp" in (self.method, self.matched_to):
            raise ValueError("inlp needs classes; `n_codes` is for leace and its controls")
        return self

    def erasers(
        self, session: Session, model: Model, examples: Examples
    ) -> dict[tuple[str, str], Eraser]:
        """The fitted eraser for every (hook, position), with its `rank` and `variance_left`.

        Args:
            session: gives the set of the fit and its activations.
            model: the unedited model.
            examples: the examples that are erased, with the prefix that the model is fed.
        """
        return {
            (hook, name): self._eraser(hook, name, session, model, examples)
            for hook in self.hooks(model)
            for name in self.names(examples)
        }

    def hooks(self, model: Model) -> list[str]:
        axes = sites.site(self.site).axes
        if axes not in (("batch", "pos", "d_model"), ("batch", "pos", "d_mlp")):
            raise InputError(
                "a variable can only be erased at sites of `batch pos d_model` or `batch pos "
                f"d_mlp`, not at {self.site!r}"
            )
        return super().hooks(model)

    def names(self, examples: Examples) -> tuple[str, ...]:
        """The names of the positions that are erased."""
        if self.position is None:
            return tuple(examples.positions)
        chosen = (self.position,) if isinstance(self.position, str) else self.position
        readout = tuple(examples.positions)[-examples.n_answer :]
        found = (readout if name == "readout" else (name,) for name in chosen)
        return tuple(dict.fromkeys(name for names in found for name in names))

    def at(self, hook: str, model: Model, examples: Examples) -> At:
        return At(hook, shared(examples.indices(self.names(examples))))

    def edit(self, at: At, session: Session, model: Model, examples: Examples) -> Edit:
        names = self.names(examples)
        fitted = [self._eraser(at.hook, name, session, model, examples) for name in names]

        def erased(own: Tensor, rows: Tensor) -> Tensor:
            columns = zip(fitted, own.unbind(dim=1), strict=True)
            return torch.stack([eraser(column) for eraser, column in columns], dim=1)

        return Edit(at, erased)

    def _eraser(
        self, hook: str, name: str, session: Session, model: Model, examples: Examples
    ) -> Eraser:
        chosen = session.examples(self.fit_on)
        fit = chosen.with_prefix(examples.prefix)
        if fit.key == chosen.key:  # clean instances: one fit serves both prefixes
            fit = chosen

        def make() -> Eraser:
            labels, there = self._labels(session, fit), fit.indices(name)
            x = session.activation(model, fit, At(hook, shared(there)))[:, 0]
            x, labels = x[there[:, 0] >= 0], labels[there[:, 0] >= 0]
            matched = self._matched
            like = None
            if matched is not None:
                like = matched._eraser(hook, name, session, model, examples)
            return self._fit(x, labels.to(x.device), like, f"{hook}, position {name}", session)

        return session.cached(("eraser", model, fit, hook, name, self._how), make)

    @property
    def _how(self) -> tuple[object, ...]:
        """Everything that an eraser depends on other than the activations."""
        return (
            self.variable,
            self.method,
            self.matched_to,
            self.rank,
            self.n_codes,
            self.seed,
            self.split_seed,
        )

    @property
    def _matched(self) -> Erase | None:
        """The erasure that a control is matched to; None for an erasure, and for a random subspace
        of a given rank."""
        if self.method in ("leace", "inlp") or (self.method == "random" and self.rank is not None):
            return None
        return self.model_copy(update={"method": self.matched_to, "rank": None, "seed": 0})

    def _labels(self, session: Session, fit: Examples) -> Tensor:
        """The classes of the variable, numbered from 0."""
        if self.variable not in fit.variables:
            raise InputError(
                f"there is no variable {self.variable!r}; {suggest(self.variable, fit.variables)}"
            )
        values, labels = fit.variables[self.variable].unique(return_inverse=True)
        if len(fit) < 3:
            raise InputError(
                f"{self.fit_on!r} has {len(fit)} examples, too few to fit an eraser; raise its `n`"
            )
        session.demand(
            len(values) > 1,
            f"in {self.fit_on!r} {self.variable} has only one value; choose a set in which it "
            "varies",
        )
        session.demand(
            self.n_codes is None or self.n_codes < len(values),
            f"n_codes {self.n_codes} exceeds the {len(values) - 1} dimension(s) spanned by the "
            f"{len(values)} values of {self.variable} in {self.fit_on!r}; lower it, or leave it "
            "out",
        )
        return labels

    def _fit(
        self, x: Tensor, labels: Tensor, like: Eraser | None, where: str, session: Session
    ) -> Eraser:
        if self.method == "inlp":
            return self._checked(inlp(x, labels, self.split_seed), x, labels, where, session)
        if self.method == "leace":
            code = (
                class_code(x, labels, self.n_codes) if self.n_codes else F.one_hot(labels).float()
            )
            return self._checked(
                leace(x, code), x, None if self.n_codes else labels, where, session
            )
        rank = like.rank if like is not None and self.rank is None else self.rank or 0
        if self.method == "random" or like is None:
            return self._checked(random_subspace(x, rank, self.seed), x, None, where, session)
        found = variance_matched(x, rank, like.variance_left, self.seed)
        session.demand(
            abs(found.variance_left - like.variance_left) <= 1e-3,
            f"no {rank} dimensions at {where} have as much variance as {self.matched_to.upper()} "
            "removes; raise `rank`",
        )
        return self._checked(found, x, None, where, session)

    def _checked(
        self, eraser: Eraser, x: Tensor, labels: Tensor | None, where: str, session: Session
    ) -> Eraser:
        n_classes, d = 0 if labels is None else int(labels.max()) + 1, x.shape[1]
        reason = "almost nothing would remain"
        if n_classes > d:
            reason = f"{n_classes} classes span up to {n_classes - 1} dimensions"
        session.demand(
            eraser.variance_left >= LEAST and n_classes - 1 < d,
            f"erasing {self.variable} by {self.method} at {where} removes {eraser.rank} of {d} "
            f"dimensions and leaves {eraser.variance_left:.1%} of the variance: {reason}; choose "
            "other positions, or let `leace` erase a low-rank code of the variable (`n_codes`)",
        )
        return eraser
