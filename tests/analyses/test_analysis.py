from __future__ import annotations

import io
from collections.abc import Mapping
from typing import ClassVar

import pandas as pd
import pytest

from mechmem.analyses.analysis import Analysis
from mechmem.analyses.dynamics import Dynamics
from mechmem.analyses.effects.patch_grid import PatchGrid
from mechmem.interventions.patch import Source
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.registry import Component
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


def test_the_session_is_told_what_is_worked_on(session):
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


@pytest.fixture
def own_analyses(monkeypatch):
    """Analyses that a test defines are forgotten after it."""
    known = Analysis.kinds()
    monkeypatch.setitem(Component.registries, "analysis", dict(known))


@pytest.mark.usefixtures("own_analyses")
def test_what_an_analysis_did_not_declare_is_refused_while_it_runs(session):
    """A result would not be made anew if such a set or checkpoint changed."""

    class Sizes(Analysis):
        columns: ClassVar[Mapping[str, str]] = {"n": "number of examples"}
        model: CheckpointName = CheckpointName("after")
        examples: ExampleSetName = ExampleSetName("noisy")
        other_model: str = "after"
        others: str = "noisy"

        def table(self, session):
            session.model(self.model)
            session.model(self.other_model)
            sets = [session.examples(name) for name in (self.examples, self.others)]
            return pd.DataFrame({"n": [len(examples) for examples in sets]})

    def run(analysis):
        with session.declaring(analysis.references()):
            return analysis.run(session, {})

    assert run(Sizes())["n"].tolist() == [12, 12]
    with pytest.raises(InputError, match="example set 'clean' is used without being declared"):
        run(Sizes(others="clean"))
    with pytest.raises(InputError, match="checkpoint 'before' is used without being declared"):
        run(Sizes(other_model="before"))
    with pytest.raises(InputError, match="did you mean 'clean'"):
        run(Sizes(others="claen"))
    assert len(session.examples("clean")) == 12  # after the run, every name is known again
