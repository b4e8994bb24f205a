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
"""Between the random circuits that stand for A and those that stand for B."""


class CircuitOverlap(CircuitAnalysis):
    """Compares circuit A (`model`, `examples`, `metric`) with B (`other_model` and so on), at each
    size.

    Sets: intersection over union of edges and of nodes (heads and MLPs), the share of A's edges in
    B and the other way round, and the hypergeometric chance of as many shared edges or more, to
    which all edges are alike. Function: the faithfulness of A's circuit on B's model and examples,
    by B's baselines, beside B's own circuit. Circuits can share few edges and yet do the same, or
    share many and not. Both stand beside random circuits of the same sizes and beside A's with the
    heads of each layer exchanged at random (`head_permuted`, where a layer has several): what A
    does beyond these, its own heads do, and not its layers alone. Source: arXiv:2403.17806; claim
    C5 of arXiv:2507.04782; the exchanged heads: ours.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "example sets of A and of B",
        "method": "how edges are ranked: eap, eap_ig or exact",
        "condition": "circuits; for faithfulness on B: cross (A's circuit), own (B's circuit); "
        "controls: random, head_permuted "
        "(A's with other heads of the same layers)",
        "k": "share of the edges that either circuit is ranked to (fraction)",
        "n_edges": "number of edges that either is ranked to, before pruning to connected ones",
        "measure": "edge_iou, node_iou, recall (share of A's edges in B), recall_other (share of "
        "B's in A), "
        "hypergeometric_p, faithfulness (0 corrupted, 1 full run of B)",
        "unit": "unit of the value",
        "value": "as found, or the mean over examples or draws; a share is undefined for an empty "
        "circuit",
        "low": "lower end of the 95 % interval: bootstrap over examples, or over draws of random "
        "circuits",
        "high": "upper end of it",
        "n": "number of examples or of draws; 1 for what is counted",
        "per_example": "what each example of B adds to the value (of a ratio, to first order); one "
        "number for counts",
    }

    other_model: Swept[CheckpointName | None] = None
    """Model of B; the same unless given."""
    other_examples: Swept[ExampleSetName | None] = None
    """Example set of B; the same unless given."""
    other_metric: Measure | None = None
    """Metric of B; the same unless given. So the true answer before memorisation can stand beside
    the given one after."""

    def table(self, session: Session) -> pd.DataFrame:
        a, b = (
            self.contrast(session),
            self.contrast(session, self.other_model, self.other_examples, self.other_metric),
        )
        if a.graph != b.graph:
            raise InputError(
                f"{self.model} and {self.other_model} are of two architectures: they share no edges"
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
            has_others = a.graph.n_heads > 1  # else there are no other heads to exchange one with
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
        """These circuits with other heads, as many draws as there are random circuits; in a draw,
        all the same heads."""
        seeds = [self.seed + i for i in range(self.n_random)]
        drawn = [
            [contrast.graph.head_permuted(c, torch.Generator().manual_seed(s)) for c in circuits]
            for s in seeds
        ]
        return torch.stack([torch.stack(draw) for draw in drawn])

    def _sets(self, contrast: Contrast, a: Edges, b: Edges, head_permuted: Circuits) -> list[Row]:
        """How far the two share edges and nodes, and how far random ones of their sizes, or A with
        other heads, do."""
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
    """Intersection over union of edges and of nodes, and the share of either's edges in the
    other."""
    nodes = contrast.graph.nodes(a), contrast.graph.nodes(b)
    return {
        "edge_iou": _share(a & b, a | b),
        "node_iou": _share(nodes[0] & nodes[1], nodes[0] | nodes[1]),
        "recall": _share(a & b, a),
        "recall_other": _share(a & b, b),
    }


def hypergeometric_p(n_edges: int, n_a: int, n_b: int, n_shared: int) -> float:
    """Chance that random sets of these sizes share as many edges or more, P(X >= n_shared)."""
    return float(stats.hypergeom.sf(n_shared - 1, n_edges, n_a, n_b))


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else float("nan")
