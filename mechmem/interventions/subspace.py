"""Erasers: the linear algebra of removing the information that a linear classifier could read; in
float64.

Each fitter (`leace`, `random_subspace`, `variance_matched`, and `inlp` in a file of its own) takes
activations, one row per example, and returns a frozen `Eraser`. `mechmem.interventions.erase`
applies them in a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

TOLERANCE = 1e-6
"""Minimum covariance (between one-hot classes and whitened activations) that is erased: far above
rounding errors, far below that of the rarest of thousands of classes. The value of 0.01 used
elsewhere would leave rare classes decodable."""

Rows = Float[Tensor, "n d"]


@dataclass(frozen=True, eq=False)
class Eraser:
    """The affine map x' = x - write read (x - centre): a projection that removes `rank`
    dimensions."""

    write: Float64[Tensor, "d rank"]
    read: Float64[Tensor, "rank d"]
    centre: Float64[Tensor, " d"]
    variance_left: float
    """Share of the variance of the fitted activations that remains after the projection (fraction;
    1 if they have no variance)."""

    @property
    def rank(self) -> int:
        """Number of dimensions removed."""
        return self.write.shape[1]

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        removed = (x.to(self.centre) - self.centre) @ self.read.T @ self.write.T
        return x - removed.to(x)


def leace(x: Rows, z: Float[Tensor, "n k"]) -> Eraser:
    """LEACE: the smallest affine change after which x and z are uncorrelated, so that no linear
    classifier can read z from x.

    Args:
        x: activations.
        z: one-hot classes or a code of them; with integer class numbers, classes would still be
            decodable.

    Source: arXiv:2306.03819.
    """
    least, x, z = rounding(x), float64(x), float64(z)
    values, vectors = torch.linalg.eigh(_covariance(x, x))
    kept = values > max(values[-1].item() * x.shape[1] * torch.finfo(x.dtype).eps, least)
    root = values.clamp_min(0).sqrt() * kept
    whiten = vectors * torch.where(kept, 1 / root, 0.0) @ vectors.T
    u, s, _ = torch.linalg.svd(whiten @ _covariance(x, z), full_matrices=False)
    u = u[:, s > TOLERANCE]
    return eraser(x, (vectors * root) @ vectors.T @ u, u.T @ whiten, x.mean(dim=0))


def random_subspace(x: Rows, rank: int, seed: int = 0) -> Eraser:
    """Projects out a uniformly random subspace, around the mean: the effect of losing `rank`
    dimensions as such.

    Args:
        x: activations, `n d`.
        rank: number of dimensions to remove.
        seed: seed of the subspace.
    """
    x = float64(x)
    basis = _random_basis(x, rank, seed)
    return eraser(x, basis, basis.T, x.mean(dim=0))


def variance_matched(x: Rows, rank: int, variance_left: float, seed: int = 0) -> Eraser:
    """Projects out a random subspace with the same rank and variance as another erasure.

    The subspace of `random_subspace` is rotated towards the directions of most (or least) variance
    as far as needed, so that both rank and variance match. If even the directions of most variance
    have too little, those are removed; `variance_left` of the result then shows the difference.

    Args:
        x: activations, `n d`.
        rank: number of dimensions to remove.
        variance_left: share of the variance that should remain (fraction).
        seed: seed of the random subspace.
    """
    x = float64(x)
    if not rank:
        return random_subspace(x, 0)
    start, sigma = _random_basis(x, rank, seed), _covariance(x, x)
    wanted = (1 - variance_left) * sigma.trace()
    vectors = torch.linalg.eigh(sigma).eigenvectors
    is_short = _held(start, sigma) < wanted
    end = vectors[:, len(sigma) - rank :] if is_short else vectors[:, :rank]
    u, _, vh = torch.linalg.svd(start.T @ end)
    # The basis of the same subspace nearest to `start`: no rotation between them is singular.
    end = end @ vh.T @ u.T
    low, high = 0.0, 1.0
    while high - low > 1e-15:
        middle = (low + high) / 2
        is_before = (_held(_turned(start, end, middle), sigma) < wanted) == is_short
        low, high = (middle, high) if is_before else (low, middle)
    basis = _turned(start, end, high)
    return eraser(x, basis, basis.T, x.mean(dim=0))


def class_code(x: Rows, labels: Int[Tensor, " n"], n_codes: int) -> Float64[Tensor, "n n_codes"]:
    """A low-rank code of a variable with many classes: each row's class mean, projected onto the
    principal directions of the class means (weighted by class size), in units of the standard
    deviation along the first.

    Args:
        x: activations, `n d`.
        labels: class of each row, counted from 0.
        n_codes: number of directions.
    """
    x = float64(x)
    one_hot = F.one_hot(labels).double()
    counts = one_hot.sum(dim=0).clamp_min(1)[:, None]
    means = one_hot.T @ x / counts - x.mean(dim=0)
    directions = torch.linalg.svd(means * counts.sqrt(), full_matrices=False).Vh[:n_codes]
    code = means[labels] @ directions.T
    return code / code.std(dim=0).max().clamp_min(torch.finfo(code.dtype).tiny)


def eraser(x: Rows, write: Tensor, read: Tensor, centre: Tensor) -> Eraser:
    """The eraser x' = x - write read (x - centre), with the share of variance that remains.

    Args:
        x: the activations on which it was fitted, `n d`.
        write: directions that are subtracted, `d rank`.
        read: coefficients that are read, `rank d`.
        centre: the point that stays fixed, `d`.
    """
    before, after = x.var(dim=0).sum(), Eraser(write, read, centre, 1.0)(x).var(dim=0).sum()
    return Eraser(write, read, centre, (after / before).item() if before > 0 else 1.0)


def float64(x: Tensor) -> Tensor:
    """x in float64, the precision of every fit."""
    # Apple's GPUs have no float64.
    return x.cpu().double() if x.device.type == "mps" else x.double()


def rounding(x: Tensor) -> float:
    """Largest variance along a direction that rounding errors of x alone could cause."""
    return (8 * torch.finfo(x.dtype).eps * x.abs().max().item()) ** 2


def _covariance(x: Tensor, z: Tensor) -> Tensor:
    return (x - x.mean(dim=0)).T @ (z - z.mean(dim=0)) / (len(x) - 1)


def _random_basis(x: Tensor, rank: int, seed: int) -> Tensor:
    drawn = torch.randn(
        x.shape[1], rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return torch.linalg.qr(drawn).Q.to(x)


def _held(basis: Tensor, sigma: Tensor) -> Tensor:
    """Variance within a subspace."""
    return ((sigma @ basis) * basis).sum()


def _turned(start: Tensor, end: Tensor, share: float) -> Tensor:
    return torch.linalg.qr((1 - share) * start + share * end).Q
