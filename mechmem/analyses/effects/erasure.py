"""Erasure: what is lost when a variable can no longer be read linearly, beside removals of equal
rank and variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, field_validator
from torch import Tensor

from mechmem.analyses.effects.effect import EffectAnalysis, Interventions
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
from mechmem.spec.sweep import Each
from mechmem.statistics.rows import over_examples, single

CONTROLS = ("random", "variance_matched")

Draws = Mapping[str, Sequence[Erase | None]]
"""By condition, the erasures that it is the mean of; none where nothing is erased."""


class Erasure(EffectAnalysis):
    """What erasing a variable from an activation does to the answers, and to what a fresh probe
    reads there.

    If memorised answers go with the variable, and not with as many random dimensions or as much
    variance, they rest on what the activation holds of it. The table also says how large the
    erasure was and whether it did what it is meant
    to: `rank`, `variance_left`, and for the variable and those of `also_probed` the accuracy
    `probe_...` of a new probe. It is fitted and tuned on two thirds of `erase.fit_on`, and tested
    on those of `examples` whose prompts up to the erased position are not among them, all erased;
    the eraser may have seen them.
    Source: arXiv:2004.07667, arXiv:2306.03819 (erasure); arXiv:2006.00995 (its effect, beside
    random directions).
    """

    columns: ClassVar[Mapping[str, str]] = {
        **EffectAnalysis.columns,
        "condition": "baseline, patched (erased); mean over draws: random (equal rank), "
        "variance_matched, control",
        "measure": "as asked, by answer; of the eraser rank, variance_left (of `fit_on`), "
        "probe_VARIABLE (accuracy)",
        "unit": "unit of the measure; several erased activations count by their mean",
    }

    erase: Erase
    """What is erased and where; `leace` or `inlp`, to which the controls are matched."""
    n_draws: int = Field(5, ge=1)
    """Draws of each of the two controls."""
    also_probed: tuple[str, ...] = ()
    """Other variables that are probed before and after, to see what went with the erased one."""
    penalties: tuple[PositiveFloat, ...] = Field(PENALTIES, min_length=1)
    """Penalties that each probe chooses from, as in `probe`."""

    @field_validator("erase")
    @classmethod
    def _is_no_control(cls, erase: Erase) -> Erase:
        methods = erase.method.each if isinstance(erase.method, Each) else [erase.method]
        if set(CONTROLS) & set(methods):
            raise ValueError(
                "erasure draws its own controls, `n_draws` times; let the method be leace or inlp"
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
        """The earliest erased position: what was read up to there decides which activations are
        the same."""
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

    def table(self, session: Session) -> pd.DataFrame:
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
            {"examples": self.examples, "condition": condition, "place": "all", "recovery": None}
            | row
            for condition, draws in self._draws.items()
            for row in (*self._sizes(session, fit, draws), *self._probed(session, fit, draws))
        ]
        said = pd.DataFrame(rows)[list(self.columns)].astype({"recovery": "Float64"})
        return pd.concat([super().table(session), said], ignore_index=True)

    def _sizes(
        self, session: Session, fit: Examples, draws: Sequence[Erase | None]
    ) -> list[dict[str, Any]]:
        """How much is removed."""
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
        """How well each variable can be read in what is left."""
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
                rows.append(row | over_examples(mean))
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
        """A probe fitted on what is left of the activation; shared by all sets that it is tested
        on."""
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
        """What is left of the activation."""
        model = session.model(self.model)
        at = At(hook, shared(examples.indices(position)))
        x = session.activation(model, examples, at)[:, 0]
        return x if draw is None else draw.erasers(session, model, examples)[hook, position](x)
