"""Probe: what a linear classifier reads of a variable from an activation, beside its controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pandas as pd
from jaxtyping import Bool, Float
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
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.statistics.rows import over_examples, single


class Probe(Analysis):
    """How well a linear probe (multinomial logistic regression) reads a variable from an
    activation.

    A probe that was fitted on clean instances and reads the variable on memorised ones just as well
    says that the model still computes it there; whether it uses it, only an intervention tells
    (`erasure`). The instances of `fit_on` are split by `seed`: the probe is fitted on a third, its
    penalty chosen on a third, and it is tested on the last third, and on those of the other sets
    that it was not fitted or tuned on. Instances whose prompts are the same up to the position have
    the same activation there, and count as one in all of this. A value that it never saw counts as
    wrong. Beside it stand the same probe on shuffled labels (what it gains is its selectivity) and
    the commonest value.
    Source: arXiv:1610.01644 (probes), arXiv:1909.03368 (selectivity).
    """

    columns: ClassVar[Mapping[str, str]] = {
        "examples": "name of the set that the probe is tested on",
        "condition": "probe, shuffled (the same probe, on shuffled labels) or majority (always the "
        "commonest value)",
        "prefix": "label whose earlier tokens the model is fed: given, true",
        "measure": "accuracy; and in one row a probe: n_values (how many it tells apart), penalty "
        "(the chosen one)",
        "unit": "unit of the measure",
        "value": "mean over the examples, in the unit of the measure",
        "low": "lower end of the bootstrap 95 % interval over examples",
        "high": "upper end of it",
        "n": "number of examples that it is tested on",
        "per_example": "1 where an example is read right, else 0, in the order of the set",
    }

    model: Swept[CheckpointName] = CheckpointName("after")
    """The checkpoint that is read."""
    variable: Swept[str]
    """A variable of the task."""
    site: Swept[str] = "resid_post"
    """A name of `mechmem.sites`; heads are read together."""
    layer: Swept[int | None] = None
    """None for a site without layers."""
    position: Swept[str]
    """One named position. Where the model reads answer tokens it is *told* the earlier ones: mind
    the prefix."""
    fit_on: Swept[ExampleSetName] = ExampleSetName("clean")
    """The example set of the fit, of clean instances only; thousands for a variable of many
    values."""
    test_on: tuple[ExampleSetName, ...] = (ExampleSetName("noisy"),)
    """The other example sets that the probe is tested on."""
    penalties: tuple[PositiveFloat, ...] = Field(PENALTIES, min_length=1)
    """Penalties of the squared weights to choose from."""
    shuffled_by: tuple[str, ...] = ()
    """Give every combination of these variables one shuffled label, to be learnt by heart; else
    every instance its own."""
    seed: int = 0
    """Seed of the split and of the shuffled labels."""

    prefixes: Prefixes = ("given", "true")
    """The labels whose earlier tokens the model is fed; one, where both have the same ones."""

    def table(self, session: Session) -> pd.DataFrame:
        model, fit = session.model(self.model), session.examples(self.fit_on)
        x = self._read(session, fit)
        check_fit(session, model, self.fit_on, self.variable, self.seed, self.position)
        same = alike(model, fit, self.position)
        names = tuple(dict.fromkeys([self.fit_on, *self.test_on]))
        tested = [unseen(session, model, n, fit, self.seed, self.position) for n in names]
        sets = [fit, *tested]
        values = [values_of(examples, self.variable) for examples in sets]
        shuffled = shuffled_labels(sets, values[0], self.shuffled_by, self.seed)
        probe = fitted(x, values[0], self.penalties, self.seed, same)
        control = fitted(x, shuffled[0], [probe.penalty], self.seed, same)
        commonest = values[0][thirds(len(fit), self.seed, same)[0]].mode().values
        rows = [
            self._counted("n_values", len(probe.values), "values"),
            self._counted("penalty", probe.penalty, ""),
        ]
        for name, examples, right, other in zip(
            names, tested, values[1:], shuffled[1:], strict=True
        ):
            for prefix in self._fed(examples):
                x = self._read(session, examples.with_prefix(prefix))
                hits = {
                    "probe": probe(x) == right,
                    "shuffled": control(x) == other,
                    "majority": right == commonest,
                }
                rows += [_row(hit, name, condition, prefix) for condition, hit in hits.items()]
        return pd.DataFrame(rows)[list(self.columns)]

    def _fed(self, examples: Examples) -> tuple[Label, ...]:
        chosen = tuple(p for p in self.prefixes if p in prefixes(examples))
        return chosen or self.prefixes[:1]

    def _read(self, session: Session, examples: Examples) -> Float[Tensor, "n d"]:
        """The activation at the position. Raises InputError for a position or site that cannot be
        read."""
        if self.position == "readout":
            raise InputError(
                "a probe reads one position, and `readout` is several; sweep them with `each:`"
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


def _row(hit: Bool[Tensor, " n"], examples: str, condition: str, prefix: str) -> dict[str, Any]:
    labels = {"examples": examples, "condition": condition, "prefix": prefix}
    measured = {"measure": "accuracy", "unit": "fraction"}
    return labels | measured | over_examples(hit.double().cpu().numpy())
