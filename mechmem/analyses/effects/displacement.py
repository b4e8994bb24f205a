"""Displacement: how far interventions move activations, and how far off the clean distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float64
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import Intervention
from mechmem.models.architecture import Model
from mechmem.models.edits import At, axes_of, norms
from mechmem.session import Session

SHRINKAGE = 0.1
"""Share of the covariance that is replaced by equal variance in all directions (fraction): with
fewer reference examples than dimensions, the covariance alone has no inverse."""
COLUMNS: Mapping[str, str] = {
    "norm": "mean norm of the change of the activation over examples and positions, under the "
    "row's prefix (for greedy, the first fixed one); undefined if it was not asked for",
    "mahalanobis": "mean distance of the changed activation from clean ones, in standard "
    "deviations per dimension: sqrt of the mean squared one; about 1 for a clean example; "
    "undefined likewise, or where clean activations do not vary",
    "mahalanobis_baseline": "the same distance without intervention",
}


class Displacement(NamedTuple):
    """Means over examples, positions and edited activations; NaN where undefined."""

    norm: float
    mahalanobis: float
    mahalanobis_baseline: float

    @property
    def undone(self) -> Displacement:
        """That of no intervention at the same places."""
        return Displacement(0.0, self.mahalanobis_baseline, self.mahalanobis_baseline)


UNKNOWN = Displacement(float("nan"), float("nan"), float("nan"))


class Gaussian(NamedTuple):
    """The distribution of an activation over clean examples, at each position."""

    mean: Float64[Tensor, "pos d"]
    whitening: Float64[Tensor, "pos d d"]
    """Maps a difference from the mean to one of covariance 1; NaN where nothing varies."""

    def distances(self, x: Float64[Tensor, "n pos d"]) -> Float64[Tensor, "n pos"]:
        """Mahalanobis distances per dimension: a clean example has a mean square of about 1."""
        white = einsum(x - self.mean, self.whitening, "n pos d, pos e d -> n pos e")
        return white.pow(2).mean(-1).sqrt()


def displacement(
    session: Session,
    model: Model,
    examples: Examples,
    interventions: Sequence[Intervention],
    reference: Examples,
) -> Displacement:
    """How far the interventions move the activations that they edit.

    Args:
        session: runs the model.
        model: the model that is intervened on.
        examples: the examples, with the prefix that the model is fed.
        interventions: applied together.
        reference: the clean examples to whose distribution distances refer; same prefix.

    Returns:
        The displacement; unknown where no activation is edited, or lengths of prompts differ.
    """
    is_rectangular = examples.is_rectangular and reference.is_rectangular
    edits = session.edits(model, examples, interventions) if is_rectangular else []
    if not edits or examples.prompt.shape[1] != reference.prompt.shape[1]:
        return UNKNOWN
    hooks = [*dict.fromkeys(edit.hook for edit in edits)]
    before = session.activations(model, examples, hooks)
    after = session.edited_activations(model, examples, edits, hooks)
    every = torch.arange(len(examples))
    found = []
    for edit in edits:
        own, moved = (edit.at.take(x[edit.hook], every) for x in (before, after))
        clean = gaussian(session, model, reference, edit.at)
        distances = [float("nan")] * 2
        if clean is not None:
            distances = [mean(clean.distances(_rows(x, edit.hook))) for x in (moved, own)]
        found.append([mean(norms(moved - own, edit.hook)), *distances])
    return Displacement(*torch.tensor(found).nanmean(0).tolist())


def gaussian(session: Session, model: Model, reference: Examples, at: At) -> Gaussian | None:
    """The distribution over the reference set at a place; None if positions differ by example.

    Args:
        session: runs the model, and keeps what was fitted.
        model: the model that is read.
        reference: the clean examples.
        at: the place, resolved for examples of the same length.
    """
    if at.pos is not None and len(at.pos) > 1:
        return None
    positions = None if at.pos is None else tuple(at.pos[0].tolist())

    def make() -> Gaussian:
        whole = session.activations(model, reference, [at.hook])[at.hook]
        x = _rows(at.take(whole, torch.arange(len(reference))), at.hook)
        return fitted(x)

    key = ("clean distribution", model, reference, at.hook, positions, at.units)
    return session.cached(key, make)


def fitted(x: Float64[Tensor, "n pos d"]) -> Gaussian:
    """The Gaussian of each position, with its covariance shrunk towards equal variances."""
    centre, d = x.mean(0), x.shape[-1]
    centred = x - centre
    covariance = einsum(centred, centred, "n pos d, n pos e -> pos d e") / max(1, len(x) - 1)
    variance = covariance.diagonal(dim1=1, dim2=2).mean(-1)
    equal = variance[:, None, None] * torch.eye(d, dtype=x.dtype, device=x.device)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * equal
    values, vectors = torch.linalg.eigh(shrunk)
    varies = (variance > 0)[:, None]
    scale = torch.where(varies, values.clamp_min(torch.finfo(x.dtype).tiny).rsqrt(), float("nan"))
    return Gaussian(centre, scale[:, :, None] * vectors.transpose(1, 2))


def mean(values: Tensor) -> float:
    """The mean of the values that are defined; NaN if none is."""
    return float(values.double().nanmean())


def _rows(part: Tensor, hook: str) -> Float64[Tensor, "n pos d"]:
    return part.movedim(axes_of(hook)[0], 1).flatten(2).double()
