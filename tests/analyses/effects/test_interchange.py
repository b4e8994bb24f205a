"""Interchange against plain hooks, and the answers that remain by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_hooks import activations_of, logits_of, setting

from mechmem.analyses.effects.displacement import displacement
from mechmem.analyses.effects.effect import Readings
from mechmem.analyses.effects.interchange import Interchange, kept
from mechmem.data.example_set import ExampleSet
from mechmem.data.minimal_pair import MinimalPair
from mechmem.measures.accuracy import Accuracy
from mechmem.session import Session
from mechmem.spec.sweep import each

OTHER = MinimalPair(flip="carry_2", hold=("digit_sum_0",))
SAME = MinimalPair(flip="digit_sum_1", hold=("carry_2",))
HOOK, WHERE = "blocks.0.hook_resid_post", (slice(None), [9])


@pytest.fixture(scope="module")
def sets(task, model):
    """Noisy sums that the model answers as labelled in most rows, with either pair."""
    chosen = {
        "noisy": ExampleSet(n=24, pair=OTHER, also_pair=SAME),
        "twins": ExampleSet(n=24, pair=SAME, also_pair=OTHER),
        "clean": ExampleSet(noisy=False, n=30),
    }
    made = {name: one.of(task).with_name(name) for name, one in chosen.items()}
    answer = Session().greedy(model, made["noisy"])
    answer[:3, 4] = (answer[:3, 4] + 1) % 10  # three rows are not memorised
    for name in ("noisy", "twins"):
        made[name] = replace(made[name], given=answer, is_noisy=torch.ones(24, dtype=torch.bool))
    return made


@pytest.fixture
def session(model, sets):
    return Session({"after": model}, sets)


def interchange(**fields) -> Interchange:
    base = {"same": "twins", "site": "resid_post", "layer": 0, "position": "=", "n_random": 2}
    return Interchange(**(base | fields))


def row(table, **where):
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    return table.squeeze(axis=0)


def moved(model, sets, arm: str, dose: float) -> torch.Tensor:
    """The activations after a step of equal norm towards one arm's pair, by plain caches."""
    x, *ends = (
        activations_of(model, e)[HOOK]
        for e in (sets["noisy"], *(sets[n].counterfactual for n in ("noisy", "twins")))
    )
    other, same = (end - x for end in ends)
    limit = torch.minimum(other.norm(dim=-1), same.norm(dim=-1))[..., None]
    chosen = {"other": other, "same": same}[arm]
    return x + dose * limit * chosen / chosen.norm(dim=-1, keepdim=True).clamp_min(1e-9)


@pytest.mark.parametrize("dose", [0.5, 1.0])
@torch.no_grad()
def test_the_arms_are_those_of_plain_hooks(dose, session, model, sets):
    table = interchange(dose=dose, measures=("accuracy_given", "logit_difference")).table(session)
    for arm in ("other", "same"):
        hook = setting(HOOK, WHERE, moved(model, sets, arm, dose))
        logits = logits_of(model, sets["noisy"], hook)
        hits = (logits.argmax(-1) == sets["noisy"].given).all(dim=1).float()
        found = row(table, condition=arm, prefix="given", place="all", measure="accuracy_given")
        np.testing.assert_array_equal(found["per_example"], hits.numpy())
        true, given = (
            logits.gather(-1, sets["noisy"].labels(label)[..., None])[..., 0]
            for label in ("true", "given")
        )
        found = row(table, condition=arm, prefix="given", place="all", measure="logit_difference")
        np.testing.assert_allclose(found["per_example"], (true - given).mean(1), atol=1e-4)
    values = [
        row(table, condition=c, prefix="given", place="all", measure="logit_difference")["value"]
        for c in ("baseline", "other", "same", "random")
    ]
    assert len(set(np.round(values, 4))) == 4


@torch.no_grad()
def test_what_is_kept_is_the_share_of_what_was_memorised(session, model, sets):
    table = interchange().table(session)
    hits = {
        c: row(table, condition=c, prefix="greedy", place="all", measure="accuracy_given")
        for c in ("baseline", "other", "same", "random")
    }
    memorised = hits["baseline"]["per_example"] == 1
    assert memorised.sum() == 21
    for condition, found in hits.items():
        left = row(table, condition=condition, prefix="greedy", measure="kept")
        assert left["n"] == 21
        np.testing.assert_array_equal(left["per_example"], found["per_example"][memorised])
        assert left["value"] == pytest.approx(found["per_example"][memorised].mean())
    assert row(table, condition="other", prefix="greedy", measure="kept")["value"] < 1


def test_what_is_kept_by_hand():
    def readings(*hits: float) -> Readings:
        return Readings({("greedy", "all", "accuracy_given"): torch.tensor(hits)})

    table = kept({"baseline": readings(1, 1, 0, 1), "same": readings(1, 0, 1, 0)})
    same = row(table, condition="same")
    assert (same["value"], same["n"]) == (pytest.approx(1 / 3), 3)
    assert same["per_example"].tolist() == [1, 0, 0]


def test_without_memory_nothing_is_kept_or_lost():
    none = Readings({("given", "all", "accuracy_given"): torch.zeros(4)})
    table = kept({"baseline": none, "same": none})
    assert table["value"].isna().all()
    assert set(table["n"]) == {0}


@torch.no_grad()
def test_both_arms_have_one_norm_and_their_distances(session, model, sets):
    analysis = interchange(dose=0.5)
    table = analysis.table(session)
    norms = {c: set(rows["norm"].round(4)) for c, rows in table.groupby("condition")}
    assert norms["baseline"] == {0}
    assert norms["other"] == norms["same"] == norms["random"]
    (patch,) = analysis.interventions(session)
    expected = displacement(session, model, sets["noisy"], [patch], sets["clean"])
    other = row(table, condition="other", prefix="given", place="all", measure="kept")
    found = other[["norm", "mahalanobis", "mahalanobis_baseline"]].tolist()
    np.testing.assert_allclose(found, expected)
    baseline = row(table, condition="baseline", prefix="given", place="all", measure="kept")
    assert baseline["mahalanobis"] == baseline["mahalanobis_baseline"] == found[2]


@torch.no_grad()
def test_each_arm_is_asked_for_its_own_pair(session, model, sets):
    table = interchange(measures=("accuracy_given", "accuracy_pair")).table(session)
    for arm, name in (("other", "noisy"), ("same", "twins")):
        logits = logits_of(model, sets["noisy"], setting(HOOK, WHERE, moved(model, sets, arm, 1.0)))
        hits = logits.argmax(-1) == sets[name].counterfactual.true
        found = row(table, condition=arm, prefix="given", place="s0", measure="accuracy_pair")
        np.testing.assert_array_equal(found["per_example"], hits[:, 4].float().numpy())


def test_doses_are_swept_and_the_table_is_as_documented(session):
    table = interchange(dose=each(0.25, 1)).run(session, {})
    assert [*table] == ["dose", *Interchange.columns]
    assert set(table["dose"]) == {0.25, 1.0}
    keys = ["dose", "condition", "prefix", "place", "measure"]
    assert not table.duplicated(keys).any()


def test_a_table_without_what_is_memorised_is_refused():
    with pytest.raises(ValueError, match=re.escape("measures lack accuracy_given")):
        interchange(measures=(Accuracy(label="true"),))
