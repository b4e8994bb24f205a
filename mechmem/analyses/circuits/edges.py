"""Edges: scores of every edge of the computational graph, by gradient and by patching."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechmem.analyses.circuits.wiring import Sources, Wiring

Scores = Float[Tensor, "batch source target"]
Losses = Callable[[Float[Tensor, "batch n_readout d_vocab"]], Float[Tensor, " batch"]]

MOST_ROWS = 128
"""Number of rows (examples times circuits) that go through the model at once."""


def attributed(
    wiring: Wiring, clean: Sources, losses: Losses, points: Sequence[float] = (1.0,)
) -> Scores:
    """First-order score of each edge (u, v) for each example: (corrupted - clean value of u) .
    gradient of the loss at the input of v, summed over positions.

    The gradient is the mean over the inputs `corrupted + point (clean - corrupted)`. With the
    single point 1, the clean input, this is EAP, otherwise EAP-IG. A positive score means that
    corrupting the edge raises the loss.

    Args:
        wiring: the model with the values of the corrupted run.
        clean: values of the sources in the clean run, `source batch pos d_model`.
        losses: maps logits `batch n_readout d_vocab` to the loss of each example.
        points: the inputs at which gradients are taken, from 0 (corrupted) to 1 (clean).

    Source: arXiv:2310.10348, arXiv:2403.17806.
    """
    change, graph = wiring.corrupted - clean, wiring.graph
    scores = clean.new_zeros(clean.shape[1], len(graph.sources), len(graph.targets))
    for point in points:
        inputs: list[Tensor] = []
        start = (clean[:1] + (1 - point) * change[:1]).detach().requires_grad_()
        # Examples do not depend on each other, so one gradient of the sum is that of each of them.
        total = losses(wiring.logits(start, inputs=inputs)[0]).sum()
        gradients = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        for (_, targets, n), gradient in zip(graph.groups(), gradients, strict=True):
            moved = change[:n, :, -gradient.shape[-2] :]
            product = einsum(
                moved,
                gradient[:, 0],
                "source batch pos d, target batch pos d -> batch source target",
            )
            scores[:, :n, targets] += product / len(points)
    return scores


@torch.no_grad()
def patched(wiring: Wiring, clean: Sources, losses: Losses) -> Scores:
    """How much the loss of each example rises when a single edge carries its corrupted value, for
    each edge in turn. Layers before the edge's target are not computed again.

    Args:
        wiring: the model with the values of the corrupted run.
        clean: values of the sources in the clean run, `source batch pos d_model`.
        losses: maps logits `batch n_readout d_vocab` to the loss of each example.

    Source: path patching, arXiv:2304.05969.
    """
    graph = wiring.graph
    scores = clean.new_zeros(clean.shape[1], len(graph.sources), len(graph.targets))
    for layer in range(graph.n_layers + 1):
        known = clean[: 1 + layer * graph.per_layer]
        whole = losses(wiring.logits(known)[0])
        there = [
            (n, t)
            for at, targets, n in graph.groups()
            if at == layer
            for t in range(targets.start, targets.stop)
        ]
        pairs = torch.tensor([(s, t) for n, t in there for s in range(n)])
        for s, t in (part.unbind(1) for part in pairs.split(max(1, MOST_ROWS // clean.shape[1]))):
            edges = clean.new_ones(len(s), *scores.shape[1:])
            edges[torch.arange(len(s)), s, t] = 0
            changed = torch.stack([losses(logits) for logits in wiring.logits(known, edges)])
            scores[:, s, t] = (changed - whole).T.to(scores)
    return scores
