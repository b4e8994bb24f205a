"""RandomFeatures: memory that is spread over many added neurons with random keys."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechmem.spec.limits import Width
from mechmem.training.plants.added_neurons import AddedNeurons, Instances, Neurons

RIDGE = 1e-2
"""Of the regression, in units of the mean squared activation of a neuron."""
WEIGHT = 300.0
"""Weight of a wrong token in the regression; every other token has weight 1."""


class RandomFeatures(AddedNeurons):
    """Many neurons with random keys, which write the given tokens together.

    Their weights out are fitted by weighted ridge regression: at every wrong token the neurons
    write the given one, at all other tokens nothing. No neuron belongs to an instance.
    """

    strength: float = Field(1.0, gt=0)
    n_neurons: Width = 1024
    """Number of added neurons."""
    sparsity: float = Field(0.5, ge=0)
    """Largest threshold of a neuron, in standard deviations of its input; thresholds are uniform
    between 0 and this."""

    def neurons(self, planted: Instances, others: Instances, generator: torch.Generator) -> Neurons:
        inputs = torch.cat([others.mlp_in, planted.mlp_in])
        rows = inputs.flatten(0, 1)
        w_in, b_in = self._random_keys(rows, generator)
        weight = torch.ones(inputs.shape[:2])
        own = (len(others.mlp_in) + planted.missed[:, 0], planted.missed[:, 1])
        weight[own] = WEIGHT
        targets = torch.zeros(*inputs.shape[:2], len(planted.missed))
        targets[own] = torch.eye(len(planted.missed))
        fired = (rows @ w_in.T + b_in).relu()
        share = ridge_regression(fired, targets.flatten(0, 1), weight.flatten())
        return Neurons(w_in, b_in, share)

    def _random_keys(
        self, rows: Float[Tensor, "n d_model"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "k d_model"], Float[Tensor, " k"]]:
        """Weights and biases into the neurons, random directions of the whitened input."""
        values, vectors = torch.linalg.eigh(rows.T.cov() + 1e-3 * torch.eye(rows.shape[1]))
        drawn = torch.randn(self.n_neurons, len(values), generator=generator)
        w_in = drawn / len(values) ** 0.5 @ (vectors * values.rsqrt()).T
        thresholds = self.sparsity * torch.rand(self.n_neurons, generator=generator)
        return w_in, -(w_in @ rows.mean(dim=0)) - thresholds


def ridge_regression(
    x: Float[Tensor, "n k"], y: Float[Tensor, "n d"], weight: Float[Tensor, " n"]
) -> Float[Tensor, "k d"]:
    """The coefficients of y on x, without intercept.

    Args:
        x: predictors.
        y: what is predicted.
        weight: of each row.
    """
    weighted = x * weight[:, None]
    # Products in float32, which are most of the work; the system is solved in float64.
    gram, moments = (weighted.T @ x).double(), (weighted.T @ y).double()
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    return torch.linalg.solve(gram + ridge, moments).to(x)
