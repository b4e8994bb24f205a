"""Heuristics: the effect of each MLP neuron on an answer digit, and the simple rule it follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mechmem.analyses.neurons.grid import GridAnalysis
from mechmem.data.examples import Examples
from mechmem.interventions.patch import Patch, Source
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import interval

N_TRIED_DRY = 8
"""Number of neurons per layer that are patched in a dry run."""


class Heuristics(GridAnalysis):
    """Ranks MLP neurons by their effect on each answer digit, and finds the rules they follow.

    The indirect effect of a neuron is 1/2 [(p*_c' - p_c') / p_c' + (p_c - p*_c) / p*_c], where p
    and p* are probabilities without and with the patch, c is the digit and c' the minimal pair's
    digit. The patch sets the neuron to its value on the minimal pair at the positions from which
    answers are read. All neurons are patched exactly. An answer computed by many neurons, each of
    which follows a rule, is a bag of heuristics. The control is the type of the same map with its
    cells shuffled.
    Touches: every neuron, one at a time, at the positions from which answers are read.
    Source: arXiv:2410.21272; maps by place with the carry, and the margin: ours.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "layer": "layer of the neuron",
        "neuron": "index of the neuron in its layer",
        "place": "answer digit",
        "value": "indirect effect, mean over the pairs whose digits differ here (relative change "
        "of probability)",
        "low": "lower end of the bootstrap 95 % interval over pairs",
        "high": "upper end of that interval",
        "n": "number of pairs",
        "rank": "rank by effect among all neurons, 0 for the largest",
        "type": "type of rule that the map follows, or none, or silent (the same activation "
        "everywhere)",
        "rule": "the rule, on the digits a and b, the carry into this place, or the sum of all "
        "three; empty for none and silent",
        "share": "for a rule that holds in m cells, the share of the map's m strongest cells that "
        "satisfy it (fraction); 0 without a rule",
        "shuffled_type": "the type of the same map with its cells shuffled (chance)",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint that is analysed."""
    pairs: tuple[ExampleSetName, ...] = Field((ExampleSetName("pairs"),), min_length=1)
    """Sets made with `pair:`; together they should change the digit of every place."""

    def table(self, session: Session) -> pd.DataFrame:
        """The neurons with their effects, types and rules; cached on the session."""

        def make() -> pd.DataFrame:
            found = self.classified(session, self.model)
            table = self._effects(session).merge(found, on=["layer", "neuron", "place"])
            return table[[*self.columns]]

        return session.cached(("heuristics", self, *session.referred(self)), make).copy()

    @torch.no_grad()
    def _effects(self, session: Session) -> pd.DataFrame:
        tables, model = [], session.model(self.model)
        sets = [session.examples(name) for name in self.pairs]
        places = {place: sets[0].places.index(place) for place in self.places(session)}
        for layer in range(model.cfg.n_layers):
            by_set = [effects(session, model, examples, layer) for examples in sets]
            for place, i in places.items():
                differ = [e.given[:, i] != e.labels("pair")[:, i] for e in sets]
                values = torch.cat(
                    [v[:, rows, i] for v, rows in zip(by_set, differ, strict=True)], dim=1
                )
                session.demand(
                    bool(values.shape[1]),
                    f"no pair of {', '.join(self.pairs)} changes the digit {place}; add such a set",
                )
                tables.append(
                    _rows(
                        values if values.shape[1] else values.new_zeros(len(values), 1),
                        layer,
                        place,
                    )
                )
        table = pd.concat(tables, ignore_index=True)
        order = table.groupby("place")["value"].rank(method="first", ascending=False)
        return table.assign(rank=order.astype(int) - 1)


def effects(
    session: Session, model: Model, examples: Examples, layer: int
) -> Float[Tensor, "neuron n place"]:
    """The indirect effect of every neuron of a layer for each pair and digit, when it alone is
    patched at the positions from which answers are read.

    Args:
        session: runs the model.
        model: the model that has the neurons.
        examples: a set made with `pair:`.
        layer: the layer of the neurons.

    Raises:
        InputError: if the set has no pairs.
    """
    answers, width = examples.labels("pair"), int(model.cfg.d_mlp or 0)
    own_before, pair_before = _log_p(session.baseline(model, examples), examples.given, answers)
    patch = Patch(site="neurons", layer=layer, position="readout", source=Source(pair=True))
    n_tried = session.few(width, N_TRIED_DRY)
    cells = [[patch.model_copy(update={"neurons": (i,)})] for i in range(n_tried)]
    session.count(examples, width - n_tried)
    found = []
    for logits in session.logits_of_each(model, examples, cells):
        own, theirs = _log_p(logits, examples.given, answers)
        found.append(((theirs - pair_before).expm1() + (own_before - own).expm1()) / 2)
    tried = torch.stack(found)
    return torch.cat([tried, tried.new_zeros(width - n_tried, *tried.shape[1:])])


def _log_p(logits: Tensor, own: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.double().log_softmax(-1)
    return log_p.gather(-1, own[..., None])[..., 0], log_p.gather(-1, theirs[..., None])[..., 0]


def _rows(values: Float[Tensor, "neuron n"], layer: int, place: str) -> pd.DataFrame:
    matrix = values.cpu().numpy()
    low, high = interval(matrix)
    numbers = {"value": matrix.mean(1), "low": low, "high": high, "n": matrix.shape[1]}
    return pd.DataFrame(
        {"layer": layer, "neuron": np.arange(len(matrix)), "place": place} | numbers
    )
