"""HeuristicTypes: whether the neurons that moved most are those that follow rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import PositiveInt
from scipy import stats

from mechmem.analyses.neurons.grid import GridAnalysis
from mechmem.analyses.neurons.neuron_shift import NeuronShift
from mechmem.analyses.neurons.rules import TYPES
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import N_RESAMPLES, interval


class HeuristicTypes(GridAnalysis):
    """What the most shifted neurons of some layers respond to, beside the rest of these layers, by
    place.

    If memory is a shift of neurons that compute (claim C7), the shifted ones follow rules as often
    as the rest do, and not none. Layers differ in both, so compare within a layer. Controls: the
    rest, and the types of all these maps with their cells shuffled (`chance`). Source:
    arXiv:2410.21272 for the types; the comparison is ours.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "place": "answer digit",
        "group": "shifted (the k most shifted neurons), rest, or chance (all of them, maps "
        "shuffled)",
        "type": "type of rule, none, or silent (the same activation everywhere)",
        "measure": "what is counted: neurons",
        "unit": "unit of the value",
        "value": "share of the group's neurons that are of this type (fraction)",
        "low": "lower end of the bootstrap 95 % interval over neurons",
        "high": "upper end of it",
        "n": "number of neurons in the group",
        "p": "permutation p of the chi-square between the types of shifted and rest at this place "
        "(0..1)",
        "q": "Benjamini-Hochberg false discovery rate of p over the places",
        "per_example": "for each neuron of the group whether it is of this type (0 or 1)",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint whose maps are classified."""
    before: CheckpointName = CheckpointName("before")
    after: CheckpointName = CheckpointName("after")
    """Shifts are from `before` to `after`."""
    noisy: ExampleSetName = ExampleSetName("noisy")
    """The noisy set whose shifts rank the neurons."""
    matched: ExampleSetName | None = None
    """The clean set of the shifts; that of the maps unless given."""
    layer: Swept[int | tuple[int, ...]] = 0
    """Layers whose neurons are ranked together."""
    k: Swept[PositiveInt] = 128
    """Number of neurons in the group `shifted`."""

    def table(self, session: Session) -> pd.DataFrame:
        layers = self.layer if isinstance(self.layer, tuple) else (self.layer,)
        found = self.classified(session, self.model).merge(
            self._shifts(session), on=["layer", "neuron"]
        )
        found = found[found["layer"].isin(layers)]
        if self.k >= len(found.drop_duplicates(["layer", "neuron"])):
            raise InputError(
                f"k {self.k} leaves no neurons beside the shifted ones of layers {layers}"
            )
        tables = [self._place(place, rows) for place, rows in found.groupby("place", sort=False)]
        rates = stats.false_discovery_control([table["p"].iloc[0] for table in tables])
        tables = [table.assign(q=q) for table, q in zip(tables, rates, strict=True)]
        return pd.concat(tables, ignore_index=True)[[*self.columns]]

    def _shifts(self, session: Session) -> pd.DataFrame:
        matched = self.matched or self.examples
        shift = NeuronShift(
            before=self.before, after=self.after, examples=self.noisy, matched=matched
        )
        return shift.kept(session)[["layer", "neuron", "shift_noisy"]]

    def _place(self, place: Any, rows: pd.DataFrame) -> pd.DataFrame:
        rows = rows.sort_values("shift_noisy", ascending=False, kind="stable")
        types = rows["type"].to_numpy()
        groups = {
            "shifted": types[: self.k],
            "rest": types[self.k :],
            "chance": rows["shuffled_type"].to_numpy(),
        }
        tables = [_shares(of).assign(group=group) for group, of in groups.items()]
        p = permutation_p(groups["shifted"], groups["rest"], self.seed)
        return pd.concat(tables).assign(place=place, p=p, measure="neurons", unit="fraction")


def permutation_p(first: np.ndarray, second: np.ndarray, seed: int = 0) -> float:
    """P of a chi-square this large between two groups of labels, if the groups were drawn at random
    from both."""
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
    low, high = interval(matrix)
    numbers = {"value": matrix.mean(1), "low": low, "high": high, "n": len(types)}
    return pd.DataFrame({"type": TYPES} | numbers | {"per_example": [*matrix.astype(np.float32)]})
