"""ActivationMap: activations of chosen neurons for every pair of digits, before and after
memorisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field

from mechmem.analyses.neurons.grid import CELLS, Grid, GridAnalysis
from mechmem.analyses.neurons.heuristics import Heuristics
from mechmem.session import Session
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.limits import Width
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept


class ActivationMap(GridAnalysis):
    """Activation maps of the neurons with the largest effect on a digit, before and after.

    Each cell has two values for its digits and carry: the mean activation over clean instances, and
    the mean over memorised instances. Where a memorised instance deviates from its cell after
    memorisation but not before, the neuron's pattern was shifted for this instance (claim C7): an
    outlier in a heuristic.
    Source: arXiv:2410.21272 for the maps, arXiv:2507.04782 for the outliers.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "model": "checkpoint: before or after",
        "order": "rank of the neuron by its effect at `after`; 0 for the largest",
        "layer": "layer of the neuron",
        "neuron": "index of the neuron in its layer",
        "place": "answer digit; activations are those at the position where it is read",
        "type": "type of rule that this checkpoint's map follows, or none, or silent (the same "
        "activation everywhere)",
        "rule": "the rule; empty for none and silent",
        "a": "digit of the first number at this place",
        "b": "digit of the second number at this place",
        "carry": "carry into this place",
        "value": "mean activation over the clean instances of the cell; undefined if it has none",
        "n": "number of clean instances in the cell",
        "noisy_value": "mean activation over the memorised instances of the cell; undefined if it "
        "has none",
        "n_noisy": "number of memorised instances in the cell",
        "noisy_prefix": "label whose earlier digits the model is fed on memorised instances",
    }

    before: CheckpointName = CheckpointName("before")
    """The checkpoint before memorisation."""
    after: CheckpointName = CheckpointName("after")
    """The checkpoint after memorisation; neurons are chosen by their effects in it."""
    noisy: ExampleSetName = ExampleSetName("noisy")
    """The set of memorised instances, under its own prefix."""
    pairs: tuple[ExampleSetName, ...] = Field((ExampleSetName("pairs"),), min_length=1)
    """Sets made with `pair:`, for the effects by which neurons are chosen."""
    place: Swept[str] = "s1"
    """The answer digit."""
    layer: Swept[int | None] = None
    """The layer from which neurons are chosen; by default, all layers."""
    k: Width = 4
    """Number of neurons."""

    def table(self, session: Session) -> pd.DataFrame:
        chosen = self._chosen(session)
        tables = []
        for model in (self.before, self.after):
            types = self.classified(session, model).set_index(["layer", "neuron", "place"])
            maps, noisy = self.maps(session, model), self.activations(session, model, self.noisy)
            for order, (layer, neuron) in enumerate(chosen):
                fit = types.loc[(layer, neuron, self.place)]
                labels = {
                    "model": model,
                    "order": order,
                    "layer": layer,
                    "neuron": neuron,
                    "place": self.place,
                }
                labels |= {
                    "type": fit["type"],
                    "rule": fit["rule"],
                    "noisy_prefix": session.examples(self.noisy).prefix,
                }
                clean = maps[layer, self.place][:, neuron]
                tables.append(
                    self._cells(session, clean, noisy[layer][..., neuron, None]).assign(**labels)
                )
        return pd.concat(tables, ignore_index=True)[[*self.columns]]

    def _chosen(self, session: Session) -> list[tuple[int, int]]:
        """(layer, neuron) of the k neurons with the largest effects."""
        if self.place not in self.places(session):
            raise InputError(
                f"no digits are added at place {self.place!r}; "
                f"{suggest(self.place, self.places(session))}"
            )
        shared = {name: getattr(self, name) for name in GridAnalysis.model_fields if name != "name"}
        table = Heuristics(model=self.after, pairs=self.pairs, **shared).table(session)
        rows = table[
            (table["place"] == self.place) & ((table["layer"] == self.layer) | (self.layer is None))
        ]
        if self.k > len(rows):
            raise InputError(
                f"k {self.k} is more than the {len(rows)} neurons of layer {self.layer}"
            )
        top = rows.nsmallest(self.k, "rank")
        return [*zip(top["layer"].tolist(), top["neuron"].tolist(), strict=True)]

    def _cells(self, session: Session, clean: np.ndarray, noisy: Any) -> pd.DataFrame:
        grids = [
            Grid.of(session.examples(name), self.place) for name in (self.examples, self.noisy)
        ]
        n, n_noisy = (grid.counts for grid in grids)
        values = {"value": np.where(n > 0, clean, np.nan), "n": n}
        outliers = np.where(n_noisy > 0, grids[1].means(noisy)[:, 0], np.nan)
        cells = dict(zip(("a", "b", "carry"), CELLS.T, strict=True))
        return pd.DataFrame(cells | values | {"noisy_value": outliers, "n_noisy": n_noisy})
