"""Concentration: whether few tokens, heads or neurons carry an answer, or many a little each."""

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
    """How unequally the attribution of each single example is spread over its tokens, heads and
    neurons.

    A look-up of a few tokens, or a memory in a few neurons, is concentrated; what is computed from
    everything is spread. Sizes of scores say nothing here, only their shares. The reference are the
    clean instances under the same metric and the same corrupted run; independent normal scores
    would have a Gini of 0.41 and take part in 0.64 of the units. Tokens are the prompt's that are
    not the same in every example; neurons and heads those of all layers.
    Touches: embed, z of each head, every neuron. Source: arXiv:2310.10348 (scores); ours, for claim
    C6.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "metric": "the metric that the scores are of",
        "component": "token, head or neuron: over what the attribution of an example is spread",
        "n_units": "number of these",
        "measure": "gini, participation or top_share, of the |scores| of each example",
        "unit": "gini: 0 even, 1 - 1/n_units all in one; participation: units; top_share: fraction",
        "value": "mean over the examples; undefined for an example without any score",
        "low": "lower end of the bootstrap 95 % interval over examples",
        "high": "upper end of it",
        "n": "number of examples",
        "per_example": "the values of the examples, in the order of the set",
    }

    metric: Measure = Logit(label="given")
    """One that clean instances have too; the logit difference of the two labels would be 0 on
    them."""
    corrupted: Source = Source(mean_over="clean")
    """One that differs at every token: a minimal pair would put everything on the token that it
    changes."""

    def table(self, session: Session) -> pd.DataFrame:
        contrast = self.contrast(session)
        rows = []
        for component, scores in _scores(contrast).items():
            for measure, (unit, measured) in MEASURES.items():
                said = {
                    "component": component,
                    "n_units": scores.shape[1],
                    "measure": measure,
                    "unit": unit,
                }
                rows.append(over_examples(measured(np.abs(scores))) | said)
        shared = {"examples": self.examples, "metric": self.metric.name}
        return pd.DataFrame(rows).assign(**shared)[[*self.columns]]


def gini(sizes: Scores) -> Float[np.ndarray, " n"]:
    """Mean difference of two units of an example, over twice their mean: 0 even, 1 - 1/units all in
    one."""
    n = sizes.shape[1]
    ranks = 2 * np.arange(1, n + 1) - n - 1
    return _over(np.sort(sizes, axis=1) @ ranks, n * sizes.sum(axis=1))


def participation(sizes: Scores) -> Float[np.ndarray, " n"]:
    """Number of units among which as much would be shared evenly: 1 if all is in one."""
    return _over(sizes.sum(axis=1) ** 2, (sizes**2).sum(axis=1))


def top_share(sizes: Scores) -> Float[np.ndarray, " n"]:
    """Share of the largest unit."""
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
            "all examples have the same prompt, so that no token tells them apart; take a larger "
            "set"
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
