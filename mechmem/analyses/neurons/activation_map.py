"""ActivationMap: what chosen neurons do at every pair of digits, before and after memorisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field, PositiveInt

from mechmem.analyses.neurons.grid import CELLS, Grid, GridAnalysis
from mechmem.analyses.neurons.heuristics import Heuristics
from mechmem.session import Session
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept


class ActivationMap(GridAnalysis):
    """The maps of the neurons with the largest indirect effect on a digit, before memorisation and
    after.

    Each cell is the mean activation over clean instances with these digits and this carry, and
    beside it that over the memorised instances in the same cell. Where a memorised instance stands
    out from its cell after memorisation and did not before, the neuron's own pattern was shifted
    for it (claim C7): an outlier in a heuristic.
    Source: arXiv:2410.21272 for the maps, arXiv:2507.04782 for the outliers.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "model": "checkpoint: before or after",
        "order": "of the neuron, by its effect at `after`; 0 is the largest",
        "layer": "layer of the neuron",
        "neuron": "index of the neuron in its layer",
        "place": "answer digit; the activation is that where it is read",
        "type": "what this checkpoint's map follows: a type of rule, none, or silent",
        "rule": "the rule; empty for none and silent",
        "a": "digit of the first number at this place",
        "b": "digit of the second number at this place",
        "carry": "carry into this place",
        "value": "mean activation over the clean instances of the cell; undefined where there is "
        "none",
        "n": "number of clean instances in the cell",
        "noisy_value": "mean activation over the memorised instances of the cell; undefined where "
        "there is none",
        "n_noisy": "number of memorised instances in the cell",
        "noisy_prefix": "label whose earlier digits the model is fed on memorised instances",
    }

    before: CheckpointName = CheckpointName("before")
    after: CheckpointName = CheckpointName("after")
    noisy: ExampleSetName = ExampleSetName("noisy")
    """The set of memorised instances, under its own prefix."""
    pairs: tuple[ExampleSetName, ...] = Field((ExampleSetName("pairs"),), min_length=1)
    """Sets made with `pair:`, for the effects that choose the neurons."""
    place: Swept[str] = "s1"
    """The answer digit."""
    layer: Swept[int | None] = None
    """The layer that neurons are chosen from; all unless given."""
    k: PositiveInt = 4
    """Number of neurons."""

    def table(self, session: Session) -> pd.DataFrame:
        chosen = self._chosen(session)
        tables = []
        for model in (self.before, self.after):
            types = self.classified(session, model).set_index(["layer", "neuron", "place"])
            maps, noisy = self.maps(session, model), self.activations(session, model, self.noisy)
            for order, (layer, neuron) in enumerate(chosen):
                fit = types.loc[(layer, neuron, self.place)]
                said = {
                    "model": model,
                    "order": order,
                    "layer": layer,
                    "neuron": neuron,
                    "place": self.place,
                }
                said |= {
                    "type": fit["type"],
                    "rule": fit["rule"],
                    "noisy_prefix": session.examples(self.noisy).prefix,
                }
                clean = maps[layer, self.place][:, neuron]
                tables.append(
                    self._cells(session, clean, noisy[layer][..., neuron, None]).assign(**said)
                )
        return pd.concat(tables, ignore_index=True)[[*self.columns]]

    def _chosen(self, session: Session) -> list[tuple[int, int]]:
        """(layer, neuron) of the k neurons of the largest effect."""
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
