"""Circuits: faithfulness at its ends, areas by hand, a planted circuit that is found, and matched
random ones."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from mechmem.analyses.analysis import Analysis
from mechmem.analyses.circuits.circuit import Circuit
from mechmem.analyses.circuits.edge_scores import EdgeScores
from mechmem.analyses.circuits.faithfulness import Runs, areas, areas_of_draws
from mechmem.data.minimal_pair import MinimalPair
from mechmem.experiment.quantities import Quantity
from mechmem.interventions.patch import Source
from mechmem.session import Session
from mechmem.statistics.rows import over_draws, over_examples

FRACTIONS = (0.0, 0.1, 0.25, 0.5, 1.0)
METHODS = pytest.mark.parametrize("method", ["eap", "eap_ig", "exact"])


@pytest.fixture(scope="module")
def pairs(task):
    train = task.sample("train")
    return (
        task.pairs(train.select(train.is_noisy), MinimalPair(flip="carry_2"))
        .select(torch.arange(8))
        .as_set()
    )


@pytest.fixture
def session(model, pairs, others):
    return Session(models={"after": model}, example_sets={"noisy": pairs, "clean": others})


def circuit(**fields) -> Circuit:
    return Circuit(**({"fractions": FRACTIONS, "n_random": 6} | fields))


def rows(table, **where) -> pd.DataFrame:
    for column, value in where.items():
        table = table[table[column] == value]
    return table


@METHODS
def test_the_whole_graph_is_faithful_and_the_empty_circuit_is_not(method, session):
    table = circuit(method=method).table(session)
    for condition in ("circuit", "random"):
        found = rows(table, condition=condition, measure="faithfulness").set_index("k")["value"]
        assert found[1.0] == pytest.approx(1, abs=1e-6)
        assert found[0.0] == pytest.approx(0, abs=1e-6)
        assert ((found - 1).abs() > 1e-3).sum() == len(FRACTIONS) - 1


def test_faithfulness_is_the_share_of_the_metric_that_a_circuit_leaves(session):
    analysis = circuit()
    table, contrast = analysis.table(session), analysis.contrast(session)
    exists = contrast.graph.exists
    full, corrupted = contrast.values(torch.stack([exists, torch.zeros_like(exists)])).mean(1)
    for i, (k, kept) in enumerate(zip(FRACTIONS, analysis.circuits(contrast), strict=True)):
        share = (contrast.values(kept[None]).mean() - corrupted) / (full - corrupted)
        row = rows(table, condition="circuit", measure="faithfulness", k=k).iloc[0]
        assert row["value"] == pytest.approx(share.item(), abs=1e-5)
        assert row["per_example"].mean() == pytest.approx(row["value"], abs=1e-5)
        assert row["low"] <= row["value"] <= row["high"]
        assert row["n_edges"] == analysis.sizes(contrast)[i] == round(k * 46)
        assert rows(table, measure="connected", k=k)["value"].item() == kept.sum()
    ends = {c: rows(table, condition=c)["value"].item() for c in ("full", "corrupted")}
    assert ends == {
        "full": pytest.approx(full.item(), abs=1e-5),
        "corrupted": pytest.approx(corrupted.item(), abs=1e-5),
    }


@METHODS
def test_circuits_are_the_connected_part_of_the_top_edges(method, session):
    analysis = circuit(method=method)
    contrast = analysis.contrast(session)
    scores = EdgeScores(methods=(method,)).table(session)[method].abs().to_numpy()
    for n, kept in zip(analysis.sizes(contrast), analysis.circuits(contrast), strict=True):
        top = torch.zeros_like(contrast.graph.exists)
        top[contrast.graph.exists] = torch.from_numpy(
            scores >= np.sort(scores)[::-1][n - 1] if n else scores < 0
        )
        assert top.sum() == n
        assert torch.equal(kept, contrast.graph.connected(top))


def test_the_interval_is_that_of_resampling_both_ends_and_the_circuit_together():
    generator = np.random.default_rng(1)
    full, corrupted = 3 + generator.normal(size=400), generator.normal(size=400)
    circuit_ = corrupted + 0.7 * (full - corrupted) + 0.3 * generator.normal(size=400)
    runs = Runs.__new__(Runs)
    runs.full, runs.corrupted, runs.values = (
        full,
        corrupted,
        np.stack([full, corrupted, circuit_])[None],
    )
    whole, none, part = runs.faithfulness[0]
    assert np.allclose(whole, 1)
    assert np.allclose(none, 0)
    drawn = generator.integers(400, size=(4000, 400))
    ratios = (circuit_ - corrupted)[drawn].mean(1) / (full - corrupted)[drawn].mean(1)
    row = over_examples(part)
    assert row["value"] == pytest.approx((circuit_ - corrupted).mean() / (full - corrupted).mean())
    assert [row["low"], row["high"]] == pytest.approx(
        np.quantile(ratios, [0.025, 0.975]).tolist(), abs=0.002
    )


def test_random_circuits_have_as_many_edges(session):
    analysis = circuit()
    contrast = analysis.contrast(session)
    drawn = analysis.random_circuits(contrast, analysis.sizes(contrast))
    assert drawn.shape[:2] == (6, len(FRACTIONS))
    assert (drawn.sum((2, 3)) == torch.tensor(analysis.sizes(contrast))).all()
    assert len({tuple(d[1].flatten().tolist()) for d in drawn}) == 6
    assert torch.equal(drawn, analysis.random_circuits(contrast, analysis.sizes(contrast)))
    assert not torch.equal(
        drawn, circuit(seed=1).random_circuits(contrast, analysis.sizes(contrast))
    )


@METHODS
def test_a_random_circuits_faithfulness_stands_beside_each_circuits(method, session):
    analysis = circuit(method=method)
    table, contrast = analysis.table(session), analysis.contrast(session)
    beside = {c: rows(table, condition=c, measure="faithfulness") for c in ("circuit", "random")}
    assert (
        beside["random"][["k", "n_edges"]].to_numpy().tolist()
        == beside["circuit"][["k", "n_edges"]].to_numpy().tolist()
    )
    exists = contrast.graph.exists
    full, corrupted = contrast.values(torch.stack([exists, torch.zeros_like(exists)])).mean(1)
    drawn = analysis.random_circuits(contrast, analysis.sizes(contrast))
    for row, circuits in zip(beside["random"].to_dict("records"), drawn.unbind(1), strict=True):
        shares = (contrast.values(circuits).mean(1) - corrupted) / (full - corrupted)
        assert row["value"] == pytest.approx(shares.mean().item(), abs=1e-5)
        assert row["n"] == 6
    assert rows(table, condition="random")["measure"].isin(["cpr", "cmd"]).sum() == 2


@METHODS
def test_a_planted_circuit_is_found(method, random_models, pairs):
    """Only head 1 of layer 1 writes anything: five edges do all that the model does, and any of
    them is needed."""
    model = random_models(0, norm=None)
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            block.mlp.W_out.zero_()
            for head in range(2):
                block.attn.W_O[head] *= float((layer, head) == (1, 1))
    session = Session(models={"after": model}, example_sets={"noisy": pairs})
    analysis = circuit(method=method, fractions=(5 / 46,))
    (kept,) = analysis.circuits(analysis.contrast(session))
    graph = analysis.contrast(session).graph
    edges = {(graph.sources[s].name, graph.targets[t].name) for s, t in kept.nonzero().tolist()}
    assert edges == {("embed", f"a1.h1.{x}") for x in "qkv"} | {
        ("embed", "logits"),
        ("a1.h1", "logits"),
    }
    table = analysis.table(session)
    assert rows(table, condition="circuit", measure="faithfulness")[
        "value"
    ].item() == pytest.approx(1, abs=1e-5)
    assert rows(table, condition="random", measure="faithfulness")["value"].item() < 0.8


def test_areas_by_hand():
    fractions = (0.0, 0.5, 1.0)
    curve = np.array([[0.0], [1.5], [1.0]])
    cpr, cmd = areas(fractions, np.repeat(curve, 4, axis=1))
    assert (cpr["measure"], cpr["value"]) == ("cpr", pytest.approx(0.5 * 0.75 + 0.5 * 1.25))
    assert (cmd["measure"], cmd["value"]) == (
        "cmd",
        pytest.approx(0.5 * (1 + 0.5) / 2 + 0.5 * (0.5 + 0) / 2),
    )
    assert cpr["low"] == pytest.approx(cpr["high"]) == pytest.approx(cpr["value"])
    mixed = np.array(
        [[0.0, 0.0], [2.0, 1.0], [1.0, 1.0]]
    )  # CMD is that of the mean curve, not the mean of the CMDs
    assert areas(fractions, mixed)[1]["value"] == cmd["value"]
    draws = areas_of_draws(fractions, [np.repeat(curve, 4, axis=1), np.zeros((3, 4))])
    assert [row["value"] for row in draws] == [
        pytest.approx(cpr["value"] / 2),
        pytest.approx((cmd["value"] + 1) / 2),
    ]
    assert draws[0]["n"] == 2


def test_intervals_are_over_examples_or_over_draws():
    values = np.arange(100.0)
    row = over_examples(values)
    assert (row["value"], row["n"]) == (49.5, 100)
    assert 42 < row["low"] < 46 < 53 < row["high"] < 57
    draws = over_draws([np.array([i, i + 2.0]) for i in range(101)])
    assert (draws["value"], draws["n"]) == (51, 101)
    assert (draws["low"], draws["high"]) == (pytest.approx(3.5), pytest.approx(98.5))
    assert draws["per_example"].tolist() == [50, 52]


def test_the_table_is_as_documented_and_survives_the_disk(session):
    table = circuit().table(session)
    assert list(table) == list(Circuit.columns)
    kept = io.BytesIO()
    table.to_parquet(kept, index=False)
    again = pd.read_parquet(kept)
    pd.testing.assert_frame_equal(
        again.drop(columns="per_example"), table.drop(columns="per_example")
    )
    assert set(table["condition"]) == {"circuit", "random", "full", "corrupted"}
    assert set(table["measure"]) == {
        "faithfulness",
        "connected",
        "cpr",
        "cmd",
        "logit_given_less_pair",
    }
    assert rows(table, measure="cpr", condition="circuit")["value"].item() == pytest.approx(
        np.trapezoid(rows(table, measure="faithfulness", condition="circuit")["value"], FRACTIONS),
        abs=1e-6,
    )


def test_claims_can_set_circuits_against_random_ones(session):
    table = pd.concat([circuit().table(session).assign(seed=seed) for seed in (0, 1)])
    where = {"condition": "circuit", "measure": "faithfulness", "k": 0.5}
    measured = Quantity(table="circuit", where=where, minus={"condition": "random"}).measure(
        {"circuit": table}
    )
    values = [
        rows(table, **(where | {"condition": c, "seed": 0}))["value"].item()
        for c in ("circuit", "random")
    ]
    assert measured.value == pytest.approx(values[0] - values[1], abs=1e-5)
    assert measured.n_seeds == 2
    area = Quantity(
        table="circuit",
        where={"condition": "circuit", "measure": "cmd"},
        minus={"condition": "random"},
    )
    assert area.measure({"circuit": table}).n_seeds == 2


def test_without_a_difference_to_leave_faithfulness_is_undefined(session):
    analysis = circuit(corrupted=Source(examples="noisy"), method="exact")  # the clean run itself
    assert rows(analysis.table(session), measure="faithfulness")["value"].isna().all()


@pytest.mark.parametrize("fractions", [(0.5, 0.1), (0.1, 0.1), (0.5, 1.2), (-0.1, 1.0), ()])
def test_fractions_ascend_within_zero_and_one(fractions):
    with pytest.raises(ValidationError, match=r"ascend|at least 1|0.1 is listed twice"):
        Circuit(fractions=fractions)


def test_a_circuit_is_found_once_for_all_analyses(session):
    circuit().table(session)
    before = session.n_forwarded
    EdgeScores(methods=("eap_ig",)).table(session)
    assert session.n_forwarded == before


@pytest.mark.parametrize(
    "block",
    [
        {"kind": "circuit"},
        {"kind": "edge_scores"},
        {"kind": "circuit_overlap", "other_model": "before"},
        {"kind": "attribution", "exact": "all"},
    ],
)
def test_the_spec_makes_a_round_trip(block):
    spec = Analysis.model_validate(block)
    assert Analysis.model_validate(spec.block()) == spec
    assert spec.block()["metric"] == {"kind": "logit", "label": "given", "against": "pair"}
    assert (
        Analysis.model_validate(block | {"metric": "probability_given"}).metric.name
        == "probability_given"
    )
