"""Overlap of circuits by hand, against counting, and across models and examples."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest
import torch
from scipy import stats

import mechmem as mm
from mechmem.analyses.circuits.circuit import Circuit
from mechmem.analyses.circuits.circuit_overlap import (
    CircuitOverlap,
    _of_halves,
    around,
    halves,
    hypergeometric_p,
    shared,
)
from mechmem.data.minimal_pair import MinimalPair
from mechmem.measures.logit import Logit
from mechmem.session import Session
from mechmem.spec.errors import InputError

FRACTIONS = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def sets(task):
    """Paired noisy and paired clean instances."""
    train, pair = task.sample("train"), MinimalPair(flip="carry_2")
    chosen = {"noisy": train.select(train.is_noisy), "clean": train.select(~train.is_noisy)}
    return {
        name: task.pairs(s, pair).select(torch.arange(7)).as_set() for name, s in chosen.items()
    }


@pytest.fixture
def session(model, other_model, sets):
    return Session(models={"after": model, "before": other_model}, example_sets=sets)


@pytest.fixture
def with_heads(random_models, sets):
    """A session of models with four heads a layer, of which most permutations move some."""
    models = {name: random_models(i, n_heads=4) for i, name in enumerate(("after", "before"))}
    return Session(models, sets)


def overlap(**fields) -> CircuitOverlap:
    return CircuitOverlap(**({"fractions": FRACTIONS, "n_random": 5} | fields))


def value(table, **where):
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    return table["value"].item()


def test_shared_edges_and_nodes_by_hand(session):
    contrast = overlap().contrast(session)
    graph = contrast.graph
    names = [node.name for node in graph.sources], [node.name for node in graph.targets]

    def made(*edges):
        circuit = torch.zeros_like(graph.exists)
        for source, target in edges:
            circuit[names[0].index(source), names[1].index(target)] = True
        return circuit

    a = made(("embed", "a0.h0.v"), ("a0.h0", "m1"), ("m1", "logits"), ("embed", "logits"))
    b = made(
        ("embed", "a0.h0.q"), ("a0.h0", "m1"), ("m1", "logits"), ("embed", "m0"), ("m0", "logits")
    )
    assert shared(contrast, a, b) == {
        "edge_iou": pytest.approx(2 / 7),
        "node_iou": pytest.approx(2 / 3),  # a0.h0 and m1 of a0.h0, m0 and m1
        "recall": pytest.approx(2 / 4),
        "recall_other": pytest.approx(2 / 5),
    }
    assert np.isnan(shared(contrast, made(), b)["recall"])
    assert shared(contrast, made(), b)["edge_iou"] == 0


@pytest.mark.parametrize(
    ("n_edges", "n_a", "n_b", "n_shared"),
    [(46, 12, 9, 6), (10, 4, 5, 0), (10, 10, 3, 3), (8, 0, 3, 0)],
)
def test_hypergeometric_p_counts_as_many_or_more(n_edges, n_a, n_b, n_shared):
    found = hypergeometric_p(n_edges, n_a, n_b, n_shared)
    ways = sum(
        comb(n_a, x) * comb(n_edges - n_a, n_b - x) for x in range(n_shared, min(n_a, n_b) + 1)
    )
    assert found == pytest.approx(ways / comb(n_edges, n_b))
    table = [[n_shared, n_a - n_shared], [n_b - n_shared, n_edges - n_a - n_b + n_shared]]
    assert found == pytest.approx(stats.fisher_exact(table, alternative="greater").pvalue)


def test_hypergeometric_p_by_going_through_all_sets():
    a = {0, 1, 2}
    sets = list(itertools.combinations(range(7), 4))
    expected = sum(len(a & set(b)) >= 2 for b in sets) / len(sets)
    assert hypergeometric_p(7, 3, 4, 2) == pytest.approx(expected)


def test_a_circuit_is_itself(session):
    table = overlap().table(session)
    for k, name in itertools.product(FRACTIONS, ("edge_iou", "node_iou", "recall", "recall_other")):
        assert value(table, k=k, measure=name, condition="circuits") == 1
    for k in FRACTIONS:
        own, cross = (
            value(table, k=k, measure="faithfulness", condition=c) for c in ("own", "cross")
        )
        assert own == cross
    assert value(table, k=1.0, measure="hypergeometric_p") == pytest.approx(1)
    assert value(table, k=0.25, measure="hypergeometric_p") < 1e-3


@pytest.mark.parametrize("other", [{"other_examples": "clean"}, {"other_model": "before"}], ids=str)
def test_the_circuit_of_a_is_judged_on_b_by_the_baselines_of_b(other, session):
    analysis = overlap(**other)
    table = analysis.table(session)
    a, b = (
        analysis.contrast(session),
        analysis.contrast(session, analysis.other_model, analysis.other_examples),
    )
    exists = b.graph.exists
    full, corrupted = b.values(torch.stack([exists, torch.zeros_like(exists)])).mean(1)
    circuits = {"cross": analysis.circuits(a), "own": analysis.circuits(b)}
    for condition, kept in circuits.items():
        for i, k in enumerate(FRACTIONS):
            share = (b.values(kept[i][None]).mean() - corrupted) / (full - corrupted)
            assert value(table, k=k, measure="faithfulness", condition=condition) == pytest.approx(
                share.item(), abs=1e-5
            )
    for name, found in shared(a, circuits["cross"][0], circuits["own"][0]).items():
        assert value(table, k=0.25, measure=name, condition="circuits") == pytest.approx(found)
    assert value(table, k=1.0, measure="faithfulness", condition="random") == pytest.approx(1)


def test_its_own_faithfulness_is_that_of_the_circuit_analysis(session):
    table = overlap(other_examples="clean").table(session)
    circuit = Circuit(examples="clean", fractions=FRACTIONS, n_random=5).table(session)
    for k in FRACTIONS:
        for theirs, ours in (("circuit", "own"), ("random", "random")):
            expected = value(circuit, k=k, condition=theirs, measure="faithfulness")
            assert value(table, k=k, condition=ours, measure="faithfulness") == pytest.approx(
                expected
            )


def test_either_circuit_has_its_own_metric(session):
    metrics = {
        "metric": Logit(label="true", against="pair"),
        "other_metric": Logit(label="given", against="pair"),
    }
    table = overlap(**metrics).table(session)
    a, b = (Circuit(metric=m, fractions=FRACTIONS, n_random=5) for m in metrics.values())
    found = shared(b.contrast(session), *(c.circuits(c.contrast(session))[0] for c in (a, b)))
    assert value(table, k=0.25, measure="edge_iou", condition="circuits") == pytest.approx(
        found["edge_iou"]
    )
    assert found["edge_iou"] < 1
    own = value(b.table(session), k=0.25, measure="faithfulness", condition="circuit")
    assert value(table, k=0.25, measure="faithfulness", condition="own") == pytest.approx(own)
    circuits = a.circuits(a.contrast(session))
    full, corrupted, kept = (
        b.contrast(session)
        .values(
            torch.stack(
                [b.contrast(session).graph.exists, torch.zeros_like(circuits[0]), circuits[0]]
            )
        )
        .mean(1)
    )
    cross = value(table, k=0.25, measure="faithfulness", condition="cross")
    assert cross == pytest.approx(((kept - corrupted) / (full - corrupted)).item(), abs=1e-5)


def test_random_circuits_of_the_sizes_of_both_stand_beside(session):
    table = overlap(other_examples="clean", n_random=40, fractions=(0.5,)).table(session)
    analysis = overlap(other_examples="clean", fractions=(0.5,))
    sizes = [
        int(analysis.circuits(analysis.contrast(session, None, name))[0].sum())
        for name in ("noisy", "clean")
    ]
    expected = sizes[0] * sizes[1] / 46  # edges that random sets of these sizes share on average
    assert value(table, measure="recall", condition="random") == pytest.approx(
        expected / sizes[0], abs=0.1
    )
    assert value(table, measure="recall_other", condition="random") == pytest.approx(
        expected / sizes[1], abs=0.1
    )


def test_beside_stands_the_circuit_of_a_with_other_heads(session):
    analysis = overlap(other_examples="clean", n_random=3, fractions=(0.5,), seed=4)
    table = analysis.table(session)
    a, b = (analysis.contrast(session, None, name) for name in ("noisy", "clean"))
    ours, theirs = analysis.circuits(a)[0], analysis.circuits(b)[0]
    drawn = torch.stack(
        [a.graph.head_permuted(ours, torch.Generator().manual_seed(4 + i)) for i in range(3)]
    )
    shares = [(theirs & other).sum() / (theirs | other).sum() for other in drawn]
    assert value(table, measure="edge_iou", condition="head_permuted") == pytest.approx(
        np.mean(shares)
    )
    exists = b.graph.exists
    full, corrupted, *kept = b.values(
        torch.cat([torch.stack([exists, torch.zeros_like(exists)]), drawn])
    ).mean(1)
    expected = np.mean([((k - corrupted) / (full - corrupted)).item() for k in kept])
    found = value(table, measure="faithfulness", condition="head_permuted")
    assert found == pytest.approx(expected, abs=1e-5)
    assert found != pytest.approx(value(table, measure="faithfulness", condition="cross"), abs=1e-3)


def test_the_table_is_as_documented(session):
    table = overlap(other_model="before", other_examples="clean").table(session)
    assert list(table) == list(CircuitOverlap.columns)
    assert table["examples"].unique().item() == "noisy / clean"
    assert not table.duplicated(["k", "measure", "condition"]).any()


def test_two_architectures_share_no_edges(random_models, model, sets):
    session = Session(
        models={"after": model, "before": random_models(0, n_layers=1)}, example_sets=sets
    )
    with pytest.raises(InputError, match="different architectures"):
        overlap(other_model="before").table(session)


def test_halves_are_halves_and_another_seed_others():
    found = halves(9, 50, 0)
    assert found.sum(1).unique().tolist() == [4]
    assert len(found.unique(dim=0)) > 30
    assert torch.equal(found, halves(9, 50, 0))
    assert not torch.equal(found, halves(9, 50, 1))


def test_what_halves_share_is_what_circuits_of_those_examples_share(with_heads, sets):
    """Each half as an example set of its own, by the way that circuits of whole sets go."""
    analysis = overlap(other_examples="clean", n_halves=4, fractions=(0.3,), seed=2)
    table = analysis.table(with_heads)
    expected = {name: [] for name in ("halves", "null", "ceiling", "ceiling_other")}
    for i, first in enumerate(halves(7, 4, 2)):
        parts = {
            (name, half): examples.select(rows).as_set()
            for name, examples in sets.items()
            for half, rows in ((1, first), (2, ~first))
        }
        part_session = Session(with_heads.models, {f"{n}{h}": e for (n, h), e in parts.items()})
        circuit = {}
        for name in part_session.example_sets:
            contrast = analysis.contrast(part_session, None, name)
            circuit[name] = analysis.circuits(contrast)[0]
        a, b = circuit["noisy1"], circuit["clean2"]
        other = contrast.graph.head_permuted(a, torch.Generator().manual_seed(2 + i))
        pairs = {"halves": (a, b), "null": (other, b)}
        pairs |= {"ceiling": (a, circuit["noisy2"]), "ceiling_other": (circuit["clean1"], b)}
        for name, pair in pairs.items():
            expected[name].append(shared(contrast, *pair)["edge_iou"])
    means = {name: np.mean(values) for name, values in expected.items()}
    for name, mean in means.items():
        assert value(table, measure="edge_iou", condition=name) == pytest.approx(mean)
    assert len(set(means.values())) == 4


def test_rescaled_overlap_by_hand():
    draws = {
        "halves": {"edge_iou": np.array([0.5, 0.7]), "node_iou": np.array([0.5, np.nan])},
        "null": {"edge_iou": np.array([0.2, 0.4]), "node_iou": np.array([0.5, 0.1])},
        "ceiling": {"edge_iou": np.array([0.9, 0.7]), "node_iou": np.array([0.55, 0.3])},
    }
    rows = {(row["measure"], row["condition"]): row for row in _of_halves(draws)}
    assert rows["edge_iou", "halves"]["value"] == pytest.approx(0.6)
    assert rows["rescaled_iou", "halves"]["value"] == pytest.approx(0.3 / 0.5)
    # contributions: .6 + (.3 - .6 * .7) / .5 and .6 + (.3 - .6 * .3) / .5
    low, high = np.quantile([0.36, 0.84], [0.025, 0.975])
    assert rows["rescaled_iou", "halves"]["low"] == pytest.approx(low)
    assert rows["rescaled_iou", "halves"]["high"] == pytest.approx(high)
    assert rows["node_iou", "halves"]["n"] == 1  # undefined in one draw
    assert np.isnan(rows["rescaled_node_iou", "halves"]["value"])  # a range of .05 only


def test_the_interval_of_a_share_is_centred_on_it():
    assert around(0.5, np.array([0.2, 0.4])) == pytest.approx({"low": 0.405, "high": 0.595})
    assert around(0.95, np.array([0.2, 0.4])) == pytest.approx({"low": 0.855, "high": 1.0})
    assert around(0.5, np.array([np.nan])) == {"low": 0.5, "high": 0.5}


def test_the_spread_of_halves_is_that_of_whole_samples():
    """For a mean: the deviations over halves of one sample, and those of many samples."""
    generator = np.random.default_rng(0)
    chosen = halves(200, 2000, 0).double().numpy()
    spread = [((chosen @ x) / 100).std() for x in generator.normal(size=(20, 200))]
    assert np.mean(spread) == pytest.approx(1 / np.sqrt(200), rel=0.1)


def test_two_samples_of_one_kind_share_what_the_ceiling_allows():
    """On a trained model: the same set twice exactly, two sets of one kind about as much."""
    trained = mm.load("fda_small")
    clean = mm.ExampleSet(noisy=False, n=200, pair=MinimalPair(flip="carry_2")).of(trained.task)
    sets = {
        "noisy": clean.select(slice(0, 100)).as_set(),
        "again": clean.select(slice(0, 100)).as_set(),
        "clean": clean.select(slice(100, 200)).as_set(),
    }
    session = Session({"after": trained.at("memorised")}, sets)
    fields = {"fractions": (0.1,), "n_halves": 20, "n_random": 2, "method": "eap_ig"}
    same = overlap(other_examples="again", **fields).table(session)
    assert value(same, measure="rescaled_iou", condition="halves") == pytest.approx(1)
    assert value(same, measure="edge_iou", condition="ceiling") < 1
    table = overlap(other_examples="clean", **fields).table(session)
    # The graph has 110 edges, so that one edge of the circuits moves the ratio by a tenth or more.
    assert 0.5 < value(table, measure="rescaled_iou", condition="halves") < 2
    row = table[(table["measure"] == "edge_iou") & (table["condition"] == "circuits")].squeeze()
    assert row["low"] < row["value"] < row["high"]


def test_with_one_head_a_layer_there_are_no_other_heads(random_models, sets):
    session = Session(models={"after": random_models(0, n_heads=1, d_head=16)}, example_sets=sets)
    table = overlap(other_examples="clean").table(session)
    assert not set(table["condition"]) & {"head_permuted", "null"}
    assert not set(table["measure"]) & {"rescaled_iou", "rescaled_node_iou"}
    assert "ceiling" in set(table["condition"])
