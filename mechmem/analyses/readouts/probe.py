"""Probe: how well a linear classifier reads a variable from an activation, with controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pandas as pd
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat
from torch import Tensor

from mechmem.analyses.analysis import Analysis
from mechmem.analyses.effects.effect import Prefixes, prefixes
from mechmem.analyses.readouts.classifier import (
    PENALTIES,
    alike,
    check_fit,
    fitted,
    shuffled_labels,
    thirds,
    unseen,
    values_of,
)
from mechmem.data.examples import Examples, Label
from mechmem.interventions.intervention import shared
from mechmem.models import sites
from mechmem.models.edits import At, axes_of
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.limits import Seed
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.rows import FRACTION, over_examples, single


class Probe(Analysis):
    """How well a linear probe reads a variable from an activation.

    The probe is a multinomial logistic regression, fitted on clean instances. If it reads the
    variable equally well on memorised instances, the model still computes the variable there.
    Whether the model uses it can only be shown by an intervention (`erasure`). The instances of
    `fit_on` are split by `seed`: one third for fitting, one for choosing the penalty and one for
    testing. The probe is also tested on those instances of other sets on which it was neither
    fitted nor tuned. Instances whose prompts agree up to the position have the same activation, so
    they always stay together in these splits. A value that does not occur in the fit counts as
    wrong. Controls are the same probe on shuffled labels, one per prompt; the same probe on a
    control task, a random function of the variables `control_task` with the values of the variable;
    and always the most frequent value. Selectivity is the accuracy minus that of such a control.
    The splits depend on `seed` and the sets alone, so that the rows of several checkpoints, layers
    and sites at one position are paired by example.
    Source: arXiv:1610.01644 (probes), arXiv:1909.03368 (control tasks, selectivity).
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the set on which the probe is tested",
        "condition": "probe, shuffled (the same probe, on a random label for each prompt), "
        "control_task (the same probe, on a random function of the variables `control_task`) or "
        "majority (always the most frequent value); for selectivity, the control",
        "prefix": "label whose earlier tokens the model is fed: given or true",
        "measure": "accuracy; selectivity (accuracy of the probe minus that of the control); and "
        "in one row per probe: n_values (number of classes), penalty (the chosen one)",
        "unit": "unit of the measure",
        "value": "mean over the examples, in the unit of the measure",
        "low": "lower end of the exact 95 % interval over examples",
        "high": "upper end of that interval",
        "n": "number of test examples",
        "per_example": "1 for each example that is read correctly, otherwise 0, in the order of "
        "the set; for selectivity, the difference of two such values",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint that is read."""
    variable: Swept[str]
    """A variable of the task."""
    site: Swept[str] = "resid_post"
    """A name of `mechmem.sites`; all heads are read together."""
    layer: Swept[int | None] = None
    """The layer; None for a site without layers."""
    position: Swept[str]
    """One named position. Past the prompt, the model is fed earlier answer tokens, so results there
    depend on the prefix."""
    fit_on: Swept[ExampleSetName] = ExampleSetName("clean")
    """The example set of the fit: clean instances only, thousands for a variable of many values."""
    test_on: tuple[ExampleSetName, ...] = (ExampleSetName("noisy"),)
    """The other example sets on which the probe is tested."""
    penalties: tuple[PositiveFloat, ...] = Field(PENALTIES, min_length=1)
    """Penalties of the squared weights to choose from."""
    control_task: tuple[str, ...] = ()
    """Variables of a control task, whose every combination gets one random label: what a probe
    reads of it is due to the probe, which knows the inputs, and not to a computation of the model.
    Choose the inputs of the variable, such as `[a_1, b_1]` for `digit_sum_1`. By default, there is
    no control task."""
    seed: Seed = 0
    """Seed of the split, of the shuffled labels and of the control task."""
    prefixes: Prefixes = ("given", "true")
    """The labels whose earlier tokens the model is fed; only one where both have the same ones."""

    def table(self, session: Session) -> pd.DataFrame:
        model, fit = session.model(self.model), session.examples(self.fit_on)
        x = self._read(session, fit)
        check_fit(session, model, self.fit_on, self.variable, self.seed, self.position)
        same = alike(model, fit, self.position)
        names = tuple(dict.fromkeys([self.fit_on, *self.test_on]))
        tested = [unseen(session, model, n, fit, self.seed, self.position) for n in names]
        sets = [fit, *tested]
        values = [values_of(examples, self.variable) for examples in sets]
        probe = fitted(x, values[0], self.penalties, self.seed, same)
        controls = [
            (name, labels, fitted(x, labels[0], [probe.penalty], self.seed, same))
            for name, labels in self._control_labels(sets, values[0]).items()
        ]
        commonest = values[0][thirds(len(fit), self.seed, same)[0]].mode().values
        rows = [
            self._counted("n_values", len(probe.values), "values"),
            self._counted("penalty", probe.penalty, ""),
        ]
        for i, (name, examples) in enumerate(zip(names, tested, strict=True), start=1):
            for prefix in self._fed(examples):
                x = self._read(session, examples.with_prefix(prefix))
                hits = {"probe": probe(x) == values[i], "majority": values[i] == commonest}
                hits |= {control: of(x) == labels[i] for control, labels, of in controls}
                rows += [_row(hit, name, condition, prefix) for condition, hit in hits.items()]
                for control, *_ in controls:
                    gained = hits["probe"].double() - hits[control].double()
                    rows.append(_row(gained, name, control, prefix, "selectivity"))
        return pd.DataFrame(rows)[list(self.columns)]

    def _control_labels(
        self, sets: Sequence[Examples], values: Int[Tensor, " fit"]
    ) -> dict[str, list[Tensor]]:
        """By control, the labels that a probe is fitted to and tested on instead, in each set."""
        labels = {"shuffled": shuffled_labels(sets, values, (), self.seed)}
        if self.control_task:
            found = shuffled_labels(sets, values, self.control_task, self.seed)
            labels["control_task"] = found
        return labels

    def _fed(self, examples: Examples) -> tuple[Label, ...]:
        chosen = tuple(p for p in self.prefixes if p in prefixes(examples))
        return chosen or self.prefixes[:1]

    def _read(self, session: Session, examples: Examples) -> Float[Tensor, "n d"]:
        """The activation at the position. Raises InputError for a position or site that cannot be
        read."""
        if self.position == "readout":
            raise InputError(
                "a probe reads one position, but `readout` means several; sweep them with `each:`"
            )
        model = session.model(self.model)
        hook = sites.hook_of(model, self.site, self.layer)
        if axes_of(hook)[0] != 1:
            raise InputError(f"a probe reads a site of `batch pos ...`, not {self.site!r}")
        at = At(hook, shared(examples.indices(self.position)))
        return session.activation(model, examples, at)[:, 0].flatten(1)

    def _counted(self, measure: str, value: float, unit: str) -> dict[str, Any]:
        labels = {"examples": self.fit_on, "condition": "probe", "prefix": "given"}
        return labels | {"measure": measure, "unit": unit} | single(value)


def _row(
    values: Tensor, examples: str, condition: str, prefix: str, measure: str = "accuracy"
) -> dict[str, Any]:
    labels = {"examples": examples, "condition": condition, "prefix": prefix}
    measured = {"measure": measure, "unit": FRACTION}
    return labels | measured | over_examples(values.double().cpu().numpy(), FRACTION)
