"""Circuit: how small a part of the computational graph suffices for the answer, compared with as
many random edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import pandas as pd
import torch
from jaxtyping import Bool
from pydantic import Field, model_validator
from torch import Tensor

from mechmem.analyses.circuits.contrast import Contrast, ContrastAnalysis, Endpoint, Method
from mechmem.analyses.circuits.faithfulness import Runs, areas, areas_of_draws, tidy
from mechmem.session import Session
from mechmem.spec.limits import Draws, Seed
from mechmem.spec.sweep import Swept
from mechmem.statistics.rows import over_draws, over_examples, single


class CircuitAnalysis(ContrastAnalysis):
    """An analysis of circuits: the edges with the largest |score|, without those that are on no
    path from the embedding to the logits."""

    method: Swept[Method] = "eap_ig"
    """How edges are scored: by gradient (eap, eap_ig) or by patching each in turn (exact)."""
    steps: Draws = 5
    """Number of inputs over which EAP-IG averages gradients."""
    endpoint: Endpoint = "clean"
    """End of the line from corrupted to clean that is one of these inputs; `midpoint` uses
    neither."""
    fractions: tuple[float, ...] = Field(
        (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0), min_length=1
    )
    """Sizes of the circuits, as shares of all edges, in ascending order."""
    n_random: Draws = 20
    """Number of random circuits of each size."""
    seed: Seed = 0
    """Seed of the first random circuit."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if (
            list(self.fractions) != sorted(set(self.fractions))
            or not 0 <= self.fractions[0] <= self.fractions[-1] <= 1
        ):
            raise ValueError("fractions must ascend, within 0 to 1")
        return self

    def sizes(self, contrast: Contrast) -> list[int]:
        """Number of edges at each fraction."""
        return [round(k * contrast.graph.n_edges) for k in self.fractions]

    def circuits(self, contrast: Contrast) -> Bool[Tensor, "circuit source target"]:
        """The circuit of each size, pruned to its connected edges."""
        scores, graph = (
            contrast.scores(self.method, self.steps, self.endpoint).cpu(),
            contrast.graph,
        )
        return torch.stack([graph.connected(graph.top(scores, n)) for n in self.sizes(contrast)])

    def random_circuits(
        self, contrast: Contrast, sizes: Sequence[int], seed: int = 0
    ) -> Bool[Tensor, "draw circuit source target"]:
        """Random circuits of the given sizes; in one draw, larger circuits contain smaller ones.

        Args:
            contrast: gives the graph from which edges are drawn.
            sizes: number of edges of each circuit.
            seed: offset to the seeds of the draws, for circuits that must be independent.
        """
        seeds = [self.seed + seed + i for i in range(self.n_random)]
        drawn = [
            [contrast.graph.drawn(n, torch.Generator().manual_seed(s)) for n in sizes]
            for s in seeds
        ]
        return torch.stack([torch.stack(draw) for draw in drawn])


class Circuit(CircuitAnalysis):
    """Keeps the k highest-ranked edges, corrupts all others and measures the metric that remains.

    Faithfulness is (circuit - corrupted) / (full - corrupted), computed from means over the
    examples. It is 1 if the circuit does as well as the full model, and above 1 if the removed
    edges worked against the answer. CPR is the area under the curve (higher is better), CMD the
    area between the curve and 1 (lower is better). Random circuits have as many edges as the ranked
    circuit before pruning. They are not pruned, since pruning changes no output.
    Source: arXiv:2504.13151, arXiv:2403.17806.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "method": "how edges are ranked: eap, eap_ig or exact",
        "condition": "circuit, random, full (the whole model) or corrupted (the corrupted run)",
        "k": "share of the edges that are kept (fraction); empty for areas",
        "n_edges": "number of edges that are kept, before pruning; empty for areas",
        "measure": "faithfulness (0 corrupted, 1 full), connected (edges left after pruning), cpr, "
        "cmd, or the metric",
        "unit": "unit of the value",
        "value": "for a circuit, computed from means over the examples; for random circuits, the "
        "mean over their draws",
        "low": "lower end of the 95 % interval: bootstrap over examples, or over the draws of "
        "random circuits",
        "high": "upper end of that interval",
        "n": "number of examples, or of draws",
        "per_example": "contribution of each example to the value (for a ratio, to first order); "
        "one number for areas and counts",
    }

    def table(self, session: Session) -> pd.DataFrame:
        contrast = self.contrast(session)
        sizes, circuits = self.sizes(contrast), self.circuits(contrast)
        drawn = self.random_circuits(contrast, sizes)
        runs = Runs(contrast, torch.cat([circuits[None], drawn]))
        chosen, *random = runs.faithfulness
        rows = runs.rows()
        for i, (k, n) in enumerate(zip(self.fractions, sizes, strict=True)):
            at, kept = {"k": k, "n_edges": n}, float(circuits[i].sum())
            rows += [
                over_examples(chosen[i]) | at | {"condition": "circuit", "measure": "faithfulness"}
            ]
            rows += [
                over_draws([r[i] for r in random])
                | at
                | {"condition": "random", "measure": "faithfulness"}
            ]
            rows += [single(kept) | at | {"condition": "circuit", "measure": "connected"}]
        rows += [row | {"condition": "circuit"} for row in areas(self.fractions, chosen)]
        rows += [row | {"condition": "random"} for row in areas_of_draws(self.fractions, random)]
        return tidy(rows, self.columns, examples=self.examples, method=self.method)
