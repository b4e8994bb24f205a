"""INLP: iterative nullspace projection, and the logistic regression that it uses; in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int
from torch import Tensor

from mechmem.interventions.subspace import TOLERANCE, Eraser, Rows, eraser, float64, rounding

SLACK = 0.02
"""INLP stops when the accuracy exceeds the share of the majority class by no more than this
(fraction of the held-out rows)."""


def inlp(x: Rows, labels: Int[Tensor, " n"], seed: int = 0) -> Eraser:
    """Iterative nullspace projection: repeatedly fits a linear classifier and removes its
    directions, until a classifier fitted on the remaining activation is no better on held-out rows
    than always predicting the most frequent class.

    The projection acts on the original x and is not centred.

    Args:
        x: activations, `n d`.
        labels: class of each row, counted from 0.
        seed: seed of the held-out third.

    Source: arXiv:2004.07667.
    """
    least, x = rounding(x), float64(x)
    fit, held_out = _split(len(x), seed)
    majority = labels[held_out].bincount().max().item() / len(held_out)
    basis, left = x[:0].T, x
    while left.var(dim=0).mean() > least:
        weight, bias = logistic_regression(left[fit], labels[fit], int(labels.max()) + 1)
        hits = (left[held_out] @ weight.T + bias).argmax(dim=1) == labels[held_out]
        if hits.double().mean() <= majority + SLACK:
            break
        basis = torch.linalg.qr(torch.cat([basis, _row_space(_without(weight, basis))], dim=1)).Q
        left = _without(x, basis)
    return eraser(x, basis, basis.T, torch.zeros_like(x[0]))


def logistic_regression(
    x: Rows, labels: Int[Tensor, " n"], n_classes: int, penalty: float = 1.0
) -> tuple[Float64[Tensor, "n_classes d"], Float64[Tensor, " n_classes"]]:
    """Weights and biases of a multinomial logistic regression, by LBFGS in float64.

    Args:
        x: activations, `n d`.
        labels: class of each row, counted from 0.
        n_classes: number of classes.
        penalty: weight of half the squared weights relative to the summed loss (nats), with x
            scaled to a mean variance of 1.
    """
    x = float64(x)
    scale = x.var(dim=0).mean().sqrt().clamp_min(1e-12)
    rows = torch.cat([(x - x.mean(dim=0)) / scale, x.new_ones(len(x), 1)], dim=1)
    weights = x.new_zeros(n_classes, rows.shape[1])
    optimiser = torch.optim.LBFGS(
        [weights], max_iter=300, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )
    one_hot = F.one_hot(labels, n_classes).double()

    def loss() -> Tensor:
        logits = rows @ weights.T
        shrunk = (
            penalty
            * torch.cat([weights[:, :-1], torch.zeros_like(weights[:, -1:])], dim=1)
            / len(x)
        )
        weights.grad = (logits.softmax(1) - one_hot).T @ rows / len(x) + shrunk
        return F.cross_entropy(logits, labels) + (shrunk * weights).sum() / 2

    optimiser.step(loss)
    weight = weights[:, :-1] / scale
    return weight, weights[:, -1] - weight @ x.mean(dim=0)


def _without(x: Tensor, basis: Tensor) -> Tensor:
    return x - x @ basis @ basis.T


def _row_space(weight: Tensor) -> Tensor:
    """Orthonormal columns that span the rows."""
    _, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return vh[s > TOLERANCE * s[0]].T


def _split(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two thirds and one third of the rows, at random."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[n // 3 :], order[: n // 3]
