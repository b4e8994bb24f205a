"""EdgeScores: how much the metric depends on each edge of the computational graph, by gradient and
by patching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pandas as pd
from pydantic import Field

from mechmem.analyses.circuits.contrast import ContrastAnalysis, Endpoint, Method, correlation
from mechmem.session import Session
from mechmem.spec.limits import Draws

N_TOP = 100
"""Number of edges with the largest scores for which agreement is also reported."""


class EdgeScores(ContrastAnalysis):
    """How much the metric loses, to first order or exactly, if a single edge is corrupted.

    The table has one row per edge. Edges with a positive score carry the information that
    distinguishes the example from its pair. Where the ranks of the gradient scores agree with those
    of patching each edge in turn, the cheap score can replace the exact one.
    Source: arXiv:2310.10348 (EAP), arXiv:2403.17806 (EAP-IG), arXiv:2304.05969 (path patching).
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "measure": "name of the attributed metric",
        "unit": "unit of the metric and of the scores",
        "source": "node that writes: embed, a0.h1 (head 1 of layer 0), m0 (MLP of layer 0)",
        "target": "input that reads: a1.h0.q, .k or .v, m1, or logits (the last residual)",
        "source_layer": "layer of the source; -1 for embed",
        "layer": "layer of the target; the number of layers for logits",
        "into": "kind of the target: q, k, v, mlp or logits",
        "eap": "edge attribution at the clean input, mean over the examples (positive: useful)",
        "eap_ig": "the same with gradients averaged over inputs between corrupted and clean",
        "exact": "loss of the metric when the edge alone is corrupted, mean over the examples",
        "spearman_eap": "rank correlation of eap and exact over all edges (-1..1), the same in "
        "every row",
        "spearman_eap_top": "the same among the 100 edges of the largest absolute exact score",
        "spearman_eap_ig": "rank correlation of eap_ig and exact over all edges",
        "spearman_eap_ig_top": "the same among the top 100",
    }

    methods: tuple[Method, ...] = Field(("eap", "eap_ig"), min_length=1)
    """The scores to compute; `exact` patches every edge in turn, and adds columns of agreement with
    the other scores."""
    steps: Draws = 5
    """Number of inputs over which EAP-IG averages gradients."""
    endpoint: Endpoint = "clean"
    """End of the line from corrupted to clean that is one of these inputs; `midpoint` uses
    neither."""

    def table(self, session: Session) -> pd.DataFrame:
        contrast = self.contrast(session)
        graph = contrast.graph
        ends = [(graph.sources[s], graph.targets[t]) for s, t in graph.exists.nonzero().tolist()]
        rows = [(s.name, t.name, s.layer, t.layer, t.kind) for s, t in ends]
        table = pd.DataFrame(rows, columns=["source", "target", "source_layer", "layer", "into"])
        table = table.assign(
            examples=self.examples, measure=self.metric.name, unit=self.metric.unit
        )
        for method in self.methods:
            table[method] = (
                contrast.scores(method, self.steps, self.endpoint)[graph.exists]
                .double()
                .cpu()
                .numpy()
            )
        table = table.assign(**_agreement(table))
        return table[[column for column in self.columns if column in table]]


def _agreement(table: pd.DataFrame) -> dict[str, float]:
    if "exact" not in table:
        return {}
    top, found = table["exact"].abs().nlargest(N_TOP).index, {}
    for method in [name for name in ("eap", "eap_ig") if name in table]:
        found[f"spearman_{method}"] = correlation(table[method].rank(), table["exact"].rank())
        found[f"spearman_{method}_top"] = correlation(
            table[method][top].rank(), table["exact"][top].rank()
        )
    return found
