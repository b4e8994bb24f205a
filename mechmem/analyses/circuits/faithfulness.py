"""Faithfulness: how much of the metric circuits retain, as table rows with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from mechmem.analyses.circuits.contrast import Contrast
from mechmem.analyses.effects.effect import TOLERANCE
from mechmem.statistics.intervals import LEVEL, ratio, resampled_means
from mechmem.statistics.rows import Row, _row, over_draws, over_examples

UNITS = {
    **{
        "faithfulness": "0 corrupted, 1 full run",
        "connected": "edges",
        "cpr": "area",
        "cmd": "area",
    },
    **{
        "edge_iou": "fraction",
        "node_iou": "fraction",
        "recall": "fraction",
        "recall_other": "fraction",
    },
    **dict.fromkeys(("rescaled_iou", "rescaled_node_iou"), "0 as null, 1 as ceiling"),
    "hypergeometric_p": "probability",
}


class Runs:
    """The metric of each example in the full run, in the corrupted run, and in circuits, whose
    edges are those of one or the other."""

    def __init__(
        self, contrast: Contrast, circuits: Bool[Tensor, "draw circuit source target"]
    ) -> None:
        self.metric, self.n_edges = contrast.metric, contrast.graph.n_edges
        exists = contrast.graph.exists
        every = torch.cat([exists[None], torch.zeros_like(exists)[None], circuits.flatten(0, 1)])
        self.full, self.corrupted, *values = contrast.values(every).double().cpu().numpy()
        self.values = np.stack(values).reshape(*circuits.shape[:2], -1)

    @cached_property
    def faithfulness(self) -> np.ndarray:
        """Contribution of each example, `draw circuit n`; their mean is (circuit - corrupted) /
        (full - corrupted), computed from the means.

        The full model has exactly 1. Undefined where the two runs do not differ.
        """
        return ratio(self.values - self.corrupted, self.full - self.corrupted, TOLERANCE)

    def rows(self) -> list[Row]:
        """The metric in the full and in the corrupted run."""
        labels = {"measure": self.metric.name, "unit": self.metric.unit}
        full = over_examples(self.full) | {"condition": "full", "k": 1.0, "n_edges": self.n_edges}
        corrupted = over_examples(self.corrupted) | {
            "condition": "corrupted",
            "k": 0.0,
            "n_edges": 0,
        }
        return [full | labels, corrupted | labels]


def areas(fractions: Sequence[float], values: np.ndarray) -> list[Row]:
    """CPR and CMD of one curve (`circuit n`) by the trapezoidal rule, with a bootstrap over
    examples. Source: arXiv:2504.13151."""
    n, found = values.shape[1], []
    resampled = resampled_means(values)
    for name, area in AREAS.items():
        low, high = np.quantile(area(fractions, resampled), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        value = area(fractions, values.mean(1, keepdims=True))[0]
        found.append(_row(value, low, high, n, np.array([value])) | {"measure": name})
    return found


def areas_of_draws(fractions: Sequence[float], draws: Sequence[np.ndarray]) -> list[Row]:
    """CPR and CMD over the curves of all draws."""
    curves = np.stack([values.mean(1) for values in draws], axis=1)
    return [
        over_draws(list(area(fractions, curves)[:, None])) | {"measure": name}
        for name, area in AREAS.items()
    ]


AREAS = {
    "cpr": lambda fractions, curves: np.trapezoid(curves, fractions, axis=0),
    "cmd": lambda fractions, curves: np.trapezoid(np.abs(1 - curves), fractions, axis=0),
}


def tidy(rows: Sequence[Row], columns: Mapping[str, str], **shared: Any) -> pd.DataFrame:
    """The table of these rows, in the order of its documented columns.

    Args:
        rows: the rows; their unit follows from their measure unless they state one.
        columns: the documented columns.
        shared: values that every row has.
    """
    full = [{"unit": UNITS.get(row["measure"], "")} | row | shared for row in rows]
    return pd.DataFrame(full)[list(columns)].astype({"k": float, "n_edges": float})
