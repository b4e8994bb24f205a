"""Heuristics: planted neurons, effects against plain TransformerLens hooks, and ranked neurons
against the rest."""

from __future__ import annotations

import copy
import io

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from mechmem.analyses.effects.neuron_top_k import NeuronTopK
from mechmem.analyses.neurons.activation_map import ActivationMap
from mechmem.analyses.neurons.grid import CELLS, Grid, GridAnalysis
from mechmem.analyses.neurons.heuristic_types import HeuristicTypes, permutation_p
from mechmem.analyses.neurons.heuristics import Heuristics, effects
from mechmem.analyses.neurons.map_similarity import MapSimilarity, correlations
from mechmem.analyses.neurons.neuron_shift import NeuronShift
from mechmem.analyses.neurons.rules import TYPES
from mechmem.data.minimal_pair import MinimalPair
from mechmem.data.tasks.two_hop_reasoning import TwoHopReasoning
from mechmem.experiment.dry_run import DryRun
from mechmem.session import Session
from mechmem.spec.errors import InputError

PAIRS = ("pairs_0", "pairs_1", "pairs_2", "pairs_3")


@pytest.fixture(scope="module")
def sets(task):
    train = task.sample("train")
    clean = train.select(~train.is_noisy)
    pairs = {
        f"pairs_{i}": task.pairs(clean, MinimalPair(flip=f"out_{i}"))
        .select(torch.arange(6))
        .as_set()
        for i in range(4)
    }
    a, b = (
        torch.randint(1000, 10_000, (3000,), generator=torch.Generator().manual_seed(s))
        for s in (0, 1)
    )
    return {"clean": task.examples(a, b), "noisy": train.select(train.is_noisy).as_set()} | pairs


@pytest.fixture
def session(model, other_model, sets):
    return Session(models={"after": model, "before": other_model}, example_sets=sets)


def neuron(table, place="s1", layer=1, index=3):
    return table.set_index(["layer", "neuron", "place"]).loc[(layer, index, place)]


def test_a_cell_is_the_two_digits_and_the_carry_of_a_place(task):
    examples = task.examples(torch.tensor([3471, 1999]), torch.tensor([2935, 8001]))
    for place, expected in (
        ("s0", [(1, 5, 0), (9, 1, 0)]),
        ("s1", [(7, 3, 0), (9, 0, 1)]),
        ("s2", [(4, 9, 1), (9, 0, 1)]),
        ("s3", [(3, 2, 1), (1, 8, 1)]),
    ):
        assert [tuple(cell) for cell in CELLS[Grid.of(examples, place).index]] == expected


def test_a_map_is_the_mean_over_the_examples_of_each_cell_where_the_place_is_read(task):
    examples = task.examples(torch.tensor([1234, 5234, 1111]), torch.tensor([4321, 4321, 1111]))
    activation = torch.arange(3 * 14 * 2.0).reshape(3, 14, 2)
    means = Grid.of(examples, "s0").means(activation)
    at = {tuple(cell): row for cell, row in zip(CELLS.tolist(), means, strict=True)}
    np.testing.assert_allclose(
        at[4, 1, 0], activation[:2, 13].mean(0)
    )  # s0 is read at the last position, s1
    np.testing.assert_allclose(at[1, 1, 0], activation[2, 13])
    assert not at[5, 5, 0].any()
    np.testing.assert_allclose(
        {
            tuple(c): r
            for c, r in zip(CELLS.tolist(), Grid.of(examples, "s3").means(activation), strict=True)
        }[5, 4, 0],
        activation[1, 10],
    )


@pytest.fixture
def planted(monkeypatch):
    """Made-up activations: neuron i of layer 1 follows rule i at place s1."""

    def activations(self, session, model, examples):
        found = session.examples(examples)
        a, b, carry = torch.tensor(CELLS)[Grid.of(found, "s1").index].T
        total = a + b + carry
        rules = [
            (a >= 3) & (a <= 5),
            total % 10 == 3,
            a == b,
            carry == 1,
            total >= 12,
            b % 2 == 1,
            a < 0,
        ]
        activation = torch.zeros(len(found), 14, 24)
        activation[:, 12, : len(rules)] = torch.stack(rules, dim=1).float()
        return [torch.zeros_like(activation), activation]

    monkeypatch.setattr(GridAnalysis, "activations", activations)


@pytest.mark.usefixtures("planted")
def test_planted_neurons_are_called_what_they_are(session):
    table = Heuristics(pairs=PAIRS).table(session)
    expected = [
        ("operand_range", "a in 3..5"),
        ("result_modulo", "sum mod 10 = 3"),
        ("identical_digits", "a = b"),
        ("carry", "carry = 1"),
        ("result_range", "sum in 12..19"),
        ("operand_modulo", "b mod 2 = 1"),
        ("silent", ""),
    ]
    for index, found in enumerate(expected):
        assert tuple(neuron(table, index=index)[["type", "rule"]]) == found
        assert neuron(table, index=index)["shuffled_type"] == ("silent" if index == 6 else "none")
        assert neuron(table, layer=0, index=index)["type"] == "silent"


def test_the_effect_is_that_of_a_plain_hook(session, model, sets):
    """1/2 [(p*_c' - p_c') / p_c' + (p_c - p*_c) / p*_c], with one neuron patched at the five last
    positions."""
    pairs = sets["pairs_1"]
    table = Heuristics(pairs=PAIRS).table(session)
    with torch.no_grad():
        plain = model(pairs.tokens)[:, -5:].double().softmax(-1)
        _, cache = model.run_with_cache(pairs.counterfactual.tokens)
        for layer, index in ((0, 5), (1, 17)):
            hook = f"blocks.{layer}.mlp.hook_post"

            def patch(activation, hook, index=index, theirs=cache[hook]):
                activation[:, -5:, index] = theirs[:, -5:, index]
                return activation

            patched = (
                model.run_with_hooks(pairs.tokens, fwd_hooks=[(hook, patch)])[:, -5:]
                .double()
                .softmax(-1)
            )
            own, theirs = pairs.given[..., None], pairs.counterfactual.true[..., None]
            p, p_star = (x.gather(-1, own)[..., 0] for x in (plain, patched))
            q, q_star = (x.gather(-1, theirs)[..., 0] for x in (plain, patched))
            expected = ((q_star - q) / q + (p - p_star) / p_star) / 2
            found = effects(session, model, pairs, layer)[index]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            assert expected[:, 3].abs().max() > 1e-3
            values = []
            for name in PAIRS:
                differ = sets[name].given[:, 3] != sets[name].counterfactual.true[:, 3]
                values += effects(session, model, sets[name], layer)[index, differ, 3].tolist()
            assert neuron(table, "s1", layer, index)["value"] == pytest.approx(np.mean(values))
            assert neuron(table, "s1", layer, index)["n"] == len(values) >= 6


def test_a_neuron_without_a_way_out_has_no_effect_and_ranks_follow_the_effects(session, model):
    deaf = copy.deepcopy(model)
    with torch.no_grad():
        deaf.blocks[1].mlp.W_out[4] = 0
    session.models = {"after": deaf, "before": deaf}
    table = Heuristics(pairs=PAIRS).table(session)
    assert neuron(table, index=4)["value"] == pytest.approx(0, abs=1e-5)
    for _, rows in table.groupby("place"):
        assert sorted(rows["rank"]) == list(range(48))
        assert rows.sort_values("rank")["value"].is_monotonic_decreasing


def test_similarity_is_the_correlation_of_two_maps(session, sets):
    table = MapSimilarity().table(session).set_index(["layer", "place"])
    met = Grid.of(sets["clean"], "s2").counts > 0
    x, y = (MapSimilarity().maps(session, name)[1, "s2"][met] for name in ("after", "before"))
    vary = (np.ptp(x, axis=0) > 0) & (np.ptp(y, axis=0) > 0)
    expected = [np.corrcoef(x[:, i], y[:, i])[0, 1] for i in np.flatnonzero(vary)]
    assert len(expected) > 12
    found = table.loc[(1, "s2"), "per_example"]
    np.testing.assert_allclose(found[vary], expected, atol=1e-6)
    assert table.loc[(1, "s2"), "value"] == pytest.approx(found.mean())
    assert MapSimilarity(other="after").table(session)["value"].to_numpy() == pytest.approx(1)
    assert list(MapSimilarity().table(session).columns) == list(MapSimilarity.columns)


def test_silent_maps_are_alike_only_to_silent_ones():
    x = np.array([[0.0, 0, 1, 1], [0, 0, 2, 2]])
    np.testing.assert_allclose(
        correlations(x, np.array([[3.0, 1, 2, 5], [3, 2, 1, 6]])), [1, 0, -1, 1]
    )


def test_the_table_is_tidy(session):
    table = Heuristics(pairs=PAIRS).table(session)
    assert list(table.columns) == list(Heuristics.columns)
    assert not table.isna().any(axis=None)
    assert not table.duplicated(["layer", "neuron", "place"]).any()
    assert len(table) == 2 * 24 * 4
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(table.to_parquet())), table)
    assert set(table["type"]) <= set(TYPES)
    again = Session(session.models, session.example_sets)
    pd.testing.assert_frame_equal(Heuristics(pairs=PAIRS).table(again), table)


def test_what_cannot_be_is_refused(session, sets):
    session.example_sets = sets | {"pairs_0": sets["pairs_0"].select(torch.tensor([0, 1]))}
    with pytest.raises(InputError, match="no pair of pairs_0 changes the digit s3"):
        Heuristics(pairs=("pairs_0",)).table(session)
    with pytest.raises(InputError, match="made with `pair:`"):
        Heuristics(pairs=("clean",)).table(session)
    world = TwoHopReasoning(n_entities=12, n_relations=5).sample("train").select(torch.arange(9))
    session.example_sets = {"clean": world}
    with pytest.raises(
        InputError, match=r"operand digits at positions a0, b0 \.\.\.; this task has e, r1, r2, ="
    ):
        Heuristics().places(session)
    session.example_sets = sets
    with pytest.raises(InputError, match="k 24 leaves no other neurons"):
        HeuristicTypes(k=24).table(session)
    with pytest.raises(InputError, match="no digits are added at place 's4'"):
        ActivationMap(place="s4", pairs=PAIRS).table(session)
    with pytest.raises(InputError, match="k 25 is more than the 24 neurons of layer 1"):
        ActivationMap(layer=1, k=25, pairs=PAIRS).table(session)


@pytest.mark.usefixtures("planted")
def test_the_ranked_neurons_are_counted_next_to_the_rest(session, monkeypatch):
    monkeypatch.setattr(
        "mechmem.analyses.neurons.heuristic_types.scores",
        lambda change, *_, **__: [
            10.0 * layer - torch.arange(24.0).expand(5, -1) for layer in change.layers
        ],
    )
    table = HeuristicTypes(layer=1, k=2).table(session)
    by_place = table.groupby("place", sort=False)[["p", "q"]].first()
    assert by_place["q"].tolist() == pytest.approx(
        stats.false_discovery_control(by_place["p"]).tolist()
    )
    found = table[table["place"] == "s1"].set_index(["group", "type"])["value"]
    assert found["ranked"].to_dict() == {
        t: 0.5 * (t in ("operand_range", "result_modulo")) for t in TYPES
    }
    rest = {"identical_digits": 1, "carry": 1, "result_range": 1, "operand_modulo": 1, "silent": 18}
    assert found["rest"].to_dict() == pytest.approx({t: rest.get(t, 0) / 22 for t in TYPES})
    assert found["chance"][["none", "silent"]].tolist() == pytest.approx([6 / 24, 18 / 24])
    assert (
        table[table["place"] == "s0"].set_index(["group", "type"])["value"]["ranked", "silent"] == 1
    )
    assert table.groupby(["place", "group"])["value"].sum().to_numpy() == pytest.approx(1)
    both = HeuristicTypes(layer=(0, 1), k=2).table(session)
    assert both[both["group"] == "chance"]["n"].unique().tolist() == [48]
    assert list(table.columns) == list(HeuristicTypes.columns)
    assert not table.isna().any(axis=None)


def test_the_spread_ranks_neurons_by_their_shift(session):
    table = HeuristicTypes(layer=(0, 1), k=3, ranking="spread").table(session)
    shift = NeuronShift(matched="clean").table(session).nlargest(3, "shift_noisy")
    types = HeuristicTypes().classified(session, "after").merge(shift, on=["layer", "neuron"])
    for place, rows in types.groupby("place"):
        found = table[(table["place"] == place) & (table["group"] == "ranked")].set_index("type")[
            "value"
        ]
        assert found.to_dict() == pytest.approx({t: (rows["type"] == t).mean() for t in TYPES})


def test_neurons_are_ranked_as_those_that_are_patched_back(session):
    in_order = NeuronTopK(layer=(0, 1), k=1).ranked(session)
    first = pd.DataFrame(in_order[:3], columns=["layer", "neuron"])
    types = HeuristicTypes().classified(session, "after").merge(first, on=["layer", "neuron"])
    table = HeuristicTypes(layer=(0, 1), k=3).table(session)
    for place, rows in types.groupby("place"):
        found = table[(table["place"] == place) & (table["group"] == "ranked")].set_index("type")
        assert found["value"].to_dict() == {t: (rows["type"] == t).mean() for t in TYPES}


def test_the_permutation_p_is_fisher_s_for_two_types():
    first, second = (np.array(["x"] * x + ["y"] * y) for x, y in ((9, 3), (6, 14)))
    exact = stats.fisher_exact([[9, 3], [6, 14]]).pvalue
    assert permutation_p(first, second) == pytest.approx(exact, abs=0.015)
    assert permutation_p(first, first) == 1
    assert permutation_p(np.array(["x"] * 30), np.array(["y"] * 30)) < 0.001


def test_activation_maps_are_those_of_the_strongest_neurons(session, sets, model, other_model):
    table = ActivationMap(pairs=PAIRS, place="s2", layer=1, k=2).table(session)
    effects_ = Heuristics(pairs=PAIRS).table(session)
    top = (
        effects_[(effects_["place"] == "s2") & (effects_["layer"] == 1)]
        .nlargest(2, "value")["neuron"]
        .tolist()
    )
    assert table.groupby("order")["neuron"].unique().map(list).tolist() == [[i] for i in top]
    assert table["model"].unique().tolist() == ["before", "after"]
    clean, noisy = sets["clean"], sets["noisy"]
    cell = (4, 3, 1)
    for name, of in (("after", model), ("before", other_model)):
        row = (
            table[(table["model"] == name) & (table["order"] == 0)]
            .set_index(["a", "b", "carry"])
            .loc[cell]
        )
        with torch.no_grad():
            _, cache = of.run_with_cache(clean.tokens)
        values = cache["blocks.1.mlp.hook_post"][:, 11, top[0]]  # s2 is read at s3
        here = torch.tensor([tuple(CELLS[i]) == cell for i in Grid.of(clean, "s2").index])
        assert row["value"] == pytest.approx(values[here].mean().item(), abs=1e-5)
        assert row["n"] == here.sum() > 0
        assert row["noisy_prefix"] == "given"
    assert table["n_noisy"].sum() == 4 * len(noisy)
    assert (table["noisy_value"].isna() == (table["n_noisy"] == 0)).all()
    assert list(table.columns) == list(ActivationMap.columns)


def test_a_memorised_instance_is_in_its_own_cell(session, sets):
    table = ActivationMap(pairs=PAIRS, place="s0", k=1).table(session)
    first = sets["noisy"].select(torch.tensor([0]))
    session.example_sets = sets | {"noisy": first}
    only = ActivationMap(pairs=PAIRS, place="s0", k=1).table(session)
    marked = only[only["n_noisy"] > 0]
    a, b, _ = CELLS[Grid.of(first, "s0").index[0]]
    assert set(zip(marked["a"], marked["b"], strict=True)) == {(a, b)}
    layer, index = int(only["layer"].iloc[0]), int(only["neuron"].iloc[0])
    value = session.activation(session.model("after"), first, f"blocks.{layer}.mlp.hook_post")[
        0, 13, index
    ]
    assert marked[marked["model"] == "after"]["noisy_value"].item() == pytest.approx(value.item())
    assert len(table) == len(only) == 2 * 200


@pytest.mark.parametrize(
    "analysis",
    [
        Heuristics(pairs=PAIRS),
        HeuristicTypes(k=2),
        ActivationMap(pairs=PAIRS, k=2),
        MapSimilarity(),
    ],
    ids=lambda analysis: analysis.kind,
)
def test_a_dry_run_on_four_examples_has_the_same_columns_and_rows(analysis, session, sets):
    real = analysis.table(session)
    few = {name: examples.select(torch.arange(4)).as_set() for name, examples in sets.items()}
    sizes = {name: len(examples) for name, examples in sets.items()}
    table = analysis.table(DryRun(sizes, models=session.models, example_sets=few))
    assert table.dtypes.equals(real.dtypes)
    assert len(table) == len(real)
    labels = [
        c
        for c in ("place", "group", "type", "a", "b", "carry", "model")
        if c in table and analysis.kind != "heuristics"
    ]
    labels = [c for c in labels if not (c == "type" and analysis.kind == "activation_map")]
    pd.testing.assert_frame_equal(table[labels], real[labels])
