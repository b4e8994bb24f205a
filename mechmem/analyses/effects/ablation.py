"""Ablation: how fast answers are lost as heads, neurons or layers are knocked out, in ranked and in
random order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechmem.analyses.circuits.attribution import Attribution, scores_of
from mechmem.analyses.circuits.attribution import components as scored_components
from mechmem.analyses.effects.effect import TOLERANCE, AnswerAnalysis, Key, Readings
from mechmem.data.examples import Examples
from mechmem.interventions.ablate import Ablate
from mechmem.interventions.patch import Source
from mechmem.measures.measure import Measure
from mechmem.measures.probability import Probability
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.limits import Draws, Index, Seed
from mechmem.spec.references import ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import LEVEL, ratio, resampled_means
from mechmem.statistics.rows import FRACTION, Row, over_draws, over_examples

Curve = Float[np.ndarray, "k n"]
Reader = Callable[[frozenset["Component"], bool], Readings]


class Component(NamedTuple):
    """The unit of ablation: a head (`a0.h1`), a neuron (`m0.n7`), or a layer's attention (`a0`) or
    MLP (`m0`)."""

    name: str
    site: str
    layer: int
    index: int | None


class Ablation(AnswerAnalysis):
    """Knocks out more and more heads, neurons or layers, the most important first.

    With a ranking from clean instances, the reasoning circuit is removed first. If memorised
    answers are lost as fast as clean ones, and faster than in random order, the memory depends on
    the reasoning circuit. If they survive it, the memory has components of its own. The area
    between the curves integrates (random - ranked) over the share of components knocked out, as a
    fraction of the baseline value; it is 0 for a ranking that is no better than chance. Controls:
    random orders, and a ranking made on other examples than those it is tested on (`ranked_on_too`
    gives the overlap).
    Source: ours, for claim C4 of arXiv:2507.04782; means: arXiv:2211.00593.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "component": "type of the components: head, neuron, or layer (its attention or MLP output)",
        "ranked_on": "example set on which the order was chosen",
        "ranked_by": "effect (the loss when a component alone is knocked out) or attribution (its "
        "first-order estimate)",
        "condition": "ranked (the ranked order), random (random orders), between (the area), or "
        "alone (one component; heads and layers only)",
        "k": "number of components knocked out; empty for the area and for `ranked_on_too`",
        "share": "k as a share of all components (fraction); empty where k is",
        "part": "for `alone`, the component: a0.h1 is head 1 of layer 0, a0 its attention, m0 its "
        "MLP; otherwise empty",
        "layer": "for `alone`, the layer of the component; otherwise empty",
        "rank": "for `alone`, the rank of the component, 1 for the first; otherwise empty",
        "prefix": AnswerAnalysis.columns["prefix"],
        "place": AnswerAnalysis.columns["place"],
        "measure": "name of the measure M; area_M for the area between its curves; ranked_on_too: "
        "share of the examples that are also in `ranked_on`",
        "unit": "unit of the measure; for areas, 0 is as random and 1 the maximum if knock-outs "
        "never raise the value",
        "value": "mean over the examples, for random orders also over their draws; an area is "
        "undefined where the baseline value is 0",
        "low": "lower end of the 95 % interval: bootstrap over examples, for areas also over the "
        "random orders; for random orders, the middle 95 % of their means",
        "high": "upper end of that interval",
        "n": "number of examples, or of random orders",
        "per_example": "the values of the examples, in the order of the set (for an area, to first "
        "order)",
    }

    component: Swept[Literal["head", "neuron", "layer"]]
    """The type of component that is knocked out; `layer` takes attention and MLP outputs."""
    method: Swept[Literal["zero", "mean", "resample", "gaussian"]] = "mean"
    """The value that replaces an activation, as in the intervention `ablate`."""
    reference_set: Swept[ExampleSetName | None] = None
    """Set of the mean, the other examples or the spread, as in `ablate`; by default, the ablated
    set."""
    ranked_on: Swept[ExampleSetName] = ExampleSetName("clean")
    """The set whose loss ranks the components, fed its own prefix; ideally it shares no example
    with `examples`."""
    ranked_by: Swept[Literal["effect", "attribution"]] = "effect"
    """`effect` is exact and needs one forward pass per component; `attribution` is a first-order
    estimate for mean ablation that needs one gradient for all components (for neurons)."""
    metric: Measure = Probability(label="true")
    """The metric whose loss ranks the components, largest loss first."""
    k: tuple[Index, ...] | None = None
    """Numbers of components knocked out; by default, 1, 2, 4, 8 and so on. 0 and all are always
    added."""
    n_random: Draws = 12
    """Number of random orders; `n_control_greedy` of them are decoded too. They are rotations of
    one random order (or of several, if there are fewer components than orders), so that every
    component comes early about equally often. A multiple of the number of heads is best."""
    seed: Seed = 0
    """Seed of the first random order, and of `resample` and `gaussian`."""

    def interventions(self, session: Session) -> list[Ablate]:
        return self.together(self.every(session.model(self.model)))

    def every(self, model: Model) -> list[Component]:
        """All components of the model, in model order. Raises InputError for neurons of a model
        without an MLP."""
        if self.component == "neuron" and model.cfg.attn_only:
            raise InputError("this model has no MLP, so no neurons; knock out heads or layers")
        layers, n_heads = range(model.cfg.n_layers), model.cfg.n_heads
        if self.component == "head":
            return [Component(f"a{i}.h{j}", "z", i, j) for i in layers for j in range(n_heads)]
        if self.component == "neuron":
            return [
                Component(f"m{i}.n{j}", "neurons", i, j)
                for i in layers
                for j in range(int(model.cfg.d_mlp or 0))
            ]
        outputs = (("a", "attn_out"), *((("m", "mlp_out"),) if not model.cfg.attn_only else ()))
        return [
            Component(f"{letter}{i}", site, i, None) for i in layers for letter, site in outputs
        ]

    def together(self, components: Sequence[Component]) -> list[Ablate]:
        """The ablations that knock these components out together: one per site and layer."""
        chosen: dict[tuple[str, int], list[int]] = {}
        for component in components:
            units = chosen.setdefault((component.site, component.layer), [])
            units.append(component.index or 0)
        return [
            self._knocked_out(site, layer, tuple(sorted(units)))
            for (site, layer), units in chosen.items()
        ]

    def _knocked_out(self, site: str, layer: int, units: tuple[int, ...]) -> Ablate:
        heads, neurons = units if site == "z" else None, units if site == "neurons" else None
        whole = Ablate(
            site=site,
            layer=layer,
            method=self.method,
            reference_set=self.reference_set,
            seed=self.seed,
        )
        return whole.model_copy(update={"head": heads, "neurons": neurons})

    def ranking(self, session: Session) -> list[Component]:
        """The components, the most important first."""
        chosen = (self.component, self.method, self.ranked_by, self.metric, self.seed)
        sets = [name and session.examples(name) for name in (self.ranked_on, self.reference_set)]
        model = session.model(self.model)

        def make() -> list[Component]:
            components = self.every(model)
            rank = self._lost if self.ranked_by == "effect" else self._attributed
            lost = np.array(rank(session, components))
            return [components[i] for i in np.argsort(-lost, kind="stable")]

        return session.cached(("ranking", model, *sets, *chosen), make)

    def _lost(self, session: Session, components: Sequence[Component]) -> list[float]:
        """How much the metric loses when each component alone is knocked out."""
        model, examples = session.model(self.model), session.examples(self.ranked_on)
        baseline = session.baseline(model, examples)

        def measured(logits: Tensor) -> float:
            return self.metric.whole(self.metric(logits, examples, baseline)).double().mean().item()

        cells = [self.together([component]) for component in components]
        found = session.logits_of_each(model, examples, cells)
        return [measured(baseline) - measured(logits) for logits in found]

    def _attributed(self, session: Session, components: Sequence[Component]) -> list[float]:
        """The same to first order, for mean ablation."""
        corrupted = Source(mean_over=self.reference_set or self.ranked_on)
        scoring = Attribution(
            model=self.model, examples=self.ranked_on, metric=self.metric, corrupted=corrupted
        )
        contrast = scoring.contrast(session)
        scored = scored_components(contrast, neurons=self.component == "neuron")
        scores = {
            one[:2]: values.double().mean(0)
            for one, values in zip(scored, scores_of(contrast, scored), strict=True)
        }
        of = {"z": "head", "attn_out": "head", "neurons": "neuron", "mlp_out": "mlp"}
        found = ((scores[of[c.site], c.layer], c.index) for c in components)
        return [(s.sum() if index is None else s[index]).item() for s, index in found]

    def sizes(self, n_components: int) -> list[int]:
        """Number of components knocked out at each point of the curve. Raises InputError if `k`
        exceeds `n_components`."""
        doubling = tuple(2**i for i in range(n_components.bit_length()) if 2**i < n_components)
        k = doubling if self.k is None else self.k
        if max(k, default=0) > n_components:
            raise InputError(
                f"k {max(k)} is more than the {n_components} components ({self.component}s) of the "
                "model"
            )
        return sorted({0, *k, n_components})

    def orders(self, components: Sequence[Component]) -> list[list[Component]]:
        """The random orders of these components."""
        n, turns = len(components), min(self.n_random, len(components))
        orders = []
        for i in range(self.n_random):
            generator = torch.Generator().manual_seed(self.seed + i // turns)
            drawn = torch.randperm(n, generator=generator)
            orders.append([components[j] for j in drawn.roll(-round(i % turns * n / turns))])
        return orders

    def table(self, session: Session) -> pd.DataFrame:
        examples = session.examples(self.examples)
        self.check_measures(examples)
        if instead := self.metric.constant_on(session.examples(self.ranked_on)):
            raise InputError(f"{self.metric.name} on {self.ranked_on!r}: {instead}")
        ranked = self.ranking(session)
        sizes, read = self.sizes(len(ranked)), self._reader(session)
        shares = [k / len(ranked) for k in sizes]
        curve = [read(frozenset(ranked[:k]), self.greedy) for k in sizes]
        random = [
            [read(frozenset(order[:k]), self.greedy and i < self.n_control_greedy) for k in sizes]
            for i, order in enumerate(self.orders(ranked))
        ]
        rows = [_seen(examples, session.examples(self.ranked_on))]
        for key in curve[0].values:
            draws = [_matrix(draw, key) for draw in random if key in draw[0].values]
            rows += [
                _named(key, row["condition"]) | row
                for row in _curves(sizes, shares, _matrix(curve, key), draws, self.units[key[2]])
            ]
        if self.component != "neuron":
            rows += self._alone(ranked, read)
        return self._tidy(rows)

    def _reader(self, session: Session) -> Reader:
        """A function that gives the readings when a set of components is knocked out. It is cached:
        all orders share their two ends."""
        model, examples = session.model(self.model), session.examples(self.examples)
        every = self.every(model)

        @cache
        def read(chosen: frozenset[Component], greedy: bool) -> Readings:
            knocked_out = self.together([one for one in every if one in chosen])
            return self.readings(session, model, examples, knocked_out, greedy)

        return read

    def _alone(self, ranked: Sequence[Component], read: Reader) -> list[Row]:
        rows = []
        for rank, component in enumerate(ranked, start=1):
            labels = {"part": component.name, "layer": component.layer, "rank": rank, "k": 1}
            for key, values in read(frozenset([component]), self.greedy).values.items():
                row = over_examples(values.double().numpy(), self.units[key[2]])
                row |= labels | {"condition": "alone"}
                rows.append(row | _named(key, "alone"))
        return rows

    def _tidy(self, rows: Sequence[Row]) -> pd.DataFrame:
        units = self.units
        units |= {f"area_{measure.name}": "0 as random, 1 at most" for measure in self.measures}
        units["ranked_on_too"] = "fraction"
        labels = {
            name: getattr(self, name)
            for name in ("examples", "component", "ranked_on", "ranked_by")
        }
        numbers = ("k", "share", "layer", "rank")
        empty = dict.fromkeys(numbers, np.nan) | {"part": None}
        full = [empty | labels | {"unit": units[row["measure"]]} | row for row in rows]
        return pd.DataFrame(full)[[*self.columns]].astype(dict.fromkeys(numbers, float))


def area(shares: Sequence[float], ranked: Curve, random: Curve) -> Float[np.ndarray, " n"]:
    """The area between two curves as a fraction of the baseline value: contributions of the
    examples, whose mean it is (to first order).

    Args:
        shares: share of the components knocked out at each point (fraction), ascending from 0.
        ranked: values at each point of the ranked order, `k n`.
        random: values at each point of a random order, `k n`.
    """
    return ratio(np.trapezoid(random - ranked, shares, axis=0), ranked[0], TOLERANCE)


def _curves(
    sizes: Sequence[int],
    shares: Sequence[float],
    ranked: Curve,
    draws: Sequence[Curve],
    unit: str,
) -> list[Row]:
    """The rows of one reading: one per size for the ranked and for the random curve, and one for
    the area between them.

    Args:
        sizes: numbers of components that are knocked out.
        shares: the same as shares of all components.
        ranked: values in the ranked order, `k n`.
        draws: values in each random order.
        unit: of the values.
    """
    at = [{"k": k, "share": share} for k, share in zip(sizes, shares, strict=True)]
    rows = [
        over_examples(ranked[i], unit) | point | {"condition": "ranked"}
        for i, point in enumerate(at)
    ]
    if draws:
        points = [over_draws([draw[i] for draw in draws]) | point for i, point in enumerate(at)]
        areas = np.stack([area(shares, ranked, draw) for draw in draws])
        rows += [*(point | {"condition": "random"} for point in points), _between(areas)]
    return rows


def _between(areas: Float[np.ndarray, "draw n"]) -> Row:
    """The mean area, with an interval from resampling both orders and examples."""
    resampled = resampled_means(areas)
    again = np.random.default_rng(0).integers(len(areas), size=resampled.shape)
    means = np.take_along_axis(resampled, again, axis=0).mean(axis=0)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return over_examples(areas.mean(axis=0)) | {"low": low, "high": high, "condition": "between"}


def _seen(examples: Examples, ranked_on: Examples) -> Row:
    """The share of examples that are also in the ranking set, so that the order was chosen to
    affect them."""
    known = {tuple(prompt) for prompt in ranked_on.prompt.tolist()}
    is_seen = np.array([tuple(prompt) in known for prompt in examples.prompt.tolist()], float)
    labels = {
        "condition": "ranked",
        "prefix": examples.prefix,
        "place": "all",
        "measure": "ranked_on_too",
    }
    return over_examples(is_seen, FRACTION) | labels


def _named(key: Key, condition: str) -> Row:
    prefix, place, measure = key
    return {
        "prefix": prefix,
        "place": place,
        "measure": f"area_{measure}" if condition == "between" else measure,
    }


def _matrix(readings: Sequence[Readings], key: Key) -> Curve:
    """The values of one reading: one row per point of the curve, one column per example."""
    return np.stack([reading.values[key].double().numpy() for reading in readings])
