"""CircuitOverlap: whether two models, or two kinds of examples, use the same circuit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool
from pydantic import Field
from scipy import stats
from torch import Tensor

from mechmem.analyses.circuits.circuit import CircuitAnalysis
from mechmem.analyses.circuits.contrast import Contrast
from mechmem.analyses.circuits.faithfulness import Runs, tidy
from mechmem.analyses.circuits.graph import Graph
from mechmem.measures.measure import Measure
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import middle, ratio
from mechmem.statistics.rows import Row, over_draws, over_examples, single

Edges = Bool[Tensor, "source target"]
Circuits = Bool[Tensor, "circuit source target"]

Draws = Mapping[str, Mapping[str, np.ndarray]]
"""By condition and measure, a value for each division into halves."""

PERMUTED = ("head_permuted", "null")
"""Conditions in which heads are permuted."""
RESCALED = {"edge_iou": "rescaled_iou", "node_iou": "rescaled_node_iou"}
"""The rescaled form of a measure."""
LEAST_RANGE = 0.1
"""Distance of ceiling and null below which the rescaled overlap is undefined."""
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

    How much two circuits can share at most depends on how well a sample of examples determines
    them. So circuits are also found on random halves of the examples, all of one size and never of
    the same instances: one half of A against the other half of B (`halves`), the same with permuted
    heads (`null`), and the two halves of A (`ceiling`) or of B (`ceiling_other`). The rescaled
    overlap is (halves - null) / (ceiling - null): 0 as with other heads, 1 as two samples of A. Let
    A be the clean set, and give both sets as many examples, in the same order where they are the
    same instances.
    Source: arXiv:2403.17806; claim C5 of arXiv:2507.04782; permuted heads and halves: ours.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "example sets of A and of B",
        "method": "how edges are ranked: eap, eap_ig or exact",
        "condition": "circuits; for faithfulness on B: cross (A's circuit), own (B's circuit); "
        "controls: random, head_permuted (A's circuit with permuted heads); circuits of halves of "
        "the examples: halves (A's against B's), null (with permuted heads), ceiling (both A's), "
        "ceiling_other (both B's)",
        "k": "share of the edges that each circuit keeps (fraction)",
        "n_edges": "number of edges that each circuit keeps, before pruning to connected ones",
        "measure": "edge_iou, node_iou, recall (share of A's edges in B), recall_other (share of "
        "B's in A), hypergeometric_p, faithfulness (0 corrupted, 1 full run of B); of halves: "
        "edge_iou, node_iou, rescaled_iou (of edges) and rescaled_node_iou",
        "unit": "unit of the value",
        "value": "the value itself, or its mean over examples or draws; a share is undefined for "
        "an empty circuit, and a rescaled one where the ceiling is less than 0.1 above the null",
        "low": "lower end of the 95 % interval: bootstrap over examples; over draws of random "
        "circuits or of halves; for shares of `circuits`, the spread over halves, which is that of "
        "other samples of as many examples as there are",
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
    n_halves: int = Field(100, ge=2, le=100_000)
    """Number of random divisions of the examples into halves."""

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
        halves = self._halves(session, a, b)
        rows = []
        for i, (k, n) in enumerate(zip(self.fractions, self.sizes(a), strict=True)):
            here = [
                *self._sets(a, ours[i], theirs[i], head_permuted[:, i], halves[i]["halves"]),
                *self._faithfulness(found[:, i]),
                *_of_halves(halves[i]),
            ]
            rows += [
                row | {"k": k, "n_edges": n}
                for row in here
                # A single head has no other to be permuted with.
                if a.graph.n_heads > 1
                or not (row["condition"] in PERMUTED or row["measure"].startswith("rescaled"))
            ]
        examples = " / ".join((self.examples, self.other_examples or self.examples))
        return tidy(rows, self.columns, examples=examples, method=self.method)

    def head_permuted(
        self, contrast: Contrast, circuits: Circuits
    ) -> Bool[Tensor, "draw circuit source target"]:
        """These circuits with their heads permuted, one draw for each random circuit; all circuits
        of a draw get the same permutation."""
        return self._permuted(contrast, circuits.expand(self.n_random, *circuits.shape))

    def _permuted(self, contrast: Contrast, draws: Tensor) -> Tensor:
        """The circuits of each draw with their heads permuted, `draw circuit source target`."""
        found = [
            contrast.graph.head_permuted(draw, torch.Generator().manual_seed(self.seed + i))
            for i, draw in enumerate(draws)
        ]
        return torch.stack(found)

    def _halves(self, session: Session, a: Contrast, b: Contrast) -> list[Draws]:
        """For each size, what the circuits of random halves of the examples share."""
        fewest = min(len(a.examples), len(b.examples))
        if fewest < 2:
            raise InputError("a circuit of half of the examples needs at least 2; raise `n`")
        n_draws = session.few(self.n_halves, 3)
        chosen = [halves(len(c.examples), n_draws, self.seed) for c in (a, b)]
        a1, a2 = (self._circuits_of(a, mask) for mask in (chosen[0], ~chosen[0]))
        b1, b2 = (self._circuits_of(b, mask) for mask in (chosen[1], ~chosen[1]))
        pairs = {"halves": (a1, b2), "null": (self._permuted(a, a1), b2)}
        pairs |= {"ceiling": (a1, a2), "ceiling_other": (b1, b2)}
        found = {name: overlaps(a.graph, *pair) for name, pair in pairs.items()}
        return [
            {name: {m: v[:, i] for m, v in of_pair.items()} for name, of_pair in found.items()}
            for i in range(len(self.fractions))
        ]

    def _circuits_of(
        self, contrast: Contrast, chosen: Bool[Tensor, "draw n"]
    ) -> Bool[Tensor, "draw circuit source target"]:
        """The circuits of each draw of examples, of all sizes."""
        each = contrast.scores_by_example(self.method, self.steps, self.endpoint).cpu()
        scores = einsum(chosen.to(each), each, "draw n, n source target -> draw source target")
        sizes, graph = self.sizes(contrast), contrast.graph
        tops = [torch.stack([graph.top(one, size) for size in sizes]) for one in scores]
        return graph.connected(torch.stack(tops))

    def _sets(
        self,
        contrast: Contrast,
        a: Edges,
        b: Edges,
        head_permuted: Circuits,
        halves: Mapping[str, np.ndarray],
    ) -> list[Row]:
        """How many edges and nodes A and B share, next to the two controls: random circuits of
        their sizes, and A with permuted heads. The spread is that over halves."""
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
            row = single(value) | around(value, halves[name])
            rows += [row | {"measure": name, "condition": "circuits"}]
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
    found = overlaps(contrast.graph, a, b)
    return {name: float(value) for name, value in found.items()}


def overlaps(graph: Graph, a: Tensor, b: Tensor) -> dict[str, np.ndarray]:
    """What `shared` gives, for each pair of circuits of the same shape.

    Args:
        graph: to which the edges belong.
        a: edges of the circuits A, `... source target`.
        b: edges of the circuits B, of the same shape.
    """
    a_nodes, b_nodes = graph.nodes(a), graph.nodes(b)
    a, b = a.flatten(-2), b.flatten(-2)
    return {
        "edge_iou": _share(a & b, a | b),
        "node_iou": _share(a_nodes & b_nodes, a_nodes | b_nodes),
        "recall": _share(a & b, a),
        "recall_other": _share(a & b, b),
    }


def halves(n: int, n_draws: int, seed: int) -> Bool[Tensor, "draw n"]:
    """Which of n examples are in the first half, in each random division into halves.

    The divisions depend on the number and the seed alone, so that the halves of two sets of the
    same instances are of the same instances.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(n_draws, n, generator=generator).argsort(dim=1).argsort(dim=1)
    return ranks < n // 2


def around(value: float, draws: np.ndarray) -> dict[str, float]:
    """The interval of a share from the spread of its values on random halves about their mean.

    Halves drawn without replacement spread about as much as whole samples do: half as many
    examples double the variance, and half of the examples being shared halves it.
    """
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return {"low": value, "high": value}
    low, high = np.clip(value + np.array(middle(draws)) - draws.mean(), 0, 1)
    # The mean of very skew draws may be beyond their middle 95 %.
    return {"low": min(float(low), value), "high": max(float(high), value)}


def _of_halves(draws: Draws) -> list[Row]:
    """The rows of what circuits of halves share, with the overlap rescaled by null and ceiling."""
    rows = []
    for name, rescaled in RESCALED.items():
        values = {condition: of_draws[name] for condition, of_draws in draws.items()}
        for condition, of_draws in values.items():
            rows.append(_over(of_draws) | {"measure": name, "condition": condition})
        gained, possible = (values[c] - values["null"] for c in ("halves", "ceiling"))
        is_defined = ~np.isnan(gained) & ~np.isnan(possible)
        shares = np.full(1, np.nan)
        if is_defined.any():
            shares = ratio(gained[is_defined], possible[is_defined], LEAST_RANGE)
        rows.append(_over(shares) | {"measure": rescaled, "condition": "halves"})
    return rows


def _over(values: np.ndarray) -> Row:
    """The mean over the draws in which a share is defined."""
    defined = values[~np.isnan(values)]
    return over_draws([np.array([value]) for value in (defined if len(defined) else [np.nan])])


def hypergeometric_p(n_edges: int, n_a: int, n_b: int, n_shared: int) -> float:
    """Probability that random sets of these sizes share at least as many edges, P(X >= n_shared).

    Args:
        n_edges: number of edges of the graph.
        n_a: number of edges of circuit A.
        n_b: number of edges of circuit B.
        n_shared: number of edges that are in both.
    """
    return float(stats.hypergeom.sf(n_shared - 1, n_edges, n_a, n_b))


def _share(part: Tensor, whole: Tensor) -> np.ndarray:
    return (part.sum(-1) / whole.sum(-1)).double().numpy()  # NaN for 0 / 0
