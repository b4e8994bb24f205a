"""HeuristicTypes: whether the neurons to which memorisation is due are those that follow rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from scipy import stats

from mechmem.analyses.neurons.grid import GridAnalysis
from mechmem.analyses.neurons.ranking import Change, Method, Options, scores
from mechmem.analyses.neurons.rules import TYPES
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.limits import Width
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import N_RESAMPLES
from mechmem.statistics.rows import FRACTION, interval_by_unit


class HeuristicTypes(GridAnalysis):
    """Types of rule of the first k neurons of a ranking, compared with the others of their layers.

    If memorisation shifts neurons that compute the answer (claim C7), the neurons that return the
    true answer when they are patched back follow rules as often as the others do. Layers differ in
    both, so compare within a layer. Controls: the other neurons, and the types of all maps with
    their cells shuffled (`chance`).
    Source: arXiv:2410.21272 for the types; the comparison is ours.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "place": "answer digit",
        "ranking": "how the neurons are ranked",
        "group": "ranked (the first k neurons), rest (the other neurons), or chance (all neurons, "
        "with shuffled maps)",
        "type": "type of rule, none, or silent (the same activation everywhere)",
        "measure": "the counted quantity: neurons",
        "unit": "unit of the value",
        "value": "share of the group's neurons that have this type (fraction)",
        "low": "lower end of the bootstrap 95 % interval over neurons",
        "high": "upper end of that interval",
        "n": "number of neurons in the group",
        "p": "permutation p-value of the chi-square between the types of ranked and rest at this "
        "place (0..1)",
        "q": "Benjamini-Hochberg false discovery rate of p over the places",
        "per_example": "for each neuron of the group, whether it has this type (0 or 1)",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint whose maps are classified."""
    before: CheckpointName = CheckpointName("before")
    """The checkpoint from which changes are measured."""
    after: CheckpointName = CheckpointName("after")
    """The checkpoint to which changes are measured."""
    noisy: ExampleSetName = ExampleSetName("noisy")
    """The noisy set whose changes rank the neurons."""
    matched: ExampleSetName | None = None
    """The clean set of the ranking; by default, that of the maps."""
    layer: Swept[int | tuple[int, ...]] = 0
    """Layers whose neurons are ranked together."""
    ranking: Swept[Method] = "attribution"
    """How neurons are ranked, as in `neuron_top_k`."""
    k: Swept[Width] = 128
    """Number of neurons in the group `ranked`."""

    def table(self, session: Session) -> pd.DataFrame:
        layers = self.layer if isinstance(self.layer, tuple) else (self.layer,)
        found = self.classified(session, self.model).merge(
            self._scores(session, layers), on=["layer", "neuron"]
        )
        if self.k >= len(found.drop_duplicates(["layer", "neuron"])):
            raise InputError(
                f"k {self.k} leaves no other neurons in layers {layers} to compare with; lower k"
            )
        tables = [self._place(place, rows) for place, rows in found.groupby("place", sort=False)]
        rates = stats.false_discovery_control([table["p"].iloc[0] for table in tables])
        tables = [table.assign(q=q) for table, q in zip(tables, rates, strict=True)]
        found = pd.concat(tables, ignore_index=True).assign(ranking=self.ranking)
        return found[[*self.columns]]

    def _scores(self, session: Session, layers: tuple[int, ...]) -> pd.DataFrame:
        """The score of each neuron of the layers, mean over the noisy instances."""
        after, before = session.model(self.after), session.model(self.before)
        matched = session.examples(self.matched or self.examples)
        change = Change(session, after, before, session.examples(self.noisy), matched, layers)
        of_layers = scores(change, self.ranking, options=Options(seed=self.seed))
        means = [of.mean(0).double().cpu().numpy() for of in of_layers]
        tables = [
            pd.DataFrame({"layer": layer, "neuron": np.arange(len(mean)), "score": mean})
            for layer, mean in zip(layers, means, strict=True)
        ]
        return pd.concat(tables, ignore_index=True)

    def _place(self, place: Any, rows: pd.DataFrame) -> pd.DataFrame:
        rows = rows.sort_values("score", ascending=False, kind="stable")
        types = rows["type"].to_numpy()
        groups = {
            "ranked": types[: self.k],
            "rest": types[self.k :],
            "chance": rows["shuffled_type"].to_numpy(),
        }
        tables = [_shares(of).assign(group=group) for group, of in groups.items()]
        p = permutation_p(groups["ranked"], groups["rest"], self.seed)
        return pd.concat(tables).assign(place=place, p=p, measure="neurons", unit="fraction")


def permutation_p(first: np.ndarray, second: np.ndarray, seed: int = 0) -> float:
    """The permutation p-value of the chi-square statistic between two groups of labels: the
    probability of one at least as large if group membership were random.

    Args:
        first: labels of the first group.
        second: labels of the second group.
        seed: seed of the permutations.
    """
    both = np.concatenate([first, second])
    kinds, labels = np.unique(both, return_inverse=True)
    totals = np.bincount(labels)
    found = np.bincount(labels[: len(first)], minlength=len(kinds))
    generator = np.random.default_rng(seed)
    drawn = generator.multivariate_hypergeometric(
        totals, len(first), size=N_RESAMPLES, method="count"
    )
    expected = totals * len(first) / len(both)
    chi_square = ((drawn - expected) ** 2 / expected).sum(
        1
    )  # that of the other group is proportional
    least = ((found - expected) ** 2 / expected).sum() * (1 - 1e-12)
    return float((1 + (chi_square >= least).sum()) / (1 + N_RESAMPLES))


def _shares(types: np.ndarray) -> pd.DataFrame:
    matrix = np.stack([types == kind for kind in TYPES]).astype(float)
    low, high = interval_by_unit(matrix, [FRACTION] * len(TYPES))
    numbers = {"value": matrix.mean(1), "low": low, "high": high, "n": len(types)}
    return pd.DataFrame({"type": TYPES} | numbers | {"per_example": [*matrix.astype(np.float32)]})
