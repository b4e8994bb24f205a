"""Quantities: numbers that are read from the tables of a run, one in each seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from mechmem.experiment.measured import NAN, Measured, OfSeed
from mechmem.spec.errors import InputError, suggest
from mechmem.spec.registry import Component
from mechmem.statistics.estimate import Limits
from mechmem.statistics.rows import DIFFERENCE, FRACTION
from mechmem.statistics.samples import (
    Group,
    Sample,
    Samples,
    ShareSamples,
    Values,
    difference,
)
from mechmem.statistics.select import MAY_BE_ABSENT, rows_where

Where = dict[str, str | int | float | bool]
Replication = Literal["seed", "instance"]
"""What a number is replicated over: trainings, or the instances of the models at hand."""
RESULTS = {
    *("seed", "value", "low", "high", "recovery", "recovery_low", "recovery_high"),
    *("n", "per_example", "unit"),
}
"""Columns that are no labels of a row."""
LIMITS: Mapping[str, Limits] = {
    FRACTION: (0.0, 1.0),
    "probability": (0.0, 1.0),
    DIFFERENCE: (-1.0, 1.0),
}
"""The range of a unit."""
COLUMN_LIMITS: Mapping[str, Limits] = {
    "pearson": (-1.0, 1.0),
    "spearman": (-1.0, 1.0),
    "auc": (0.0, 1.0),
}
"""The range of a column other than `value`."""
MOST_COMPARED = 4
"""Rows of which the largest is taken with a Bonferroni correction; of more, it is chosen on the
discovery seed, where the run has it."""
DISCOVERY = 0
"""The seed on which rules, layers and sizes may be chosen."""


@dataclass(frozen=True)
class Reading:
    """What the tables hold of a quantity."""

    samples: Samples
    labels: Mapping[str, Any] = field(default_factory=dict)
    measure: str = ""
    missing: Mapping[int, str] = field(default_factory=dict)
    share: ShareSamples | None = None
    """The samples as a share of what was attainable."""
    chosen_on_discovery: bool = False
    """Whether the row was chosen on the discovery seed, which is then left out."""


@dataclass(frozen=True)
class Tables:
    """The tables of a run, with the quantities that are read from them.

    Args:
        tables: by name, of all seeds.
        quantities: by name; some read others.
        missing: by the name of a table, why some seeds have no (or fewer) rows in it.
    """

    tables: Mapping[str, pd.DataFrame]
    quantities: Mapping[str, Quantity] = field(default_factory=dict)
    missing: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        found = {seed for reasons in self.missing.values() for seed in reasons}
        for table in self.tables.values():
            found |= set(table["seed"]) if "seed" in table else set()
        return sorted(int(seed) for seed in found)

    def read(self, name: str) -> Reading:
        """The reading of a quantity that another one names."""
        if name not in self.quantities:
            raise InputError(f"there is no quantity {name!r}; {suggest(name, self.quantities)}")
        return self.quantities[name].read(self)


class Quantity(Component):
    """A number from a table in every seed: the mean of the rows of `where`, minus (example by
    example) that of the rows of `minus`; or the difference of two other quantities."""

    table: str | None = None
    """The table that is read; none for a `difference`."""
    where: Where = {}
    minus: Where | None = None
    """The keys in which the subtracted rows differ from `where`."""
    value: str = "value"
    """The column to average; of `value`, per-example values are used where the table has them."""
    statistic: Literal["mean", "median"] = "mean"
    """Of the examples of a seed."""
    pick: Literal["largest", "smallest"] | None = None
    """Of several rows per seed (layers, sites ...), take the one with the largest or smallest mean
    over seeds; of equal ones the first. The interval and the verdict are corrected for the choice
    (Bonferroni); of more than four rows, the row is chosen on seed 0 and measured in the others,
    where the run has both."""
    difference: tuple[str, str] | None = None
    """The first of these quantities minus the second, example by example where both are of the
    same examples: such as a gap after memorisation minus the same gap before it."""
    share_of: str | None = None
    """The quantity that was attainable: this one is then the share of it that was reached."""
    min_attainable: float = Field(0.05, gt=0)
    """What must have been attainable at least, so that a share of it can be judged."""
    if_missing: float | None = None
    """The number of a seed that has no such row, such as a phase that never came; by default, the
    claims that read it are then not testable."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.table is None) == (self.difference is None):
            raise ValueError("a quantity needs one of `table` and `difference`")
        of_table = [key for key in ("where", "minus", "pick") if getattr(self, key)]
        if self.difference and of_table:
            raise ValueError(f"`{of_table[0]}` belongs to a `table`, not to a `difference`")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The other quantities that it reads."""
        return (*(self.difference or ()), *((self.share_of,) if self.share_of else ()))

    def measure(
        self,
        tables: Mapping[str, pd.DataFrame] | Tables,
        spreads: Mapping[str, float] | None = None,
        per: Replication = "seed",
    ) -> Measured:
        """The quantity in these tables.

        Args:
            tables: by name, or with the quantities that this one reads.
            spreads: least standard deviation between seeds, by measure (`pooled_spreads`).
            per: `instance` tells nothing about other trainings.

        Raises:
            InputError: a table, a column or a quantity is unknown, or several rows fit and `pick`
                is not set.
        """
        source = tables if isinstance(tables, Tables) else Tables(tables)
        reading = self.read(source)
        found = _measured(reading, spreads or {}, per)
        if self.share_of is None or not reading.samples.by_seed:
            return found
        return self._share(reading, source.quantities[self.share_of], source, spreads or {}, per)

    def _share(
        self,
        reading: Reading,
        attainable: Quantity,
        source: Tables,
        spreads: Mapping[str, float],
        per: Replication,
    ) -> Measured:
        """The share, if what was attainable is known to be more than nothing."""
        most = attainable.measure(source, spreads, per)
        missing = {**most.missing, **reading.missing}
        limits = (0.0, 1.0)
        if reading.share is None or not reading.share.seeds:
            return Measured(NAN, NAN, NAN, 0, reading.labels, missing=missing, limits=limits)
        n = len(reading.share.seeds)
        is_known = most.low > 0 or most.high < 0
        if not is_known or abs(most.value) < self.min_attainable:
            reason = (
                f"only {most.number} was attainable; a share of it can be judged from "
                f"{self.min_attainable:g}, and if the interval excludes 0"
            )
            return Measured(NAN, NAN, NAN, n, reading.labels, {}, "", limits, reason, missing)
        estimate = reading.share.estimate() if per == "seed" else reading.share.of_examples()
        low, high = estimate.ends()
        by_seed = {
            seed: OfSeed(one.value, *one.ends())
            for seed in reading.share.seeds
            for one in [reading.share.of_seed(seed)]
        }
        return Measured(
            estimate.value,
            low,
            high,
            n,
            reading.labels,
            by_seed,
            limits=limits,
            missing=missing,
            estimate=estimate,
        )

    def read(self, source: Tables) -> Reading:
        """The values of every seed. Raises InputError as `measure` does."""
        reading = self._difference(source) if self.difference else self._picked(source)
        if self.share_of is None:
            return reading
        most = source.read(self.share_of)
        return replace(reading, share=ShareSamples(reading.samples, most.samples))

    def _difference(self, source: Tables) -> Reading:
        first, second = (source.read(name) for name in self.difference or ())
        ours, theirs = first.samples, second.samples
        by_seed = {
            seed: self._subtracted(ours, theirs, seed)
            for seed in ours.seeds
            if seed in theirs.by_seed
        }
        are_means = {ours.statistic, theirs.statistic} == {"mean"}
        samples = Samples(
            by_seed,
            are_shares=are_means and ours.are_shares and theirs.are_shares,
            limits=_of_difference(ours.limits, theirs.limits),
            n_compared=max(ours.n_compared, theirs.n_compared),
        )
        measure = f"{first.measure} minus {second.measure}"
        return Reading(samples, {}, measure, {**second.missing, **first.missing})

    @staticmethod
    def _subtracted(ours: Samples, theirs: Samples, seed: int) -> Sample:
        if {ours.statistic, theirs.statistic} == {"mean"}:
            return difference(ours.by_seed[seed], theirs.by_seed[seed])
        number = ours.values()[seed] - theirs.values()[seed]
        return {("number",): Values(np.array([number]))}

    # From a table

    def _picked(self, source: Tables) -> Reading:
        table = self._table(source)
        readings = list(self._readings(table, source))
        if not readings:
            return self._completed(Reading(Samples({}), self.where), source)
        if len(readings) > 1 and self.pick is None:
            raise InputError(
                f"{len(readings)} rows per seed fit {self.where}; add a key "
                f"({_differing(readings)}) or `pick:`"
            )
        return self._completed(self._extreme(readings), source)

    def _table(self, source: Tables) -> pd.DataFrame:
        name = str(self.table)
        if name not in source.tables:
            raise InputError(f"there is no table {name!r}; {suggest(name, source.tables)}")
        return source.tables[name]

    def _extreme(self, readings: Sequence[Reading]) -> Reading:
        """The row with the largest or smallest mean over seeds, with the correction for it."""
        if len(readings) == 1:
            return readings[0]
        seeds = readings[0].samples.seeds
        on_discovery = len(readings) > MOST_COMPARED and DISCOVERY in seeds and len(seeds) > 1

        def size(reading: Reading) -> float:
            values = reading.samples.values()
            return (
                values.get(DISCOVERY, NAN) if on_discovery else float(np.mean([*values.values()]))
            )

        defined = [r for r in readings if not np.isnan(size(r))] or readings
        chosen = (min if self.pick == "smallest" else max)(defined, key=size)
        samples = chosen.samples
        if on_discovery:
            tested = {s: sample for s, sample in samples.by_seed.items() if s != DISCOVERY}
            samples = replace(samples, by_seed=tested)
            return replace(chosen, samples=samples, chosen_on_discovery=True)
        return replace(chosen, samples=replace(samples, n_compared=len(readings)))

    def _completed(self, reading: Reading, source: Tables) -> Reading:
        """The reading with the seeds that have no row: with `if_missing` as their number, or with
        the reason."""
        by_seed = dict(reading.samples.by_seed)
        left_out = {DISCOVERY} if reading.chosen_on_discovery else set()
        lost = [seed for seed in source.seeds if seed not in {*by_seed, *left_out}]
        if self.if_missing is not None:
            number: Sample = {("number",): Values(np.array([self.if_missing]))}
            by_seed |= dict.fromkeys(lost, number)
            by_seed = {seed: by_seed[seed] for seed in sorted(by_seed)}
            return replace(reading, samples=replace(reading.samples, by_seed=by_seed))
        missing = {seed: self._reason(seed, source) for seed in lost}
        return replace(reading, missing=missing)

    def _reason(self, seed: int, source: Tables) -> str:
        known = source.missing.get(str(self.table), {}).get(seed)
        if known:
            return known
        if MAY_BE_ABSENT in self.where:
            return f"never reached phase {self.where[MAY_BE_ABSENT]!r}"
        return f"has no row in table {self.table!r} with {self.where}"

    def _readings(self, table: pd.DataFrame, source: Tables) -> Iterator[Reading]:
        """One reading for each row per seed that fits."""
        missing = source.missing.get(str(self.table), {})
        try:
            chosen = rows_where(table, self.where)
        except InputError:
            if not missing:
                raise
            return  # the rows of this value may be those that are missing
        if chosen.empty:
            return
        if self.value not in chosen:
            raise InputError(
                f"table {self.table!r} has no column {self.value!r}; "
                f"{suggest(self.value, chosen.columns)}"
            )
        if "per_example" not in chosen or self.value != "value":
            yield self._of_column(table, chosen, missing)
            return
        keys = _label_columns(chosen)
        for labels, rows in (
            chosen.groupby(keys, sort=False, dropna=False) if keys else [((), chosen)]
        ):
            named = dict(zip(keys, labels if isinstance(labels, tuple) else (labels,), strict=True))
            if rows["seed"].duplicated().any():
                raise InputError(
                    f"{rows['seed'].value_counts().max()} rows per seed fit {self.where} with the "
                    "same labels; add a key"
                )
            yield self._of_rows(table, rows, named, missing)

    def _of_rows(
        self,
        table: pd.DataFrame,
        rows: pd.DataFrame,
        labels: Mapping[str, Any],
        missing: Mapping[int, str],
    ) -> Reading:
        """The reading of rows with values per example, one in each seed."""
        by_seed: dict[int, Sample] = {}
        for _, row in rows.iterrows():
            seed = int(row["seed"])
            sample = {self._group(row): Values(np.asarray(row["per_example"], float))}
            if self.minus is not None:
                try:
                    other = self._other(table, row, labels)
                except InputError:
                    if seed not in missing:
                        raise
                    continue
                values = Values(np.asarray(other["per_example"], float))
                sample = difference(sample, {self._group(other): values})
            by_seed[seed] = sample
        return Reading(self._samples(by_seed, rows), labels, self._measure_name(rows))

    def _of_column(
        self, table: pd.DataFrame, chosen: pd.DataFrame, missing: Mapping[int, str]
    ) -> Reading:
        """The reading of a column without values per example: the rows of a seed are averaged."""
        if self.pick:
            raise InputError(
                f"`pick` needs per-example values, but column {self.value!r} of table "
                f"{self.table!r} has none; use `where`"
            )
        try:
            chosen[self.value].to_numpy(float)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"column {self.value!r} of table {self.table!r} holds text, not numbers; choose "
                "another `value`"
            ) from error
        by_seed: dict[int, Sample] = {}
        for seed in chosen["seed"].unique():
            rows = chosen[chosen["seed"] == seed]
            sample: Sample = {("rows",): Values(rows[self.value].to_numpy(float))}
            if self.minus is not None:
                try:
                    other = rows_where(table[table["seed"] == seed], self.where | self.minus)
                    if other.empty:
                        raise InputError(
                            f"`minus` leaves no row of seed {seed}: {self.where | self.minus}"
                        )
                except InputError:
                    if seed not in missing:
                        raise
                    continue
                theirs: Sample = {("other rows",): Values(other[self.value].to_numpy(float))}
                sample = difference(sample, theirs)
            by_seed[int(seed)] = sample
        return Reading(self._samples(by_seed, chosen), dict(self.where), self._measure_name(chosen))

    def _samples(self, by_seed: Mapping[int, Sample], rows: pd.DataFrame) -> Samples:
        unit = _unit(rows) if self.value == "value" else ""
        values = [v.values for sample in by_seed.values() for v in sample.values()]
        if unit is None:  # a table without units: right and wrong are told by their values
            is_binary = all(np.isin(v, (-1, 0, 1)).all() and len(v) > 1 for v in values)
            unit = FRACTION if is_binary else ""
        limits = LIMITS.get(unit) or COLUMN_LIMITS.get(self.value)
        if self.minus is not None:
            limits = _of_difference(limits, limits)
        if self.statistic == "median" and any(len(sample) > 1 for sample in by_seed.values()):
            raise InputError(
                "a median of differences needs pairs: `minus` must leave rows of the same examples"
            )
        return Samples(
            by_seed,
            are_shares=unit == FRACTION and self.statistic == "mean",
            limits=limits,
            statistic=self.statistic,
        )

    def _measure_name(self, rows: pd.DataFrame) -> str:
        """`accuracy_true`, `accuracy_true difference`: what a spread is pooled over."""
        if self.value != "value":
            name = f"{self.table} {self.value}"
        else:
            names = rows["measure"].unique() if "measure" in rows else [self.table]
            name = "/".join(map(str, names))
        is_difference = self.minus is not None or _unit(rows) == DIFFERENCE
        name += " difference" if is_difference else ""
        return f"median {name}" if self.statistic == "median" else name

    def _group(self, row: pd.Series) -> Group:
        """Rows of one table and one example set are of the same examples."""
        return (str(self.table), str(row.get("examples", "")))

    def _other(self, table: pd.DataFrame, row: pd.Series, labels: Mapping[str, Any]) -> pd.Series:
        """The row that is subtracted: that of `minus`, otherwise with the same labels."""
        minus = self.minus or {}
        known = {key: value for key, value in labels.items() if not _missing(value)}
        wanted = known | minus
        other = rows_where(table[table["seed"] == row["seed"]], dict(self.where) | minus)
        for key, value in known.items():
            if key in minus or key in self.where:
                continue
            same = other[other[key] == value]
            # A float may be a result of the row, such as a norm, in which the other row differs.
            if len(same) or not pd.api.types.is_float_dtype(other[key]):
                other = same
        if len(other) != 1:
            raise InputError(f"`minus` must leave one row, not {len(other)}: {wanted}")
        return other.iloc[0]


def _measured(reading: Reading, spreads: Mapping[str, float], per: Replication) -> Measured:
    samples = reading.samples
    if not samples.by_seed:
        return Measured(
            *(NAN, NAN, NAN, 0),
            labels=reading.labels,
            missing=reading.missing,
            limits=samples.limits,
        )
    floor = spreads.get(reading.measure, 0.0)
    estimate = samples.estimate(floor) if per == "seed" else samples.of_examples()
    low, high = estimate.ends()
    by_seed = {}
    for seed in samples.seeds:
        one = samples.of_seed(seed)
        by_seed[seed] = OfSeed(one.value, *one.ends())
    return Measured(
        estimate.value,
        low,
        high,
        len(by_seed),
        reading.labels,
        by_seed,
        reading.measure,
        samples.limits,
        "",
        reading.missing,
        samples.is_proportion,
        estimate,
    )


def _label_columns(rows: pd.DataFrame) -> list[str]:
    """The columns that tell the rows of a seed apart. A number that is not the same in every seed,
    such as a norm, is a result."""
    keys = [column for column in rows.columns if column not in RESULTS]
    seeds = rows["seed"].nunique()

    def is_label(column: str) -> bool:
        if seeds == 1 or not pd.api.types.is_numeric_dtype(rows[column]):
            return True
        values = rows.groupby("seed")[column].agg(lambda found: frozenset(found.dropna()))
        return len(set(values)) == 1

    return [column for column in keys if is_label(column)]


def _unit(rows: pd.DataFrame) -> str | None:
    """The unit of the rows; None if the table has no units or the rows have several."""
    units = rows["unit"].unique() if "unit" in rows else []
    return str(units[0]) if len(units) == 1 else None


def _of_difference(first: Limits | None, second: Limits | None) -> Limits | None:
    if first is None or second is None:
        return None
    return first[0] - second[1], first[1] - second[0]


def _differing(readings: Sequence[Reading]) -> str:
    labels = [reading.labels for reading in readings]
    return ", ".join(key for key in labels[0] if len({str(one[key]) for one in labels}) > 1)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))
