"""Rankings: how much each MLP neuron counts for what differs between two checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.intervention import shared
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.patch_contributions import PatchContributions
from mechmem.measures.measure import of_labels
from mechmem.models.architecture import Model
from mechmem.models.edits import At, Edit
from mechmem.models.outputs import OUTPUTS, check_adds_up, output_of, weights_out
from mechmem.session import Session

Method = Literal[
    "attribution",
    "integrated_gradients",
    "label_neutral",
    "spread",
    "activation",
    "weight_change",
    "ablation",
    "random",
]
Target = Literal["true", "given", "third"]
Unit = Literal["activations", "contributions"]
Site = Literal["neurons", "z"]
Metric = Callable[[Tensor, Int[Tensor, " batch"]], Float[Tensor, " batch"]]
"""(logits of the answer tokens, row numbers) -> a number per example."""
Scores = list[Float[Tensor, "n neuron"]]
"""The scores of the examples, one tensor per layer."""

SPREAD_FLOOR = 0.01
"""Minimum spread of a neuron, as a share of its layer's median: avoids a division by zero for
silent neurons."""
N_TRIED_DRY = 8
"""Neurons of a layer that stand for all of them in a dry run."""


@dataclass(frozen=True)
class Change:
    """Neurons of a model that are moved to their values in another model, example by example."""

    session: Session
    model: Model
    """The model that is patched."""
    source: Model
    """The model whose values the neurons get."""
    examples: Examples
    """The examples, under the prefix that both models are fed; all of one length."""
    clean: Examples
    """Clean instances: for the spread, and for the shift that all instances share."""
    layers: tuple[int, ...]
    """Layers whose neurons are moved."""
    position: str | tuple[str, ...] | None = "readout"
    """The positions over which scores are summed; None for all."""
    unit: Unit = "activations"
    """Whether neurons get the source's activations, or also its weights out of them."""
    minus_clean: bool = False
    """Whether the mean change on the clean instances is subtracted from each change."""
    site: Site = "neurons"
    """Neurons, or heads: a head is scored by the sum over its dimensions."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Under which results are cached on the session."""
        chosen = (self.layers, self.position, self.unit, self.minus_clean, self.site)
        return (self.model, self.source, self.examples, self.clean, *chosen)

    def hook(self, layer: int) -> str:
        """The hook of the units of a layer."""
        return f"blocks.{layer}.{OUTPUTS[self.site][0]}"

    def at(self, hook: str, examples: Examples) -> At:
        """A hook at the chosen positions of these examples."""
        found = None if self.position is None else shared(examples.indices(self.position))
        return At(hook, found)

    def values(
        self, layer: int, examples: Examples | None = None
    ) -> tuple[Float[Tensor, "n pos width"], Float[Tensor, "n pos width"]]:
        """The activations in the source and in the model, at the chosen positions; those of heads
        are flattened.

        Args:
            layer: the layer.
            examples: other examples than those of the change; then nothing is subtracted.
        """
        rows = self.examples if examples is None else examples
        at = self.at(self.hook(layer), rows)
        theirs, own = (
            self.session.activation(m, rows, at).flatten(2) for m in (self.source, self.model)
        )
        if self.minus_clean and examples is None:
            both = self.values(layer, self.clean)
            return theirs - both[0].mean(0, keepdim=True), own - both[1].mean(0, keepdim=True)
        return theirs, own

    def shift(self, layer: int) -> Float[Tensor, "n pos width"]:
        """How far each activation is moved."""
        theirs, own = self.values(layer)
        return theirs - own

    def written(
        self, layer: int, units: Sequence[int] | None = None
    ) -> Float[Tensor, "n pos d_model"]:
        """How far moving these units moves their sum in the residual stream.

        Args:
            layer: the layer.
            units: indices of neurons; by default, all units.
        """
        hook, chosen = self.hook(layer), None if units is None else tuple(units)
        theirs, own = (v if units is None else v[..., list(units)] for v in self.values(layer))
        weights = weights_out(self.model, hook, chosen)
        if self.unit == "activations":
            return (theirs - own) @ weights
        return theirs @ weights_out(self.source, hook, chosen) - own @ weights

    def along(self, gradient: Float[Tensor, "n pos ..."], layer: int) -> Float[Tensor, "n unit"]:
        """The change of each unit times the gradient, summed over the positions.

        Args:
            gradient: at the activations, or for contributions at their sum in the residual stream.
            layer: the layer.
        """
        if self.unit == "activations":
            return self.by_unit((gradient.flatten(2) * self.shift(layer)).sum(1))
        theirs, own = self.values(layer)
        to_source, to_own = (
            gradient @ weights_out(model, self.hook(layer)).T for model in (self.source, self.model)
        )
        return self.by_unit((to_source * theirs - to_own * own).sum(1))

    def by_unit(self, values: Float[Tensor, "n width"]) -> Float[Tensor, "n unit"]:
        """The sums over the dimensions of each head; values of neurons as they are."""
        if self.site == "neurons":
            return values
        return values.unflatten(1, (self.model.cfg.n_heads, -1)).sum(2)

    def patch(self, layer: int, neurons: Sequence[int]) -> Patch:
        """The patch that moves these neurons of a layer."""
        kind = PatchContributions if self.unit == "contributions" else Patch
        return kind(
            site="neurons",
            layer=layer,
            neurons=tuple(neurons),
            position=self.position,
            source=Source(live=self.source),
        )


@dataclass(frozen=True)
class Options:
    """What some of the methods ask for."""

    n_steps: int = 8
    """Points of the path of integrated gradients."""
    spread_floor: float = SPREAD_FLOOR
    """Minimum spread of a neuron, as a share of its layer's median."""
    seed: int = 0
    """Seed of the random ranking."""


def preference(examples: Examples, target: Target) -> Metric:
    """How far the target's logits exceed those of the label they are to replace, in nats, summed
    over the answer tokens.

    Args:
        examples: with their labels; for a third label, those of `with_true` it.
        target: `true` and `third`: the true label against the given one; `given`: the reverse.
    """
    sign = -1 if target == "given" else 1

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        true, given = (
            of_labels(logits, examples.labels(label)[rows].to(logits.device))
            for label in ("true", "given")
        )
        return sign * (true - given).sum(1)

    return metric


def indifference(examples: Examples, target: Target = "true") -> Metric:
    """How far the mean of all logits exceeds that of the given label (for the target `given`, the
    reverse), in nats, summed over the answer tokens: no other label is looked for.

    Args:
        examples: with their labels.
        target: what moving a neuron is to bring about.
    """
    sign = -1 if target == "given" else 1

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        given = of_labels(logits, examples.given[rows].to(logits.device))
        return sign * (logits.mean(-1) - given).sum(1)

    return metric


def scores(
    change: Change, method: Method, target: Target = "true", options: Options | None = None
) -> Scores:
    """The score of each neuron in each example, layer by layer. Positive scores of `attribution`,
    `integrated_gradients`, `label_neutral` and `ablation` favour the target; the others have no
    sign.

    - attribution: gradient of the metric (target against the label it replaces) at the model,
      times the change.
    - integrated_gradients: the same with the gradient averaged over the straight line from the
      model's to the source's values, on which all neurons of the layers move at once. The scores
      of an example sum to the effect of moving all of them.
    - label_neutral: attribution of the mean logit against the given label's.
    - spread: the size of the change in standard deviations over clean instances at the source.
    - activation: the size of the change.
    - weight_change: norm of the change of the weights into and out of the neuron and of its bias.
    - ablation: the exact effect on the metric of moving this neuron alone.
    - random: normal numbers, one per neuron.

    Args:
        change: which neurons are moved, from what to what.
        method: the method.
        target: the label that moving neurons is to bring about.
        options: of single methods.
    """
    chosen = options or Options()
    key = ("neuron scores", *change.key, method, target, chosen)
    return change.session.cached(key, lambda: _scores(change, method, target, chosen))


def _scores(change: Change, method: Method, target: Target, options: Options) -> Scores:
    metric = preference(change.examples, target)
    if method == "attribution":
        return _integrated(change, metric, [0.0])
    if method == "integrated_gradients":
        return _integrated(change, metric, midpoints(options.n_steps))
    if method == "label_neutral":
        return _integrated(change, indifference(change.examples, target), [0.0])
    if method == "ablation":
        return [_one_by_one(change, layer, metric) for layer in change.layers]
    if method == "weight_change":
        return [_weight_change(change, layer) for layer in change.layers]
    if method == "random":
        return _random(change, options.seed)
    found = []
    for layer in change.layers:
        size = change.shift(layer).abs().double().cpu()
        if method == "spread":
            at_source = change.values(layer, change.clean)[0].double().cpu().numpy()
            size = size / torch.from_numpy(spread_of(at_source, options.spread_floor))
        found.append(size.mean(1))
    return found


def midpoints(n: int) -> list[float]:
    """The middles of n equal parts of the line from 0 to 1."""
    return [(i + 0.5) / n for i in range(n)]


def spread_of(
    activations: Float[np.ndarray, "n pos neuron"], floor: float
) -> Float[np.ndarray, "pos neuron"]:
    """The standard deviation of each neuron over the examples, at each position.

    Args:
        activations: of the neurons of a layer.
        floor: smallest value, as a share of the layer's median.
    """
    spread = activations.std(axis=0)
    return np.maximum(spread, floor * np.median(spread)) + 1e-12


def integrated(change: Change, metric: Metric, n_steps: int) -> Scores:
    """Integrated gradients of any metric, as `scores` documents them.

    Args:
        change: which neurons are moved, from what to what.
        metric: what is attributed.
        n_steps: points of the path; 0 for the gradient at the model alone.
    """
    return _integrated(change, metric, midpoints(n_steps) or [0.0])


def _integrated(change: Change, metric: Metric, points: Sequence[float]) -> Scores:
    """The change times the mean gradient at these points between the model (0) and the source."""
    total = [torch.zeros((), dtype=torch.double)] * len(change.layers)
    for point in points:
        edits = [] if point == 0 else [_moved(change, layer, point) for layer in change.layers]
        gradients = _gradients(change, metric, edits)
        total = [
            kept + change.along(gradient, layer).double().cpu() / len(points)
            for kept, gradient, layer in zip(total, gradients, change.layers, strict=True)
        ]
    return total


def _gradients(
    change: Change, metric: Metric, edits: Sequence[Edit]
) -> list[Float[Tensor, "n pos ..."]]:
    """The gradient of the metric at the activations of each layer, or at their sum."""
    places = [_moved_at(change, layer) for layer in change.layers]

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        return metric(logits, rows).sum()

    found: list[list[Tensor]] = [[] for _ in places]
    hooks = [at.hook for at in places]
    for batch in change.session.gradients(change.model, change.examples, loss, hooks, edits):
        for kept, at in zip(found, places, strict=True):
            kept.append(at.take(batch.gradients[at.hook], batch.rows))
    return [torch.cat(parts) for parts in found]


def _moved(change: Change, layer: int, point: float) -> Edit:
    """All neurons of a layer, set to a point of the line from the model's to the source's values.
    The edit starts a graph of its own, so that the gradient is that of what comes after."""
    at, session, model = _moved_at(change, layer), change.session, change.model
    own = session.activation(model, change.examples, at)
    moved = change.shift(layer) if change.unit == "activations" else change.written(layer)
    value = own + point * moved.reshape(own.shape)
    return Edit(at, lambda own, rows: value[rows].to(own).clone().requires_grad_())


def _moved_at(change: Change, layer: int) -> At:
    """Where the change is made: at the activations, or at their sum in the residual stream."""
    hook = change.hook(layer)
    if change.unit == "contributions":
        check_adds_up(change.model)
        hook = output_of(hook)
    return change.at(hook, change.examples)


def _one_by_one(change: Change, layer: int, metric: Metric) -> Float[Tensor, "n neuron"]:
    session, examples, every = change.session, change.examples, torch.arange(len(change.examples))
    width = int(change.model.cfg.d_mlp or 0)
    n_tried = session.few(width, N_TRIED_DRY)
    cells = [[change.patch(layer, (i,))] for i in range(n_tried)]
    session.count(examples, width - n_tried)
    baseline = metric(session.baseline(change.model, examples), every)
    found = [
        metric(logits, every) - baseline
        for logits in session.logits_of_each(change.model, examples, cells)
    ]
    missing = [torch.zeros(len(examples))] * (width - n_tried)
    return torch.stack([*found, *missing], dim=1).double()


def _weight_change(change: Change, layer: int) -> Float[Tensor, "n neuron"]:
    theirs, own = (
        dict(m.blocks[layer].mlp.named_parameters()) for m in (change.source, change.model)
    )
    total = torch.zeros(())
    for name, axis in (("W_in", 0), ("W_gate", 0), ("W_out", 1)):
        if name in own:
            total = total + (theirs[name] - own[name]).detach().double().pow(2).sum(axis).cpu()
    total = total + (theirs["b_in"] - own["b_in"]).detach().double().pow(2).cpu()
    return total.sqrt().expand(len(change.examples), -1)


def _random(change: Change, seed: int) -> Scores:
    generator, width = torch.Generator().manual_seed(seed), int(change.model.cfg.d_mlp or 0)
    drawn = torch.randn(len(change.layers), width, generator=generator, dtype=torch.double)
    return [row.expand(len(change.examples), -1) for row in drawn]


def ranked(of_layers: Scores, layers: Sequence[int]) -> list[tuple[int, int]]:
    """The neurons of these layers, (layer, index), in the order of their mean scores.

    Args:
        of_layers: for each layer, the scores of the examples.
        layers: the layers.
    """
    means = torch.cat([values.mean(0) for values in of_layers])
    order = means.argsort(descending=True, stable=True).tolist()
    width = of_layers[0].shape[1]
    return [(layers[i // width], i % width) for i in order]
