"""Heuristics: how much each MLP neuron does for an answer digit, and which simple rule it
follows."""

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

REHEARSED = 8
"""Neurons of a layer that stand for all of them in a rehearsal."""


class Heuristics(GridAnalysis):
    """Ranks every MLP neuron by its indirect effect on each answer digit, and finds the rule that
    its map follows.

    The effect of a neuron is 1/2 [(p*_c' - p_c') / p_c' + (p_c - p*_c) / p*_c], with the minimal
    pair's value of this neuron patched in where answers are read: p and p* without and with the
    patch, c the digit, c' the pair's digit. All neurons are patched exactly. A sum that is put
    together from many neurons, each with a rule, is what the bag of heuristics looks like. The
    control is the type that the same map has when its cells are shuffled.
    Touches: every neuron, one at a time, at the positions that answers are read from. Source:
    arXiv:2410.21272; maps by place with the carry, and the margin: ours.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "layer": "layer of the neuron",
        "neuron": "index of the neuron in its layer",
        "place": "answer digit",
        "value": "indirect effect, mean over the pairs whose digits differ here (relative change "
        "of probability)",
        "low": "lower end of the bootstrap 95 % interval over pairs",
        "high": "upper end of it",
        "n": "number of pairs",
        "rank": "by effect among all neurons, 0 is the largest",
        "type": "what the map follows: a type of rule, none, or silent (the same everywhere)",
        "rule": "the rule, of the digits a and b, the carry into this place and their sum; empty "
        "for none and silent",
        "share": "share of the strongest cells, as many as the rule has, that satisfy it "
        "(fraction); 0 without a rule",
        "shuffled_type": "the type of the same map with its cells shuffled (chance)",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint that is looked at."""
    pairs: tuple[ExampleSetName, ...] = Field((ExampleSetName("pairs"),), min_length=1)
    """Sets made with `pair:`; together they should change the digit of every place."""

    def table(self, session: Session) -> pd.DataFrame:
        """The neurons with their effects, types and rules; kept on the session."""

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
    """The indirect effect of every neuron of a layer, patched alone where answers are read, for
    each pair and digit.

    Args:
        session: runs the model.
        model: whose neurons.
        examples: a set with pairs (InputError otherwise).
        layer: of the neurons.
    """
    answers, width = examples.labels("pair"), int(model.cfg.d_mlp or 0)
    own_before, pair_before = _log_p(session.baseline(model, examples), examples.given, answers)
    patch = Patch(site="neurons", layer=layer, position="readout", source=Source(pair=True))
    n_tried = session.few(width, REHEARSED)
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
