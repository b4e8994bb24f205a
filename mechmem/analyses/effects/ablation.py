"""Ablation: how fast the answers die as heads, neurons or layers are knocked out, in ranked against
random order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor

from mechmem.analyses.circuits.attribution import Attribution, scores_of
from mechmem.analyses.circuits.attribution import parts as scored_parts
from mechmem.analyses.effects.effect import (
    TOLERANCE,
    EffectAnalysis,
    Key,
    Readings,
    baseline_logits,
    edits_of,
)
from mechmem.data.examples import Examples
from mechmem.interventions.ablate import Ablate
from mechmem.interventions.patch import Source
from mechmem.measures.measure import Measure
from mechmem.measures.probability import Probability
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import LEVEL, ratio, resamples
from mechmem.statistics.rows import Row, over_draws, over_examples

Curve = Float[np.ndarray, "k n"]
Reader = Callable[[frozenset["Part"], bool], Readings]


class Part(NamedTuple):
    """What is knocked out as one: a head (`a0.h1`), a neuron (`m0.n7`), or a layer's attention
    (`a0`) or MLP (`m0`)."""

    name: str
    site: str
    layer: int
    index: int | None


class Ablation(EffectAnalysis):
    """Knocks out 0, 1, 2, ... of the heads, neurons or layers, the most needed first, beside random
    orders.

    Ranked on clean instances it is the reasoning circuit that is removed: if memorised answers die
    with it, as fast as clean ones and faster than at random, the memory rests on reasoning; if they
    outlive it, the memory has parts of its own. The area between the two curves is (random -
    ranked), over the share of parts that is gone, in units of what is there baseline: 0 for a
    ranking that is no better than chance. Controls: random orders, and a ranking chosen on other
    examples than it is judged on (`ranked_on_too` says how many are the same). Source: ours, for
    claim C4 of arXiv:2507.04782; means: arXiv:2211.00593.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "component": "what is knocked out: head, neuron, or layer (the attention or MLP output of one)",
        "ranked_on": "example set on which the order was chosen",
        "ranked_by": "effect (the loss when a part alone is knocked out) or attribution (its first-order estimate)",
        "condition": "ranked order, random orders, between (the area), or alone (one part; heads and layers only)",
        "k": "number of parts that are knocked out; empty for the area and for `ranked_on_too`",
        "share": "k as a share of all parts (fraction); empty where k is",
        "part": "of `alone` (else empty), the part: a0.h1 head 1 of layer 0, a0 attention, m0 MLP of layer 0",
        "layer": "of `alone` (else empty), the layer of the part",
        "rank": "of `alone` (else empty), the place of the part in the ranked order; 1 goes first",
        "prefix": EffectAnalysis.columns["prefix"],
        "place": EffectAnalysis.columns["place"],
        "measure": "what is measured; area_M for the area of M; ranked_on_too: share of the examples ranked on too",
        "unit": "unit of the measure; of areas, 0 as random, 1 the most there can be of what only falls",
        "value": "mean over the examples; of random orders, also over their draws; an area is undefined where nothing is "
        "right baseline",
        "low": "lower end of the 95 % interval: bootstrap over examples, of areas also over the random orders; of random "
        "orders, their middle",
        "high": "upper end of it",
        "n": "number of examples, or of random orders",
        "per_example": "the values of the examples, in the order of the set (of an area, to first order)",
    }

    component: Swept[Literal["head", "neuron", "layer"]]
    method: Swept[Literal["zero", "mean", "resample", "gaussian"]] = "mean"
    """As in the intervention `ablate`."""
    reference_set: Swept[str | None] = None
    """Set of the mean, the other examples or the spread, as in `ablate`; the set that is patched
    unless given."""
    ranked_on: Swept[str] = "clean"
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

    @model_validator(mode="after")
    def _brings_its_control(self) -> Self:
        if self.control is not None:
            raise ValueError(
                "ablation draws its own control, `n_random` times; leave `control` out"
            )
        return self

    def parts(self, session: Session) -> list[Ablate]:
        return self.together(self.every(session.model(self.model)))

    def every(self, model: Model) -> list[Part]:
        """All parts there are, in the order of the model. Raises InputError for neurons of a model
        without an MLP."""
        if self.component == "neuron" and model.cfg.attn_only:
            raise InputError("this model has no neurons: it has no MLP; knock out heads or layers")
        layers, n_heads = range(model.cfg.n_layers), model.cfg.n_heads
        if self.component == "head":
            return [Part(f"a{i}.h{j}", "z", i, j) for i in layers for j in range(n_heads)]
        if self.component == "neuron":
            return [
                Part(f"m{i}.n{j}", "neurons", i, j)
                for i in layers
                for j in range(int(model.cfg.d_mlp or 0))
            ]
        outputs = (("a", "attn_out"), *((("m", "mlp_out"),) if not model.cfg.attn_only else ()))
        return [Part(f"{letter}{i}", site, i, None) for i in layers for letter, site in outputs]

    def together(self, parts: Sequence[Part]) -> list[Ablate]:
        """These parts knocked out at once: one ablation for those of a layer."""
        chosen: dict[tuple[str, int], list[int]] = {}
        for part in parts:
            chosen.setdefault((part.site, part.layer), []).append(part.index or 0)
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

    def ranking(self, session: Session) -> list[Part]:
        """The parts, the most needed first."""
        chosen = (self.component, self.method, self.ranked_by, self.metric, self.seed)
        sets = (name and session.examples(name) for name in (self.ranked_on, self.reference_set))
        key = ("ranking", session.model(self.model), *sets, *chosen)
        if key not in session.cache:
            parts = self.every(session.model(self.model))
            lost = (
                self._lost(session, parts)
                if self.ranked_by == "effect"
                else self._attributed(session, parts)
            )
            session.cache[key] = [parts[i] for i in np.argsort(-np.array(lost), kind="stable")]
        return session.cache[key]

    def _lost(self, session: Session, parts: Sequence[Part]) -> list[float]:
        """What the metric loses when each part alone is knocked out."""
        model, examples = session.model(self.model), session.examples(self.ranked_on)
        baseline = baseline_logits(session, model, examples)

        def measured(logits: Tensor) -> float:
            return self.metric.whole(self.metric(logits, examples, baseline)).double().mean().item()

        edits = (edits_of(self.together([part]), model, examples, session) for part in parts)
        return [measured(baseline) - measured(session.logits(model, examples, e)) for e in edits]

    def _attributed(self, session: Session, parts: Sequence[Part]) -> list[float]:
        """The same to first order, for mean ablation."""
        corrupted = Source(mean_reference_set=self.reference_set or self.ranked_on)
        scoring = Attribution(
            model=self.model, examples=self.ranked_on, metric=self.metric, corrupted=corrupted
        )
        contrast = scoring.contrast(session)
        units = scored_parts(contrast, neurons=self.component == "neuron")
        scores = {
            u[:2]: s.double().mean(0)
            for u, s in zip(units, scores_of(contrast, units), strict=True)
        }
        of = {"z": "head", "attn_out": "head", "neurons": "neuron", "mlp_out": "mlp"}
        found = ((scores[of[p.site], p.layer], p.index) for p in parts)
        return [(s.sum() if index is None else s[index]).item() for s, index in found]

    def sizes(self, n_parts: int) -> list[int]:
        """How many are knocked out at each point of the curve. Raises InputError for more than
        there are."""
        k = (
            self.k
            if self.k is not None
            else tuple(2**i for i in range(n_parts.bit_length()) if 2**i < n_parts)
        )
        if max(k, default=0) > n_parts:
            raise InputError(
                f"k {max(k)} is more than the {n_parts} parts ({self.component}) of the model"
            )
        return sorted({0, *k, n_parts})

    def orders(self, parts: Sequence[Part]) -> list[list[Part]]:
        """The random orders."""
        n, turns = len(parts), min(self.n_random, len(parts))
        orders = []
        for i in range(self.n_random):
            drawn = torch.randperm(
                n, generator=torch.Generator().manual_seed(self.seed + i // turns)
            )
            orders.append([parts[j] for j in drawn.roll(-round(i % turns * n / turns))])
        return orders

    def table(self, session: Session) -> pd.DataFrame:
        ranked, examples = self.ranking(session), session.examples(self.examples)
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
        model, examples, every = (
            session.model(self.model),
            session.examples(self.examples),
            self.every(session.model(self.model)),
        )

        @cache
        def read(chosen: frozenset[Part], greedy: bool) -> Readings:
            return self.readings(
                session, model, examples, self.together([p for p in every if p in chosen]), greedy
            )

        return read

    def _alone(self, ranked: Sequence[Part], read: Reader) -> list[Row]:
        rows = []
        for rank, part in enumerate(ranked, start=1):
            said = {
                "condition": "alone",
                "part": part.name,
                "layer": part.layer,
                "rank": rank,
                "k": 1,
            }
            found = read(frozenset([part]), self.greedy).values
            rows += [
                over_examples(v.double().numpy()) | said | _named(key, "alone")
                for key, v in found.items()
            ]
        return rows

    def _tidy(self, rows: Sequence[Row]) -> pd.DataFrame:
        units = {measure.name: measure.unit for measure in self.measures} | {
            "ranked_on_too": "fraction"
        }
        units |= {f"area_{measure.name}": "0 as random, 1 at most" for measure in self.measures}
        said = {
            name: getattr(self, name)
            for name in ("examples", "component", "ranked_on", "ranked_by")
        }
        empty = dict.fromkeys(("k", "share", "layer", "rank"), np.nan) | {"part": None}
        table = pd.DataFrame([empty | said | {"unit": units[row["measure"]]} | row for row in rows])
        return table[[*self.columns]].astype(dict.fromkeys(("k", "share", "layer", "rank"), float))


def area(shares: Sequence[float], ranked: Curve, random: Curve) -> Float[np.ndarray, " n"]:
    """The area between the curves in units of what is there baseline, of each example (their mean,
    to first order)."""
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
    resampled = areas @ resamples(areas.shape[1])
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
