"""Effects: how an intervention changes the answers, with baseline, source and control."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from mechmem.analyses.analysis import Analysis
from mechmem.data.examples import Examples, Label
from mechmem.interventions.controls.control import Control
from mechmem.interventions.intervention import Intervention
from mechmem.measures.accuracy import Accuracy
from mechmem.measures.measure import Measure
from mechmem.models.architecture import Model
from mechmem.session import Session, SourcePrefix
from mechmem.spec.errors import InputError
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.selection import distinct
from mechmem.spec.sweep import Swept
from mechmem.statistics.estimate import ERROR
from mechmem.statistics.rows import interval_by_unit
from mechmem.statistics.shares import share_over_examples

Interventions = Sequence[Intervention]
Key = tuple[str, str, str]
"""(prefix, place, measure)"""
Prefixes = Annotated[tuple[Label, ...], AfterValidator(distinct)]

TOLERANCE = 1e-6
"""Baseline below which a value cannot be expressed as a fraction of it."""
LEAST_SPAN = 0.05
"""Difference between source and baseline, in the unit of the measure, below which a normalised
recovery is undefined: 5 points of an accuracy, 0.05 nats."""
NO_RECOVERY = dict.fromkeys(("recovery", "recovery_low", "recovery_high"))


@dataclass(frozen=True)
class Readings:
    """A value for every example, by (prefix, place, measure)."""

    values: Mapping[Key, Tensor]


class AnswerAnalysis(Analysis):
    """An analysis that reports how interventions change the answers to an example set.

    Every effect is given for each prefix that the model is fed (`given`, `true`, or its own answer
    in `greedy` decoding), for the whole answer and for each of its places, next to the baseline.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "condition": "baseline (no intervention), intervened, control (mean over its draws) or "
        "source (the run that is patched in)",
        "prefix": "label whose earlier tokens the model is fed: given or true; greedy: its own "
        "answer",
        "place": "answer token, or all for the whole answer",
        "measure": "name of the measure; accuracies and probabilities in 0..1, logits and KL in "
        "nats",
        "unit": "unit of the measure",
        "value": "mean over the examples, in the unit of the measure",
        "low": "lower end of the 95 % interval over examples: exact for right and wrong, "
        "otherwise bootstrap",
        "high": "upper end of that interval",
        "recovery": "(value - baseline) / (source - baseline); undefined unless source and "
        "baseline differ by 0.05 (in the unit of the measure) and their interval excludes 0",
        "recovery_low": "lower end of the 95 % interval of the recovery over examples (Fieller); "
        "undefined likewise",
        "recovery_high": "upper end of that interval; undefined likewise",
        "n": "number of examples",
        "per_example": "the values of the examples, in the order of the set",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint that is intervened on."""
    examples: Swept[ExampleSetName] = ExampleSetName("noisy")
    """The example set."""
    measures: Annotated[tuple[Measure, ...], AfterValidator(distinct)] = (
        Accuracy(label="true"),
        Accuracy(label="given"),
    )
    """The measures of each answer."""
    prefixes: Prefixes = ("given", "true")
    """The labels whose earlier tokens the model is fed; only one where both have the same ones."""
    greedy: bool = True
    """Whether the model also answers by greedy decoding, without the help of a prefix."""
    source_prefix: SourcePrefix = "own"
    """The answer tokens that the source of a patch is fed while the patched model decodes: the
    patched model's own answer so far, or the given or the true label."""
    n_control_greedy: int = Field(5, ge=0, le=100_000)
    """Number of draws of the control that are decoded too (slower than a fixed prefix)."""

    @abstractmethod
    def interventions(self, session: Session) -> Interventions:
        """The interventions, applied together."""

    def answered(self, session: Session) -> Examples:
        """The examples that are answered, with the labels by which the answers are judged."""
        return session.examples(self.examples)

    def target(self, session: Session, examples: Examples) -> Tensor | None:
        """Logits of the run that is patched in; None if there is no such run."""
        return None

    def controls(
        self, session: Session, interventions: Interventions
    ) -> dict[str, list[list[Intervention]]]:
        """The draws of each control, by the name of its condition."""
        return {}

    def table(self, session: Session) -> pd.DataFrame:
        with session.steady():
            return self._table(session)

    def _table(self, session: Session) -> pd.DataFrame:
        model, examples = session.model(self.model), self.answered(session)
        self.check_measures(examples)
        interventions = self.interventions(session)
        conditions = {
            "baseline": self.readings(session, model, examples, []),
            "intervened": self.readings(session, model, examples, interventions),
        }
        for name, draws in self.controls(session, interventions).items():
            conditions[name] = mean_over_draws(
                [
                    self.readings(
                        session, model, examples, draw, self.greedy and i < self.n_control_greedy
                    )
                    for i, draw in enumerate(draws)
                ]
            )
        source = self._source_readings(session, examples)
        if source is not None:
            conditions["source"] = source
        return effect_table(self.examples, conditions, self.units)[[*AnswerAnalysis.columns]]

    @property
    def units(self) -> dict[str, str]:
        """The unit of each measure, by its name."""
        return {measure.name: measure.unit for measure in self.measures}

    def check_measures(self, examples: Examples) -> None:
        """Raises InputError for a measure that is the same for every model on these examples."""
        for measure in self.measures:
            if instead := measure.constant_on(examples):
                raise InputError(f"{measure.name} on {self.examples!r}: {instead}")

    def fed(self, examples: Examples) -> tuple[Label, ...]:
        """The chosen prefixes, without those that make no difference on these examples."""
        return tuple(p for p in self.prefixes if p in prefixes(examples)) or self.prefixes[:1]

    def readings(
        self,
        session: Session,
        model: Model,
        examples: Examples,
        interventions: Interventions,
        greedy: bool = True,
    ) -> Readings:
        """All measures by prefix and place under these interventions.

        Args:
            session: runs the model.
            model: the model that answers.
            examples: the examples that it answers.
            interventions: applied together; empty for the baseline, which is cached.
            greedy: whether the model also answers by greedy decoding.
        """
        greedy = greedy and self.greedy
        if interventions:
            return self._readings(session, model, examples, interventions, greedy)
        chosen = (self.measures, self.prefixes, greedy)
        return session.cached(
            ("readings", model, examples, chosen),
            lambda: self._readings(session, model, examples, interventions, greedy),
        )

    def _readings(
        self,
        session: Session,
        model: Model,
        examples: Examples,
        interventions: Interventions,
        greedy: bool,
    ) -> Readings:
        values: dict[Key, Tensor] = {}
        known: dict[Label, Tensor] = {}
        for prefix in self.fed(examples):
            fed = examples.with_prefix(prefix)
            logits = session.logits(model, fed, interventions)
            known[prefix] = logits.argmax(-1)
            values |= self._measured(prefix, logits, fed, session.baseline(model, fed))
        judges = [m for m in self.measures if greedy and _judges(m, model, examples)]
        if greedy and not interventions:  # once, and not for every intervention and draw
            for measure in self.measures:
                if measure not in judges:
                    session.say(
                        f"{measure.name} has no greedy rows: it needs the logits under a prefix"
                    )
        if judges:
            answer = session.greedy(model, examples, interventions, known, self.source_prefix)
            for measure in judges:
                judged = measure.of_answer(answer, examples, _width(model))
                if judged is not None:
                    values |= by_place("greedy", measure, judged, examples)
        return Readings(values)

    def _measured(
        self, prefix: Label, logits: Tensor, fed: Examples, baseline: Tensor
    ) -> dict[Key, Tensor]:
        found: dict[Key, Tensor] = {}
        for measure in self.measures:
            found |= by_place(prefix, measure, measure(logits, fed, baseline), fed)
        return found

    def _source_readings(self, session: Session, examples: Examples) -> Readings | None:
        model = session.model(self.model)
        values: dict[Key, Tensor] = {}
        for prefix in self.fed(examples):
            fed = examples.with_prefix(prefix)
            logits = self.target(session, fed)
            if logits is None:
                return None
            values |= self._measured(prefix, logits, fed, session.baseline(model, fed))
        return Readings(values)


class EffectAnalysis(AnswerAnalysis):
    """An analysis of how interventions change the answers, with a control of matched size."""

    control: Control | None = None
    """Random interventions of the same size."""

    def controls(
        self, session: Session, interventions: Interventions
    ) -> dict[str, list[list[Intervention]]]:
        if self.control is None:
            return {}
        return {"control": self.control.draws(interventions, session.model(self.model))}


def prefixes(examples: Examples) -> tuple[Label, ...]:
    """The prefixes that differ: both for noisy labels of several tokens, otherwise one."""
    same = torch.equal(examples.given[:, :-1], examples.true[:, :-1])
    return ("given",) if same else ("given", "true")


def by_place(
    prefix: str, measure: Measure, values: Tensor, examples: Examples
) -> dict[Key, Tensor]:
    """The values of the whole answer and of each place, by their key.

    Args:
        prefix: the label whose earlier tokens the model was fed, or `greedy`.
        measure: the measure of the values.
        values: the values at the answer tokens, `n n_answer`.
        examples: the examples, which name the places.
    """
    whole = {(prefix, "all", measure.name): measure.whole(values)}
    if examples.n_answer == 1:
        return whole
    return whole | {
        (prefix, place, measure.name): values[:, i] for i, place in enumerate(examples.places)
    }


def _judges(measure: Measure, model: Model, examples: Examples) -> bool:
    return measure.of_answer(examples.given, examples, _width(model)) is not None


def _width(model: Model) -> int:
    return int(model.cfg.d_vocab_out)


def effect_table(
    examples: str,
    conditions: Mapping[str, Readings],
    units: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """The tidy table of an effect; its columns are those of `AnswerAnalysis`.

    Args:
        examples: name of the example set.
        conditions: the readings, by condition.
        units: the unit of each measure, by its name.
    """
    rows = []
    for condition, readings in conditions.items():
        matrix = np.stack([values.double().numpy() for values in readings.values.values()])
        low, high = interval_by_unit(matrix, [units.get(key[2], "") for key in readings.values])
        for i, key in enumerate(readings.values):
            prefix, place, measure = key
            rows.append(
                {
                    "examples": examples,
                    "condition": condition,
                    "prefix": prefix,
                    "place": place,
                    "measure": measure,
                    "unit": units.get(measure, ""),
                    "value": matrix[i].mean(),
                    "low": low[i],
                    "high": high[i],
                    **_recovery(conditions, condition, key),
                    "n": matrix.shape[1],
                    "per_example": matrix[i].astype(np.float32),
                }
            )
    return pd.DataFrame(rows).astype(dict.fromkeys(NO_RECOVERY, "Float64"))


def _recovery(
    conditions: Mapping[str, Readings], condition: str, key: Key
) -> Mapping[str, float | None]:
    """The share of the way from the baseline to the source, with its interval; None where there is
    no source or hardly a way to go."""
    source = conditions["source"].values.get(key) if "source" in conditions else None
    if source is None or condition in ("baseline", "source"):
        return NO_RECOVERY
    baseline = conditions["baseline"].values[key].double()
    span = (source.double() - baseline).numpy()
    gained = (conditions[condition].values[key].double() - baseline).numpy()
    if len(span) < 2 or not abs(span.mean()) >= LEAST_SPAN:
        return NO_RECOVERY
    # Defined only if the span's own interval excludes 0: otherwise these ends are infinite.
    low, high = share_over_examples(gained, span).ends(ERROR)
    if not np.isfinite([low, high]).all():
        return NO_RECOVERY
    return {
        "recovery": gained.mean() / span.mean(),
        "recovery_low": low,
        "recovery_high": high,
    }


def mean_over_draws(draws: Sequence[Readings]) -> Readings:
    """The means over the draws that have a reading, one draw at a time to save memory."""
    total: dict[Key, Tensor] = {}
    n_draws: dict[Key, int] = {}
    for draw in draws:
        for key, values in draw.values.items():
            total[key] = total[key] + values.double() if key in total else values.double()
            n_draws[key] = n_draws.get(key, 0) + 1
    return Readings({key: total[key] / n_draws[key] for key in draws[0].values})
