"""CircuitOverlap: whether two models, or two kinds of examples, use the same circuit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from scipy import stats
from torch import Tensor

from mechmem.analyses.circuits.circuit import CircuitAnalysis
from mechmem.analyses.circuits.contrast import Contrast
from mechmem.analyses.circuits.faithfulness import Runs, tidy
from mechmem.measures.measure import Measure
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.rows import Row, over_draws, over_examples, single

Edges = Bool[Tensor, "source target"]
Circuits = Bool[Tensor, "circuit source target"]

OTHER_SEED = 10**6
"""Offset between the seeds of the random circuits of A and of B."""


class CircuitOverlap(CircuitAnalysis):
    """Compares circuit A (`model`, `examples`, `metric`) with circuit B (`other_model` and so on).

    Two comparisons are made at each size. Sets: intersection over union of edges and of nodes
    (heads and MLPs), the share of A's edges in B and of B's in A, and the hypergeometric
    probability of sharing at least as many edges if all edges were equally likely. Function: the
    faithfulness of A's circuit on B's model and examples, normalised by B's full and corrupted
    runs, next to that of B's own circuit. Circuits can share few edges and yet do the same, or
    share many edges and not do the same. There are two controls: random circuits of the same
    sizes, and A's circuit with the heads of each layer permuted at random (`head_permuted`, where
    a layer has several). Overlap beyond the second is due to A's particular heads, not just to
    their layers.
    Source: arXiv:2403.17806; claim C5 of arXiv:2507.04782; the permuted heads: ours.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "example sets of A and of B",
        "method": "how edges are ranked: eap, eap_ig or exact",
        "condition": "circuits; for faithfulness on B: cross (A's circuit), own (B's circuit); "
        "controls: random, head_permuted (A's circuit with permuted heads)",
        "k": "share of the edges that each circuit keeps (fraction)",
        "n_edges": "number of edges that each circuit keeps, before pruning to connected ones",
        "measure": "edge_iou, node_iou, recall (share of A's edges in B), recall_other (share of "
        "B's in A), hypergeometric_p, faithfulness (0 corrupted, 1 full run of B)",
        "unit": "unit of the value",
        "value": "the value itself, or its mean over examples or draws; a share is undefined for "
        "an empty circuit",
        "low": "lower end of the 95 % interval: bootstrap over examples, or over draws of random "
        "circuits",
        "high": "upper end of that interval",
        "n": "number of examples or of draws; 1 for counts",
        "per_example": "contribution of each example of B to the value (for a ratio, to first "
        "order); one number for counts",
    }

    other_model: Swept[CheckpointName | None] = None
    """Model of B; by default, that of A."""
    other_examples: Swept[ExampleSetName | None] = None
    """Example set of B; by default, that of A."""
    other_metric: Measure | None = None
    """Metric of B; by default, that of A. With it, the circuit of the true answer before
    memorisation can be compared with that of the given answer after it."""

    def table(self, session: Session) -> pd.DataFrame:
        a, b = (
            self.contrast(session),
            self.contrast(session, self.other_model, self.other_examples, self.other_metric),
        )
        if a.graph != b.graph:
            raise InputError(
                f"{self.model} and {self.other_model} have different architectures and share no "
                "edges; choose two models of the same architecture"
            )
        ours, theirs = self.circuits(a), self.circuits(b)
        random, head_permuted = self.random_circuits(b, self.sizes(b)), self.head_permuted(a, ours)
        found = Runs(b, torch.cat([ours[None], theirs[None], random, head_permuted])).faithfulness
        rows = []
        for i, (k, n) in enumerate(zip(self.fractions, self.sizes(a), strict=True)):
            here = [
                *self._sets(a, ours[i], theirs[i], head_permuted[:, i]),
                *self._faithfulness(found[:, i]),
            ]
            has_others = a.graph.n_heads > 1  # a single head has no other to be permuted with
            rows += [
                row | {"k": k, "n_edges": n}
                for row in here
                if has_others or row["condition"] != "head_permuted"
            ]
        examples = " / ".join((self.examples, self.other_examples or self.examples))
        return tidy(rows, self.columns, examples=examples, method=self.method)

    def head_permuted(
        self, contrast: Contrast, circuits: Circuits
    ) -> Bool[Tensor, "draw circuit source target"]:
        """These circuits with their heads permuted, one draw for each random circuit; all circuits
        of a draw get the same permutation."""
        seeds = [self.seed + i for i in range(self.n_random)]
        drawn = [
            [contrast.graph.head_permuted(c, torch.Generator().manual_seed(s)) for c in circuits]
            for s in seeds
        ]
        return torch.stack([torch.stack(draw) for draw in drawn])

    def _sets(self, contrast: Contrast, a: Edges, b: Edges, head_permuted: Circuits) -> list[Row]:
        """How many edges and nodes A and B share, next to the two controls: random circuits of
        their sizes, and A with permuted heads."""
        sizes = int(a.sum()), int(b.sum())
        drawn = [
            self.random_circuits(contrast, [n], i * OTHER_SEED)[:, 0] for i, n in enumerate(sizes)
        ]
        controls = {
            "random": [shared(contrast, *pair) for pair in zip(*drawn, strict=True)],
            "head_permuted": [shared(contrast, other, b) for other in head_permuted],
        }
        p = hypergeometric_p(contrast.graph.n_edges, *sizes, int((a & b).sum()))
        rows = [single(p) | {"measure": "hypergeometric_p", "condition": "circuits"}]
        for name, value in shared(contrast, a, b).items():
            rows += [single(value) | {"measure": name, "condition": "circuits"}]
            for condition, draws in controls.items():
                values = [np.array([draw[name]]) for draw in draws]
                rows += [over_draws(values) | {"measure": name, "condition": condition}]
        return rows

    def _faithfulness(self, values: np.ndarray) -> list[Row]:
        cross, own, *drawn = values
        found = {
            "cross": over_examples(cross),
            "own": over_examples(own),
            "random": over_draws(drawn[: self.n_random]),
            "head_permuted": over_draws(drawn[self.n_random :]),
        }
        return [
            row | {"condition": condition, "measure": "faithfulness"}
            for condition, row in found.items()
        ]


def shared(contrast: Contrast, a: Edges, b: Edges) -> dict[str, float]:
    """Intersection over union of edges and of nodes, and the share of each circuit's edges that are
    in the other.

    Args:
        contrast: gives the graph.
        a: edges of circuit A, `source target`.
        b: edges of circuit B, `source target`.
    """
    nodes = contrast.graph.nodes(a), contrast.graph.nodes(b)
    return {
        "edge_iou": _share(a & b, a | b),
        "node_iou": _share(nodes[0] & nodes[1], nodes[0] | nodes[1]),
        "recall": _share(a & b, a),
        "recall_other": _share(a & b, b),
    }


def hypergeometric_p(n_edges: int, n_a: int, n_b: int, n_shared: int) -> float:
    """Probability that random sets of these sizes share at least as many edges, P(X >= n_shared).

    Args:
        n_edges: number of edges of the graph.
        n_a: number of edges of circuit A.
        n_b: number of edges of circuit B.
        n_shared: number of edges that are in both.
    """
    return float(stats.hypergeom.sf(n_shared - 1, n_edges, n_a, n_b))


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else float("nan")
