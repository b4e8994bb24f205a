"""The figures: they show the numbers of the table, say what they show, and refuse what would
mislead."""

from __future__ import annotations

import ast
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import mechmem.report.figures
from mechmem.report.figures.bars import Bars
from mechmem.report.figures.curves import Curves
from mechmem.report.figures.embed import division
from mechmem.report.figures.figure import Figure
from mechmem.report.figures.heatmap import Heatmap
from mechmem.report.figures.rows import averaged, in_order, shown
from mechmem.report.figures.scatter import Scatter
from mechmem.report.figures.style import COLOURS
from mechmem.report.figures.top_k_curve import TopKCurve

NAN = float("nan")


def effects(**columns) -> pd.DataFrame:
    """Rows for every combination of the lists, over seeds 0 and 1; `value` counts up in
    hundredths."""
    names = ["seed", *columns]
    rows = [
        dict(zip(names, row, strict=True)) for row in itertools.product([0, 1], *columns.values())
    ]
    half = len(rows) // 2
    extra = {"examples": "noisy", "prefix": "given", "measure": "accuracy_true", "n": 10}
    for i, row in enumerate(rows):
        value = (i % half) / 100 + 0.02 * row["seed"]
        row |= {k: v for k, v in extra.items() if k not in row}
        row |= {
            "value": value,
            "low": value - 0.01,
            "high": value + 0.03,
            "recovery": 2 * value,
            "per_example": [0, 1],
        }
    return pd.DataFrame(rows)


def dynamics() -> pd.DataFrame:
    rows = [
        {"seed": seed, "step": step, "curve": curve, "value": step / 200 + 0.01 * seed}
        for seed, step, curve in itertools.product(
            [0, 1], [0, 100], ["clean", "memorised", "chance"]
        )
    ]
    phases = [
        {"seed": seed, "step": 100 * seed, "curve": "phase", "label": "generalised"}
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows + phases)


def neurons() -> pd.DataFrame:
    rows = [(0, 0, 0, 1.0, 2.0), (0, 0, 1, 1.5, 1.0), (0, 1, 0, 3.0, 0.5)]
    return pd.DataFrame(rows, columns=["seed", "layer", "neuron", "shift_noisy", "shift_clean"])


GRID = effects(layer=[0, 1], position=["a1", "=", "s0"])
CONDITIONS = effects(
    layer=[0, 1], condition=["intervened", "control"], site=["neurons", "attn_out"]
)
TOP_K = effects(k=[0, 1, 10], condition=["top", "random"], layer=[0, 1])

CASES = {
    "curves": (Curves(table="dynamics", title="T", caption="C"), dynamics()),
    "heatmap": (
        Heatmap(table="patch_grid", x="position", y="layer", where={"layer": (0, 1)}),
        GRID,
    ),
    "bars": (Bars(table="patch", x="layer", facet="site", where={"examples": "noisy"}), CONDITIONS),
    "top_k_curve": (
        TopKCurve(table="top_k", facet="layer", where={"k": (0, 1, 10), "seed": (0, 1)}),
        TOP_K,
    ),
    "scatter": (Scatter(table="neuron_shift", x="shift_clean", y="shift_noisy"), neurons()),
}
every_figure = pytest.mark.parametrize(("figure", "table"), CASES.values(), ids=CASES)


def traces(drawn: go.Figure, group: str) -> list:
    return [
        trace for trace in drawn.data if trace.legendgroup == group and trace.hoverinfo != "skip"
    ]


def test_every_kind_is_tested():
    elsewhere = {"circuit_graph", "faithfulness_curve"}  # in test_figures_circuits.py
    assert set(Figure.kinds()) == set(CASES) | elsewhere | {
        "activation_maps"
    }  # in test_figures_maps.py


@every_figure
def test_the_spec_makes_a_round_trip(figure, table):
    again = Figure.model_validate(json.loads(json.dumps(figure.block())))
    assert again == figure
    assert hash(again) == hash(figure)
    assert type(again.where.get("layer", ())) is tuple


@every_figure
def test_axes_have_titles(figure, table):
    layout = figure.draw(table).layout
    assert layout.xaxis.title.text
    assert layout.yaxis.title.text


@every_figure
def test_drawing_is_deterministic_and_leaves_the_table_alone(figure, table):
    before = table.copy(deep=True)
    assert division(figure.draw(table), "f") == division(figure.draw(table), "f")
    pd.testing.assert_frame_equal(table, before)


@every_figure
def test_it_says_over_which_seeds(figure, table):
    assert "seed" in figure.draw(table).layout.title.subtitle.text


@every_figure
def test_an_unknown_column_is_named_with_those_there_are(figure, table):
    for wrong in (
        figure.model_copy(update={"where": {"laier": 1}}),
        figure.model_copy(update={"where": {"per_example": 1}}),
    ):
        with pytest.raises(ValueError, match="no column"):
            wrong.draw(table)
    with pytest.raises(ValueError, match=rf"no column '{figure.columns[1]}'"):
        figure.draw(table.drop(columns=figure.columns[1]))


@every_figure
def test_a_value_that_no_row_has_is_named_with_those_there_are(figure, table):
    for wanted in (7, (0, 7)):
        with pytest.raises(ValueError, match="seed 7; choose from 0"):
            figure.model_copy(update={"where": {"seed": wanted}}).draw(table)
    with pytest.raises(ValueError, match="no rows"):
        figure.draw(table.head(0))


@every_figure
def test_a_page_holds_no_address_of_plotly_s_server(figure, table):
    assert "sendcharttocloud" in figure.draw(table).layout.template.layout.modebar.remove
    assert "http" not in division(figure.draw(table), "f")


def test_where_narrows_step_by_step():
    figure = Heatmap(
        table="t", x="position", y="layer", where={"layer": 0, "position": ("a1", "=")}
    )
    assert set(figure.rows(GRID)["position"]) == {"a1", "="}
    odd = GRID[(GRID["layer"] == 1) | (GRID["position"] != "a1")]
    with pytest.raises(ValueError, match="no row is left with position 'a1'; choose from =, s0"):
        figure.rows(odd)


def test_curves_are_one_line_for_each_curve_and_seed():
    drawn = Curves(table="d").draw(dynamics())
    first, second = traces(drawn, "memorised")
    assert (list(first.x), list(first.y)) == ([0, 100], [0, 0.5])
    assert list(second.y) == pytest.approx([0.01, 0.51])
    assert first.line.color == second.line.color == COLOURS["memorised"]
    assert [t.showlegend for t in (first, second)] == [True, False]
    assert "held-out" not in "".join(t.name for t in drawn.data)
    assert len(drawn.data) == 6
    assert drawn.layout.yaxis.tickformat == ".0%"


def test_curves_mark_each_phase_at_each_seed_s_step():
    layout = Curves(table="d").draw(dynamics()).layout
    assert [shape.x0 for shape in layout.shapes] == [0, 100]
    assert [note.text for note in layout.annotations] == ["generalised<br>step 0 to 100"]
    without = dynamics()[lambda table: table["curve"] != "phase"].drop(columns="label")
    assert not Curves(table="d").draw(without).layout.shapes


def test_labels_of_close_phases_are_stacked():
    mark = {"seed": 0, "step": 55, "curve": "phase", "label": "memorised"}
    table = pd.concat([dynamics(), pd.DataFrame([mark])])
    assert [
        note.text.count("<br>") for note in Curves(table="d").draw(table).layout.annotations
    ] == [1, 3]


def test_curves_leave_out_repeated_points_and_the_ends_of_training():
    table = dynamics().assign(label=lambda table: table["label"].fillna(""))
    again = table[(table["step"] == 100) & (table["curve"] != "phase")].assign(label="final")
    mark = pd.DataFrame(
        [{"seed": 0, "step": 100, "curve": "phase", "label": "final", "value": 100.0}]
    )
    drawn = Curves(table="d").draw(pd.concat([table, again, mark], ignore_index=True))
    assert drawn == Curves(table="d").draw(table)


def test_curves_refuse_two_trainings_in_one_line():
    two = pd.concat([dynamics().assign(training=name) for name in ("a", "b")])
    with pytest.raises(ValueError, match=r"they differ in training \(a, b\)"):
        Curves(table="d").draw(two)


def test_a_heatmap_shows_the_mean_over_seeds():
    cells, undefined = Heatmap(table="t", x="position", y="layer").draw(GRID).data
    assert (list(cells.x), list(cells.y)) == (["a1", "=", "s0"], ["0", "1"])
    np.testing.assert_allclose(np.array(cells.z, float), [[0.01, 0.02, 0.03], [0.04, 0.05, 0.06]])
    assert (cells.zmin, cells.zmax, cells.texttemplate) == (0, 1, "%{z:.2f}")
    assert np.isnan(np.array(undefined.z, float)).all()
    assert "seed: 0, 1" in cells.hovertext[0][0]
    assert "per_example" not in cells.hovertext[0][0]


@pytest.mark.parametrize(
    "look", [{"value": "recovery"}, {"where": {"measure": "logit_difference"}}]
)
def test_what_has_a_sign_is_drawn_around_zero(look):
    table = GRID.assign(
        measure="logit_difference", value=GRID["value"] * 100, recovery=GRID["value"] * 100
    )
    cells = Heatmap(table="t", x="position", y="layer", **look).draw(table).data[0]
    assert (cells.zmin, cells.zmax) == pytest.approx((-6, 6))


def test_a_small_recovery_looks_small():
    assert (
        Heatmap(table="t", x="position", y="layer", value="recovery").draw(GRID).data[0].zmax == 1
    )


def test_an_undefined_cell_is_grey_and_a_missing_one_is_empty():
    table = GRID[(GRID["layer"] == 0) | (GRID["position"] != "s0")]
    table = table.assign(recovery=table["recovery"].where(table["position"] != "="))
    cells, undefined = (
        Heatmap(table="t", x="position", y="layer", value="recovery").draw(table).data
    )
    np.testing.assert_array_equal(np.isnan(np.array(cells.z, float)), [[0, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(np.array(undefined.z, float) == 1, [[0, 1, 0], [0, 1, 0]])
    assert [list(row) for row in undefined.text] == [["", "undefined", ""], ["", "undefined", ""]]


def test_a_recovery_that_one_seed_lacks_is_the_mean_of_the_others():
    table = GRID.assign(recovery=GRID["recovery"].where(GRID["seed"] == 0))
    cells = Heatmap(table="t", x="position", y="layer", value="recovery").draw(table).data[0]
    np.testing.assert_allclose(np.array(cells.z, float), [[0, 0.02, 0.04], [0.06, 0.08, 0.1]])


def test_layers_go_up_in_whole_numbers_and_names_are_read_downwards():
    table = pd.concat([effects(layer=[10.0, 2.0], site=["neurons", "attn_out"])])
    drawn = Heatmap(table="t", x="site", y="layer").draw(table)
    assert list(drawn.data[0].y) == ["2", "10"]
    assert drawn.layout.yaxis.autorange is True
    assert Heatmap(table="t", x="layer", y="site").draw(table).layout.yaxis.autorange == "reversed"


def test_many_cells_carry_no_numbers():
    table = effects(layer=list(range(15)), head=list(range(14)))
    assert Heatmap(table="t", x="head", y="layer").draw(table).data[0].texttemplate is None


def test_a_heatmap_refuses_rows_that_would_be_hidden():
    with pytest.raises(
        ValueError,
        match=r"2 rows for layer 0, position a1, seed 0: they differ in prefix \(given, true\)",
    ):
        Heatmap(table="t", x="position", y="layer").draw(
            pd.concat([GRID, GRID.assign(prefix="true")])
        )
    with pytest.raises(ValueError, match="rows without a layer"):
        Heatmap(table="t", x="position", y="layer").draw(pd.concat([GRID, GRID.assign(layer=NAN)]))


def test_bars_show_means_with_the_seeds_intervals():
    drawn = Bars(table="t", x="layer", where={"site": "neurons"}).draw(CONDITIONS)
    intervened, control = drawn.data
    assert (intervened.name, control.name) == ("intervened", "control (matched, random)")
    assert list(intervened.x) == ["0", "1"]
    assert list(intervened.y) == pytest.approx([0.01, 0.05])
    assert list(intervened.error_y.array) == pytest.approx([0.03, 0.03])
    assert list(intervened.error_y.arrayminus) == pytest.approx([0.01, 0.01])
    assert control.marker.color == COLOURS["control"]
    assert drawn.layout.yaxis.title.text == "accuracy, true label (fraction)"
    subtitle = drawn.layout.title.subtitle.text.replace("\xa0", " ")
    assert (
        subtitle == "site neurons · examples noisy · prefix given · mean of 2 seeds"
        " · whiskers: 95 % interval"
    )


def test_a_recovery_does_not_borrow_the_interval_of_the_value():
    drawn = Bars(table="t", x="layer", value="recovery", where={"site": "neurons"}).draw(CONDITIONS)
    assert list(drawn.data[0].y) == pytest.approx([0.02, 0.1])
    assert drawn.data[0].error_y.array is None
    assert "interval" not in drawn.layout.title.subtitle.text


def test_each_facet_has_a_panel_and_the_legend_names_each_condition_once():
    drawn = Bars(table="t", x="layer", facet="site", facet_row="examples").draw(
        pd.concat([CONDITIONS, CONDITIONS.assign(examples="clean")])
    )
    heads = [
        "noisy instances, neurons",
        "noisy instances, attn_out",
        "clean instances, neurons",
        "clean instances, attn_out",
    ]
    assert [note.text for note in drawn.layout.annotations] == heads
    assert [trace.name for trace in drawn.data if trace.showlegend] == [
        "intervened",
        "control (matched, random)",
    ]
    assert len(drawn.data) == 8


@pytest.mark.parametrize("layers", [[0, 1], ["0", "1", "0+1"]])
def test_the_head_of_a_panel_says_what_its_number_is_of(layers):
    """A column that also holds sets of layers holds words."""
    drawn = TopKCurve(table="t", facet="layer").draw(
        effects(k=[0, 1], condition=["top"], layer=layers)
    )
    assert [note.text for note in drawn.layout.annotations] == [
        f"layer {layer}" for layer in layers
    ]


def test_a_row_without_x_is_a_line_in_its_panels():
    level = {
        "condition": "baseline",
        "layer": NAN,
        "site": None,
        "value": 0.03,
        "examples": "noisy",
        "measure": "accuracy_true",
    }
    table = pd.concat([CONDITIONS, pd.DataFrame([level | {"seed": seed} for seed in (0, 1)])])
    drawn = Bars(table="t", x="layer", facet="site").draw(table)
    assert [shape.y0 for shape in drawn.layout.shapes] == [0.03, 0.03]
    assert [shape.showlegend for shape in drawn.layout.shapes] == [True, False]
    assert len(drawn.data) == 4


def test_measures_share_an_axis_only_with_one_unit():
    both = pd.concat(
        [CONDITIONS.assign(measure=name) for name in ("accuracy_true", "accuracy_given")]
    )
    where = {"site": "neurons", "condition": "intervened"}
    figure = Bars(table="t", x="layer", colour="measure", where=where)
    assert figure.draw(both).layout.yaxis.title.text == "accuracy (fraction)"
    mixed = pd.concat([CONDITIONS, CONDITIONS.assign(measure="logit_difference")])
    with pytest.raises(ValueError, match="share no unit"):
        figure.draw(mixed)
    assert figure.draw(mixed.assign(unit="bits")).layout.yaxis.title.text == "accuracy (bits)"


def test_top_k_curves_have_a_band_around_the_mean():
    drawn = TopKCurve(table="t", where={"layer": 1}).draw(TOP_K)
    low, high, line = (trace for trace in drawn.data if trace.legendgroup == "top")
    assert list(line.x) == pytest.approx(np.log1p([0, 1, 10]))
    assert list(line.y) == pytest.approx([0.02, 0.06, 0.1])
    assert list(low.y) == pytest.approx([0.01, 0.05, 0.09])
    assert list(high.y) == pytest.approx([0.05, 0.09, 0.13])
    assert high.fill == "tonexty"
    assert list(drawn.layout.xaxis.ticktext) == ["0", "1", "10"]
    assert list(TopKCurve(table="t", scale="linear", where={"layer": 1}).draw(TOP_K).data[2].x) == [
        0,
        1,
        10,
    ]


def test_top_k_tick_labels_do_not_run_into_each_other():
    drawn = TopKCurve(table="t").draw(effects(k=list(range(0, 200, 5)), condition=["top"]))
    places = np.array(drawn.layout.xaxis.tickvals)
    assert 2 < len(places) < 20
    assert np.diff(places).min() >= 0.035 * places.max() * 0.9


def test_a_scatter_has_a_point_for_each_row_and_the_line_of_equals():
    lower, upper, equal = Scatter(table="t", x="shift_clean", y="shift_noisy").draw(neurons()).data
    assert (list(lower.x), list(lower.y)) == ([2.0, 1.0], [1.0, 1.5])
    assert (list(upper.x), list(upper.y)) == ([0.5], [3.0])
    assert (list(equal.x), list(equal.y)) == ([0.5, 3.0], [0.5, 3.0])
    assert (
        lower.hovertext[1]
        == "seed: 0<br>layer: 0<br>neuron: 1<br>shift_noisy: 1.5<br>shift_clean: 1"
    )
    assert (
        len(
            Scatter(table="t", x="shift_clean", y="shift_noisy", diagonal=False)
            .draw(neurons())
            .data
        )
        == 2
    )


def test_a_nullable_recovery_is_undefined_where_it_is_missing():
    table = GRID.assign(recovery=GRID["recovery"].where(GRID["position"] != "=").astype("Float64"))
    cells = Heatmap(table="t", x="position", y="layer", value="recovery").draw(table).data[0]
    np.testing.assert_array_equal(np.isnan(np.array(cells.z, float)), [[0, 1, 0], [0, 1, 0]])
    none = CONDITIONS.assign(recovery=None)
    bars = Bars(table="t", x="layer", facet="site", value="recovery").draw(none).data
    assert all(np.isnan(trace.y).all() for trace in bars)


def test_lists_other_than_per_example_are_said_in_words():
    table = CONDITIONS.assign(neurons=[np.array([3, 17])] * len(CONDITIONS))
    drawn = Bars(table="t", x="layer", facet="site").draw(table)
    assert "neurons 3, 17" in drawn.layout.title.subtitle.text.replace("\xa0", " ")


def test_in_order_and_shown():
    assert in_order(pd.Series([3, 1, 3])) == [1, 3]
    assert in_order(pd.Series(["s1", "=", None, "s1"])) == ["s1", "="]
    assert [shown(value) for value in (1.0, 0.12345, NAN, None, True, "x")] == [
        "1",
        "0.123",
        "–",
        "–",
        "True",
        "x",
    ]


def test_averaging_keeps_rows_without_a_key():
    table = pd.DataFrame({"seed": [0, 1], "layer": [NAN, NAN], "value": [0.1, 0.3]})
    assert averaged(table, ["layer", None])["value"].tolist() == pytest.approx([0.2])


@pytest.mark.parametrize(
    "path",
    sorted(Path(mechmem.report.figures.__file__).parent.glob("*.py")),
    ids=lambda path: path.stem,
)
def test_figures_import_no_model(path):
    tree = ast.parse(path.read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    ours = [str(name) for name in modules if str(name).startswith("mechmem")]
    allowed = ("mechmem.report.figures.", "mechmem.spec.")
    assert [name for name in ours if not name.startswith(allowed)] == []
    assert not {"torch", "transformer_lens"} & {str(name).split(".")[0] for name in modules}


def test_axes_say_the_unit_that_all_rows_state():
    table = pd.DataFrame(
        {"seed": 0, "layer": [0, 1], "value": [0.5, 2.0], "exact": [1.0, 2.5], "unit": "nats"}
    )
    layout = Scatter(table="t", x="exact", y="value").draw(table).layout
    assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("exact (nats)", "value (nats)")
    mixed = table.assign(unit=["nats", "fraction"])
    assert Scatter(table="t", x="exact", y="value").draw(mixed).layout.xaxis.title.text == "exact"
