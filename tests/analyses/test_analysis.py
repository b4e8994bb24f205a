from __future__ import annotations

import io

import pandas as pd
import pytest

from mechmem.analyses.analysis import Analysis
from mechmem.analyses.dynamics import Dynamics
from mechmem.analyses.effects.patch_grid import PatchGrid
from mechmem.interventions.patch import Source
from mechmem.session import Session
from mechmem.spec.sweep import each

GRID = PatchGrid(site="attn_out", layer=each(), source=Source(checkpoint="before"), greedy=False)


def test_a_sweep_is_its_members_one_below_the_other(session):
    table = GRID.run(session, {"layer": range(2)})
    for layer in (0, 1):
        alone = GRID.model_copy(update={"layer": layer}).table(session)
        part = table[table["layer"] == layer].drop(columns="layer").reset_index(drop=True)
        pd.testing.assert_frame_equal(part, alone)
    assert table.index.is_unique


def test_an_analysis_without_a_sweep_is_its_table():
    session = Session(
        curves=[{"step": 0, "clean": 0.0, "memorised": 0.0, "corrected": 0.0, "held_out": 0.0}]
    )
    pd.testing.assert_frame_equal(Dynamics().run(session, {}), Dynamics().table(session))


def test_a_swept_column_that_the_table_has_is_not_doubled(session):
    table = PatchGrid(
        site="embed", source=Source(checkpoint="before"), examples=each(), greedy=False
    ).run(session, {"examples": ("noisy", "clean")})
    assert list(table.columns).count("examples") == 1
    assert list(dict.fromkeys(table["examples"])) == ["noisy", "clean"]


def test_the_bench_is_told_what_is_worked_on(session):
    said = []
    session.say = said.append
    GRID.run(session, {"layer": range(2)})
    assert said == ["patch_grid 1/2 layer 0", "patch_grid 2/2 layer 1"]


@pytest.mark.parametrize(
    ("layers", "cells"),
    [((0, 1), [0, 1]), (((0, 1),), ["0+1"]), ((0, 1, (0, 1)), ["0", "1", "0+1"])],
)
def test_a_sweep_over_layers_and_sets_of_layers_can_be_saved(layers, cells, session):
    table = GRID.model_copy(update={"layer": each(*layers)}).run(session, {})
    saved = pd.read_parquet(io.BytesIO(table.to_parquet(index=False)))
    assert list(dict.fromkeys(saved["layer"])) == cells


def test_the_name_of_the_table_is_the_kind_unless_given():
    assert GRID.table_name == "patch_grid"
    assert GRID.model_copy(update={"name": "mine"}).table_name == "mine"


@pytest.mark.parametrize("kind", Analysis.kinds().values())
def test_every_analysis_says_what_its_columns_mean(kind):
    assert kind.columns
    assert all(meaning and not meaning.endswith(".") for meaning in kind.columns.values())
