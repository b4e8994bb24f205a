"""Ablation: how fast the answers die as heads, neurons or layers are knocked out, in ranked against
random order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt
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
from mechmem.spec.references import ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import LEVEL, ratio, resampled_means
from mechmem.statistics.rows import Row, over_draws, over_examples

Curve = Float[np.ndarray, "k n"]
Reader = Callable[[frozenset["Component"], bool], Readings]


class Component(NamedTuple):
    """What is knocked out as one: a head (`a0.h1`), a neuron (`m0.n7`), or a layer's attention
    (`a0`) or MLP (`m0`)."""

    name: str
    site: str
    layer: int
    index: int | None


class Ablation(AnswerAnalysis):
    """Knocks out 0, 1, 2, ... of the heads, neurons or layers, the most needed first, beside random
    orders.

    Ranked on clean instances it is the reasoning circuit that is removed: if memorised answers die
    with it, as fast as clean ones and faster than at random, the memory rests on reasoning; if they
    outlive it, the memory has parts of its own. The area between the two curves is (random -
    ranked), over the share of parts that is gone, in units of what is there at the baseline: 0 for
    a ranking that is no better than chance. Controls: random orders, and a ranking chosen on other
    examples than it is judged on (`ranked_on_too` says how many are the same). Source: ours, for
    claim C4 of arXiv:2507.04782; means: arXiv:2211.00593.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "component": "what is knocked out: head, neuron, or layer (the attention or MLP output of "
        "one)",
        "ranked_on": "example set on which the order was chosen",
        "ranked_by": "effect (the loss when a part alone is knocked out) or attribution (its "
        "first-order estimate)",
        "condition": "ranked order, random orders, between (the area), or alone (one part; heads "
        "and layers only)",
        "k": "number of parts that are knocked out; empty for the area and for `ranked_on_too`",
        "share": "k as a share of all parts (fraction); empty where k is",
        "part": "of `alone` (else empty), the part: a0.h1 head 1 of layer 0, a0 attention, m0 MLP "
        "of layer 0",
        "layer": "of `alone` (else empty), the layer of the part",
        "rank": "of `alone` (else empty), the place of the part in the ranked order; 1 goes first",
        "prefix": AnswerAnalysis.columns["prefix"],
        "place": AnswerAnalysis.columns["place"],
        "measure": "what is measured; area_M for the area of M; ranked_on_too: share of the "
        "examples ranked on too",
        "unit": "unit of the measure; of areas, 0 as random, 1 the most there can be of what only "
        "falls",
        "value": "mean over the examples; of random orders, also over their draws; an area is "
        "undefined where nothing is "
        "right at the baseline",
        "low": "lower end of the 95 % interval: bootstrap over examples, of areas also over the "
        "random orders; of random "
        "orders, their middle",
        "high": "upper end of it",
        "n": "number of examples, or of random orders",
        "per_example": "the values of the examples, in the order of the set (of an area, to first "
        "order)",
    }

    component: Swept[Literal["head", "neuron", "layer"]]
    method: Swept[Literal["zero", "mean", "resample", "gaussian"]] = "mean"
    """As in the intervention `ablate`."""
    reference_set: Swept[ExampleSetName | None] = None
    """Set of the mean, the other examples or the spread, as in `ablate`; the set that is patched
    unless given."""
    ranked_on: Swept[ExampleSetName] = ExampleSetName("clean")
    """The set whose loss ranks the parts, fed its own prefix; best one that shares no example with
    `examples`."""
    ranked_by: Swept[Literal["effect", "attribution"]] = "effect"
    """Exact, one forward a part, or the first-order estimate for mean ablation: one gradient for
    all (for neurons)."""
    metric: Measure = Probability(label="true")
    """What is lost when a part is needed; the part that loses most goes first."""
    k: tuple[NonNegativeInt, ...] | None = None
    """Numbers of parts knocked out; 1, 2, 4, 8 ... unless given. None and all are always among
    them."""
    n_random: int = Field(12, ge=1)
    """Random orders; of these, `n_control_greedy` are decoded too. They are turns of one random
    order (and of a next one, where there are more than parts), so that every part comes early about
    as often; a multiple of the heads is best."""
    seed: int = 0
    """Seed of the first random order, and of `resample` and `gaussian`."""

    def interventions(self, session: Session) -> list[Ablate]:
        return self.together(self.every(session.model(self.model)))

    def every(self, model: Model) -> list[Component]:
        """All parts there are, in the order of the model. Raises InputError for neurons of a model
        without an MLP."""
        if self.component == "neuron" and model.cfg.attn_only:
            raise InputError("this model has no neurons: it has no MLP; knock out heads or layers")
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
        """These components knocked out at once: one ablation for those of a layer."""
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
        """The parts, the most needed first."""
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
        """What the metric loses when each part alone is knocked out."""
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
        """How many are knocked out at each point of the curve. Raises InputError for more than
        there are."""
        doubling = tuple(2**i for i in range(n_components.bit_length()) if 2**i < n_components)
        k = doubling if self.k is None else self.k
        if max(k, default=0) > n_components:
            raise InputError(
                f"k {max(k)} is more than the {n_components} components ({self.component}s) of the "
                "model"
            )
        return sorted({0, *k, n_components})

    def orders(self, components: Sequence[Component]) -> list[list[Component]]:
        """The random orders."""
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
                for row in _curves(sizes, shares, _matrix(curve, key), draws)
            ]
        if self.component != "neuron":
            rows += self._alone(ranked, read)
        return self._tidy(rows)

    def _reader(self, session: Session) -> Reader:
        """The readings when a set of parts is knocked out; orders meet at the ends, which are read
        once."""
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
                row = over_examples(values.double().numpy()) | labels | {"condition": "alone"}
                rows.append(row | _named(key, "alone"))
        return rows

    def _tidy(self, rows: Sequence[Row]) -> pd.DataFrame:
        units = {measure.name: measure.unit for measure in self.measures}
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
    """The area between the curves in units of what is there at the baseline, of each example (their
    mean, to first order)."""
    return ratio(np.trapezoid(random - ranked, shares, axis=0), ranked[0], TOLERANCE)


def _curves(
    sizes: Sequence[int], shares: Sequence[float], ranked: Curve, draws: Sequence[Curve]
) -> list[Row]:
    """The rows of one reading: a point a size on the ranked and on the random curve, and the area
    between them."""
    at = [{"k": k, "share": share} for k, share in zip(sizes, shares, strict=True)]
    rows = [
        over_examples(ranked[i]) | point | {"condition": "ranked"} for i, point in enumerate(at)
    ]
    if draws:
        points = [over_draws([draw[i] for draw in draws]) | point for i, point in enumerate(at)]
        areas = np.stack([area(shares, ranked, draw) for draw in draws])
        rows += [*(point | {"condition": "random"} for point in points), _between(areas)]
    return rows


def _between(areas: Float[np.ndarray, "draw n"]) -> Row:
    """The mean area, with an interval for which orders and examples are drawn again."""
    resampled = resampled_means(areas)
    again = np.random.default_rng(0).integers(len(areas), size=resampled.shape)
    means = np.take_along_axis(resampled, again, axis=0).mean(axis=0)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return over_examples(areas.mean(axis=0)) | {"low": low, "high": high, "condition": "between"}


def _seen(examples: Examples, ranked_on: Examples) -> Row:
    """Which examples were ranked on too, so that the order is chosen to hurt them."""
    known = {tuple(prompt) for prompt in ranked_on.prompt.tolist()}
    is_seen = np.array([tuple(prompt) in known for prompt in examples.prompt.tolist()], float)
    said = {
        "condition": "ranked",
        "prefix": examples.prefix,
        "place": "all",
        "measure": "ranked_on_too",
    }
    return over_examples(is_seen) | said


def _named(key: Key, condition: str) -> Row:
    prefix, place, measure = key
    return {
        "prefix": prefix,
        "place": place,
        "measure": f"area_{measure}" if condition == "between" else measure,
    }


def _matrix(readings: Sequence[Readings], key: Key) -> Curve:
    """A row a point of the curve, a column an example."""
    return np.stack([reading.values[key].double().numpy() for reading in readings])
