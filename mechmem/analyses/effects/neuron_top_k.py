"""NeuronTopK: the first k neurons of a ranking patched, compared with random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import PositiveFloat
from torch import Tensor

from mechmem.analyses.effects.effect import (
    AnswerAnalysis,
    Interventions,
    Readings,
)
from mechmem.analyses.neurons.ranking import (
    SPREAD_FLOOR,
    Change,
    Method,
    Options,
    Target,
    Unit,
    ranked,
    scores,
)
from mechmem.data.examples import Examples, Label, third_labels
from mechmem.interventions.controls.random_neurons import RandomNeurons
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.patch_contributions import PatchContributions
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.limits import Draws, Index, Seed
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.selection import Indices, Names
from mechmem.spec.sweep import Swept


class NeuronTopK(AnswerAnalysis):
    """Patches the first k neurons of a ranking to their values in the checkpoint `before`.

    If few ranked neurons restore the true answers of examples that did not rank them, and equally
    many random neurons of the same layers do not, the memory is in them. Sweep `k` for the
    cumulative curve, `layer` for one layer at a time, and `examples` for clean instances under the
    same patch. To patch forward, exchange `model` and `before` and set `towards: given`.

    A ranking towards the true label is also a search for that label. `towards: third` shows how
    much of the effect is the search: neurons are ranked towards a wrong label that belongs to
    another example, answers are judged by it, and measures of the label `true` are renamed `third`.
    Source: ours, for claim C7; attribution: arXiv:2310.10348; integrated gradients:
    arXiv:1703.01365.
    """

    columns: ClassVar[Mapping[str, str]] = {
        **AnswerAnalysis.columns,
        "ranking": "how the neurons are ranked",
        "towards": "label that the ranking looks for",
        "patch": "what is patched: activations, or contributions",
        "k": "number of neurons patched",
        "norm": "L2 norm of the change that the patch makes in mlp_out, mean over examples and "
        "readouts, over several layers the root of the summed squares; undefined for the source",
    }

    before: CheckpointName = CheckpointName("before")
    """The checkpoint whose values the neurons get."""
    layer: Swept[Indices]
    """Layers whose neurons are ranked together."""
    k: Swept[Index]
    """Number of neurons that are patched."""
    ranking: Swept[Method] = "attribution"
    """How neurons are ranked: by `attribution` (gradient times change), `integrated_gradients`,
    `label_neutral` (attribution of the mean logit against the given label's), `spread` (change in
    standard deviations), `activation` (size of the change), `weight_change`, `ablation` (the exact
    effect of each neuron alone; slow) or at `random`."""
    towards: Swept[Target] = "true"
    """The label that the patch is to bring about: the true one, a random third one, or, for a
    patch forward, the given one."""
    patch: Swept[Unit] = "activations"
    """Whether neurons get the activations of `before`, or `contributions`: its activations and its
    weights out of the neurons. Gradients are taken accordingly."""
    position: Swept[Names | None] = None
    """Positions at which neurons are patched and their scores summed; by default, all are patched,
    and scores are of the readouts."""
    minus_clean: Swept[bool] = False
    """Whether the mean change on `matched` is subtracted from each change before neurons are
    ranked."""
    ranked_on: ExampleSetName = ExampleSetName("noisy")
    """The noisy set that ranks the neurons, by mean score. To test on other instances, make two
    sets of one seed of which one skips the other's `n`."""
    matched: ExampleSetName = ExampleSetName("clean")
    """The clean set that gives the spread and the mean change."""
    n_steps: Draws = 8
    """Points of the path of integrated gradients."""
    spread_floor: PositiveFloat = SPREAD_FLOOR
    """Minimum spread of a neuron, as a share of its layer's median."""
    n_random: Draws = 20
    """Number of draws of k random neurons."""
    seed: Seed = 0
    """Seed of the first of these draws, of third labels and of the random ranking."""

    @property
    def layers(self) -> tuple[int, ...]:
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)

    def answered(self, session: Session) -> Examples:
        return self._targeted(session.examples(self.examples))

    def fed(self, examples: Examples) -> tuple[Label, ...]:
        # A third label is no prefix: neither model has an answer to it.
        return ("given",) if self.towards == "third" else super().fed(examples)

    def interventions(self, session: Session) -> Interventions:
        in_order = self.ranked(session)
        if self.k > len(in_order):
            raise InputError(
                f"k {self.k} is more than the {len(in_order)} neurons of layers {self.layers}"
            )
        return self._patches(in_order[: self.k])

    def ranked(self, session: Session) -> list[tuple[int, int]]:
        """All neurons of the layers, (layer, index), the first to be patched first."""
        change = self.change(session)
        options = Options(self.n_steps, self.spread_floor, self.seed)
        return ranked(scores(change, self.ranking, self.towards, options), self.layers)

    def change(self, session: Session) -> Change:
        """The change by which neurons are ranked."""
        return Change(
            session,
            session.model(self.model),
            session.model(self.before),
            self._targeted(session.examples(self.ranked_on)),
            session.examples(self.matched),
            self.layers,
            self.position or "readout",
            self.patch,
            self.minus_clean,
        )

    def controls(
        self, session: Session, interventions: Interventions
    ) -> dict[str, list[list[Intervention]]]:
        control = RandomNeurons(n=self.n_random, layers=self.layers)
        model, like = session.model(self.model), self._patch(self.layers[0])
        # Of no neuron or all of them there is one choice.
        is_one = self.k in (0, len(self.layers) * int(model.cfg.d_mlp or 0))
        seeds = range(self.seed, self.seed + (1 if is_one else self.n_random))
        return {"control": [control.at_random(like, self.k, seed, model) for seed in seeds]}

    def readings(
        self,
        session: Session,
        model: Model,
        examples: Examples,
        interventions: Interventions,
        greedy: bool = True,
    ) -> Readings:
        # Several rankings share their random neurons.
        key = ("patched neurons", *interventions, self.measures, self.fed(examples), greedy)
        key += (self.greedy, self.source_prefix, model, session.model(self.before), examples)
        found = super().readings
        return session.cached(key, lambda: found(session, model, examples, interventions, greedy))

    def target(self, session: Session, examples: Examples) -> Tensor | None:
        return session.baseline(session.model(self.before), examples)

    def table(self, session: Session) -> pd.DataFrame:
        table = super().table(session)
        patches = self.interventions(session)
        draws = self.controls(session, patches)["control"]
        norms = {
            "baseline": 0.0,
            "intervened": self._norm(session, patches),
            "control": np.mean([self._norm(session, draw) for draw in draws]),
        }
        chosen = {name: getattr(self, name) for name in ("ranking", "towards", "patch", "k")}
        table = table.assign(**chosen, norm=table["condition"].map(norms))
        if self.towards == "third":
            table["measure"] = table["measure"].str.replace("_true", "_third")
        return table

    def _targeted(self, examples: Examples) -> Examples:
        if self.towards != "third":
            return examples
        return examples.with_true(third_labels(examples, self.seed))

    def _patches(self, chosen: Sequence[tuple[int, int]]) -> list[Patch]:
        found: list[Patch] = []
        for layer in self.layers:
            neurons = tuple(sorted(index for at, index in chosen if at == layer))
            if neurons:
                found.append(self._patch(layer, neurons))
        return found

    def _patch(self, layer: int, neurons: tuple[int, ...] | None = None) -> Patch:
        kind = PatchContributions if self.patch == "contributions" else Patch
        source = Source(checkpoint=self.before)
        return kind(
            site="neurons", layer=layer, neurons=neurons, position=self.position, source=source
        )

    def _norm(self, session: Session, patches: Interventions) -> float:
        """How far the patches move the outputs of the MLPs, given the unpatched activations."""
        change = replace(self.change(session), examples=self.answered(session), minus_clean=False)
        squares = torch.zeros(())
        for patch in patches:
            assert isinstance(patch, Patch)
            assert isinstance(patch.layer, int)
            moved = change.written(patch.layer, patch.neurons)
            squares = squares + moved.double().pow(2).sum(-1)
        return float(squares.sqrt().mean())
