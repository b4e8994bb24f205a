"""Samples: the values of a quantity in every seed, and the estimates that they allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mechmem.statistics.estimate import Estimate, Limits, Part
from mechmem.statistics.intervals import Floats
from mechmem.statistics.means import (
    Location,
    is_interior,
    over_examples_of_seeds,
    over_seeds,
)
from mechmem.statistics.medians import Median
from mechmem.statistics.proportions import Counts, agresti_caffo, agresti_min, is_binary
from mechmem.statistics.shares import Share, share_over_examples, share_over_seeds

Statistic = Literal["mean", "median"]


@dataclass(frozen=True)
class Values:
    """The values of examples; a single one is a number that is counted, not sampled."""

    values: Floats
    is_difference: bool = False
    """Whether each value is a difference of two values of the same example."""
    is_negated: bool = False
    """Whether they were subtracted."""

    def negated(self) -> Values:
        return Values(-self.values, self.is_difference, not self.is_negated)


Group = tuple[str, ...]
"""Names a set of examples: values of one group are of the same examples and can be paired."""
Sample = Mapping[Group, Values]
"""What one seed says: the sum of the means over independent groups of examples."""


def difference(first: Sample, second: Sample) -> Sample:
    """First minus second: example by example within a group that both have, otherwise of means."""
    found = dict(first)
    for group, values in second.items():
        same = found.get(group)
        if same is not None and len(same.values) == len(values.values):
            found[group] = Values(same.values - values.values, is_difference=True)
        else:
            # The name of the group, made unlike those of the first: these are other examples.
            found[(*group, "subtracted")] = values.negated()
    return found


@dataclass(frozen=True)
class Samples:
    """A quantity in every seed.

    Args:
        by_seed: the sample of each seed.
        are_shares: whether the values are right and wrong, so that counts bound them.
        limits: the lowest and the highest value that the measure can take.
        statistic: of the examples of a seed.
        n_compared: rows of which this is the largest or the smallest.
    """

    by_seed: Mapping[int, Sample]
    are_shares: bool = False
    limits: Limits | None = None
    statistic: Statistic = "mean"
    n_compared: int = 1

    @property
    def seeds(self) -> list[int]:
        return list(self.by_seed)

    def values(self) -> dict[int, float]:
        """The number of each seed."""
        return {seed: self._value(sample) for seed, sample in self.by_seed.items()}

    def estimate(self, floor: float = 0.0) -> Estimate:
        """The mean over seeds, with the seed as the unit of replication.

        Args:
            floor: least standard deviation between seeds.
        """
        by_seed = np.array(list(self.values().values()))
        value = float(by_seed.mean())
        samples = list(self.by_seed.values())
        parts: list[Part] = []
        if np.isnan(value):
            pass
        elif np.isinf(by_seed).any():  # no mean, no spread: what holds in every single seed
            parts = [part for sample in samples for part in self._within([sample])]
        else:
            if len(samples) > 1:
                parts.append(over_seeds(by_seed, floor))
            parts += self._within(samples)
            if len(samples) > 1 and floor == 0 and self._is_squeezed(by_seed):
                parts += [part for sample in samples for part in self._within([sample])]
        return Estimate(value, parts, self.limits, self.n_compared)

    def of_examples(self) -> Estimate:
        """The mean over seeds, with the example as the unit: nothing is said of other models. A
        number that is counted, not sampled, such as a point of a curve, is known exactly."""
        value = float(np.mean(list(self.values().values())))
        exact = [Location(value, 0.0, np.inf)]
        parts = [] if np.isnan(value) else self._within(list(self.by_seed.values())) or exact
        return Estimate(value, parts, self.limits, self.n_compared)

    def of_seed(self, seed: int) -> Estimate:
        """The number of one model; without an interval if it is a single number."""
        sample = self.by_seed[seed]
        value = self._value(sample)
        parts = [] if np.isnan(value) else self._within([sample])
        return Estimate(value, parts, self.limits)

    @property
    def is_proportion(self) -> bool:
        """Whether every value is a 0 or a 1, and nothing is subtracted."""
        return self.are_shares and all(
            len(sample) == 1
            and not any(v.is_difference for v in sample.values())
            and all(is_binary(v.values) for v in sample.values())
            for sample in self.by_seed.values()
        )

    def _value(self, sample: Sample) -> float:
        if self.statistic == "median":
            return float(np.median(_only(sample).values))
        return float(sum(values.values.mean() for values in sample.values()))

    def _is_squeezed(self, by_seed: Floats) -> bool:
        """Whether a proportion is so near 0 or 1 that seeds cannot show how far they differ."""
        return self.is_proportion and not is_interior(by_seed, (0.0, 1.0))

    def _within(self, samples: Sequence[Sample]) -> list[Part]:
        """Bounds by the examples of these seeds; none for numbers without examples."""
        if self.statistic == "median":
            pooled = np.concatenate([_only(sample).values for sample in samples])
            return [Median(pooled)] if len(pooled) > len(samples) else []
        if self.is_proportion and all(len(_only(sample).values) > 1 for sample in samples):
            pooled = np.concatenate([_only(sample).values for sample in samples])
            return [Counts(float(pooled.sum()), len(pooled))]
        found = self.location(samples)
        return [] if found is None else [found]

    def location(self, samples: Sequence[Sample]) -> Location | None:
        """The mean over these seeds with its standard error by the examples; None for numbers
        without examples, and where the seeds have different groups."""
        if any(sample.keys() != samples[0].keys() for sample in samples):
            return None
        groups = [[sample[group] for sample in samples] for group in samples[0]]
        found = [_location(group, self.are_shares) for group in groups]
        is_sampled = any(part.error > 0 or part.df < np.inf for part in found)
        return _sum(found) if is_sampled else None


@dataclass(frozen=True)
class ShareSamples:
    """A quantity as a share of what was attainable, in the same seeds.

    Args:
        gained: the quantity.
        attainable: the most that it could have been.
    """

    gained: Samples
    attainable: Samples

    @property
    def seeds(self) -> list[int]:
        return [seed for seed in self.gained.seeds if seed in self.attainable.by_seed]

    def estimate(self) -> Estimate:
        """The ratio of the means over seeds, with the seed as the unit of replication."""
        gained, attainable = self._numbers(self.gained), self._numbers(self.attainable)
        parts: list[Part] = [share_over_seeds(gained, attainable)] if len(gained) > 1 else []
        ratio = float(np.mean(gained) / np.mean(attainable))
        return Estimate(ratio, [*parts, *self._within(self.seeds)], None, self.gained.n_compared)

    def of_examples(self) -> Estimate:
        """The same, with the example as the unit."""
        ratio = float(np.mean(self._numbers(self.gained)) / np.mean(self._numbers(self.attainable)))
        return Estimate(ratio, self._within(self.seeds), None, self.gained.n_compared)

    def of_seed(self, seed: int) -> Estimate:
        """The share in one model."""
        gained, attainable = self.gained.values()[seed], self.attainable.values()[seed]
        ratio = gained / attainable if attainable else float("nan")
        return Estimate(ratio, self._within([seed]))

    def values(self) -> dict[int, float]:
        """The share of each seed, for the record only: the ratio is never averaged."""
        return {seed: self.of_seed(seed).value for seed in self.seeds}

    def _numbers(self, samples: Samples) -> list[float]:
        values = samples.values()
        return [values[seed] for seed in self.seeds]

    def _within(self, seeds: Sequence[int]) -> list[Part]:
        """The share by the examples of these seeds; none for numbers without examples."""
        both = [(self.gained.by_seed[seed], self.attainable.by_seed[seed]) for seed in seeds]
        if all(_are_paired(gained, attainable) for gained, attainable in both):
            pooled = [
                np.concatenate([_only(pair[side]).values for pair in both]) for side in (0, 1)
            ]
            return [share_over_examples(*pooled)] if len(pooled[0]) > 1 else []
        gained, attainable = (
            samples.location([samples.by_seed[seed] for seed in seeds])
            for samples in (self.gained, self.attainable)
        )
        if gained is None or attainable is None:
            return []
        covariance = np.diag([gained.error**2, attainable.error**2])
        df = min(gained.df, attainable.df)
        return [Share(gained.mean, attainable.mean, covariance, df)]


def _only(sample: Sample) -> Values:
    (values,) = sample.values()
    return values


def _are_paired(first: Sample, second: Sample) -> bool:
    return (
        len(first) == 1
        and first.keys() == second.keys()
        and len(_only(first).values) == len(_only(second).values)
    )


def _location(by_seed: Sequence[Values], are_shares: bool) -> Location:
    """The mean of one group of examples over the seeds.

    Args:
        by_seed: the group's values in each seed.
        are_shares: whether right and wrong are bounded by their counts.
    """
    first = by_seed[0]
    if any(len(of.values) < 2 for of in by_seed):  # numbers that are counted, not sampled
        return Location(float(np.mean([of.values.mean() for of in by_seed])), 0.0, np.inf)
    sign = -1 if first.is_negated else 1
    pooled = sign * np.concatenate([of.values for of in by_seed])
    n = len(pooled)
    if are_shares and first.is_difference and np.isin(pooled, (-1, 0, 1)).all():
        found = agresti_min(float((pooled > 0).sum()), float((pooled < 0).sum()), n)
    elif are_shares and not first.is_difference and is_binary(pooled):
        found = agresti_caffo(float(pooled.sum()), n)
    else:
        return over_examples_of_seeds([of.values for of in by_seed])
    return Location(sign * found.mean, found.error, found.df)


def _sum(parts: Sequence[Location]) -> Location:
    """The sum of independent numbers, with the degrees of freedom of Welch and Satterthwaite."""
    variance = sum(part.error**2 for part in parts)
    spent = sum(part.error**4 / part.df for part in parts)
    df = variance**2 / spent if spent > 0 else max(part.df for part in parts)
    return Location(sum(part.mean for part in parts), float(np.sqrt(variance)), df)
