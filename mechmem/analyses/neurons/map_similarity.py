"""MapSimilarity: how similar neurons' activation maps are at two checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mechmem.analyses.neurons.grid import Grid, GridAnalysis
from mechmem.session import Session
from mechmem.spec.references import CheckpointName
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import interval


class MapSimilarity(GridAnalysis):
    """Correlation of each neuron's map with that of the same neuron at another checkpoint.

    If memorisation shifts patterns only slightly (claim C7), the maps before and after it stay
    similar. Any training changes them, so compare with checkpoints between which little was
    memorised: sweep `model` and `other`.
    Source: ours.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "layer": "layer of the neurons",
        "place": "answer digit; activations are those at the position where it is read",
        "measure": "the measured quantity: similarity",
        "unit": "unit of the value",
        "value": "correlation over the cells, mean over the layer's neurons; a neuron that is "
        "silent at both checkpoints counts as 1, at only one as 0",
        "low": "lower end of the bootstrap 95 % interval over neurons",
        "high": "upper end of that interval",
        "n": "number of neurons",
        "per_example": "the correlation of each neuron",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The first checkpoint."""
    other: Swept[CheckpointName] = CheckpointName("before")
    """The checkpoint with which it is compared."""

    def table(self, session: Session) -> pd.DataFrame:
        others, rows = self.maps(session, self.other), []
        for (layer, place), map_ in self.maps(session, self.model).items():
            is_met = Grid.of(session.examples(self.examples), place).counts > 0
            found = correlations(map_[is_met], others[layer, place][is_met])
            low, high = interval(found[None])
            numbers = {"value": found.mean(), "low": low[0], "high": high[0], "n": len(found)}
            rows.append(
                {"layer": layer, "place": place}
                | numbers
                | {"per_example": found.astype(np.float32)}
            )
        return pd.DataFrame(rows).assign(measure="similarity", unit="correlation")[[*self.columns]]


def correlations(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.floating]:
    """Pearson's r of each column of x with the same column of y; 1 if neither varies, 0 if only one
    does."""
    x, y = x - x.mean(0), y - y.mean(0)
    size_x, size_y = np.sqrt((x**2).sum(0)), np.sqrt((y**2).sum(0))
    both = size_x * size_y
    return np.where(
        both > 0, (x * y).sum(0) / np.where(both > 0, both, 1), (size_x == 0) & (size_y == 0)
    )
