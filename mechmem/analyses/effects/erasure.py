"""Erasure: what is lost when a variable can no longer be read linearly, beside removals of equal rank and variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, field_validator
from torch import Tensor

from mechmem.analyses.circuits.faithfulness import over_examples, single
from mechmem.analyses.effects.effect import EffectAnalysis, Parts, prefixes
from mechmem.analyses.readouts.classifier import PENALTIES, Classifier, alike, check_fit, fitted, unseen, values_of
from mechmem.data.examples import Examples
from mechmem.interventions.erase import Erase
from mechmem.interventions.intervention import Intervention
from mechmem.session import Bench
from mechmem.spec.registry import Each

CONTROLS = ("random", "variance_matched")

Draws = Mapping[str, Sequence[Erase | None]]
"""By condition, the erasures that it is the mean of; none where nothing is erased."""


class Erasure(EffectAnalysis):
    """What erasing a variable from an activation does to the answers, and to what a fresh probe reads there.

    If memorised answers go with the variable, and not with as many random dimensions or as much variance, they rest on
    what the activation holds of it. The table also says how large the erasure was and whether it did what it is meant
    to: `rank`, `variance_left`, and for the variable and those of `also_probed` the accuracy `probe_...` of a new probe.
    It is fitted and tuned on two thirds of `erase.fit_on`, and tested on those of `examples` whose prompts up to the
    erased position are not among them, all erased; the eraser may have seen them.
    Source: arXiv:2004.07667, arXiv:2306.03819 (erasure); arXiv:2006.00995 (its effect, beside random directions).
    """

    columns: ClassVar[Mapping[str, str]] = {
        **EffectAnalysis.columns,
        "condition": "unpatched, patched (erased); mean over draws: random (equal rank), variance_matched, control",
        "measure": "as asked, by answer; of the eraser rank, variance_left (of `fit_on`), probe_VARIABLE (accuracy)",
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
            raise ValueError("erasure draws its own controls, `n_draws` times; let the method be leace or inlp")
        return erase

    def parts(self, bench: Bench) -> Parts:
        return [self.erase]

    def controls(self, bench: Bench, parts: Parts) -> dict[str, list[list[Intervention]]]:
        drawn: dict[str, list[list[Intervention]]] = {
            name: [[draw] for draw in self._draws[name] if draw] for name in CONTROLS
        }
        return super().controls(bench, parts) | drawn

    @property
    def _probed_variables(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([self.erase.variable, *self.also_probed]))

    def _first(self, examples: Examples) -> int:
        """The earliest erased position: what was read up to there decides which activations are the same."""
        return min(self.erase.positions(examples).values())

    @property
    def _draws(self) -> Draws:
        drawn = {
            name: [
                self.erase.model_copy(update={"method": name, "matched_to": self.erase.method, "seed": seed})
                for seed in range(self.erase.seed, self.erase.seed + self.n_draws)
            ]
            for name in CONTROLS
        }
        return {"unpatched": [None], "patched": [self.erase], **drawn}

    def table(self, bench: Bench) -> pd.DataFrame:
        fit = bench.examples(self.erase.fit_on)
        for variable in self._probed_variables:
            check_fit(bench, self.erase.fit_on, variable, self.erase.split_seed, self._first(fit))
        rows = [
            {"examples": self.examples, "condition": condition, "place": "all", "recovery": None} | row
            for condition, draws in self._draws.items()
            for row in (*self._sizes(bench, fit, draws), *self._probed(bench, fit, draws))
        ]
        said = pd.DataFrame(rows)[list(self.columns)].astype({"recovery": "Float64"})
        return pd.concat([super().table(bench), said], ignore_index=True)

    def _sizes(self, bench: Bench, fit: Examples, draws: Sequence[Erase | None]) -> list[dict[str, Any]]:
        """How much is removed."""
        model = bench.model(self.model)
        erasers = [eraser for draw in draws if draw for eraser in draw.erasers(model, fit, bench).values()]
        rank = sum(eraser.rank for eraser in erasers) / max(len(erasers), 1)
        left = sum(eraser.variance_left for eraser in erasers) / len(erasers) if erasers else 1.0
        return [
            {"prefix": "given", "measure": "rank", "unit": "dimensions"} | single(rank),
            {"prefix": "given", "measure": "variance_left", "unit": "fraction"} | single(left),
        ]

    def _probed(self, bench: Bench, fit: Examples, draws: Sequence[Erase | None]) -> list[dict[str, Any]]:
        """How well each variable can be read in what is left."""
        test, rows = unseen(bench, self.examples, fit, self.erase.split_seed, self._first(fit)), []
        for variable in self._probed_variables:
            for prefix in prefixes(test):
                fed = test.with_prefix(prefix)
                hits = [
                    (self._probe(bench, fit, draw, variable, *where)(self._read(bench, fed, draw, *where)))
                    == values_of(fed, variable)
                    for draw in draws
                    for where in self.erase.erasers(bench.model(self.model), fit, bench)
                ]
                row = {"prefix": prefix, "measure": f"probe_{variable}", "unit": "fraction"}
                rows.append(row | over_examples(torch.stack(hits).double().mean(dim=0).cpu().numpy()))
        return rows

    def _probe(
        self, bench: Bench, fit: Examples, draw: Erase | None, variable: str, hook: str, position: str
    ) -> Classifier:
        """A probe fitted on what is left of the activation; shared by all sets that it is tested on."""
        model = bench.model(self.model)
        key = ("probe", model, fit.key, hook, position, draw, variable, self.penalties, self.erase.split_seed)
        if key not in bench.memo:
            x = self._read(bench, fit, draw, hook, position)
            values, same = values_of(fit, variable), alike(fit, self._first(fit))
            bench.memo[key] = fitted(x, values, self.penalties, self.erase.split_seed, same)
        return bench.memo[key]

    def _read(
        self, bench: Bench, examples: Examples, draw: Erase | None, hook: str, position: str
    ) -> Float[Tensor, "n d"]:
        """What is left of the activation."""
        model = bench.model(self.model)
        x = bench.activation(model, examples, hook)[:, examples.positions[position]]
        return x if draw is None else draw.erasers(model, examples, bench)[hook, position](x)
