"""The script that compares tables, on two tiny made-up folders of runs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from compare_tables import compare, main, runs_by_name

N = 10


def shares(condition: str, prefix: str, n_right: int) -> dict:
    """A row of a share of ten examples."""
    right = [1.0] * n_right + [0.0] * (N - n_right)
    return {
        "seed": 0,
        "how": "mean",
        "condition": condition,
        "prefix": prefix,
        "measure": "neither",
        "unit": "fraction",
        "value": n_right / N,
        "low": n_right / N - 0.05,
        "high": n_right / N + 0.05,
        "n": N,
        "per_example": right,
    }


def old_table() -> pd.DataFrame:
    return pd.DataFrame(
        [
            shares("unpatched", "given", 9),
            shares("unpatched", "decode", 8),
            shares("patched", "given", 5),
            shares("patched", "decode", 4),
        ]
    )


def new_table() -> pd.DataFrame:
    """The old table in the new words, its rows in another order."""
    table = old_table().rename(columns={"how": "method"}).iloc[::-1].reset_index(drop=True)
    words = {"unpatched": "baseline", "patched": "intervened", "decode": "greedy"}
    return table.replace(words | {"neither": "off_label_rate"})


def scores() -> pd.DataFrame:
    """A table without units: a number for each neuron."""
    return pd.DataFrame({"layer": [0, 0, 1], "neuron": [0, 1, 0], "exact": [2.0, -1.0, 1e-9]})


def with_value(table: pd.DataFrame, row: int, column: str, value: object) -> pd.DataFrame:
    table = table.copy()
    table.loc[row, column] = value
    return table


def test_renamed_tables_are_the_same():
    found = compare(old_table(), new_table())
    assert str(found) == "same (4 rows)"
    assert not found.exceeds


@pytest.mark.parametrize(
    ("value", "exceeds", "n_examples"), [(0.9, True, 5), (0.5, False, 1), (0.3, False, 1)]
)
def test_a_proportion_may_differ_by_one_example(value, exceeds, n_examples):
    found = compare(old_table(), with_value(new_table(), 0, "value", value))
    assert found.n_examples == pytest.approx(n_examples)
    assert found.exceeds is exceeds
    assert "value at seed 0, method mean, condition intervened, prefix greedy" in found.where


def test_examples_are_counted_where_a_row_is_a_mean_over_draws():
    draws = old_table().assign(n=3)
    found = compare(draws, with_value(draws, 0, "value", 0.7))
    assert found.n_examples == pytest.approx(2)  # of ten examples, not of three draws


def test_an_interval_follows_its_proportion():
    moved = with_value(with_value(new_table(), 0, "value", 0.5), 0, "high", 0.9)
    assert not compare(old_table(), moved).exceeds
    assert compare(old_table(), with_value(new_table(), 0, "high", 0.9)).exceeds


@pytest.mark.parametrize(
    ("value", "exceeds"), [(2.0001, False), (2.001, True), (1.9999, False), (float("nan"), True)]
)
def test_another_value_may_differ_by_a_ten_thousandth(value, exceeds):
    found = compare(scores(), with_value(scores(), 0, "exact", value))
    assert found.exceeds is exceeds


def test_a_value_near_zero_is_compared_with_the_largest_of_its_measure():
    assert not compare(scores(), with_value(scores(), 2, "exact", 2e-9)).exceeds
    assert compare(scores(), with_value(scores(), 2, "exact", 1e-5)).exceeds


def test_values_that_are_undefined_on_both_sides_are_the_same():
    undefined = with_value(scores(), 1, "exact", np.nan)
    assert str(compare(undefined, undefined)) == "same (3 rows)"


def test_a_number_and_its_text_are_one_label():
    assert str(compare(scores(), scores().astype({"layer": str}))) == "same (3 rows)"


def test_rows_of_one_side_are_counted_by_the_label_that_only_it_has():
    source = {**new_table().loc[0], **shares("source", "given", 7), "measure": "off_label_rate"}
    more = pd.concat([new_table(), pd.DataFrame([source]).drop(columns="how")])
    found = compare(old_table(), more)
    assert found.exceeds
    assert found.problems == ["only after: 1 rows (1 with condition source)"]
    fewer = new_table().query("prefix != 'greedy'")
    assert compare(old_table(), fewer).problems == ["only before: 2 rows (2 with prefix greedy)"]


def test_a_column_of_one_side_is_named():
    found = compare(scores(), scores().assign(auc=0.5))
    assert found.problems == ["only after: columns auc"]


def test_a_text_that_is_a_result_is_compared():
    heuristics = scores().assign(type=["carry", "none", "carry"], rule=["carry = 1", "", "a in 2"])
    found = compare(heuristics, with_value(heuristics, 1, "type", "carry"))
    assert found.problems == [
        "type differs in 1 rows, such as layer 0, neuron 1: 'none' became 'carry'"
    ]


def test_a_text_without_which_rows_are_alike_is_a_label():
    types = pd.DataFrame({"layer": 0, "type": ["carry", "none"], "value": [0.5, 0.25]})
    assert str(compare(types, types.iloc[::-1].reset_index(drop=True))) == "same (2 rows)"
    other = compare(types, types.replace("none", "silent"))
    assert [text.partition(" rows")[0] for text in other.problems] == [
        "only before: 1",
        "only after: 1",
    ]


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """The old and the new folder, each with the run `fda_twin` and its two tables."""
    old, new = tmp_path / "old", tmp_path / "new"
    write(old / "fda_twin-aaa", twin=old_table(), scores=scores())
    write(new / "fda_twin-bbb", cross_model_swap=new_table(), scores=scores())
    return old, new


def write(run: Path, **tables: pd.DataFrame) -> None:
    (run / "tables").mkdir(parents=True)
    for name, table in tables.items():
        table.to_parquet(run / "tables" / f"{name}.parquet")


def test_runs_that_agree_end_with_0(folders, capsys):
    assert main([str(folder) for folder in folders]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "fda_twin/cross_model_swap: same (4 rows)",
        "fda_twin/scores: same (3 rows)",
    ]


def test_runs_that_differ_end_with_1_and_each_table_has_its_line(folders, capsys):
    old, new = folders
    write(old / "thr_paths-aaa", paths=scores())
    path = new / "fda_twin-bbb" / "tables"
    with_value(scores(), 0, "exact", 4.0).to_parquet(path / "scores.parquet")
    scores().to_parquet(path / "more.parquet")
    (path / "cross_model_swap.parquet").unlink()
    assert main([str(old), str(new)]) == 1
    swap, more, differing, paths = capsys.readouterr().out.splitlines()
    assert "there is no such table after" in swap
    assert differing.startswith("fda_twin/scores: DIFFERS: 3 rows")
    assert differing.endswith("largest: exact at layer 0, neuron 0")
    assert "there is no such table before" in more
    assert "thr_paths: DIFFERS" in paths
    assert "there is no such run after" in paths


def test_of_two_runs_of_a_name_the_latest_is_taken(folders):
    _, new = folders
    write(new / "fda_twin-ccc", scores=scores())
    os.utime(new / "fda_twin-ccc" / "tables", (1, 1))
    assert runs_by_name(new) == {"fda_twin": new / "fda_twin-bbb"}


def test_wrong_arguments_end_with_2_and_the_usage(capsys):
    assert main(["one"]) == 2
    assert "OLD_RUNS NEW_RUNS" in capsys.readouterr().err
