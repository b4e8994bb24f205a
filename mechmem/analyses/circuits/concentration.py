"""Concentration: whether an answer depends on a few tokens, heads or neurons, or a little on
many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from mechmem.analyses.circuits.attribution import Components, components, scores_of
from mechmem.analyses.circuits.contrast import Contrast, ContrastAnalysis
from mechmem.interventions.patch import Source
from mechmem.measures.logit import Logit
from mechmem.measures.measure import Measure
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.statistics.rows import over_examples

Scores = Float[np.ndarray, "n unit"]


class Concentration(ContrastAnalysis):
    """How unequally each example's attribution is spread over its tokens, heads and neurons.

    A look-up keyed on a few tokens, or a memory held by a few neurons, gives concentrated scores;
    a computation on the whole input gives spread ones. Only the relative sizes of an example's
    scores matter. Compare with clean instances under the same metric and the same corrupted run.
    For independent normal scores, the Gini coefficient would be 0.41 and the participation 0.64 of
    the units. The tokens are the prompt tokens that vary between examples; the heads and neurons
    are those of all layers.
    Touches: embed, z of each head, every neuron.
    Source: arXiv:2310.10348 (scores); ours, for claim C6.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "metric": "name of the attributed metric",
        "component": "token, head or neuron: the units over which an example's attribution is "
        "spread",
        "n_units": "number of these units",
        "measure": "gini, participation or top_share, of the |scores| of each example",
        "unit": "gini: 0 even, 1 - 1/n_units all in one; participation: units; top_share: fraction",
        "value": "mean over the examples; undefined for an example without any score",
        "low": "lower end of the bootstrap 95 % interval over examples",
        "high": "upper end of that interval",
        "n": "number of examples",
        "per_example": "the values of the examples, in the order of the set",
    }

    metric: Measure = Logit(label="given")
    """The attributed metric. It must be defined on clean instances too: the logit difference of the
    two labels would be 0 there."""
    corrupted: Source = Source(mean_over="clean")
    """The corrupted run. It should differ at every token: a minimal pair would concentrate all
    attribution on the token that it changes."""

    def table(self, session: Session) -> pd.DataFrame:
        contrast = self.contrast(session)
        rows = []
        for component, scores in _scores(contrast).items():
            for measure, (unit, measured) in MEASURES.items():
                labels = {
                    "component": component,
                    "n_units": scores.shape[1],
                    "measure": measure,
                    "unit": unit,
                }
                rows.append(over_examples(measured(np.abs(scores))) | labels)
        shared = {"examples": self.examples, "metric": self.metric.name}
        return pd.DataFrame(rows).assign(**shared)[[*self.columns]]


def gini(sizes: Scores) -> Float[np.ndarray, " n"]:
    """Gini coefficient of each example: the mean absolute difference of two units, divided by twice
    their mean. It is 0 if all units are equal and 1 - 1/n_units if one unit has everything."""
    n = sizes.shape[1]
    ranks = 2 * np.arange(1, n + 1) - n - 1
    return _over(np.sort(sizes, axis=1) @ ranks, n * sizes.sum(axis=1))


def participation(sizes: Scores) -> Float[np.ndarray, " n"]:
    """Participation ratio: the effective number of units; 1 if one unit has everything."""
    return _over(sizes.sum(axis=1) ** 2, (sizes**2).sum(axis=1))


def top_share(sizes: Scores) -> Float[np.ndarray, " n"]:
    """Share of the largest unit (fraction)."""
    return _over(sizes.max(axis=1), sizes.sum(axis=1))


MEASURES = {
    "gini": ("0 even, 1 in one", gini),
    "participation": ("units", participation),
    "top_share": ("fraction", top_share),
}


def _over(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    return np.divide(
        numerators, denominators, out=np.full(len(numerators), np.nan), where=denominators > 0
    )


def _scores(contrast: Contrast) -> dict[str, Scores]:
    """The attribution of every token, head and neuron, for each example."""
    prompt = contrast.examples.prompt
    is_input = (prompt != prompt[:1]).any(dim=0)
    if not is_input.any():
        raise InputError(
            "all examples have the same prompt, so no token distinguishes them; choose a larger set"
        )
    parts = [c for c in components(contrast) if c.component in ("head", "neuron")]
    wanted = [Components("token", -1, "hook_embed"), *parts]
    found: dict[str, list[torch.Tensor]] = {}
    for one, scores in zip(wanted, scores_of(contrast, wanted), strict=True):
        is_token = one.component == "token"
        chosen = scores[:, : len(is_input)][:, is_input] if is_token else scores
        found.setdefault(one.component, []).append(chosen)
    return {
        component: torch.cat(scores, dim=1).double().numpy() for component, scores in found.items()
    }
