"""Planning: whether a rule can be met, and the smallest effect that a study can establish."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechmem.experiment.claims import Condition
from mechmem.experiment.measured import Measured
from mechmem.experiment.spec import Experiment
from mechmem.spec.errors import BlockError
from mechmem.statistics.estimate import ERROR
from mechmem.statistics.means import t_quantile
from mechmem.statistics.proportions import clopper_pearson

SPREADS = (0.03, 0.1)
"""Standard deviations between seeds for which the smallest effect is stated where no previous run
has measured one."""
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Plan:
    """What a dry run knows of the real one.

    Args:
        measured: the quantities of the dry run, of which the values mean nothing.
        sizes: by the name of an example set, how many examples the real run has.
    """

    experiment: Experiment
    measured: Mapping[str, Measured]
    sizes: Mapping[str, int]

    def check_rules(self) -> None:
        """Raises BlockError for a rule that no outcome could meet."""
        for place, condition in self._conditions():
            found = self.measured[condition.quantity]
            if found.limits is None:
                continue
            low, high = found.limits
            if not low <= condition.threshold <= high:
                raise BlockError(
                    place,
                    f"{condition.quantity} lies between {low:g} and {high:g}, so it cannot "
                    f"be judged by {condition.rule}",
                )
            if best := self._best(condition):
                raise BlockError(place, best)

    def _best(self, condition: Condition) -> str:
        """Why not even the best outcome meets a condition; empty if it does."""
        n, found = self._n(condition.quantity), self.measured[condition.quantity]
        if n is None or not found.is_proportion:
            return ""
        n_all = n * len(self.experiment.seeds)
        low, high = clopper_pearson(np.array([n_all, 0]), n_all)
        all_right, none_right = float(low[0]), float(high[1])
        if condition.at_least is not None and condition.threshold > all_right:
            return (
                f"no outcome meets {condition.rule}: even {n_all} of {n_all} have an interval from "
                f"{all_right:.3g}; choose a lower threshold or more examples"
            )
        if condition.at_most is not None and condition.threshold < none_right:
            return (
                f"no outcome meets {condition.rule}: even 0 of {n_all} have an interval up to "
                f"{none_right:.3g}; choose a higher threshold or more examples"
            )
        return ""

    def smallest_effects(self, spreads: Mapping[str, float]) -> list[dict[str, Any]]:
        """For every condition, how far from its threshold the mean over the planned seeds must be.

        Args:
            spreads: by measure, the standard deviation between seeds in a previous run.
        """
        rows = []
        for claim in self.experiment.claims:
            for condition in claim.holds_when:
                found = self.measured[condition.quantity]
                known = spreads.get(found.measure)
                bounded = found.limits is not None
                for spread in [known] if known is not None else SPREADS if bounded else [None]:
                    rows.append(
                        {
                            "claim": claim.id,
                            "rule": condition.rule,
                            "seeds": len(self.experiment.seeds),
                            "seed_spread": spread,
                            "smallest_effect": self._half_width(condition, spread),
                        }
                    )
        return rows

    def _half_width(self, condition: Condition, spread: float | None) -> float | None:
        """Half the width of the interval at the threshold; None for one seed, where nothing can be
        established, and for an unknown spread."""
        n_seeds, n = len(self.experiment.seeds), self._n(condition.quantity)
        if n_seeds < 2 or spread is None:
            return None
        widths = [t_quantile(n_seeds - 1, 1 - ERROR) * spread / np.sqrt(n_seeds)]
        if n is not None and self.measured[condition.quantity].is_proportion:
            at = condition.threshold
            low, high = clopper_pearson(np.array(at * n * n_seeds), n * n_seeds)
            widths += [at - float(low), float(high) - at]
        return round(float(max(widths)), 4)

    def _n(self, quantity: str) -> int | None:
        """How many examples of a seed the quantity is read from; None if that is not known."""
        return self.sizes.get(str(self.measured[quantity].labels.get("examples")))

    def _conditions(self) -> Iterator[tuple[Place, Condition]]:
        for i, claim in enumerate(self.experiment.claims):
            for field in ("holds_when", "requires"):
                for j, condition in enumerate(getattr(claim, field)):
                    key = "at_least" if condition.at_least is not None else "at_most"
                    yield ("claims", i, field, j, key), condition
