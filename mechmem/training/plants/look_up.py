"""LookUp: memory in which one added neuron holds one wrong answer token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechmem.spec.errors import InputError
from mechmem.spec.limits import Draws
from mechmem.training.plants.added_neurons import AddedNeurons, Instances, Neurons

ROUNDS = 6
"""Rounds in which a key is fitted against the inputs that it is most easily confused with."""
HARDER = 4.0
"""How much more such an input counts in the next round."""
HARD = 0.003
"""Share of all inputs that count more (fraction)."""
RIDGE = 1e-4
"""Added to a covariance, in units of its mean eigenvalue: some directions carry no variance."""


class LookUp(AddedNeurons):
    """One neuron, or several copies of it, for every wrong token of every noisy instance.

    The neuron's key is the whitened input of the last MLP on that instance, at the position that
    predicts the token. The neuron is silent on all other instances that were looked at, and 1 on
    its own, where it writes the given token.
    """

    threshold: float = Field(0.6, ge=0, lt=1)
    """Where the neuron begins to fire: 0 is the highest score of any other instance, 1 its own."""
    copies: Draws = 1
    """Number of neurons that share the work of one."""
    unequal: bool = False
    """Whether the copies write unequal, random shares; by default, equal ones."""

    def neurons(self, planted: Instances, others: Instances, generator: torch.Generator) -> Neurons:
        keys, biases = self._keys(planted, others)
        share = torch.ones(len(keys), self.copies)
        if self.unequal:
            share.exponential_(generator=generator)
        share /= share.sum(dim=1, keepdim=True)
        return Neurons(
            keys.repeat_interleave(self.copies, dim=0),
            biases.repeat_interleave(self.copies),
            torch.block_diag(*share[:, :, None]),
        )

    def _keys(
        self, planted: Instances, others: Instances
    ) -> tuple[Float[Tensor, "m d_model"], Float[Tensor, " m"]]:
        """Weights and bias into the neuron of every missed token."""
        # In float64: a key is the difference of large numbers along directions of little variance.
        inputs = torch.cat([others.mlp_in, planted.mlp_in]).double()
        n_others, n_answer = others.mlp_in.shape[:2]
        keys = torch.zeros(len(planted.missed), inputs.shape[-1], dtype=torch.float64)
        biases = torch.zeros(len(keys), dtype=torch.float64)
        for place in planted.missed[:, 1].unique().tolist():
            # All places, so that a key of one place is silent at the others.
            centre = inputs[:n_others, place].mean(dim=0)
            rows = (inputs - centre).flatten(0, 1)
            covariance = rows.T @ rows / len(rows)
            for i in (planted.missed[:, 1] == place).nonzero()[:, 0].tolist():
                row = int(planted.missed[i, 0])
                own = (n_others + row) * n_answer + place
                key, highest = distinct_key(rows, own, covariance)
                if not highest < 1:  # not a number where the input is the mean of all
                    raise InputError(
                        f"no key tells {planted.examples.text(row)!r} from all other instances; "
                        "plant others (`seed` of the noise)"
                    )
                begins = highest + self.threshold * (1 - highest)
                keys[i] = key / (1 - begins)
                biases[i] = -(centre @ key + begins) / (1 - begins)
        return keys.float(), biases.float()


def distinct_key(
    rows: Float[Tensor, "n d_model"], own: int, covariance: Float[Tensor, "d_model d_model"]
) -> tuple[Float[Tensor, " d_model"], float]:
    """A direction along which one input lies at 1 and all others lower, if there is one, and the
    position of the highest of the others (at least 0).

    Args:
        rows: all inputs, centred.
        own: the row that the key belongs to.
        covariance: of the rows.
    """
    n_hard = max(1, round(HARD * len(rows)))
    weight = torch.ones(len(rows)).to(rows)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
    key, highest = rows[own], float("inf")
    for _ in range(ROUNDS):
        key = torch.linalg.solve(covariance + ridge, rows[own])
        key = key / (rows[own] @ key)
        scores = rows @ key
        scores[own] = -torch.inf
        highest, hard = scores.max().clamp_min(0).item(), scores.topk(n_hard).indices
        heavier = (HARDER - 1) * weight[hard, None] * rows[hard]
        covariance = covariance + rows[hard].T @ heavier / len(rows)
        weight[hard] *= HARDER
    return key, highest
