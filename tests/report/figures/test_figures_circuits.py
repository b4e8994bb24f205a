"""The figures of circuits: what is drawn is what the table says."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from mechmem.report.figures.circuit_graph import CircuitGraph, connected
from mechmem.report.figures.embed import division
from mechmem.report.figures.faithfulness_curve import FaithfulnessCurve
from mechmem.report.figures.figure import Figure
from mechmem.report.figures.style import BLUE, VERMILLION

FRACTIONS = (0.0, 0.01, 0.1, 1.0)
UNIT = "0 corrupted, 1 full run"


def curves() -> pd.DataFrame:
    """Two seeds; the circuit is at 0, 0.3, 0.6 and 1 in the first, 0.02 higher in the second."""
    rows = []
    for seed, condition, (i, k) in itertools.product(
        (0, 1), ("circuit", "random"), enumerate(FRACTIONS)
    ):
        value = (0.0, 0.3, 0.6, 1.0)[i] * (1 if condition == "circuit" else 0.1) + 0.02 * seed
        rows.append(
            {
                "seed": seed,
                "condition": condition,
                "k": k,
                "measure": "faithfulness",
                "unit": UNIT,
                "value": value,
            }
        )
    for seed, condition in itertools.product((0, 1), ("circuit", "random")):
        for measure, value in (("cpr", 0.8), ("cmd", 0.2)):
            value = (value if condition == "circuit" else 1 - value) + 0.02 * seed
            rows.append(
                {
                    "seed": seed,
                    "condition": condition,
                    "k": np.nan,
                    "measure": measure,
                    "unit": "area",
                    "value": value,
                }
            )
    table = pd.DataFrame(rows).assign(examples="noisy", method="eap_ig", n=10)
    return table.assign(low=table["value"] - 0.01, high=table["value"] + 0.03)


def edges() -> pd.DataFrame:
    """One layer of two heads and an MLP."""
    rows = [
        ("embed", "a0.h0.q", -1, 0, "q", 0.1),
        ("embed", "a0.h0.v", -1, 0, "v", 2.0),
        ("embed", "a0.h1.k", -1, 0, "k", -1.5),
        ("embed", "m0", -1, 0, "mlp", 0.0),
        ("embed", "logits", -1, 1, "logits", 0.5),
        ("a0.h0", "m0", 0, 0, "mlp", -4.0),
        ("a0.h1", "m0", 0, 0, "mlp", 0.2),
        ("a0.h0", "logits", 0, 1, "logits", 0.3),
        ("a0.h1", "logits", 0, 1, "logits", 0.05),
        ("m0", "logits", 0, 1, "logits", 3.0),
    ]
    table = pd.DataFrame(
        rows, columns=["source", "target", "source_layer", "layer", "into", "eap_ig"]
    )
    return table.assign(
        seed=0, examples="noisy", measure="logit_given_less_pair", unit="nats", spearman_eap=0.5
    )


CASES = {
    "faithfulness_curve": (FaithfulnessCurve(table="circuit", title="T"), curves()),
    "circuit_graph": (CircuitGraph(table="edge_scores", title="T"), edges()),
}
every_figure = pytest.mark.parametrize(("figure", "table"), CASES.values(), ids=CASES)


def lines(drawn: go.Figure) -> list[go.Scatter]:
    return [trace for trace in drawn.data if trace.mode == "lines" and trace.hovertext]


def words(drawn: go.Figure) -> str:
    return drawn.layout.title.subtitle.text.replace("\xa0", " ").replace("<br>", " ")


@every_figure
def test_the_spec_makes_a_round_trip(figure, table):
    assert Figure.model_validate(json.loads(json.dumps(figure.block()))) == figure


@every_figure
def test_drawing_is_deterministic_and_leaves_the_table_alone(figure, table):
    before = table.copy(deep=True)
    assert division(figure.draw(table), "f") == division(figure.draw(table), "f")
    pd.testing.assert_frame_equal(table, before)


@every_figure
def test_it_says_over_which_seeds_and_examples(figure, table):
    assert "seed" in words(figure.draw(table))
    assert "examples noisy" in words(figure.draw(table))


@every_figure
def test_an_unknown_column_is_named(figure, table):
    with pytest.raises(ValueError, match=rf"no column '{figure.columns[-1]}'"):
        figure.draw(table.drop(columns=figure.columns[-1]))


def test_faithfulness_is_drawn_by_the_share_of_edges_with_a_place_for_none():
    drawn = FaithfulnessCurve(table="t").draw(curves())
    circuit, random = (trace for trace in drawn.data if trace.hoverinfo == "text")
    assert list(circuit.y) == pytest.approx([0.01, 0.31, 0.61, 1.01])
    assert list(random.y) == pytest.approx([0.01, 0.04, 0.07, 0.11])
    assert list(circuit.x) == pytest.approx(np.log1p([0, 10, 100, 1000]))
    assert list(drawn.layout.xaxis.ticktext) == ["0 %", "1 %", "10 %", "100 %"]
    assert drawn.layout.yaxis.title.text == "faithfulness (0 corrupted, 1 full run)"
    assert sorted(shape.y0 for shape in drawn.layout.shapes) == [0, 1]


def test_the_scale_may_be_linear_and_the_edges_be_counted():
    linear = FaithfulnessCurve(table="t", scale="linear").draw(curves())
    assert list(linear.data[2].x) == list(FRACTIONS)
    assert linear.layout.xaxis.title.text == "share of the edges that is kept"
    counted = FaithfulnessCurve(table="t", x="n_edges").draw(
        curves().assign(n_edges=lambda t: 200 * t["k"])
    )
    assert list(counted.data[2].x) == pytest.approx(np.log1p([0, 2, 20, 200]))
    assert list(counted.layout.xaxis.ticktext) == ["0", "2", "20", "200"]
    assert counted.layout.xaxis.title.text == "n edges (log scale)"


def test_areas_stand_in_the_legend_of_one_panel_only():
    drawn = FaithfulnessCurve(table="t").draw(curves())
    shown = [trace.name for trace in drawn.data if trace.showlegend is not False]
    assert shown == ["circuit: CPR 0.81, CMD 0.21", "random (control): CPR 0.21, CMD 0.81"]
    both = pd.concat([curves(), curves().assign(examples="clean")])
    panels = FaithfulnessCurve(table="t", facet="examples").draw(both)
    assert [trace.name for trace in panels.data if trace.showlegend is not False] == [
        "circuit",
        "random (control)",
    ]
    without = FaithfulnessCurve(table="t").draw(
        curves()[lambda table: table["measure"] == "faithfulness"]
    )
    assert {trace.name for trace in without.data if trace.showlegend is not False} == {
        "circuit",
        "random (control)",
    }


def test_a_table_without_faithfulness_is_refused():
    with pytest.raises(ValueError, match="no row is left with measure 'faithfulness'"):
        FaithfulnessCurve(table="t", where={"measure": "cpr"}).draw(curves())


def test_the_top_connected_edges_are_drawn_by_size_and_sign():
    drawn = CircuitGraph(table="t", n=4).draw(edges())  # embed -> a0.h1.k leads nowhere
    found = {
        (t.hovertext.split("source: ")[1].split("<br>")[0], t.line.color): t.line.width
        for t in lines(drawn)
    }
    assert found == {
        ("embed", BLUE): pytest.approx(3.9),
        ("m0", BLUE): pytest.approx(5.45),
        ("a0.h0", VERMILLION): 7.0,
    }
    assert "top 4 of 10 edges by |eap_ig| of logit given less pair (nats), 3 connected" in words(
        drawn
    )
    assert [t.name for t in lines(drawn) if t.showlegend] == ["useful", "works against the metric"]


def test_edges_run_between_their_nodes_and_arrive_at_their_ports():
    drawn = CircuitGraph(table="t", n=4).draw(edges())
    boxes = {a.text: (a.x, a.y) for a in drawn.layout.annotations if a.text not in "qkv"}
    assert set(boxes) == {"embed", "logits", "a0.h0", "a0.h1", "m0"}
    assert boxes["embed"][1] < boxes["a0.h0"][1] < boxes["m0"][1] < boxes["logits"][1]
    value = next(t for t in lines(drawn) if "target: a0.h0.v" in t.hovertext)
    assert (value.x[0], value.x[-1]) == pytest.approx((boxes["embed"][0], boxes["a0.h0"][0] + 0.2))
    assert boxes["embed"][1] < value.y[0] < value.y[-1] < boxes["a0.h0"][1]
    faint = {
        a.text for a in drawn.layout.annotations if a.font.size == 12 and a.font.color == "#a9b0b9"
    }
    assert faint == {"a0.h1"}


def test_connected_edges_by_hand():
    table = edges().assign(
        node=lambda t: [v.rpartition(".")[0] if "." in v else v for v in t["target"]]
    )
    assert len(connected(table)) == 10
    some = table[table["source"] != "m0"]
    assert set(connected(some)["target"]) == {"a0.h0.q", "a0.h0.v", "a0.h1.k", "logits"}
    assert connected(table[table["source"] != "embed"]).empty


def test_a_graph_without_mlps_or_without_a_circuit_is_drawn():
    no_mlp = edges()[lambda table: (table["into"] != "mlp") & (table["source"] != "m0")]
    assert len(lines(CircuitGraph(table="t").draw(no_mlp))) == 6
    drawn = CircuitGraph(table="t", n=1).draw(edges())
    assert not lines(drawn)
    assert "0 connected" in words(drawn)


def test_several_graphs_are_refused():
    both = pd.concat([edges(), edges().assign(seed=1)])
    with pytest.raises(ValueError, match=r"several graphs \(seed\); choose one"):
        CircuitGraph(table="t").draw(both)
    assert lines(CircuitGraph(table="t", where={"seed": 1}).draw(both))
