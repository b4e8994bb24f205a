from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from mechmem.analyses.analysis import Analysis, joined
from mechmem.experiment import cells as home
from mechmem.experiment.cell_store import KEY, CellStore
from mechmem.experiment.cells import TrainedRun
from mechmem.experiment.spec import Experiment
from mechmem.progress import ProgressCallback
from mechmem.spec.errors import BlockError, InputError
from mechmem.spec.references import CheckpointName, ExampleSetName
from mechmem.spec.sweep import Swept
from mechmem.training.store import own_folder

BARE = {"figures": [], "quantities": {}, "claims": [], "answer": ""}


class Log:
    """Which cells were computed; `fail` raises in one of them, `now` is what the clock shows."""

    def __init__(self) -> None:
        self.computed: list[object] = []
        self.fail: dict[object, BaseException] = {}
        self.before = lambda value: None
        self.seconds_per_cell = 0.0
        self.now = 0.0


LOG = Log()


@pytest.fixture(autouse=True)
def tally(monkeypatch):
    """Registers the kind `tally` for one test, with an empty log and a clock of its own."""
    LOG.__init__()
    monkeypatch.setattr(home, "time", SimpleNamespace(monotonic=lambda: LOG.now))

    class Tally(Analysis):
        """A table with a column of every type that analyses make."""

        columns = {"n": "number"}
        x: Swept[int | str | tuple[int, ...]] = 0
        examples: Swept[ExampleSetName] = "noisy"
        model: Swept[CheckpointName] = "after"

        def table(self, session):
            LOG.before(self.x)
            if self.x in LOG.fail:
                raise LOG.fail[self.x]
            LOG.now += LOG.seconds_per_cell
            LOG.computed.append(self.x)
            n = len(session.examples(self.examples))
            n_rows = 0 if self.x == "empty" else 2
            values = [np.full(n, i, dtype=np.float32) for i in range(n_rows)]
            is_odd = self.x in (1, 3)
            frame = {
                "examples_here": [self.examples] * n_rows,
                "row": range(n_rows),
                "value": [float(v.mean()) for v in values],
                "maybe": [None if is_odd else "word"] * n_rows,
                "nothing": [None] * n_rows,
                "whole_or_not": [2 if is_odd else 0.5] * n_rows,
                "recovery": pd.array([None if is_odd else 1.5] * n_rows, dtype="Float64"),
                "flag": [is_odd] * n_rows,
                "per_example": values,
            }
            return pd.DataFrame(frame)

    yield Tally
    Analysis.registries["analysis"].pop("tally")


@pytest.fixture
def runs(trained, recipe, tmp_path):
    shutil.copytree(trained.folder, own_folder(recipe, 0, tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def table(spec, recipe, runs):
    """A function that makes the table of a tally with these fields, in `runs` or another folder."""

    def make(folder=runs, changes=None, **fields):
        block = spec(analyses=[{"kind": "tally", **fields}], **BARE)
        block["checkpoints"] = {"after": "final"}
        block["examples"] = {"noisy": {"noisy": True, "n": 8}}
        experiment = Experiment.model_validate(block | (changes or {}))
        run = TrainedRun(experiment, recipe, 0, folder, ProgressCallback(), {})
        return run.table(0, experiment.analyses[0])

    return make


def swept(*values):
    return {"x": {"each": list(values)}}


def computed():
    found = list(LOG.computed)
    LOG.computed.clear()
    return found


# What is computed


def test_a_sweep_that_grows_by_a_value_computes_that_value(table):
    _, is_new = table(**swept(0, 1, 2))
    assert (computed(), is_new) == ([0, 1, 2], True)
    longer, is_new = table(**swept(0, 1, 2, 3))
    assert (computed(), is_new) == ([3], True)
    assert longer["x"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    again, is_new = table(**swept(0, 1, 2, 3))
    assert (computed(), is_new) == ([], False)
    pd.testing.assert_frame_equal(again, longer)


def test_a_sweep_in_another_order_or_of_one_value_computes_nothing(table):
    table(**swept(0, 1, 2))
    computed()
    backwards, _ = table(**swept(2, 1, 0))
    assert backwards["x"].tolist() == [2, 2, 1, 1, 0, 0]
    single, _ = table(x=1)
    assert "x" not in single
    table(name="renamed", **swept(0, 1))
    assert computed() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"examples": {"noisy": {"noisy": True, "n": 7}}},
        {"checkpoints": {"after": {"step": 5}}},
        {"memory": "1 GiB"},
        {"backend": "hooked"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_decides_the_rows_is_part_of_the_key(table, changes):
    table(**swept(0, 1))
    computed()
    table(changes=changes, **swept(0, 1))
    assert computed() == [0, 1]


@pytest.mark.parametrize("changes", [{"question": "Why?"}, {"name": "other"}, {"answer": "Yes."}])
def test_what_does_not_decide_the_rows_is_not(table, changes):
    table(**swept(0, 1))
    computed()
    table(changes=changes, **swept(0, 1))
    assert computed() == []


def test_another_number_of_threads_or_version_computes_again(table, monkeypatch):
    table()
    computed()
    with monkeypatch.context() as patch:
        patch.setattr(home, "conditions", lambda _: {"threads": 3})
        table()
    assert computed() == [0]
    with monkeypatch.context() as patch:
        patch.setattr(home, "code_hash", lambda _: "other")
        table()
    assert computed() == [0]


def test_a_set_that_another_analysis_uses_is_not_part_of_the_key(table):
    both = {
        "examples": {"noisy": {"noisy": True, "n": 8}, "clean": {"noisy": False, "n": 3}},
        "analyses": [
            {"kind": "tally"},
            {"kind": "tally", "name": "second", "examples": "clean"},
        ],
    }
    table(changes=both)
    computed()
    both["examples"] = both["examples"] | {"clean": {"noisy": False, "n": 4}}
    table(changes=both)
    assert computed() == []


# Interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a fault"), InputError("no")])
def test_an_interruption_costs_only_the_cell_it_came_in(table, error):
    LOG.fail = {2: error}
    expected = BlockError if isinstance(error, InputError) else type(error)
    with pytest.raises(expected):
        table(**swept(0, 1, 2, 3))
    assert computed() == [0, 1]
    LOG.fail = {}
    table(**swept(0, 1, 2, 3))
    assert computed() == [2, 3]


def test_a_kill_costs_at_most_a_chunk(table, runs, tmp_path):
    """What is on the disk while a cell is computed is what a kill would leave there."""
    LOG.seconds_per_cell = 10
    values = list(range(8))

    def keep_a_copy(value):
        shutil.copytree(runs, tmp_path / f"killed_in_{value}")

    LOG.before = keep_a_copy
    whole, _ = table(**swept(*values))
    LOG.before, n_chunk = (lambda value: None), int(home.CHUNK_SECONDS // 10)
    computed()
    for value in values:
        found, _ = table(folder=tmp_path / f"killed_in_{value}", **swept(*values))
        pd.testing.assert_frame_equal(found, whole)
        lost = [x for x in computed() if x < value]
        assert len(lost) < n_chunk
        assert lost == values[value - value % n_chunk : value]


def test_long_cells_are_written_one_by_one_and_short_ones_together(table, runs):
    LOG.seconds_per_cell = home.CHUNK_SECONDS + 1
    table(**swept(0, 2, 4))
    assert len(list((runs / "cells").glob("*/*.parquet"))) == 3
    LOG.seconds_per_cell = 1
    table(**swept(6, 8, 10))
    assert len(list((runs / "cells").glob("*/*.parquet"))) == 4


# Damage


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "data", "text"])
def test_a_damaged_chunk_is_computed_again(table, runs, damage):
    LOG.seconds_per_cell = 10
    whole, _ = table(**swept(0, 2, 4, 6))
    computed()
    chunks = sorted((runs / "cells").glob("*/*.parquet"))
    assert len(chunks) == 2
    path = max(chunks, key=lambda chunk: chunk.stat().st_size)
    content = bytearray(path.read_bytes())
    if damage == "data":  # not seen in the footer: only a checksum tells
        content[200] ^= 0xFF
    path.write_bytes(
        {
            "empty": b"",
            "cut": bytes(content[: len(content) // 2]),
            "header": b"XXXX" + bytes(content[4:-4]) + b"XXXX",
            "data": bytes(content),
            "text": b"not a table",
        }[damage]
    )
    again, is_new = table(**swept(0, 2, 4, 6))
    assert (computed(), is_new) == ([0, 2, 4], True)
    pd.testing.assert_frame_equal(again, whole)


# One table, whatever the chunks


SWEEPS = [
    swept(0, 1, 2, 3),
    swept(0, [0, 1], 2),
    swept("a", "empty", "b"),
    swept(1, "empty"),
    {"x": 1},
    {"examples": {"each": "all"}, "model": {"each": ["after"]}},
]


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
@pytest.mark.parametrize("seconds", [0, 10, 100])
def test_the_table_is_the_same_whatever_the_chunks(table, tally, sweep, seconds, tmp_path, runs):
    LOG.seconds_per_cell = seconds
    fresh, _ = table(**sweep)
    stored, is_new = table(**sweep)
    assert not is_new
    pd.testing.assert_frame_equal(fresh, stored)
    LOG.seconds_per_cell = 100
    shutil.rmtree(runs / "cells")
    other, _ = table(**sweep)
    pd.testing.assert_frame_equal(fresh, other)
    assert fresh.dtypes.to_dict() == other.dtypes.to_dict()
    assert KEY not in fresh


def test_the_table_is_the_one_that_the_analysis_makes(table, tally, examples):
    from mechmem.session import Session

    found, _ = table(**swept(0, [0, 1], 2))
    noisy = examples.select(list(range(8)))
    members = tally(**swept(0, [0, 1], 2)).expand({})
    plain = [member.table(Session(example_sets={"noisy": noisy})) for _, member in members]
    expected = joined(plain, [labels for labels, _ in members])
    assert found["x"].tolist() == ["0", "0", "0+1", "0+1", "2", "2"]
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)


# The store


def test_a_store_keeps_cells_of_any_columns_apart(tmp_path):
    store = CellStore(tmp_path)
    cells = {
        "a": pd.DataFrame({"x": [1, 2]}),
        "b": pd.DataFrame({"x": [1.5]}),
        "c": pd.DataFrame({"y": ["word"]}),
        "d": pd.DataFrame({"x": [3]}),
        "e": pd.DataFrame({"x": pd.Series([], dtype="int64")}),
    }
    store.write(cells)
    assert len(list(tmp_path.glob("*.parquet"))) == 3
    for found in (store, CellStore(tmp_path)):
        read = found.read([*cells, "missing"])
        assert read.keys() == cells.keys()
        for key, frame in cells.items():
            pd.testing.assert_frame_equal(read[key], frame)
        assert "missing" not in found


def test_an_analysis_that_cannot_be_is_named(table):
    LOG.fail = {1: InputError("it is not possible")}
    with pytest.raises(BlockError, match="it is not possible") as raised:
        table(**swept(0, 1))
    assert raised.value.loc == ("analyses", 0)


def test_another_training_is_taken_at_the_step_of_a_phase_of_the_own_one(spec, recipe, runs):
    """The own training ends at step 20, the other one at step 30."""
    longer = recipe.optimisation.model_copy(update={"n_steps": 30})
    twin = recipe.model_copy(update={"name": "longer", "optimisation": longer})
    block = spec(analyses=[{"kind": "tally", "model": {"each": "all"}}], **BARE)
    block["examples"] = {"noisy": {"noisy": True, "n": 8}}
    block["checkpoints"] = {
        "same": {"same_step_as": "final", "training": twin.block()},
        "last": {"phase": "final", "training": twin.block()},
    }
    run = TrainedRun(Experiment.model_validate(block), recipe, 0, runs, ProgressCallback(), {})
    models = run.session.models
    there = run.training(twin)
    assert run.trained.phases["final"] == 20
    for name, step in (("same", 20), ("last", 30)):
        expected = there.at(step).state_dict()
        assert all(
            torch.equal(value, expected[key]) for key, value in models[name].state_dict().items()
        )
