"""Measures of concentration by hand and against their definitions; a model that reads one token is
concentrated."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from look_up import copying

from mechmem.analyses.circuits.attribution import Components, scores_of
from mechmem.analyses.circuits.concentration import Concentration, gini, participation, top_share
from mechmem.interventions.patch import Source
from mechmem.measures.logit import Logit
from mechmem.measures.logit_difference import LogitDifference
from mechmem.session import Session
from mechmem.spec.errors import InputError

SIZES = np.array([[0, 0, 0, 4.0], [1, 1, 1, 1], [1, 2, 3, 4], [4, 1, 3, 2]])


def test_by_hand():
    # |1-2| + |1-3| + |1-4| + |2-3| + |2-4| + |3-4| = 10; twice that over 2 * 4 * 10
    assert gini(SIZES).tolist() == [0.75, 0, 0.25, 0.25]
    assert participation(SIZES).tolist() == [1, 4, 100 / 30, 100 / 30]
    assert top_share(SIZES).tolist() == [1, 0.25, 0.4, 0.4]


@given(st.lists(st.floats(0.001, 1000), min_size=2, max_size=12))
def test_the_gini_is_the_mean_difference_of_two_over_twice_the_mean(sizes):
    x = np.array(sizes)
    expected = np.abs(x[:, None] - x).sum() / (2 * len(x) ** 2 * x.mean())
    assert gini(x[None])[0] == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.floats(0.001, 1000), min_size=2, max_size=12), st.floats(0.01, 100))
def test_size_and_order_do_not_matter(sizes, factor):
    x = np.array([sizes])
    for measured in (gini, participation, top_share):
        assert measured(x)[0] == pytest.approx(measured(factor * x[:, ::-1])[0], rel=1e-6, abs=1e-9)


def test_normal_scores_are_as_the_docstring_says():
    drawn = np.abs(np.random.default_rng(0).normal(size=(200, 2000)))
    assert gini(drawn).mean() == pytest.approx(2**0.5 - 1, abs=0.005)
    assert participation(drawn).mean() / 2000 == pytest.approx(2 / np.pi, abs=0.005)


def test_an_example_without_a_score_is_undefined():
    for measured in (gini, participation, top_share):
        assert np.isnan(measured(np.array([[0.0, 0, 0], [1, 2, 3]]))).tolist() == [True, False]


def values(table: pd.DataFrame, measure: str) -> dict[str, float]:
    return table[table["measure"] == measure].set_index("component")["value"].to_dict()


@pytest.fixture
def linear(random_models, examples, others) -> Session:
    """One layer of uniform attention, no norm: what a token adds to the logits is its own
    embedding's doing."""
    model = random_models(0, n_layers=1, n_heads=2, attn_only=True, norm=None)
    with torch.no_grad():
        model.blocks[0].attn.W_Q.zero_()
        model.blocks[0].attn.b_Q.zero_()
    return Session(models={"after": model}, example_sets={"noisy": examples, "clean": others})


def test_tokens_of_a_linear_model_by_hand(linear, examples, others):
    model = linear.model("after")
    change = model.W_E[others.tokens].mean(0) - model.W_E[examples.tokens]  # n pos d_model
    towards = model.W_U[:, examples.given].permute(1, 2, 0) / 5  # n place d_model
    through = torch.einsum(
        "nqd,hed,hfe->nqf", towards, model.blocks[0].attn.W_O, model.blocks[0].attn.W_V
    )
    scores = torch.zeros(12, 14)
    for place, readout in enumerate(range(9, 14)):
        direct = (change[:, readout] * towards[:, place]).sum(-1)
        scores[:, readout] -= direct.detach()
        attended = torch.einsum("npd,nd->np", change[:, : readout + 1], through[:, place]) / (
            readout + 1
        )
        scores[:, : readout + 1] -= attended.detach()
    contrast = Concentration().contrast(linear)
    found = scores_of(contrast, [Components("token", -1, "hook_embed")])[0]
    torch.testing.assert_close(found, scores, atol=1e-5, rtol=1e-4)
    digits = [0, 1, 2, 3, 5, 6, 7, 8]
    expected = gini(scores[:, digits].abs().double().numpy())
    row = Concentration().table(linear).query("component == 'token' and measure == 'gini'")
    np.testing.assert_allclose(row["per_example"].item(), expected, atol=1e-5)
    assert row["n_units"].item() == 8


def test_tokens_sum_to_the_embedding(session):
    contrast = Concentration(examples="clean", corrupted=Source(mean_over="noisy")).contrast(
        session
    )
    tokens, embed = scores_of(
        contrast, [Components("token", -1, "hook_embed"), Components("embed", -1, "hook_embed")]
    )
    torch.testing.assert_close(tokens.sum(1, keepdim=True), embed, atol=1e-5, rtol=1e-4)
    assert tokens.shape == (12, 14)
    alone = scores_of(contrast, [Components("embed", -1, "hook_embed")])[
        0
    ]  # the same hook, and not what is kept of tokens
    torch.testing.assert_close(alone, embed)


def test_a_model_that_reads_one_token_is_concentrated_on_it(linear):
    linear.models = {"after": copying([6] * 5)}
    table = Concentration().table(linear)
    assert values(table, "participation")["token"] == pytest.approx(1, abs=1e-4)
    assert values(table, "top_share")["token"] == pytest.approx(1, abs=1e-4)
    assert values(table, "gini")["token"] == pytest.approx(7 / 8, abs=1e-4)


def test_every_head_and_neuron_of_all_layers_counts(session):
    table = Concentration().table(session)
    assert list(table.columns) == list(Concentration.columns)
    assert table.groupby("component")["n_units"].unique().map(list).to_dict() == {
        "token": [8],
        "head": [4],
        "neuron": [48],
    }
    assert len(table) == 9
    assert table.notna().all(axis=None)
    for component, n_units in (("token", 8), ("head", 4), ("neuron", 48)):
        assert 1 < values(table, "participation")[component] < n_units
        assert 1 / n_units < values(table, "top_share")[component] < 1
        assert 0 < values(table, "gini")[component] < 1 - 1 / n_units


def test_a_model_without_mlps_has_no_neurons(linear):
    assert set(Concentration().table(linear)["component"]) == {"token", "head"}


def test_a_metric_without_a_slope_is_refused(session):
    constant = {"metric": LogitDifference(), "corrupted": Source(mean_over="noisy")}
    with pytest.raises(InputError, match="logit_difference is 0; take logit_true"):
        Concentration(examples="clean", **constant).table(session)
    with pytest.raises(
        InputError, match=r"gradient of .* is zero on these examples.*choose another"
    ):
        Concentration(corrupted=Source(examples="noisy")).table(session)
    assert Concentration(metric=Logit(label="true")).table(session)["metric"].unique().tolist() == [
        "logit_true"
    ]


def test_examples_that_no_token_tells_apart_are_refused(session):
    session.example_sets = {
        **session.example_sets,
        "noisy": session.examples("noisy").select(torch.tensor([0])).as_set(),
    }
    with pytest.raises(InputError, match="all examples have the same prompt"):
        Concentration().table(session)
