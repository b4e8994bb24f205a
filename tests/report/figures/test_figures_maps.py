"""ActivationMaps: the colours are the activations, on one scale a neuron, and marks are where the
instances are."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest

from mechmem.report.figures.activation_maps import ActivationMaps
from mechmem.report.figures.embed import division
from mechmem.report.figures.figure import Figure
from mechmem.spec.errors import InputError

NAN = float("nan")


def maps() -> pd.DataFrame:
    """Neuron 5 is a at `before` and 2 a at `after`; neuron 7 is silent; one memorised instance, in
    cell (3, 4)."""
    rows = []
    for model, order, a, b, carry in itertools.product(
        ["before", "after"], [0, 1], range(10), range(10), [0, 1]
    ):
        value = a * (1 + (model == "after")) * (order == 0) + 0.25 * carry
        is_here = (a, b) == (3, 4)
        said = (
            {"type": "none", "rule": ""}
            if order
            else {"type": "operand_range", "rule": "a in 7..9"}
        )
        rows.append(
            {
                **{
                    "seed": 0,
                    "model": model,
                    "order": order,
                    "layer": 2,
                    "neuron": (5, 7)[order],
                    "place": "s1",
                },
                **said,
                **{
                    "a": a,
                    "b": b,
                    "carry": carry,
                    "value": NAN if (a, b) == (9, 9) else float(value),
                    "n": 12,
                },
                **{"noisy_value": 20.0 * (order == 0) if is_here else NAN, "n_noisy": int(is_here)},
            }
        )
    return pd.DataFrame(rows)


TABLE = maps()
FIGURE = ActivationMaps(table="maps", where={"carry": 0})


def of(drawn, kind):
    return [trace for trace in drawn.data if trace.type == kind]


def test_before_stands_above_after_and_each_neuron_has_a_column():
    drawn = FIGURE.draw(TABLE)
    heads = [note.text for note in drawn.layout.annotations]
    assert heads == [
        "before, layer 2 neuron 5<br>a in 7..9 (operand range)",
        "before, layer 2 neuron 7<br>no rule",
        "after, layer 2 neuron 5<br>a in 7..9 (operand range)",
        "after, layer 2 neuron 7<br>no rule",
    ]
    assert [trace.yaxis for trace in of(drawn, "heatmap")] == ["y", "y2", "y3", "y4"]
    assert drawn.layout.yaxis.domain[0] > drawn.layout.yaxis3.domain[1]
    assert (drawn.layout.xaxis3.title.text, drawn.layout.yaxis3.title.text) == (
        "a (digit)",
        "b (digit)",
    )
    assert (drawn.layout.xaxis.title.text, drawn.layout.yaxis.title.text) == (None, "b (digit)")


def test_colours_are_activations_on_a_scale_that_a_neuron_s_panels_share():
    before, silent, after, _ = of(FIGURE.draw(TABLE), "heatmap")
    z = np.array(before.z, float)
    assert (list(before.x), list(before.y), z.shape) == (list(range(10)), list(range(10)), (10, 10))
    np.testing.assert_allclose(
        z[4], np.arange(10) / 20
    )  # 0 to 20 is the range of the neuron, marks included
    np.testing.assert_allclose(np.array(after.z, float)[4], np.arange(10) / 10)
    assert np.isnan(z[9, 9])
    assert np.nanmax(np.abs(np.array(silent.z, float))) == 0
    layout = FIGURE.draw(TABLE).layout
    assert (layout.coloraxis.cmin, layout.coloraxis.cmax) == (0, 1)
    assert "range" in layout.coloraxis.colorbar.title.text


def test_memorised_instances_are_marked_where_they_are_with_their_own_activation():
    drawn = FIGURE.draw(TABLE)
    *marks, legend = of(drawn, "scatter")
    assert [(list(m.x), list(m.y)) for m in marks] == [([3], [4])] * 4
    assert [list(m.marker.color) for m in marks] == [[1.0], [0.0], [1.0], [0.0]]
    assert [m.showlegend for m in marks] == [False] * 4
    assert legend.name == "memorised instances in the cell"
    assert "noisy_value: 20" in marks[0].hovertext[0]
    assert "place s1" in drawn.layout.title.subtitle.text.replace("\xa0", " ")
    assert "seed 0 only" in drawn.layout.title.subtitle.text.replace("\xa0", " ")


def test_what_would_hide_maps_is_refused():
    with pytest.raises(InputError, match="holds maps of carry 0, 1; choose one with `where`"):
        ActivationMaps(table="maps").draw(TABLE)
    with pytest.raises(InputError, match="holds maps of seed 0, 1"):
        FIGURE.draw(pd.concat([TABLE, TABLE.assign(seed=1)]))
    with pytest.raises(InputError, match="several maps of a neuron"):
        FIGURE.draw(pd.concat([TABLE, TABLE.assign(layer=1)]))
    with pytest.raises(InputError, match="no column 'rule'"):
        FIGURE.draw(TABLE.drop(columns="rule"))


def test_a_map_without_a_memorised_or_any_instance_is_drawn():
    drawn = FIGURE.draw(TABLE.assign(noisy_value=NAN, value=NAN))
    assert np.isnan(np.array(of(drawn, "heatmap")[0].z, float)).all()
    assert [len(m.x) for m in of(drawn, "scatter")] == [0] * 4 + [1]


def test_it_makes_a_round_trip_and_draws_the_same_bytes():
    assert Figure.model_validate(json.loads(json.dumps(FIGURE.block()))) == FIGURE
    before = TABLE.copy(deep=True)
    assert division(FIGURE.draw(TABLE), "f") == division(FIGURE.draw(TABLE), "f")
    pd.testing.assert_frame_equal(TABLE, before)
