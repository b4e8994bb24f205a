"""Localisation: whether a ranking of neurons finds those that were planted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from pydantic import AfterValidator, PositiveFloat
from scipy import stats
from torch import Tensor

from mechmem.analyses.analysis import Analysis
from mechmem.analyses.neurons.ranking import SPREAD_FLOOR, Change, Method, Options, Unit, scores
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.limits import Draws, Seed
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.selection import distinct
from mechmem.spec.sweep import Swept
from mechmem.statistics.rows import Row, over_examples

Methods = Annotated[tuple[Method, ...], AfterValidator(distinct)]


@dataclass(frozen=True)
class Planted:
    """The planted neurons of some layers, with the example that owns each."""

    layers: tuple[int, ...]
    """The layers that have any."""
    neurons: Int[Tensor, " planted"]
    """Their indices in these layers, one layer after the other."""
    owners: Int[Tensor, " planted"]
    """The example in which each is most active."""


class Localisation(Analysis):
    """Scores rankings of neurons on memories that were planted in known neurons.

    A neuron is planted if it writes nothing in `before` and something in `after`; it belongs to the
    instance in which it is most active. All neurons of the layers with planted ones are ranked
    in each instance by the absolute score; dead ones, which are active nowhere in either
    checkpoint, are left out. Only camouflaged plants, in a model that changed elsewhere too, tell
    methods apart: where nothing else changed, every method finds the neuron.
    Source: arXiv:2311.09060 (the INJ benchmark).
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "method": "how neurons are ranked",
        "measure": "r_at_1 (the instance's first neuron is one of its planted ones) or auc "
        "(probability that a planted neuron in its own instance has a larger score than a neuron "
        "that is not, of any instance)",
        "unit": "unit of the value",
        "value": "mean over the instances that own a planted neuron (0..1)",
        "low": "lower end of the bootstrap 95 % interval over instances",
        "high": "upper end of that interval",
        "n": "number of these instances",
        "n_planted": "number of planted neurons",
        "n_ranked": "number of neurons that are ranked, without dead ones",
        "per_example": "the values of these instances, in the order of the set",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint with the planted neurons."""
    before: CheckpointName = CheckpointName("before")
    """The checkpoint of the same shape without them."""
    examples: Swept[ExampleSetName] = ExampleSetName("noisy")
    """The planted instances."""
    matched: ExampleSetName = ExampleSetName("clean")
    """The clean set that gives the spread and the mean change."""
    methods: Methods = (
        "attribution",
        "integrated_gradients",
        "label_neutral",
        "spread",
        "activation",
        "weight_change",
        "random",
    )
    """The rankings; `ablation`, the exact effect of each neuron, is slow."""
    patch: Swept[Unit] = "activations"
    """Whether neurons would get the activations of `before`, or its weights out too."""
    minus_clean: Swept[bool] = False
    """Whether the mean change on `matched` is subtracted from each change."""
    spread_floor: Swept[PositiveFloat] = SPREAD_FLOOR
    """Minimum spread of a neuron, as a share of its layer's median."""
    n_steps: Draws = 8
    """Points of the path of integrated gradients."""
    seed: Seed = 0
    """Seed of the random ranking."""

    def table(self, session: Session) -> pd.DataFrame:
        with session.steady():
            return self._table(session)

    def _table(self, session: Session) -> pd.DataFrame:
        planted = self.planted(session)
        change = self._change(session, planted.layers)
        alive = _alive(change)
        options = Options(self.n_steps, self.spread_floor, self.seed)
        counted = {"n_planted": len(planted.neurons), "n_ranked": int(alive.sum())}
        rows: list[Row] = []
        for method in self.methods:
            found = scores(change, method, options=options)
            sizes = torch.cat([values.double() for values in found], dim=1).abs()
            for measure, values in found_by(sizes, planted, alive).items():
                labels = {"method": method, "measure": measure, "unit": "fraction"}
                rows.append(over_examples(values) | labels | counted)
        return pd.DataFrame(rows).assign(examples=self.examples)[[*self.columns]]

    def planted(self, session: Session) -> Planted:
        """The planted neurons, from the weights of the two checkpoints.

        Raises InputError if there are none.
        """
        after, before = session.model(self.model), session.model(self.before)
        added = [_added(before, after, layer) for layer in range(after.cfg.n_layers)]
        layers = tuple(layer for layer, mask in enumerate(added) if mask.any())
        session.demand(
            bool(layers),
            f"no neuron writes nothing in {self.before!r} and something in {self.model!r}; take a "
            "planted model and the same model without the plant",
        )
        if not layers:  # a dry run, whose models have no plants
            added[0][0] = True
            layers = (0,)
        change = self._change(session, layers)
        own = torch.cat([change.values(layer)[1].amax(dim=1) for layer in layers], dim=1)
        neurons = torch.cat([added[layer] for layer in layers]).nonzero()[:, 0]
        return Planted(layers, neurons, own[:, neurons].argmax(dim=0).cpu())

    def _change(self, session: Session, layers: tuple[int, ...]) -> Change:
        return Change(
            session,
            session.model(self.model),
            session.model(self.before),
            session.examples(self.examples),
            session.examples(self.matched),
            layers,
            unit=self.patch,
            minus_clean=self.minus_clean,
        )


def _added(before: Model, after: Model, layer: int) -> Bool[Tensor, " neuron"]:
    """Which neurons of a layer write nothing before and something after."""
    silent, writes = (
        m.blocks[layer].mlp.W_out.detach().abs().sum(dim=1).cpu() for m in (before, after)
    )
    return (silent == 0) & (writes > 0)


def _alive(change: Change) -> Bool[Tensor, " neuron"]:
    """Which neurons are active somewhere: not 0 in every example of either checkpoint."""
    found = []
    for layer in change.layers:
        runs = [v for e in (change.examples, change.clean) for v in change.values(layer, e)]
        found.append(torch.stack([(v != 0).any(dim=0).any(dim=0) for v in runs]).any(dim=0))
    return torch.cat(found).cpu()


def found_by(
    sizes: Float[Tensor, "n neuron"], planted: Planted, alive: Bool[Tensor, " neuron"]
) -> dict[str, Float[np.ndarray, " owner"]]:
    """R@1 and AUC of the instances that own a planted neuron.

    The AUC of an instance is that of its own planted neurons against the neurons of all instances
    that are not planted there, pooled; their mean is the pooled AUC if all own equally many.

    Args:
        sizes: absolute scores.
        planted: the planted neurons and their owners.
        alive: which neurons are ranked.
    """
    is_own = torch.zeros(sizes.shape, dtype=torch.bool)
    is_own[planted.owners, planted.neurons] = True
    is_ranked = alive | is_own.any(dim=0)
    sizes, is_own = sizes[:, is_ranked], is_own[:, is_ranked]
    owners = is_own.any(dim=1)
    first = sizes.argmax(dim=1, keepdim=True)
    # Ties with a neuron that is not the instance's own count as not found.
    best_other = sizes.masked_fill(is_own, -1).amax(dim=1)
    hit = is_own.gather(1, first)[:, 0] & (sizes.amax(dim=1) > best_other)
    others = sizes[~is_own].numpy()
    ranks = stats.rankdata(np.concatenate([others, sizes[is_own].numpy()]))[len(others) :]
    own = stats.rankdata(sizes[is_own].numpy())
    placed = torch.zeros(sizes.shape, dtype=torch.double)
    placed[is_own] = torch.from_numpy((ranks - own) / len(others))
    auc = placed.sum(dim=1) / is_own.sum(dim=1).clamp_min(1)
    return {"r_at_1": hit[owners].double().numpy(), "auc": auc[owners].numpy()}
