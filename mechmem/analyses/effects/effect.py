"""Effects: what an intervention does to the answers, beside the baseline model, its source and a
matched control."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from mechmem.analyses.analysis import Analysis
from mechmem.data.examples import Examples, Label
from mechmem.interventions.controls.control import Control
from mechmem.interventions.intervention import Intervention
from mechmem.measures.accuracy import Accuracy
from mechmem.measures.measure import Measure
from mechmem.models.architecture import Model
from mechmem.session import Session
from mechmem.spec.files import digest
from mechmem.spec.sweep import Swept
from mechmem.statistics.intervals import interval

Interventions = Sequence[Intervention]
Key = tuple[str, str, str]
"""(prefix, place, measure)"""

TOLERANCE = 1e-6
"""Difference between source and baseline below which a normalised recovery is undefined."""


OTHER_PART = 10**6
"""Between the seeds of a control's draws for the parts of one effect: no two parts move in the same
direction."""


@dataclass(frozen=True)
class Readings:
    """A value for every example, by (prefix, place, measure)."""

    values: Mapping[Key, Tensor]


class EffectAnalysis(Analysis):
    """An analysis that reports what interventions do to the answers of an example set.

    Every effect states the prefix that the model is fed (`given`, `true`, or its own in `greedy`
    decoding), is given for the whole answer and by place, and stands beside the baseline model and,
    if asked, a control matched in size.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the example set",
        "condition": "baseline, patched, control (mean over its draws) or source (the run that is patched in)",
        "prefix": "label whose earlier tokens the model is fed: given, true; greedy: its own answer",
        "place": "answer token, or all for the whole answer",
        "measure": "what is measured; accuracies and probabilities in 0..1, logit differences and KL in nats",
        "unit": "unit of the measure",
        "value": "mean over the examples, in the unit of the measure",
        "low": "lower end of the bootstrap 95 % interval over examples",
        "high": "upper end of it",
        "recovery": "(value - baseline) / (source - baseline); undefined below a difference of 1e-6",
        "n": "number of examples",
        "per_example": "the values of the examples, in the order of the set",
    }

    model: Swept[str] = "after"
    """The checkpoint that is intervened on."""
    examples: Swept[str] = "noisy"
    """The example set."""
    measures: tuple[Measure, ...] = (Accuracy(label="true"), Accuracy(label="given"))
    control: Control | None = None
    greedy: bool = True
    """Also let the model answer freely (greedy), which no prefix can help."""
    n_control_greedy: int = Field(5, ge=0)
    """Draws of the control that are decoded too (slower than the fed prefixes)."""

    @abstractmethod
    def parts(self, session: Session) -> Interventions:
        """The interventions, applied together."""

    def target(self, session: Session, examples: Examples) -> Tensor | None:
        """Logits of the run that is patched in, if there is such a run."""
        return None

    def control_draws(self, session: Session, parts: Interventions) -> list[list[Intervention]]:
        """The draws of the control, each a list of interventions applied together."""
        if self.control is None:
            return []
        seeds = [self.control.seed + OTHER_PART * i for i in range(len(parts))]
        controls = [self.control.model_copy(update={"seed": seed}) for seed in seeds]
        per_part = [
            c.draws(part, session.model(self.model))
            for c, part in zip(controls, parts, strict=True)
        ]
        return [[p for part in draw for p in part] for draw in zip(*per_part, strict=True)]

    def controls(
        self, session: Session, parts: Interventions
    ) -> dict[str, list[list[Intervention]]]:
        """The draws of each control, by the name of its condition."""
        draws = self.control_draws(session, parts)
        return {"control": draws} if draws else {}

    def table(self, session: Session) -> pd.DataFrame:
        model, examples, parts = (
            session.model(self.model),
            session.examples(self.examples),
            self.parts(session),
        )
        baseline = self.readings(session, model, examples, [])
        conditions = {
            "baseline": baseline,
            "intervened": self.readings(session, model, examples, parts),
        }
        for name, draws in self.controls(session, parts).items():
            conditions[name] = _mean(
                [
                    self.readings(
                        session,
                        model,
                        examples,
                        draw,
                        greedy=self.greedy and i < self.n_control_greedy,
                    )
                    for i, draw in enumerate(draws)
                ]
            )
        source = self._source_readings(session, model, examples)
        if source is not None:
            conditions["source"] = source
        table = effect_table(self.examples, conditions)
        units = {measure.name: measure.unit for measure in self.measures}
        table["unit"] = table["measure"].map(units)
        return table[[*EffectAnalysis.columns]]

    def readings(
        self,
        session: Session,
        model: Model,
        examples: Examples,
        parts: Interventions,
        greedy: bool = True,
    ) -> Readings:
        """All measures by prefix and place under these interventions."""
        greedy = greedy and self.greedy
        if parts:
            return self._readings(session, model, examples, parts, greedy)
        key = ("readings", model, examples, digest([m.block() for m in self.measures]), greedy)
        if key not in session.cache:
            session.cache[key] = self._readings(session, model, examples, parts, greedy)
        return session.cache[key]

    def _readings(
        self, session: Session, model: Model, examples: Examples, parts: Interventions, greedy: bool
    ) -> Readings:
        values: dict[Key, Tensor] = {}
        known: dict[Label, Tensor] = {}
        for prefix in prefixes(examples):
            fed = examples.with_prefix(prefix)
            logits = session.logits(model, fed, edits_of(parts, model, fed, session))
            known[prefix] = logits.argmax(-1)
            baseline = baseline_logits(session, model, fed)
            values |= self._measured(prefix, logits, fed, baseline)
        accuracies = [m for m in self.measures if isinstance(m, Accuracy)]
        if greedy and accuracies:
            answer = greedy_answer(session, model, examples, parts, known)
            for measure in accuracies:
                hits = (answer == examples.labels(measure.label)).float()
                values |= by_place("greedy", measure, hits, examples)
        return Readings(values)

    def _measured(
        self, prefix: Label, logits: Tensor, fed: Examples, baseline: Tensor
    ) -> dict[Key, Tensor]:
        found: dict[Key, Tensor] = {}
        for measure in self.measures:
            found |= by_place(prefix, measure, measure(logits, fed, baseline), fed)
        return found

    def _source_readings(
        self, session: Session, model: Model, examples: Examples
    ) -> Readings | None:
        values: dict[Key, Tensor] = {}
        for prefix in prefixes(examples):
            fed = examples.with_prefix(prefix)
            logits = self.target(session, fed)
            if logits is None:
                return None
            values |= self._measured(prefix, logits, fed, baseline_logits(session, model, fed))
        return Readings(values)


def prefixes(examples: Examples) -> tuple[Label, ...]:
    """The prefixes that differ: both for noisy labels of several tokens, else one."""
    same = torch.equal(examples.given[:, :-1], examples.true[:, :-1])
    return ("given",) if same else ("given", "true")


def edits_of(parts: Interventions, model: Model, examples: Examples, session: Session) -> list:
    """The edits of several interventions applied together."""
    return [edit for part in parts for edit in part.edits(model, examples, session)]


def baseline_logits(session: Session, model: Model, examples: Examples) -> Tensor:
    """Logits without intervention; keeps the residual before each layer too, where patched forwards
    resume."""
    resid = [f"blocks.{layer}.hook_resid_pre" for layer in range(1, model.cfg.n_layers)]
    return session.activations(model, examples, [*resid, "unembed.hook_out"])["unembed.hook_out"][
        :, -examples.n_answer :
    ]


def by_place(
    prefix: str, measure: Measure, values: Tensor, examples: Examples
) -> dict[Key, Tensor]:
    """The whole answer and each place."""
    places = {
        (prefix, place, measure.name): values[:, i] for i, place in enumerate(examples.places)
    }
    return {(prefix, "all", measure.name): measure.whole(values)} | (
        places if examples.n_answer > 1 else {}
    )


def greedy_answer(
    session: Session,
    model: Model,
    examples: Examples,
    parts: Interventions,
    known: Mapping[Label, Tensor] | None = None,
) -> Tensor:
    """The greedy answer under the interventions, `n n_answer`.

    A guess of the answer is fed, and what the model makes of it fed again, until nothing changes:
    the first t tokens are final after t rounds, and an answer that was guessed right costs one
    forward instead of `n_answer`. `known` are answers already at hand for the given or the true
    prefix, as first guesses that cost nothing.
    """
    answer, n_right = examples.given.clone(), torch.full((len(examples),), -1)
    for label, found in (known or {}).items():
        agreeing = (found[:, :-1] == examples.labels(label)[:, :-1]).cumprod(dim=1).sum(dim=1)
        is_better = agreeing > n_right
        answer[is_better], n_right = found[is_better], agreeing.maximum(n_right)
    open_rows = (n_right < examples.n_answer - 1).nonzero()[:, 0]
    for _ in range(examples.n_answer):
        if not len(open_rows):
            break
        fed = examples.select(open_rows).continued_with(answer[open_rows])
        new = session.logits(model, fed, edits_of(parts, model, fed, session)).argmax(-1)
        is_fixed = (new[:, :-1] == answer[open_rows][:, :-1]).all(dim=1)
        answer[open_rows] = new
        open_rows = open_rows[~is_fixed]
    return answer


def effect_table(examples: str, conditions: Mapping[str, Readings]) -> pd.DataFrame:
    """The tidy table of an effect; its columns are those of `EffectAnalysis`."""
    rows = []
    for condition, readings in conditions.items():
        matrix = np.stack([values.double().numpy() for values in readings.values.values()])
        low, high = interval(matrix)
        for i, key in enumerate(readings.values):
            recovery = (
                _recovery(conditions, key, matrix[i].mean())
                if condition not in ("baseline", "source")
                else None
            )
            prefix, place, measure = key
            rows.append(
                {
                    "examples": examples,
                    "condition": condition,
                    "prefix": prefix,
                    "place": place,
                    "measure": measure,
                    "value": matrix[i].mean(),
                    "low": low[i],
                    "high": high[i],
                    "recovery": recovery,
                    "n": matrix.shape[1],
                    "per_example": matrix[i].astype(np.float32),
                }
            )
    return pd.DataFrame(rows).astype({"recovery": "Float64"})


def _recovery(conditions: Mapping[str, Readings], key: Key, value: float) -> float | None:
    if "source" not in conditions or key not in conditions["source"].values:
        return None
    low = conditions["baseline"].values[key].double().mean().item()
    span = conditions["source"].values[key].double().mean().item() - low
    return None if abs(span) < TOLERANCE else (value - low) / span


def _mean(draws: Sequence[Readings]) -> Readings:
    keys = draws[0].values
    return Readings(
        {
            key: torch.stack([d.values[key].double() for d in draws if key in d.values]).mean(0)
            for key in keys
        }
    )
