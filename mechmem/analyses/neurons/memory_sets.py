"""MemorySets: the fewest neurons, or heads, that undo a memory, and the fewest that carry it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from mechmem.analyses.analysis import Analysis
from mechmem.analyses.neurons.exchange import Exchange
from mechmem.analyses.neurons.ranking import (
    Change,
    Site,
    Unit,
    indifference,
    integrated,
    preference,
)
from mechmem.data.examples import Examples, third_labels
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.limits import Draws, Seed, Width
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import LEVEL
from mechmem.statistics.rows import Row, over_examples

Kind = Literal["neuron", "head"]
Rest = Literal["before", "after"]
Holds = Callable[[Int[Tensor, " n"]], Bool[Tensor, " n"]]
"""(number of units of each example) -> whether its answer is the wanted one."""
SITES: dict[str, Site] = {"neuron": "neurons", "head": "z"}
ONE_BY_ONE = 16
"""Size up to which every size is tried; beyond, sizes grow by the factor below, and the last step
is halved until the size is known."""
GROWTH = 1.5


@dataclass(frozen=True)
class Order:
    """The units of all layers in the order of each example's own ranking."""

    scores: Float[Tensor, "n layer unit"]

    @property
    def n_units(self) -> int:
        return self.scores[0].numel()

    def first(self, sizes: Int[Tensor, " n"]) -> Bool[Tensor, "n layer unit"]:
        """The first units of each example, as many as its size."""
        flat = self.scores.flatten(1)
        rank = flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return (rank < sizes[:, None]).reshape(self.scores.shape)


class MemorySets(Analysis):
    """How few neurons, or heads, hold each memorised answer.

    In each instance the units of all layers are ranked by integrated gradients of the change
    between `before` and `after`, without regard to the true label. `back` is the fewest first
    units that, returned to `before`, give the true answer: it measures the margin of the memory,
    and is small for a distributed one too. `keep` is the fewest first units whose change alone
    gives the memorised answer: it is small only for a look-up. `participation` is the number of
    units that share the change evenly. All changes are of contributions: activations and weights
    out of the units, at all positions; everything downstream answers to them.

    With `rest: before`, `keep` patches units forward into `before`, all else as it was there. With
    `rest: after`, all other units of the kind are returned and the rest stays as in `after`; a
    memory that another kind of unit holds then has a `keep` of 0. Answers are whole and greedy:
    each is checked under its own label as prefix, which is the same. Sizes up to 16 are all tried;
    beyond, a size may be missed if a larger set undoes what it did.

    A ranking towards a label is a search for it: `returned_true` and `returned_third` are the
    shares of answers that become the true, or a random third, label when the first `top` units of
    a ranking towards it are returned; `returned_neutral` is that of the true label by the ranking
    above. Clean instances have a `back` of 0, and are a control for the third label.
    Source: ours, for claim C6; the ranking: arXiv:1703.01365.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "component": "neuron or head, of all layers",
        "measure": "back, keep, participation, keep_is_large, returned_true, returned_third or "
        "returned_neutral",
        "unit": "units (neurons or heads), or fraction",
        "value": "median over the examples, or for fractions the mean",
        "low": "lower end of the 95 % interval: of the median by order statistics, of a mean by "
        "bootstrap",
        "high": "upper end of that interval",
        "n": "number of examples",
        "n_units": "number of units of all layers",
        "share_infinite": "share of the examples in which no number of units is enough (0..1)",
        "per_example": "the values of the examples, in the order of the set; n_units + 1 where no "
        "number of units is enough",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint that has memorised."""
    before: CheckpointName = CheckpointName("before")
    """The checkpoint to which units are returned."""
    examples: Swept[ExampleSetName] = ExampleSetName("noisy")
    """The instances."""
    component: Swept[Kind] = "neuron"
    """Neurons, or heads."""
    rest: Swept[Rest] = "before"
    """Where `keep` is measured: everything but the kept units as in `before`, or the other kinds of
    units as in `after`."""
    patch: Swept[Unit] = "contributions"
    """Whether units get the other checkpoint's activations alone, or its weights out too."""
    n_steps: Draws = 8
    """Points of the path of integrated gradients."""
    top: Width = 64
    """Number of units that are returned for the shares of answers."""
    least: Width | None = None
    """A `keep` from which on it counts as large; by default, 8 neurons or 2 heads."""
    seed: Seed = 0
    """Seed of the third labels."""

    def table(self, session: Session) -> pd.DataFrame:
        with session.steady():
            rows = self._rows(session)
        shared = {"examples": self.examples, "component": self.component}
        return pd.DataFrame(rows).assign(**shared)[[*self.columns]]

    def _rows(self, session: Session) -> list[Row]:
        examples = session.examples(self.examples).as_set()
        order = self.order(session, examples)
        sizes = {
            "back": fewest(self._returned(session, order, examples, "true"), order),
            "keep": fewest(self._kept(session, order, examples), order),
        }
        least = self.least or (8 if self.component == "neuron" else 2)
        never = order.n_units + 1
        rows = [
            _row(name, found, never, {"n_units": order.n_units}) for name, found in sizes.items()
        ]
        spread = participation(order.scores)
        rows.append(_row("participation", spread, never, {"n_units": order.n_units}))
        shares = {"keep_is_large": sizes["keep"] >= least}
        shares |= self._shares(session, order, examples)
        for name, holds in shares.items():
            of_all = over_examples(holds.double().numpy())
            labels = {"measure": name, "unit": "fraction", "n_units": order.n_units}
            rows.append(of_all | labels | {"share_infinite": 0.0})
        return rows

    def order(self, session: Session, examples: Examples, towards: Examples | None = None) -> Order:
        """The units in the order of each instance's own ranking.

        Args:
            session: gives the models.
            examples: the instances.
            towards: the instances with the label that is looked for as their true one; by default,
                no label is looked for.
        """
        model = session.model(self.model)
        change = Change(
            session,
            model,
            session.model(self.before),
            examples,
            examples,
            tuple(range(model.cfg.n_layers)),
            None,
            self.patch,
            site=SITES[self.component],
        )
        metric = indifference(examples) if towards is None else preference(towards, "true")
        return Order(torch.stack(integrated(change, metric, self.n_steps), dim=1))

    def _returned(
        self, session: Session, order: Order, examples: Examples, label: Literal["true", "given"]
    ) -> Holds:
        """Whether the first units, returned to `before`, give the label."""
        model, source = session.model(self.model), session.model(self.before)

        def holds(sizes: Tensor) -> Tensor:
            part = self._exchange(source, order.first(sizes))
            return _answers(session, model, examples.with_prefix(label), part)

        return holds

    def _kept(self, session: Session, order: Order, examples: Examples) -> Holds:
        """Whether the change of the first units alone gives the memorised answer."""
        after, before = session.model(self.model), session.model(self.before)
        fed = examples.with_prefix("given")

        def holds(sizes: Tensor) -> Tensor:
            first = order.first(sizes)
            if self.rest == "before":
                return _answers(session, before, fed, self._exchange(after, first))
            return _answers(session, after, fed, self._exchange(before, ~first))

        return holds

    def _exchange(self, source: Model, chosen: Tensor) -> Exchange:
        return Exchange(source, chosen, SITES[self.component], self.patch)

    def _shares(self, session: Session, order: Order, examples: Examples) -> dict[str, Tensor]:
        """Whether the first `top` units, returned, give the label that the ranking looks for."""
        third = examples.with_true(third_labels(examples, self.seed))
        towards = {
            "returned_true": (examples, self.order(session, examples, examples)),
            "returned_third": (third, self.order(session, examples, third)),
            "returned_neutral": (examples, order),
        }
        sizes = torch.full((len(examples),), min(self.top, order.n_units))
        return {
            name: self._returned(session, ranked, looked_for, "true")(sizes)
            for name, (looked_for, ranked) in towards.items()
        }


def _answers(session: Session, model: Model, fed: Examples, part: Exchange) -> Bool[Tensor, " n"]:
    """Whether the whole answer is the label that is fed: then greedy decoding gives it too."""
    logits = session.logits(model, fed, [part])
    return (logits.argmax(-1) == fed.labels(fed.prefix)).all(dim=1)


def fewest(holds: Holds, order: Order) -> Int[Tensor, " n"]:
    """The smallest number of units for which each example holds; `n_units + 1` for never.

    Args:
        holds: tried with a number for each example.
        order: for the numbers of examples and units.
    """
    n, most = len(order.scores), order.n_units
    low, high = torch.full((n,), -1), torch.full((n,), most + 1)
    for size in sizes_up_to(most):
        is_open = high > most
        if not is_open.any():
            break
        found = holds(torch.full((n,), size)) & is_open
        high[found] = size
        low[is_open & ~found] = size
    is_open = (high <= most) & (high - low > 1)
    while is_open.any():
        middle = torch.where(is_open, (low + high) // 2, high.clamp_max(most))
        found = holds(middle)
        high = torch.where(is_open & found, middle, high)
        low = torch.where(is_open & ~found, middle, low)
        is_open = (high <= most) & (high - low > 1)
    return high


def sizes_up_to(most: int) -> list[int]:
    """0 to 16 one by one, then growing ones, and the largest."""
    sizes = [*range(min(most, ONE_BY_ONE) + 1)]
    while sizes[-1] < most:
        sizes.append(min(most, int(sizes[-1] * GROWTH)))
    return sizes


def participation(scores: Float[Tensor, "n layer unit"]) -> Float[Tensor, " n"]:
    """Number of units that would share the scores evenly, (sum |s|)^2 / sum s^2; 0 if all are 0."""
    sizes = scores.flatten(1).abs().double()
    return sizes.sum(1) ** 2 / sizes.pow(2).sum(1).clamp_min(1e-300)


def _row(measure: str, values: Tensor, never: int, labels: Row) -> Row:
    """A median with its interval by order statistics."""
    numbers = values.double().numpy()
    low, high = median_interval(numbers)
    found: Row = {"measure": measure, "unit": "units", "value": float(np.median(numbers))}
    found |= {"low": low, "high": high, "n": len(numbers)}
    is_size = measure != "participation"
    infinite = float((numbers == never).mean()) if is_size else 0.0
    of_all = {"share_infinite": infinite, "per_example": numbers.astype(np.float32)}
    return {**found, **labels, **of_all}


def median_interval(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """The order statistics that contain the median with a probability of at least 95 %; the
    smallest and the largest value where no two do. Source: the binomial distribution of the
    number of values below the median."""
    in_order, n, tail = np.sort(values), len(values), (1 - LEVEL) / 2
    below = int(stats.binom.ppf(tail, n, 0.5))
    if stats.binom.cdf(below, n, 0.5) > tail:
        below -= 1
    below = max(below, 0)
    return float(in_order[below]), float(in_order[n - 1 - below])
