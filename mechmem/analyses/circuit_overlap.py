"""CircuitOverlap: whether two models, or two kinds of examples, use the same circuit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from scipy import stats
from torch import Tensor

from mechmem.analyses.circuit import CircuitAnalysis
from mechmem.analyses.contrast import Contrast
from mechmem.analyses.faithfulness import Row, Runs, over_draws, over_examples, single, tidy
from mechmem.bench import Bench
from mechmem.component import InputError, Swept
from mechmem.measures import Measure

Edges = Bool[Tensor, "source target"]

OTHER_SEED = 10**6
"""Between the random circuits that stand for A and those that stand for B."""


class CircuitOverlap(CircuitAnalysis):
    """Compares circuit A (`model`, `examples`, `metric`) with B (`other_model` and so on), at each size.

    Sets: intersection over union of edges and of nodes (heads and MLPs), the share of A's edges in B and the other way
    round, each beside pairs of random circuits of the same sizes and beside A and B with the heads of each layer
    exchanged at random (`relabelled`: what the same layers alone would share), and the hypergeometric chance of as many
    shared edges or more, to which all edges are alike. Function: the faithfulness of A's circuit on B's model and
    examples, by B's baselines, beside B's own circuit and random ones. Circuits can share few edges and yet do the same,
    or share many and not. Source: arXiv:2403.17806; claim C5 of arXiv:2507.04782.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "example sets of A and of B",
        "method": "how edges are ranked: eap, eap_ig or exact",
        "condition": "circuits; for faithfulness on B: cross (A's circuit), own (B's circuit); controls: random, relabelled "
        "(B with other heads of the same layers)",
        "k": "share of the edges that either circuit is ranked to (fraction)",
        "n_edges": "number of edges that either is ranked to, before pruning to connected ones",
        "measure": "edge_iou, node_iou, recall (share of A's edges in B), recall_other (share of B's in A), "
        "hypergeometric_p, faithfulness (0 corrupted, 1 full run of B)",
        "unit": "unit of the value",
        "value": "as found, or the mean over examples or draws; a share is undefined for an empty circuit",
        "low": "lower end of the 95 % interval: bootstrap over examples, or over draws of random circuits",
        "high": "upper end of it",
        "n": "number of examples or of draws; 1 for what is counted",
        "per_example": "what each example of B adds to the value (of a ratio, to first order); one number for counts",
    }

    other_model: Swept[str | None] = None
    """Model of B; the same unless given."""
    other_examples: Swept[str | None] = None
    """Example set of B; the same unless given."""
    other_metric: Measure | None = None
    """Metric of B; the same unless given. So the true answer before memorisation can stand beside the given one after."""

    def table(self, bench: Bench) -> pd.DataFrame:
        a, b = self.contrast(bench), self.contrast(bench, self.other_model, self.other_examples, self.other_metric)
        if a.graph != b.graph:
            raise InputError(f"{self.model} and {self.other_model} are of two architectures: they share no edges")
        circuits = self.circuits(a), self.circuits(b)
        random = self.random_circuits(b, self.sizes(b))
        runs = Runs(b, torch.cat([circuits[0][None], circuits[1][None], random]))
        rows = []
        for i, (k, n) in enumerate(zip(self.fractions, self.sizes(a), strict=True)):
            found = [*self._sets(a, circuits[0][i], circuits[1][i]), *_faithfulness(runs.faithfulness[:, i])]
            rows += [row | {"k": k, "n_edges": n} for row in found]
        examples = " / ".join((self.examples, self.other_examples or self.examples))
        return tidy(rows, self.columns, examples=examples, method=self.method)

    def _sets(self, contrast: Contrast, a: Edges, b: Edges) -> list[Row]:
        """How far the two share edges and nodes, and how far random ones of their sizes, or with other heads, do."""
        sizes = int(a.sum()), int(b.sum())
        theirs = [self.random_circuits(contrast, [n], i * OTHER_SEED)[:, 0] for i, n in enumerate(sizes)]
        generators = [torch.Generator().manual_seed(self.seed + i) for i in range(self.n_random)]
        controls = {
            "random": [shared(contrast, *pair) for pair in zip(*theirs, strict=True)],
            "relabelled": [shared(contrast, a, contrast.graph.relabelled(b, g)) for g in generators],
        }
        p = hypergeometric_p(contrast.graph.n_edges, *sizes, int((a & b).sum()))
        rows = [single(p) | {"measure": "hypergeometric_p", "condition": "circuits"}]
        for name, value in shared(contrast, a, b).items():
            rows += [single(value) | {"measure": name, "condition": "circuits"}]
            for condition, draws in controls.items():
                values = [np.array([draw[name]]) for draw in draws]
                rows += [over_draws(values) | {"measure": name, "condition": condition}]
        return rows


def shared(contrast: Contrast, a: Edges, b: Edges) -> dict[str, float]:
    """Intersection over union of edges and of nodes, and the share of either's edges in the other."""
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


def _faithfulness(values: np.ndarray) -> list[Row]:
    cross, own, *random = values
    found: list[tuple[str, Any]] = [("cross", over_examples(cross)), ("own", over_examples(own))]
    return [row | {"condition": c, "measure": "faithfulness"} for c, row in [*found, ("random", over_draws(random))]]


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else float("nan")
