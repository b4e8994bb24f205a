"""Verdicts: preconditions, attainable ranges, missing seeds, several conditions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from mechmem.experiment.claims import Claim
from mechmem.experiment.measured import Measured, OfSeed, pooled_spreads
from mechmem.experiment.quantities import Quantity, Tables
from mechmem.spec.errors import InputError

NAN = float("nan")


def hits(n_right: int, n: int = 100) -> list[float]:
    return [1.0] * n_right + [0.0] * (n - n_right)


def table(rows: dict[str, list[list[float]]], **columns: Any) -> pd.DataFrame:
    """{condition: values by seed (1, 2 ...) and example}."""
    found = [
        {"condition": condition, "seed": seed, "value": float(np.mean(values))}
        | {"examples": "noisy", "measure": "accuracy_given", "unit": "fraction"}
        | {"per_example": np.array(values), "n": len(values)}
        for condition, seeds in rows.items()
        for seed, values in enumerate(seeds, start=1)
    ]
    return pd.DataFrame(found).assign(**columns)


def measured(rows: dict[str, list[list[float]]], **quantities: Any) -> dict[str, Measured]:
    """A quantity for each condition, and those that are given as blocks."""
    plain = {name: {"table": "t", "where": {"condition": name}} for name in rows}
    built = {name: Quantity.model_validate(q) for name, q in (plain | quantities).items()}
    source = Tables({"t": table(rows)}, built)
    return {name: quantity.measure(source) for name, quantity in built.items()}


def claim(quantity: str = "effect", at_least: float = 0.3, **fields: Any) -> Claim:
    holds = [{"quantity": quantity, "at_least": at_least}]
    return Claim.model_validate({"id": "C", "says": "", "holds_when": holds} | fields)


HALF = [hits(50), hits(55), hits(45)]


def test_a_precondition_that_holds_in_every_seed_lets_the_rule_decide():
    found = measured({"effect": HALF, "memorised": [hits(99), hits(98), hits(100)]})
    needs = [{"quantity": "memorised", "at_least": 0.9}]
    verdict = claim(requires=needs).verdict(found)
    assert verdict["verdict"] == "supported"
    assert verdict["requires"][0]["met"] is True
    assert list(verdict["requires"][0]["found"]) == ["1", "2", "3"]


def test_a_precondition_that_fails_in_one_seed_makes_the_claim_not_testable():
    found = measured({"effect": HALF, "memorised": [hits(99), hits(20), hits(100)]})
    verdict = claim(requires=[{"quantity": "memorised", "at_least": 0.9}]).verdict(found)
    assert verdict["verdict"] == "not testable"
    assert "memorised >= 0.9 fails: seed 2: 0.2 [0.127, 0.292]" in verdict["reason"]


def test_a_precondition_that_is_unclear_in_one_seed_leaves_it_undetermined():
    found = measured({"effect": HALF, "memorised": [hits(99), hits(91), hits(100)]})
    verdict = claim(requires=[{"quantity": "memorised", "at_least": 0.9}]).verdict(found)
    assert verdict["verdict"] == "undetermined"
    assert "unclear in some seed whether memorised >= 0.9" in verdict["reason"]


def test_a_control_at_the_floor_is_a_precondition():
    found = measured({"effect": HALF, "kept": [hits(3), hits(0), hits(1)]})
    asked = claim(requires=[{"quantity": "kept", "at_least": 0.5}], control="kept")
    verdict = asked.verdict(found)
    assert verdict["verdict"] == "not testable"
    assert verdict["control"]["quantity"] == "kept"
    assert verdict["control"]["value"] == pytest.approx(4 / 300)


def test_what_was_attainable_must_reach_the_threshold():
    rows = {"effect": [hits(3)] * 3, "whole": [hits(3), hits(4), hits(2)]}
    verdict = claim(at_least=0.1, attainable="whole").verdict(measured(rows))
    assert verdict["verdict"] == "not testable"
    assert "was attainable, effect >= 0.1 asks for more" in verdict["reason"]
    assert claim(at_least=0.01, attainable="whole").verdict(measured(rows))["verdict"] != (
        "not testable"
    )


SHARE = {"table": "t", "where": {"condition": "effect"}, "share_of": "whole"}


def test_a_share_of_what_was_attainable():
    rows = {"effect": HALF, "whole": [hits(80), hits(85), hits(75)]}
    share = measured(rows, share=SHARE)["share"]
    assert share.value == pytest.approx(150 / 240)
    assert share.low < share.value < share.high
    assert claim("share", 0.3).verdict(measured(rows, share=SHARE))["verdict"] == "supported"


def test_a_share_of_next_to_nothing_is_not_testable():
    rows = {"effect": [hits(1)] * 3, "whole": [hits(3), hits(4), hits(2)]}
    found = measured(rows, share=SHARE)
    assert np.isnan(found["share"].value)
    verdict = claim("share", 0.3).verdict(found)
    assert verdict["verdict"] == "not testable"
    assert "only 0.03" in verdict["reason"]


def test_a_phase_that_one_seed_never_reached_makes_the_claim_not_testable():
    source = Tables(
        {"t": table({"effect": HALF})}, missing={"t": {4: "never reached phase 'memorised'"}}
    )
    found = {"effect": Quantity(table="t").measure(source)}
    assert found["effect"].n_seeds == 3
    verdict = claim().verdict(found)
    assert verdict["verdict"] == "not testable"
    assert verdict["reason"] == "effect: seed 4 never reached phase 'memorised'"


def test_a_phase_that_no_seed_reached():
    lost = dict.fromkeys((1, 2), "never reached phase 'memorised'")
    source = Tables({"t": pd.DataFrame({"seed": []})}, missing={"t": lost})
    found = Quantity(table="t", where={"condition": "effect"}).measure(source)
    assert (found.n_seeds, dict(found.missing)) == (0, lost)
    assert claim().verdict({"effect": found})["verdict"] == "not testable"


def test_a_seed_without_a_phase_may_count_as_a_number():
    steps = pd.DataFrame(
        {"seed": [1, 1, 2], "label": ["", "generalised", ""], "value": [0.0, 400.0, 0.0]}
    )
    where = {"label": "generalised"}
    never = Quantity(table="t", where=where).measure({"t": steps})
    assert dict(never.missing) == {2: "never reached phase 'generalised'"}
    counted = Quantity(table="t", where=where, if_missing=0.0).measure({"t": steps})
    assert (counted.value, counted.n_seeds, dict(counted.missing)) == (200.0, 2, {})


def test_a_difference_of_differences_is_paired_within_each_set():
    rows = pd.concat(
        [
            table({"x": [values] * 3}, examples=examples, model=model)
            for (examples, model), values in {
                ("noisy", "after"): [3.0, 5.0, 9.0],
                ("noisy", "before"): [2.0, 4.0, 8.0],
                ("clean", "after"): [1.0, 7.0],
                ("clean", "before"): [1.5, 7.5],
            }.items()
        ]
    ).assign(unit="nats")
    gaps = {
        f"gap_{model}": Quantity(
            table="t", where={"model": model, "examples": "noisy"}, minus={"examples": "clean"}
        )
        for model in ("after", "before")
    }
    widened = Quantity(difference=("gap_after", "gap_before"))
    found = widened.measure(Tables({"t": rows}, gaps))
    # noisy rose by 1 in every example and clean fell by 0.5: no example varies
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))


def test_a_median_of_instances_may_be_infinite():
    keep = [[2.0] * 3 + [np.inf] * 17] * 3
    rows = table({"keep": keep}).assign(unit="neurons")
    found = Quantity(table="t", statistic="median").measure({"t": rows})
    assert (found.value, found.low, found.high) == (np.inf, np.inf, np.inf)
    assert claim("keep", 8).verdict({"keep": found})["verdict"] == "supported"


def test_a_median_of_a_look_up_refutes():
    rows = table({"keep": [[1.0] * 18 + [2.0] * 2] * 3}).assign(unit="neurons")
    found = Quantity(table="t", statistic="median").measure({"t": rows})
    assert claim("keep", 8).verdict({"keep": found})["verdict"] == "refuted"


def test_one_model_is_judged_by_its_instances():
    found = Quantity(table="t").measure({"t": table({"effect": [hits(28, 30)]})}, per="instance")
    assert claim().verdict({"effect": found})["verdict"] == "undetermined"
    verdict = claim().verdict({"effect": found}, per="instance")
    assert verdict["verdict"] == "supported"
    assert verdict["reason"] == "over the instances of 1 model: all hold"


@pytest.mark.parametrize(("value", "verdict"), [(0.6, "supported"), (0.0, "refuted")])
def test_a_number_of_one_model_that_is_counted_is_known_exactly(value, verdict):
    curve = pd.DataFrame({"seed": [0], "curve": ["lead"], "value": [value]})
    found = Quantity(table="t").measure({"t": curve}, per="instance")
    assert (found.low, found.high) == (value, value)
    assert claim().verdict({"effect": found}, per="instance")["verdict"] == verdict


def test_twelve_of_twelve_in_three_seeds_have_an_interval():
    found = Quantity(table="t").measure({"t": table({"effect": [hits(12, 12)] * 3})})
    # seeds so near 1 cannot show how far they differ: each one's own interval counts
    assert (found.low, found.high) == (pytest.approx(0.025 ** (1 / 12)), 1.0)


def test_several_conditions_share_the_error_of_a_refutation():
    def of(p: float) -> Measured:
        """A quantity that is below 0.5 with this p."""
        from mechmem.statistics.estimate import Estimate
        from mechmem.statistics.means import Location, t_quantile

        error = 0.1 / t_quantile(np.inf, 1 - p)
        estimate = Estimate(0.4, [Location(0.4, error, np.inf)])
        return Measured(0.4, *estimate.ends(), 5, estimate=estimate)

    holds = [{"quantity": name, "at_least": 0.5} for name in ("a", "b")]
    asked = claim(holds_when=holds)
    assert asked.verdict({"a": of(0.02), "b": of(0.4)})["verdict"] == "undetermined"
    assert asked.verdict({"a": of(0.01), "b": of(0.4)})["verdict"] == "refuted"
    alone = claim(holds_when=holds[:1])
    assert alone.verdict({"a": of(0.02)})["verdict"] == "refuted"


def test_the_spread_of_a_study_is_pooled_by_measure_over_interior_quantities():
    def of(*values: float, measure: str = "m") -> Measured:
        seeds = {seed: OfSeed(value) for seed, value in enumerate(values)}
        return Measured(0.5, 0, 1, 2, by_seed=seeds, measure=measure, limits=(0.0, 1.0))

    inside = [of(0.4, 0.6)] * 5
    edge = of(0.8, 1.0)
    assert pooled_spreads([*inside, edge]) == {"m": pytest.approx(np.sqrt(0.02))}
    assert pooled_spreads([*inside[:4], edge]) == {}
    assert pooled_spreads([*inside[:4], of(0.4, 0.6, measure="other")]) == {}


def test_a_pooled_spread_widens_quiet_quantities():
    rows = {"effect": [hits(50), hits(50), hits(50)]}
    source = {"t": table(rows)}
    quiet = Quantity(table="t").measure(source)
    wide = Quantity(table="t").measure(source, {"accuracy_given": 0.1})
    assert wide.high - wide.low == pytest.approx(2 * 4.3027 * 0.1 / np.sqrt(3), rel=1e-3)
    assert quiet.high - quiet.low < wide.high - wide.low


@pytest.mark.parametrize(
    "fields",
    [
        {"requires": [{"quantity": "effect", "at_most": 0.2}]},
        {
            "holds_when": [
                {"quantity": "effect", "at_least": 0.5},
                {"quantity": "effect", "at_most": 0.5},
            ]
        },
    ],
)
def test_a_rule_that_contradicts_itself_is_refused(fields):
    with pytest.raises(ValidationError, match="no outcome meets both effect"):
        claim(**fields)


@pytest.mark.parametrize("fields", [{}, {"table": "t", "difference": ["a", "b"]}])
def test_a_quantity_has_one_origin(fields):
    with pytest.raises(ValidationError, match="needs one of `table` and `difference`"):
        Quantity(**fields)


def test_a_quantity_that_is_unknown_is_named():
    with pytest.raises(InputError, match="there is no quantity 'whole'"):
        Quantity(table="t", share_of="whole").measure({"t": table({"effect": HALF})})


def test_of_many_rows_the_one_that_led_on_seed_0_is_measured_in_the_others():
    rows = pd.concat(
        [
            table({"x": [hits(40 + layer), hits(90 - 10 * layer), hits(20)]}, layer=layer)
            for layer in range(6)
        ]
    )
    rows["seed"] -= 1
    found = Quantity(table="t", pick="largest").measure({"t": rows})
    assert found.labels["layer"] == 5
    assert list(found.by_seed) == [1, 2]
    assert found.value == pytest.approx((0.4 + 0.2) / 2)


def test_the_largest_of_few_rows_has_a_wider_interval():
    few = pd.concat([table({"x": HALF}, layer=layer) for layer in range(3)])
    picked = Quantity(table="t", pick="largest").measure({"t": few})
    alone = Quantity(table="t", where={"layer": 0}).measure({"t": few})
    assert picked.value == alone.value
    assert picked.high - picked.low > 1.5 * (alone.high - alone.low)
