"""Interchange: patches from minimal pairs with another and with the same intermediate value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
from pydantic import AfterValidator, Field

from mechmem.analyses.effects.displacement import COLUMNS, Displacement, displacement
from mechmem.analyses.effects.effect import (
    AnswerAnalysis,
    Interventions,
    Readings,
    effect_table,
    mean_over_draws,
)
from mechmem.data.examples import Examples
from mechmem.interventions.controls.random_direction import RandomDirection
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch_towards import PatchTowards
from mechmem.measures.accuracy import Accuracy
from mechmem.measures.measure import Measure
from mechmem.measures.off_label_rate import OffLabelRate
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.limits import Draws, Seed
from mechmem.spec.references import ExampleSetName
from mechmem.spec.selection import Indices, Names, Units, distinct
from mechmem.spec.sweep import Swept
from mechmem.statistics.rows import Row, over_examples

MEMORISED = Accuracy(label="given")
Moves = Mapping[str, tuple[Examples, Sequence[Sequence[Intervention]]]]
"""By condition, the examples that are intervened on and the draws of interventions."""


def _with_memorised(measures: tuple[Measure, ...]) -> tuple[Measure, ...]:
    if MEMORISED not in measures:
        raise ValueError(
            "measures lack accuracy_given, without which nobody can tell whether a dose left "
            "anything to compare; add it"
        )
    return distinct(measures)


class Interchange(AnswerAnalysis):
    """Moves an activation towards that of two minimal pairs and compares the answers that are lost.

    The pair of `examples` has another intermediate value (arm `other`); that of `same` has another
    input but the same intermediate value (arm `same`). Both arms change the same instances at the
    same place by the same norm: at each position, `dose` times the shorter of the two ways. A
    memorised answer that depends on the intermediate value is lost more often in `other`; one that
    depends on the inputs alone is lost in both. A dose at which `same` keeps under half of the
    memorised answers (`kept`) tests nothing: any change of this size destroys the answer. Nor does
    one at which the intermediate value is not exchanged, because the pair with the same value lies
    near: on clean instances the answers of `other` must become those of the pair. The condition
    `random` moves as far in a random direction.
    Source: interchange interventions, arXiv:2106.02997; the arm `same` and equal norms: ours.
    """

    columns: ClassVar[Mapping[str, str]] = {
        **{key: text for key, text in AnswerAnalysis.columns.items() if "recovery" not in key},
        "condition": "baseline (no intervention), other (towards the pair with another "
        "intermediate value), same (towards the pair with the same one) or random (as far in a "
        "random direction; mean over its draws)",
        "measure": "name of the measure; `pair` in it means the pair of the arm, and that of "
        "`other` in baseline and random; kept: share of the memorised answers that remain, over "
        "the examples whose given label the model answers without intervention",
        "value": "mean over the examples, in the unit of the measure; undefined for kept if "
        "nothing is memorised",
        "n": "number of examples; for kept, of the memorised ones",
        "per_example": "the values of the examples, in the order of the set and alike in all "
        "conditions",
        **COLUMNS,
    }

    measures: Annotated[tuple[Measure, ...], AfterValidator(_with_memorised)] = (
        MEMORISED,
        Accuracy(label="true"),
        OffLabelRate(),
    )
    """The measures of each answer, accuracy_given among them."""
    same: Swept[ExampleSetName]
    """The same examples as in `examples`, with pairs that have the same intermediate value: in the
    two sets, `pair` and `also_pair` are swapped."""
    site: Swept[str]
    """A name of the sites table, or a TransformerLens hook name."""
    layer: Swept[Indices | None] = None
    """One layer or several; None for a site without layers."""
    position: Swept[Names | None] = None
    """Named positions; by default, all."""
    head: Swept[Indices | None] = None
    """Heads, at sites that have them; by default, all."""
    neurons: Swept[Units | None] = None
    """Neurons, at `neurons` and `mlp_pre`; by default, all."""
    dose: Swept[Annotated[float, Field(gt=0, le=1)]] = 1.0
    """Norm of the change, as a share of the shorter of the two ways (fraction)."""
    reference_set: Swept[ExampleSetName] = ExampleSetName("clean")
    """Clean examples, to whose distribution the columns `mahalanobis` refer; several times as many
    as the activation has dimensions. A tenth of their covariance is replaced by equal variances."""
    n_random: Draws = 5
    """Number of random directions."""
    seed: Seed = 0
    """Seed of the first random direction."""

    def interventions(self, session: Session) -> Interventions:
        return [self._towards(self.same)]

    def _towards(self, matched: str) -> PatchTowards:
        chosen = {
            name: getattr(self, name)
            for name in ("site", "layer", "position", "head", "neurons", "dose")
        }
        return PatchTowards(**chosen, matched=matched)

    def _table(self, session: Session) -> pd.DataFrame:
        model = session.model(self.model)
        other, same = session.examples(self.examples), session.examples(self.same)
        self.check_measures(other)
        towards_other, towards_same = self._towards(self.same), self._towards(self.examples)
        control = RandomDirection(n=self.n_random, seed=self.seed)
        moves: Moves = {
            "other": (other, [[towards_other]]),
            "same": (same, [[towards_same]]),
            "random": (other, control.draws([towards_other], model)),
        }
        conditions = {"baseline": self.readings(session, model, other, [])}
        for name, (examples, draws) in moves.items():
            conditions[name] = mean_over_draws(
                [
                    self.readings(session, model, examples, draw, i < self.n_control_greedy)
                    for i, draw in enumerate(draws)
                ]
            )
        table = pd.concat([self._effects(conditions), kept(conditions)], ignore_index=True)
        table = table.assign(examples=self.examples)
        return self._with_distances(session, model, table, moves)[[*self.columns]]

    def _effects(self, conditions: Mapping[str, Readings]) -> pd.DataFrame:
        units = {measure.name: measure.unit for measure in self.measures}
        table = effect_table(self.examples, conditions)
        return table.assign(unit=table["measure"].map(units))

    def _with_distances(
        self,
        session: Session,
        model: Model,
        table: pd.DataFrame,
        moves: Moves,
    ) -> pd.DataFrame:
        """The table with the columns of the displacement of each condition and prefix."""
        fed = self.fed(session.examples(self.examples))
        found = {}
        for prefix in fed:
            reference = session.examples(self.reference_set).with_prefix(prefix)
            for condition, (examples, draws) in moves.items():
                own = examples.with_prefix(prefix)
                of_draws = [displacement(session, model, own, d, reference) for d in draws]
                found[condition, prefix] = Displacement(*np.mean(of_draws, axis=0).tolist())
            found["baseline", prefix] = found["other", prefix].undone
        keys = zip(table["condition"], table["prefix"].replace("greedy", fed[0]), strict=True)
        rows = pd.DataFrame([found[key] for key in keys], columns=[*COLUMNS])
        return pd.concat([table, rows], axis=1)


def kept(conditions: Mapping[str, Readings]) -> pd.DataFrame:
    """Rows of the share of memorised answers that remain in each condition, by prefix.

    Args:
        conditions: by name, the readings, of which `baseline` tells what is memorised.
    """
    rows: list[Row] = []
    for key, values in conditions["baseline"].values.items():
        prefix, place, measure = key
        if (place, measure) != ("all", MEMORISED.name):
            continue
        memorised = values.bool()
        labels = {"prefix": prefix, "place": "all", "measure": "kept", "unit": "fraction"}
        for condition, readings in conditions.items():
            remaining = readings.values[key][memorised].double().numpy()
            rows.append(labels | {"condition": condition} | _share(remaining))
    return pd.DataFrame(rows)


def _share(remaining: np.ndarray) -> Row:
    if len(remaining):
        return over_examples(remaining)
    undefined = dict.fromkeys(("value", "low", "high"), float("nan"))
    return undefined | {"n": 0, "per_example": np.full(1, np.nan, np.float32)}
