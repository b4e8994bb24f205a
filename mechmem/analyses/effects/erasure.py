"""Erasure: which answers are lost when a variable is no longer linearly decodable, compared with
removing equal rank or variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, field_validator
from torch import Tensor

from mechmem.analyses.effects.effect import NO_RECOVERY, EffectAnalysis, Interventions
from mechmem.analyses.readouts.classifier import (
    PENALTIES,
    Classifier,
    alike,
    check_fit,
    fitted,
    unseen,
    values_of,
)
from mechmem.data.examples import Examples
from mechmem.interventions.erase import Erase
from mechmem.interventions.intervention import Intervention, shared
from mechmem.models.edits import At
from mechmem.session import Session
from mechmem.spec import limits
from mechmem.spec.sweep import Each
from mechmem.statistics.rows import over_examples, single

CONTROLS = ("random", "variance_matched")

Draws = Mapping[str, Sequence[Erase | None]]
"""The erasures that each condition averages over; None where nothing is erased."""


class Erasure(EffectAnalysis):
    """Erases a variable from an activation and measures the answers and what a new probe can read.

    If memorised answers are lost with the variable, but not with equally many random dimensions or
    equal variance, they depend on the activation's information about it. The table also reports the
    size of the erasure (`rank`, `variance_left`) and whether it worked: the accuracy `probe_...` of
    a new probe for the variable and for each of `also_probed`. The probe is fitted and tuned on two
    thirds of `erase.fit_on`, and tested on those of `examples` whose prompts up to the erased
    position it has not seen, always on activations after the erasure. The eraser itself may have
    been fitted on test examples.
    Source: arXiv:2004.07667, arXiv:2306.03819 (erasure); arXiv:2006.00995 (comparison of its effect
    with random directions).
    """

    columns: ClassVar[Mapping[str, str]] = {
        **EffectAnalysis.columns,
        "condition": "baseline, intervened (erased); means over draws: random (equal rank), "
        "variance_matched, control",
        "measure": "a measure of the answers; or a measure of the erasure: rank, variance_left (on "
        "`fit_on`), probe_VARIABLE (accuracy)",
        "unit": "unit of the measure; with several erased activations, their mean is reported",
    }

    erase: Erase
    """The variable to erase and the site; the method is `leace` or `inlp`, and the controls are
    matched to it."""
    n_draws: limits.Draws = 5
    """Number of draws of each of the two controls."""
    also_probed: tuple[str, ...] = ()
    """Other variables that are probed before and after, to see which are erased along with it."""
    penalties: tuple[PositiveFloat, ...] = Field(PENALTIES, min_length=1)
    """Penalties that each probe chooses from, as in `probe`."""

    @field_validator("erase")
    @classmethod
    def _is_no_control(cls, erase: Erase) -> Erase:
        methods = erase.method.each if isinstance(erase.method, Each) else [erase.method]
        if set(CONTROLS) & set(methods):
            raise ValueError(
                "erasure draws its own controls, `n_draws` times; choose the method leace or inlp"
            )
        return erase

    def interventions(self, session: Session) -> Interventions:
        return [self.erase]

    def controls(
        self, session: Session, interventions: Interventions
    ) -> dict[str, list[list[Intervention]]]:
        drawn: dict[str, list[list[Intervention]]] = {
            name: [[draw] for draw in self._draws[name] if draw] for name in CONTROLS
        }
        return super().controls(session, interventions) | drawn

    @property
    def _probed_variables(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([self.erase.variable, *self.also_probed]))

    def _first(self, examples: Examples) -> str:
        """The earliest erased position: examples with the same tokens up to it have the same
        activation."""
        names = self.erase.names(examples)
        earliest = examples.indices(names).double().mean(dim=0).argmin()
        return names[int(earliest)]

    @property
    def _draws(self) -> Draws:
        drawn = {
            name: [
                self.erase.model_copy(
                    update={"method": name, "matched_to": self.erase.method, "seed": seed}
                )
                for seed in range(self.erase.seed, self.erase.seed + self.n_draws)
            ]
            for name in CONTROLS
        }
        return {"baseline": [None], "intervened": [self.erase], **drawn}

    def _table(self, session: Session) -> pd.DataFrame:
        model, fit = session.model(self.model), session.examples(self.erase.fit_on)
        for variable in self._probed_variables:
            check_fit(
                session,
                model,
                self.erase.fit_on,
                variable,
                self.erase.split_seed,
                self._first(fit),
            )
        rows = [
            {"examples": self.examples, "condition": condition, "place": "all", **NO_RECOVERY} | row
            for condition, draws in self._draws.items()
            for row in (*self._sizes(session, fit, draws), *self._probed(session, fit, draws))
        ]
        checks = pd.DataFrame(rows)[list(self.columns)].astype(
            dict.fromkeys(NO_RECOVERY, "Float64")
        )
        return pd.concat([super()._table(session), checks], ignore_index=True)

    def _sizes(
        self, session: Session, fit: Examples, draws: Sequence[Erase | None]
    ) -> list[dict[str, Any]]:
        """The rank and the remaining variance of the erasures, mean over draws and places."""
        model = session.model(self.model)
        erasers = [
            eraser
            for draw in draws
            if draw
            for eraser in draw.erasers(session, model, fit).values()
        ]
        rank = sum(eraser.rank for eraser in erasers) / max(len(erasers), 1)
        left = sum(eraser.variance_left for eraser in erasers) / len(erasers) if erasers else 1.0
        return [
            {"prefix": "given", "measure": "rank", "unit": "dimensions"} | single(rank),
            {"prefix": "given", "measure": "variance_left", "unit": "fraction"} | single(left),
        ]

    def _probed(
        self, session: Session, fit: Examples, draws: Sequence[Erase | None]
    ) -> list[dict[str, Any]]:
        """How well each variable can be read from the erased activations."""
        model, rows = session.model(self.model), []
        test = unseen(session, model, self.examples, fit, self.erase.split_seed, self._first(fit))
        places = [*self.erase.erasers(session, model, fit)]
        for variable in self._probed_variables:
            for prefix in self.fed(test):
                fed = test.with_prefix(prefix)
                right = values_of(fed, variable)
                hits = []
                for draw in draws:
                    for place in places:
                        probe = self._probe(session, fit, draw, variable, *place)
                        hits.append(probe(self._read(session, fed, draw, *place)) == right)
                row = {"prefix": prefix, "measure": f"probe_{variable}", "unit": "fraction"}
                mean = torch.stack(hits).double().mean(dim=0).cpu().numpy()
                rows.append(row | over_examples(mean, row["unit"]))
        return rows

    def _probe(
        self,
        session: Session,
        fit: Examples,
        draw: Erase | None,
        variable: str,
        hook: str,
        position: str,
    ) -> Classifier:
        """A probe fitted on the erased activation; cached for all sets that it is tested on."""
        model = session.model(self.model)

        def make() -> Classifier:
            x = self._read(session, fit, draw, hook, position)
            values, same = values_of(fit, variable), alike(model, fit, self._first(fit))
            return fitted(x, values, self.penalties, self.erase.split_seed, same)

        chosen = (hook, position, draw, variable, self.penalties, self.erase.split_seed)
        return session.cached(("probe", model, fit, *chosen), make)

    def _read(
        self, session: Session, examples: Examples, draw: Erase | None, hook: str, position: str
    ) -> Float[Tensor, "n d"]:
        """The activation after the erasure."""
        model = session.model(self.model)
        at = At(hook, shared(examples.indices(position)))
        x = session.activation(model, examples, at)[:, 0]
        return x if draw is None else draw.erasers(session, model, examples)[hook, position](x)
