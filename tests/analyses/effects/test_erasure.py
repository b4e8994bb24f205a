from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

import mechmem as mm
from mechmem.analyses.effects.erasure import Erasure
from mechmem.analyses.effects.intervene import Intervene
from mechmem.analyses.readouts.classifier import fitted, thirds
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.experiment.dry_run import DryRun
from mechmem.interventions.controls.random_direction import RandomDirection
from mechmem.interventions.erase import Erase
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.sweep import each

with (
    warnings.catch_warnings()
):  # concept-erasure scripts a function of its own, which torch deprecates
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    from concept_erasure import LeaceFitter

HOOK = "blocks.1.hook_resid_post"
LABELS = ["examples", "condition", "prefix", "place", "measure", "unit"]


@pytest.fixture(scope="module")
def clean():
    return FourDigitAddition(n_train=10, n_held_out=1500, seed=3).sample("held_out")


@pytest.fixture
def session(model, other_model, examples, clean) -> Session:
    return Session({"after": model, "before": other_model}, {"noisy": examples, "clean": clean})


def erase(**fields) -> Erase:
    return Erase(
        **({"site": "resid_post", "layer": 1, "variable": "carry_4", "position": "="} | fields)
    )


def erasure(erase: Erase, **fields) -> Erasure:
    return Erasure(erase=erase, **({"n_draws": 2, "penalties": (10.0,)} | fields))


def values(table: pd.DataFrame, measure: str, prefix: str = "given") -> pd.Series:
    """By condition, for the whole answer."""
    chosen = table[
        (table["measure"] == measure) & (table["prefix"] == prefix) & (table["place"] == "all")
    ]
    return chosen.set_index("condition")["value"]


def effects(table: pd.DataFrame, condition: str) -> pd.DataFrame:
    is_of_answers = table["measure"].str.startswith(("accuracy", "logit"))
    rows = table[(table["condition"] == condition) & is_of_answers]
    return rows.drop(columns=["condition", "recovery"]).reset_index(drop=True)


def test_the_answers_are_those_of_the_intervention(session):
    table = erasure(erase()).table(session)
    pd.testing.assert_frame_equal(
        effects(table, "intervened"),
        effects(Intervene(intervention=erase()).table(session), "intervened"),
    )
    pd.testing.assert_frame_equal(
        effects(table, "baseline"),
        effects(Intervene(intervention=erase()).table(session), "baseline"),
    )


@pytest.mark.parametrize("method", ["leace", "inlp"])
@pytest.mark.parametrize("control", ["random", "variance_matched"])
def test_a_control_is_the_mean_over_its_draws(control, method, session):
    asked = {"measures": ("logit_difference", "accuracy_true")}
    table = erasure(erase(method=method, seed=5), **asked).table(session)
    drawn = [erase(method=control, matched_to=method, seed=seed) for seed in (5, 6)]
    by_hand = [Intervene(intervention=draw, **asked).table(session) for draw in drawn]
    expected = [np.stack(effects(t, "intervened")["per_example"]) for t in by_hand]
    assert not np.allclose(*expected, atol=1e-3)
    np.testing.assert_allclose(
        np.stack(effects(table, control)["per_example"]), np.mean(expected, axis=0), atol=1e-5
    )


@pytest.mark.parametrize("method", ["leace", "inlp"])
def test_it_says_how_much_was_removed_and_that_the_controls_match(method, session, model, clean):
    part = erase(method=method)
    found = part.erasers(session, model, clean)[HOOK, "="]
    table = erasure(part).table(session)
    rank, left = values(table, "rank"), values(table, "variance_left")
    assert rank.to_dict() == {
        "baseline": 0,
        "intervened": found.rank,
        "random": found.rank,
        "variance_matched": found.rank,
    }
    assert (left["baseline"], left["intervened"]) == (1, pytest.approx(found.variance_left))
    assert left["variance_matched"] == pytest.approx(found.variance_left)
    drawn = [
        erase(method="random", matched_to=method, seed=i).erasers(session, model, clean)[HOOK, "="]
        for i in (0, 1)
    ]
    assert left["random"] == pytest.approx(np.mean([e.variance_left for e in drawn]))
    assert 0 < left["intervened"] < 1


def test_several_activations_count_by_their_mean(session, model, clean):
    part = erase(layer=(0, 1), position=("=", "s4"), variable="digit_sum_3", n_codes=2)
    table = erasure(part).table(session)
    found = part.erasers(session, model, clean)
    assert len(found) == 4
    assert values(table, "variance_left")["intervened"] == pytest.approx(
        np.mean([e.variance_left for e in found.values()])
    )
    reads = []
    for hook, position in found:
        x = session.activation(model, clean, hook)[:, clean.positions[position]]
        y, noisy = clean.variables["digit_sum_3"], session.examples("noisy")
        read = session.activation(model, noisy, hook)[:, clean.positions[position]]
        reads.append(
            (fitted(x, y, [10.0], 0)(read) == noisy.variables["digit_sum_3"]).double().mean().item()
        )
    assert values(table, "probe_digit_sum_3")["baseline"] == pytest.approx(np.mean(reads))


def test_the_probe_before_erasure_is_that_of_the_probe_analysis(session):
    table = erasure(
        erase(), examples="clean", also_probed=("digit_sum_0",), penalties=(1.0, 10.0)
    ).table(session)
    for variable in ("carry_4", "digit_sum_0"):
        read = mm.Probe(
            variable=variable, layer=1, position="=", penalties=(1.0, 10.0), test_on=()
        ).table(session)
        read = read[(read["measure"] == "accuracy") & (read["condition"] == "probe")]
        assert values(table, f"probe_{variable}")["baseline"] == read["value"].item()
        n = table[table["measure"] == f"probe_{variable}"]["n"]
        assert set(n) == {500}  # the last third of `clean`


def test_where_there_is_nothing_to_erase_nothing_changes(session):
    table = erasure(erase(site="embed", layer=None, position="+"), greedy=False).table(session)
    wide = table.pivot_table(
        index=["prefix", "place", "measure"], columns="condition", values="value"
    )
    for condition in ("intervened", "random", "variance_matched"):
        pd.testing.assert_series_equal(wide[condition], wide["baseline"], check_names=False)


def test_the_table_has_the_documented_columns_and_every_row_once(session):
    table = erasure(erase(), control=RandomDirection(n=2), also_probed=("out_0", "carry_4")).table(
        session
    )
    assert list(table.columns) == list(Erasure.columns)
    assert not table[LABELS].duplicated().any()
    assert set(table["condition"]) == {
        "baseline",
        "intervened",
        "control",
        "random",
        "variance_matched",
    }
    undefined = ["recovery", "recovery_low", "recovery_high"]
    assert not table.drop(columns=undefined).isna().any(axis=None)
    probes = table[table["measure"] == "probe_out_0"]
    assert set(zip(probes["condition"], probes["prefix"], strict=True)) == {
        (c, p)
        for c in ("baseline", "intervened", "random", "variance_matched")
        for p in ("given", "true")
    }
    assert (table["low"] <= table["value"] + 1e-12).all()
    assert (table["value"] <= table["high"] + 1e-12).all()


def test_what_is_fitted_is_shared_by_all_sets_of_a_sweep(session, monkeypatch):
    fits = []
    monkeypatch.setattr(
        "mechmem.analyses.effects.erasure.fitted", lambda *a: fits.append(a) or fitted(*a)
    )
    erasure(erase(), examples=each("noisy", "clean")).run(session, {})
    assert len(fits) == 1 + 1 + 2 * 2  # baseline, erased, two draws of two controls


def test_the_same_spec_gives_the_same_bytes_and_another_seed_other_controls(
    session, model, examples, clean
):
    again = Session({"after": model}, {"noisy": examples, "clean": clean})
    first = erasure(erase()).table(session)
    pd.testing.assert_frame_equal(first, erasure(erase()).table(again))
    other = erasure(erase(seed=9)).table(session)
    assert values(other, "variance_left")["random"] != values(first, "variance_left")["random"]
    assert (
        values(other, "variance_left")["intervened"] == values(first, "variance_left")["intervened"]
    )


def test_a_dry_run_on_four_examples_has_the_same_labels(session, model, examples, clean):
    few = {
        "noisy": examples.select(torch.arange(4)).as_set(),
        "clean": clean.select(torch.arange(4)).as_set(),
    }
    dry = DryRun(dict.fromkeys(few, 1000), models={"after": model}, example_sets=few)
    part = erasure(erase(variable="digit_sum_3", n_codes=3), also_probed=("out_0",))
    pd.testing.assert_frame_equal(part.table(dry)[LABELS], part.table(session)[LABELS])


@pytest.mark.parametrize(
    ("chosen", "fields", "message"),
    [
        ({"variable": "cary_4"}, {}, "there is no variable 'cary_4'"),
        ({}, {"also_probed": ("cary_4",)}, "there is no variable 'cary_4'"),
        ({"position": "s9"}, {}, "there is no position 's9'"),
        (
            {"fit_on": "noisy"},
            {},
            "a probe is fitted on clean instances only, and 7 of the 12 in 'noisy' are noisy",
        ),
        ({"fit_on": "three"}, {}, "'three' has 3 examples: a probe needs at least 4"),
        ({"fit_on": "uniform"}, {}, "carry_4 is always 1"),
        (
            {"fit_on": "uniform", "variable": "carry_1"},
            {"also_probed": ("carry_4",)},
            "carry_4 is always 1",
        ),
        (
            {"variable": "digit_sum_3"},
            {},
            "removes 16 of 16 dimensions and leaves 0.0% of the variance: 17 classes span up",
        ),
        ({"n_codes": 2}, {}, "n_codes 2 exceeds the 1 dimension"),
        (
            {},
            {"examples": "seen"},
            "the probe is fitted on every activation that 'seen' has at this position",
        ),
    ],
)
def test_what_cannot_be_is_refused(chosen, fields, message, session, clean):
    session.example_sets |= {
        "three": clean.select(torch.arange(3)).as_set(),
        "uniform": clean.select(clean.variables["carry_4"] == 1).as_set(),
        "seen": clean.select(thirds(len(clean), 0)[0]).as_set(),
    }
    with pytest.raises(InputError, match=message):
        erasure(erase(**chosen), **fields).table(session)


@pytest.mark.parametrize("method", ["random", each("leace", "variance_matched")])
def test_a_control_is_not_what_is_erased(method):
    with pytest.raises(ValueError, match="draws its own controls"):
        erasure(erase(method=method))


@pytest.fixture(scope="module")
def shipped() -> Session:
    trained = mm.load("fda_small")
    sets = {
        "clean": mm.ExampleSet(noisy=False, n=3000),
        "held_out": mm.ExampleSet(split="held_out", n=1000),
    }
    return Session(
        {"after": trained.at("memorised")},
        {name: chosen.of(trained.task) for name, chosen in sets.items()},
    )


def test_on_the_shipped_model_the_carry_goes_and_an_unrelated_digit_sum_stays(shipped):
    part = erasure(
        Erase(site="resid_mid", layer=1, variable="carry_2", position="s3"),
        examples="held_out",
        also_probed=("digit_sum_2",),
        greedy=False,
    )
    table = part.table(shipped)
    carry = values(table, "probe_carry_2")
    share = shipped.examples("held_out").variables["carry_2"].double().mean().item()
    assert carry["baseline"] > 0.95
    assert carry["intervened"] <= max(share, 1 - share) + 0.05
    assert carry["baseline"] - carry["random"] < 0.05
    assert carry["baseline"] - carry["variance_matched"] < 0.05
    other = values(table, "probe_digit_sum_2")
    assert other["baseline"] > 0.9
    for condition in ("intervened", "random", "variance_matched"):
        assert abs(other[condition] - other["baseline"]) < 0.05


def test_the_probe_after_erasure_is_scikit_learns_after_that_of_concept_erasure(shipped):
    clean, held_out = shipped.examples("clean"), shipped.examples("held_out")
    hook = "blocks.1.hook_resid_mid"
    x, new = (
        shipped.activation(shipped.model("after"), s, hook)[:, s.positions["s3"]].double()
        for s in (clean, held_out)
    )
    one_hot = F.one_hot(clean.variables["carry_2"]).double()
    oracle = LeaceFitter.fit(x, one_hot, shrinkage=False, svd_tol=1e-6).eraser
    train = thirds(len(clean), 0)[0]
    scale = oracle(x)[train].var(0).mean().sqrt()
    probe = LogisticRegression(C=1 / 10, max_iter=20_000, tol=1e-8)
    probe.fit((oracle(x)[train] / scale).numpy(), clean.variables["digit_sum_2"][train].numpy())
    expected = probe.score((oracle(new) / scale).numpy(), held_out.variables["digit_sum_2"].numpy())
    part = erasure(
        Erase(site="resid_mid", layer=1, variable="carry_2", position="s3"),
        examples="held_out",
        also_probed=("digit_sum_2",),
        greedy=False,
        n_draws=1,
    )
    assert values(part.table(shipped), "probe_digit_sum_2")["intervened"] == pytest.approx(
        expected, abs=0.003
    )
