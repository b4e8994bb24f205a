"""Compare the tables of two folders of runs: `python tests/compare_tables.py OLD_RUNS NEW_RUNS`.

For every run in OLD, the run of the same name in NEW is compared table by table, after the renames
below. Proportions may differ by one example, other values by a relative 1e-4. The exit code is 1
if anything differs by more.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

TABLES = {"twin": "cross_model_swap", "distributed": "token_replacement"}
COLUMNS = {"how": "method", "over": "reference_set"}
VALUES: Mapping[str, Mapping[str, str]] = {
    "condition": {
        "patched": "intervened",
        "unpatched": "baseline",
        "relabelled": "head_permuted",
    },
    "prefix": {"decode": "greedy"},
    "noisy_prefix": {"decode": "greedy"},
    "measure": {"neither": "off_label_rate", "area_neither": "area_off_label_rate"},
}
"""What was renamed: tables, columns, and values by column."""

NUMBERS = ("value", "low", "high", "n", "exact", "eap", "eap_ig", "p", "q", "auc", "pearson")
PREFIXES = ("spearman", "shift_", "signed_", "noisy_value", "n_noisy")
"""Columns that hold results, and beginnings of the names of others."""
EITHER = ("type", "rule", "shuffled_type", "rank", "share")
"""Results in some tables and labels in others: labels where rows are alike without them."""
IGNORED = ("per_example", "recovery")
"""Values of single examples are summed up in `value`; a recovery is computed from it."""

MOST_EXAMPLES = 1.0
MOST_RELATIVE = 1e-4
NEAR_ZERO = 1e-3
"""A value near zero is compared with this share of the largest one of its measure."""
ROUNDING = 1e-6


@dataclass
class Comparison:
    """What differs between two tables."""

    n_rows: int = 0
    n_examples: float = 0.0
    """Largest difference of a proportion, as a number of examples."""
    relative: float = 0.0
    """Largest relative difference of another value."""
    where: str = ""
    """The row of the largest excess over the tolerance."""
    problems: list[str] = field(default_factory=list)
    """Rows, columns or texts that are not the same; always more than is tolerated."""
    excess: float = 0.0

    def note(self, excess: pd.Series, column: str) -> None:
        """Remember the row whose difference is the largest share of its tolerance."""
        if len(excess) and excess.max() > self.excess:
            self.excess = float(excess.max())
            self.where = f"{column} at {excess.idxmax()}"

    @property
    def exceeds(self) -> bool:
        return bool(self.problems) or self.excess > 1 + ROUNDING

    def __str__(self) -> str:
        if not self.problems and self.excess == 0:
            return f"same ({self.n_rows} rows)"
        found = [
            f"{self.n_rows} rows",
            f"proportions differ by up to {self.n_examples:.3g} examples",
            f"other values by a relative {self.relative:.1e}",
            *self.problems,
        ]
        mark = "DIFFERS" if self.exceeds else "within the tolerance"
        return f"{mark}: {'; '.join(found)}" + (f"; largest: {self.where}" if self.where else "")


def renamed(table: pd.DataFrame) -> pd.DataFrame:
    """The table in the new words; a table that has them already stays as it is."""
    table = table.rename(columns={old: new for old, new in COLUMNS.items() if old in table})
    new = {
        column: table[column].replace(words) for column, words in VALUES.items() if column in table
    }
    return table.assign(**new)


def compare(old: pd.DataFrame, new: pd.DataFrame) -> Comparison:
    """Compare two tables row by row; rows belong together if all their labels are equal."""
    old, new = renamed(old), renamed(new)
    result = Comparison()
    sides = {"before": (old, new), "after": (new, old)}
    for side, (table, other) in sides.items():
        if alone := [column for column in table if column not in other]:
            result.problems.append(f"only {side}: columns {', '.join(alone)}")
    shared = [column for column in old.columns if column in new and column not in IGNORED]
    labels = _labels(old, shared)
    old, new = _keyed(old, labels), _keyed(new, labels)
    result.problems += _missing("before", old, new, labels)
    result.problems += _missing("after", new, old, labels)
    both = old.index.intersection(new.index)
    result.n_rows = len(both)
    _compare_results(old.loc[both], new.loc[both], [c for c in shared if c not in labels], result)
    return result


def _labels(table: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    results = {c for c in columns if c in NUMBERS or c.startswith(PREFIXES)}
    labels = [c for c in columns if c not in results and c not in EITHER]
    for column in (c for c in columns if c in EITHER):
        if table.duplicated(labels).any():
            labels.append(column)
    return labels


def _keyed(table: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """The table with its labels in words as the index; rows with equal labels are numbered."""
    words = table[labels].apply(lambda column: column.map(_word))
    keys = words.apply(lambda row: ", ".join(f"{c} {v}" for c, v in row.items() if v), axis=1)
    repeats = keys.groupby(keys).cumcount()
    keys = keys + repeats.map(lambda i: f" (row {i + 1} of these labels)" if i else "")
    return table.assign(**words).set_index(pd.Index(keys, name="key"))


def _word(value: object) -> str:
    """A label as text, the same for 1, 1.0 and "1", and for every kind of nothing."""
    if np.ndim(value) > 0:
        return "+".join(map(_word, value))  # type: ignore[call-overload]
    if value is None or pd.isna(value):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _missing(
    side: str, table: pd.DataFrame, other: pd.DataFrame, labels: Sequence[str]
) -> Iterator[str]:
    """The rows that only this side has, counted by a label that only this side has."""
    alone = table.loc[table.index.difference(other.index)]
    if alone.empty:
        return
    known = {column: set(other[column]) for column in labels}
    counts: Counter[str] = Counter()
    for row in alone[list(labels)].to_dict("records"):
        own = [f"{c} {v or 'empty'}" for c, v in row.items() if v not in known[str(c)]]
        counts[", ".join(own) or "another combination"] += 1
    listed = ", ".join(f"{n} with {label}" for label, n in counts.most_common(5))
    yield f"only {side}: {len(alone)} rows ({listed})"


def _compare_results(
    old: pd.DataFrame, new: pd.DataFrame, columns: Sequence[str], result: Comparison
) -> None:
    moved = pd.Series(False, index=old.index)
    """Rows whose proportion differs: their intervals differ with it."""
    for column in columns:
        if not pd.api.types.is_numeric_dtype(old[column]):
            _compare_texts(old[column], new[column], result)
            continue
        before, after = (t[column].to_numpy(float, na_value=np.nan) for t in (old, new))
        difference = pd.Series(after - before, index=old.index).abs()
        n_undefined = int((np.isnan(before) != np.isnan(after)).sum())
        if n_undefined:
            result.problems.append(f"{column} is undefined on one side only in {n_undefined} rows")
        is_share = _proportions(old, column)
        examples = difference[is_share & ~moved] * _n_examples(old)[is_share & ~moved]
        if column == "value":
            moved = is_share & (difference > ROUNDING)
        relative = (difference / _scale(old, column, before, after))[~is_share].fillna(0.0)
        result.n_examples = max(result.n_examples, examples.max() if examples.any() else 0.0)
        result.relative = max(result.relative, relative.max() if relative.any() else 0.0)
        result.note(examples / MOST_EXAMPLES, column)
        result.note(relative / MOST_RELATIVE, column)


def _compare_texts(old: pd.Series, new: pd.Series, result: Comparison) -> None:
    differ = old.map(_word) != new.map(_word)
    if differ.any():
        at = differ.idxmax()
        result.problems.append(
            f"{old.name} differs in {int(differ.sum())} rows, such as {at}: "
            f"{_word(old[at])!r} became {_word(new[at])!r}"
        )


def _proportions(table: pd.DataFrame, column: str) -> pd.Series:
    """Which rows of the column are shares of examples."""
    if column not in ("value", "low", "high"):
        return pd.Series(False, index=table.index)
    if "unit" in table:
        return table["unit"] == "fraction"
    return pd.Series("n" in table and table[column].between(0, 1).all(), index=table.index)


def _n_examples(table: pd.DataFrame) -> pd.Series:
    """The number of examples of each row; `n` counts draws where a row is a mean over draws."""
    n = table["n"] if "n" in table else pd.Series(1, index=table.index)
    return n.where(n >= _lengths(table), _lengths(table)).astype(float)


def _lengths(table: pd.DataFrame) -> pd.Series:
    if "per_example" not in table:
        return pd.Series(0, index=table.index)
    return table["per_example"].map(np.size)


def _scale(table: pd.DataFrame, column: str, before: np.ndarray, after: np.ndarray) -> pd.Series:
    """What a difference is relative to: the value, or a share of the largest of its measure."""
    size = pd.Series(np.fmax(np.abs(before), np.abs(after)), index=table.index)
    groups = table["measure"] if "measure" in table else pd.Series("", index=table.index)
    largest = size.groupby(groups.to_numpy()).transform("max")
    return size.clip(lower=NEAR_ZERO * largest).replace(0.0, np.nan)


def runs_by_name(folder: Path) -> dict[str, Path]:
    """The latest run of each name; the folder of a run is NAME-HASH."""
    found = sorted(folder.glob("*-*/tables"), key=lambda tables: tables.stat().st_mtime)
    return {tables.parent.name.rpartition("-")[0]: tables.parent for tables in found}


def tables_by_name(run: Path) -> dict[str, Path]:
    """The tables of a run under their new names."""
    return {TABLES.get(path.stem, path.stem): path for path in run.glob("tables/*.parquet")}


def compare_runs(old: Path, new: Path) -> Iterator[tuple[str, Comparison]]:
    """The name and the comparison of every table of every run in `old`."""
    runs = runs_by_name(new)
    for name, folder in sorted(runs_by_name(old).items()):
        if name not in runs:
            yield name, Comparison(problems=["there is no such run after"])
            continue
        before, after = tables_by_name(folder), tables_by_name(runs[name])
        for table in sorted(before | after):
            if table in before and table in after:
                found = compare(pd.read_parquet(before[table]), pd.read_parquet(after[table]))
            else:
                side = "after" if table in before else "before"
                found = Comparison(problems=[f"there is no such table {side}"])
            yield f"{name}/{table}", found


def main(arguments: Sequence[str]) -> int:
    """Print a line per table; 1 if something exceeds the tolerance."""
    if len(arguments) != 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    exceeds = False
    for name, found in compare_runs(Path(arguments[0]), Path(arguments[1])):
        sys.stdout.write(f"{name}: {found}\n")
        exceeds |= found.exceeds
    return int(exceeds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
