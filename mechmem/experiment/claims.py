"""Claims: findings that can fail, and their verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from mechmem.experiment.measured import Measured, OfSeed
from mechmem.experiment.quantities import Replication
from mechmem.spec.registry import Component
from mechmem.statistics.holm import holm

Verdict = Literal["supported", "refuted", "undetermined", "not testable"]


class Condition(Component):
    """What a claim requires: that a quantity's whole interval is on one side of a threshold."""

    quantity: str
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a condition needs one of `at_least` and `at_most`")
        return self

    @property
    def threshold(self) -> float:
        return float(self.at_least if self.at_least is not None else self.at_most or 0.0)

    @property
    def rule(self) -> str:
        sign = ">=" if self.at_least is not None else "<="
        return f"{self.quantity} {sign} {self.threshold:g}"

    def outcome(self, measured: Measured | OfSeed) -> bool | None:
        """True if the whole interval fulfils the condition, False if none of it does, else None.

        A number without an interval (a single number of a seed) counts as it is.
        """
        if np.isnan(measured.value):
            return None
        low, high = (
            measured.value if np.isnan(end) else end for end in (measured.low, measured.high)
        )
        threshold = self.threshold
        if self.at_most is not None:
            low, high, threshold = -high, -low, -threshold
        return True if low >= threshold else False if high < threshold else None

    def p_of_contradiction(self, measured: Measured) -> float:
        """One-sided p of "the quantity is on the wrong side"; 1 for an undefined one."""
        if np.isnan(measured.value):
            return 1.0
        is_floor = self.at_least is not None
        return (measured.p_below if is_floor else measured.p_above)(self.threshold)


class Claim(Component):
    """A finding that can fail.

    It is supported if all conditions hold, each with a one-sided error of 2.5 %; refuted if one is
    contradicted after Holm's correction; not testable if a precondition fails in a seed, or if what
    was attainable lies below the threshold; otherwise (or with too few seeds) undetermined.
    """

    id: str
    says: str
    holds_when: tuple[Condition, ...] = Field(min_length=1)
    requires: tuple[Condition, ...] = ()
    """Preconditions, judged in every seed on its own, such as that the labels were memorised and
    that the control kept its answers."""
    attainable: str | None = None
    """The quantity that the first condition's could at most have reached: below the threshold, the
    claim is not testable."""
    control: str | None = None
    """A quantity that is shown next to the effect."""
    exploratory: bool | str = False
    """Whether the rule was chosen after a look at the data, or how."""
    min_seeds: int = Field(3, ge=2, le=1_000)
    """With fewer seeds the verdict is `undetermined`, whatever the numbers are."""

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        floors: dict[str, float] = {}
        ceilings: dict[str, float] = {}
        for condition in (*self.holds_when, *self.requires):
            name, threshold = condition.quantity, condition.threshold
            if condition.at_least is not None:
                floors[name] = max(threshold, floors.get(name, -np.inf))
            else:
                ceilings[name] = min(threshold, ceilings.get(name, np.inf))
        for name in floors.keys() & ceilings.keys():
            if floors[name] >= ceilings[name]:
                raise ValueError(
                    f"no outcome meets both {name} >= {floors[name]:g} and {name} <= "
                    f"{ceilings[name]:g}"
                )
        return self

    def quantities(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """The quantities that it names, each with its place in the claim."""
        for field in ("holds_when", "requires"):
            for i, condition in enumerate(getattr(self, field)):
                yield (field, i, "quantity"), condition.quantity
        for field in ("attainable", "control"):
            if name := getattr(self, field):
                yield (field,), name

    @property
    def rule(self) -> str:
        return " and ".join(condition.rule for condition in self.holds_when)

    def verdict(
        self, measured: Mapping[str, Measured], per: Replication = "seed"
    ) -> dict[str, Any]:
        """The verdict with its reason and all that it rests on; see docs/new_experiment.md.

        Args:
            measured: the quantities by name.
            per: `instance` judges the models at hand, however few, and no other trainings.
        """
        first = measured[self.holds_when[0].quantity]
        n_seeds = min(measured[condition.quantity].n_seeds for condition in self.holds_when)
        rejected = self._rejected(measured)
        verdict, reason = self._judged(measured, rejected, n_seeds, per)
        return {
            "id": self.id,
            "says": self.says,
            "verdict": verdict,
            "reason": reason,
            "rule": self.rule,
            "requires": [self._required(condition, measured) for condition in self.requires],
            "effect": first.value,
            "interval": [first.low, first.high],
            "attainable": _beside(self.attainable, measured),
            "control": _beside(self.control, measured),
            "n_seeds": n_seeds,
            # Without a record of the rule, nothing shows that it was there before the data.
            "timing": "exploratory" if self.exploratory else "after",
            "exploratory": self.exploratory,
            "conditions": [
                {
                    "rule": condition.rule,
                    "met": condition.outcome(measured[condition.quantity]),
                    "contradicted": is_rejected,
                    "found": measured[condition.quantity].number,
                }
                for condition, is_rejected in zip(self.holds_when, rejected, strict=True)
            ],
        }

    def _rejected(self, measured: Mapping[str, Measured]) -> list[bool]:
        """Which conditions are contradicted, after Holm's correction for their number."""
        p_values = [c.p_of_contradiction(measured[c.quantity]) for c in self.holds_when]
        outcomes = [c.outcome(measured[c.quantity]) for c in self.holds_when]
        return [
            outcome is False and is_rejected
            for outcome, is_rejected in zip(outcomes, holm(p_values), strict=True)
        ]

    def _judged(
        self,
        measured: Mapping[str, Measured],
        rejected: Sequence[bool],
        n_seeds: int,
        per: Replication,
    ) -> tuple[Verdict, str]:
        """The verdict and its reason."""
        if obstacle := self._obstacle(measured):
            return "not testable", obstacle
        verdict, found = self._by_rule(measured, rejected)
        if per == "instance":
            return verdict, f"over the instances of {_counted(n_seeds, 'model')}: {found}"
        if n_seeds < self.min_seeds:
            needed = f"{n_seeds} of the {self.min_seeds} seeds that a verdict needs"
            return "undetermined", f"{needed}; so far {found}"
        return verdict, f"over {n_seeds} seeds: {found}"

    def _by_rule(
        self, measured: Mapping[str, Measured], rejected: Sequence[bool]
    ) -> tuple[Verdict, str]:
        """The verdict of the conditions alone."""
        unsure = [c.rule for c in self.requires if self._met(c, measured) is None]
        if unsure:
            return "undetermined", f"unclear in some seed whether {'; '.join(unsure)}"
        failed = [c.rule for c, r in zip(self.holds_when, rejected, strict=True) if r]
        unclear = [c.rule for c in self.holds_when if not c.outcome(measured[c.quantity])]
        if failed:
            return "refuted", f"contradicted: {'; '.join(failed)}"
        if unclear:
            return "undetermined", f"unclear: {'; '.join(unclear)}"
        return "supported", "all hold"

    def _obstacle(self, measured: Mapping[str, Measured]) -> str:
        """Why the claim cannot be tested; empty if it can."""
        for _, name in self.quantities():
            if lost := measured[name].missing:
                seed, reason = next(iter(lost.items()))
                others = f", and so {_counted(len(lost) - 1, 'other')}" if len(lost) > 1 else ""
                return f"{name}: seed {seed} {reason}{others}"
        for condition in self.requires:
            if self._met(condition, measured) is False:
                failed = _failing(condition, measured[condition.quantity])
                return f"the precondition {condition.rule} fails: {failed}"
        for _, name in self.quantities():
            if measured[name].untestable:
                return f"{name}: {measured[name].untestable}"
        first = self.holds_when[0]
        if self.attainable is not None:
            most = measured[self.attainable]
            if np.isnan(most.value):
                return f"{self.attainable}, which was attainable, is undefined"
            if abs(most.value) < abs(first.threshold):
                return f"only {most.number} was attainable, {first.rule} asks for more"
        return ""

    def _met(self, condition: Condition, measured: Mapping[str, Measured]) -> bool | None:
        """Whether a precondition holds in every seed: False if it fails in one, None if that is
        unclear."""
        found = measured[condition.quantity]
        outcomes = [condition.outcome(one) for one in found.by_seed.values()]
        outcomes = outcomes or [condition.outcome(found)]
        if False in outcomes:
            return False
        return None if None in outcomes else True

    def _required(self, condition: Condition, measured: Mapping[str, Measured]) -> dict[str, Any]:
        found = measured[condition.quantity]
        by_seed = {str(seed): _ends(one) for seed, one in found.by_seed.items()}
        return {"rule": condition.rule, "met": self._met(condition, measured), "found": by_seed}


def _beside(name: str | None, measured: Mapping[str, Measured]) -> dict[str, Any] | None:
    if name is None:
        return None
    found = measured[name]
    return {"quantity": name, "value": found.value, "interval": [found.low, found.high]}


def _failing(condition: Condition, measured: Measured) -> str:
    """`seed 2: 0.31 [0.25, 0.37]`, the first seed in which it fails."""
    for seed, one in measured.by_seed.items():
        if condition.outcome(one) is False:
            return f"seed {seed}: {_ends(one)}"
    return measured.number


def _ends(one: OfSeed) -> str:
    if np.isnan(one.low):
        return f"{one.value:.3g}"
    return f"{one.value:.3g} [{one.low:.3g}, {one.high:.3g}]"


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
