"""Attribution scores by hand, against autograd and against patching one part at a time through
hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechmem.analyses.circuits.attribution import Attribution, components, scores_of
from mechmem.analyses.circuits.contrast import correlation
from mechmem.data.minimal_pair import MinimalPair
from mechmem.interventions.applied import applied
from mechmem.interventions.patch import Patch, Source
from mechmem.measures.accuracy import Accuracy
from mechmem.measures.kl import KL
from mechmem.measures.logit import Logit
from mechmem.measures.logit_difference import LogitDifference
from mechmem.measures.probability import Probability
from mechmem.models.sites import SITES
from mechmem.session import Session
from mechmem.spec.errors import InputError

SITE_OF = {"embed": "embed", "head": "z", "mlp": "mlp_out", "neuron": "neurons"}


@pytest.fixture(scope="module")
def pairs(task):
    train = task.sample("train")
    return (
        task.pairs(train.select(train.is_noisy), MinimalPair(flip="carry_2"))
        .select(torch.arange(8))
        .as_set()
    )


@pytest.fixture
def session(model, other_model, pairs, others):
    return Session(
        models={"after": model, "before": other_model},
        example_sets={"noisy": pairs, "clean": others},
    )


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def scores_by_part(contrast):
    scored = components(contrast)
    return {
        (one.component, one.layer): scores
        for one, scores in zip(scored, scores_of(contrast, scored), strict=True)
    }


def metric_of(model, examples, metric, parts=()):
    with torch.no_grad(), applied(model, parts, examples) as patched:
        logits = patched(examples.tokens)[:, -examples.n_answer :]
    return metric.whole(metric(logits, examples, logits))


def test_scores_of_a_linear_model_by_hand(random_models, pairs):
    """One layer, no norm, uniform attention: a score is minus the change of z along W_O and the two
    logits' columns."""
    model = random_models(0, n_layers=1, attn_only=True, norm=None)
    with torch.no_grad():
        model.blocks[0].attn.W_Q.zero_()
        model.blocks[0].attn.b_Q.zero_()
    contrast = Attribution().contrast(
        Session(models={"after": model}, example_sets={"noisy": pairs})
    )
    embed = [
        model.W_E[tokens] + model.W_pos for tokens in (pairs.tokens, pairs.counterfactual.tokens)
    ]
    change = embed[1] - embed[0]  # n pos d_model
    uniform = torch.tril(torch.ones(14, 14)) / torch.arange(1.0, 15)[:, None]
    z = torch.einsum("qk,nkd,hde->nqhe", uniform, change, model.blocks[0].attn.W_V)
    towards = (model.W_U[:, pairs.given] - model.W_U[:, pairs.counterfactual.true]).permute(
        1, 2, 0
    ) / 5  # n place d_model
    results = torch.einsum("nqhe,hed->nqhd", z[:, -5:], model.blocks[0].attn.W_O)
    heads = -torch.einsum("nqhd,nqd->nh", results, towards)
    found = scores_by_part(contrast)
    close(found["head", 0], heads.detach())
    direct = -torch.einsum("nqd,nqd->n", change[:, -5:], towards)
    close(found["embed", -1][:, 0], (direct + heads.sum(1)).detach())
    table = Attribution(exact="all").table(contrast.session)
    np.testing.assert_allclose(
        table["exact"], table["value"], atol=1e-5
    )  # linear: first order is all there is
    np.testing.assert_allclose(
        table["value"], torch.cat([found["embed", -1], heads], 1).mean(0).detach(), atol=1e-5
    )


@pytest.mark.parametrize(
    "metric",
    [Logit(label="given"), Logit(label="given", against="pair"), Probability(), LogitDifference()],
)
def test_scores_are_what_autograd_through_the_hooks_gives(metric, session, model, pairs):
    found = scores_by_part(Attribution(metric=metric).contrast(session))
    hooks = {
        (c, layer): SITES[SITE_OF[c]].hook(layer if layer >= 0 else None) for c, layer in found
    }
    clean, corrupted = {}, {}

    def keep(x, hook):
        x.retain_grad()
        clean[hook.name] = x

    logits = model.run_with_hooks(pairs.tokens, fwd_hooks=[(h, keep) for h in hooks.values()])[
        :, -5:
    ]
    metric.whole(metric(logits, pairs, logits)).sum().backward()
    model.zero_grad()
    seen = [(h, lambda x, hook: corrupted.update({hook.name: x.detach()})) for h in hooks.values()]
    model.run_with_hooks(pairs.counterfactual.tokens, fwd_hooks=seen)
    for part, hook in hooks.items():
        product = (corrupted[hook] - clean[hook].detach()) * -clean[hook].grad
        expected = product.sum((1, 3)) if part[0] == "head" else product.sum(1)
        expected = expected if part[0] in ("head", "neuron") else expected.sum(1, keepdim=True)
        scale = expected.abs().max()
        assert scale > 0
        close(found[part] / scale, expected / scale)


@pytest.mark.parametrize(
    "source", [Source(pair=True), Source(mean_over="clean"), Source(checkpoint="before")], ids=str
)
def test_exact_effects_are_those_of_patching_through_hooks(source, session, model, pairs):
    metric = Logit(label="given", against="pair")
    table = Attribution(exact="all", corrupted=source).table(session)
    before = metric_of(model, pairs, metric)
    for row in table[(table["component"] != "neuron") | (table["index"] % 6 == 0)].to_dict(
        "records"
    ):
        unit = {"head": {"head": row["index"]}, "neuron": {"neurons": (row["index"],)}}.get(
            row["component"], {}
        )
        layer = row["layer"] if row["layer"] >= 0 else None
        patch = Patch(site=SITE_OF[row["component"]], layer=layer, source=source, **unit)
        with torch.no_grad(), applied(model, [patch], pairs, session) as patched:
            logits = patched(pairs.tokens)[:, -5:]
        assert row["exact"] == pytest.approx(
            (before - metric.whole(metric(logits, pairs, logits))).mean().item(), abs=1e-5
        )


def test_the_table_holds_the_means_and_every_part(session, model):
    table = Attribution().table(session)
    assert list(table) == list(Attribution.columns)
    assert table.groupby(["component", "layer"]).size().to_dict() == {
        ("embed", -1): 1,
        **{("head", layer): 2 for layer in (0, 1)},
        **{("mlp", layer): 1 for layer in (0, 1)},
        **{("neuron", layer): 24 for layer in (0, 1)},
    }
    found = scores_by_part(Attribution().contrast(session))
    for (component, layer), scores in found.items():
        rows = table[(table["component"] == component) & (table["layer"] == layer)]
        np.testing.assert_allclose(rows["value"], scores.mean(0), atol=1e-6)
        assert rows["index"].tolist() == list(range(scores.shape[1]))
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert table[["exact", "pearson", "spearman"]].isna().all(axis=None)
    assert "neuron" not in set(Attribution(neurons=False).table(session)["component"])


def test_the_largest_are_patched_and_agreement_is_among_them(session):
    whole, some = Attribution(exact="all").table(session), Attribution(exact=5).table(session)
    for layer in (0, 1):
        neurons = some[(some["component"] == "neuron") & (some["layer"] == layer)]
        largest = neurons["value"].abs().nlargest(5).index
        assert set(neurons.index[neurons["exact"].notna()]) == set(largest)
        np.testing.assert_allclose(some["exact"][largest], whole["exact"][largest], atol=1e-6)
        assert neurons["pearson"].unique().item() == pytest.approx(
            some["value"][largest].corr(some["exact"][largest]), abs=1e-6
        )
        every = whole[(whole["component"] == "neuron") & (whole["layer"] == layer)]
        assert every["spearman"].unique().item() == pytest.approx(
            every["value"].corr(every["exact"], "spearman")
        )
        assert every["pearson"].iloc[0] > 0.7  # first order says something even of a random model


def test_attention_only_models_have_no_mlps(random_models, pairs):
    session = Session(
        models={"after": random_models(0, attn_only=True)}, example_sets={"noisy": pairs}
    )
    assert set(Attribution(exact=1).table(session)["component"]) == {"embed", "head"}


def test_scores_are_learnt_once(session):
    Attribution().table(session)
    before = session.n_forwarded
    Attribution(name="again").table(session)
    assert session.n_forwarded == before
    Attribution(metric=Probability()).table(session)
    assert session.n_forwarded > before


def test_batches_make_no_difference(session, model, pairs):
    whole = Attribution(exact="all").table(session)
    tight = Session(session.models, session.example_sets, memory=240_000)
    sizes = [
        len(batch.rows)
        for batch in tight.gradients(model, pairs, lambda logits, _: logits.sum(), ["hook_embed"])
    ]
    assert sizes == [1] * 8
    again = Attribution(exact="all").table(tight)
    np.testing.assert_allclose(again[["value", "exact"]], whole[["value", "exact"]], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"metric": Accuracy()}, "accuracy_true has no gradient"),
        (
            {
                "metric": LogitDifference(),
                "examples": "clean",
                "corrupted": Source(mean_over="noisy"),
            },
            "take logit_true",
        ),
        (
            {"corrupted": Source(examples="noisy")},
            "gradient of .* is zero on these examples.*choose another",
        ),
        ({"examples": "clean"}, "pair"),
        (
            {"examples": "clean", "corrupted": Source(mean_over="noisy")},
            "measure of the pair's label",
        ),
    ],
)
def test_what_cannot_be_attributed_is_refused(fields, said, session):
    with pytest.raises(InputError, match=said):
        Attribution(**fields).table(session)


def test_no_gradient_is_left_on_the_parameters(session, model):
    Attribution(exact=2).table(session)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_correlation_by_hand():
    import pandas as pd

    assert correlation(pd.Series([1.0, 2, 3]), pd.Series([2.0, 4, 6])) == pytest.approx(1)
    assert correlation(pd.Series([1.0, 2, 4]), pd.Series([1.0, 0, 1])) == pytest.approx(0.1889822)
    assert np.isnan(correlation(pd.Series([1.0, 2]), pd.Series([2.0, 4])))
    assert np.isnan(correlation(pd.Series([1.0, 1, 1]), pd.Series([2.0, 4, 5])))


def test_logit_less_that_of_another_label(pairs):
    logits = torch.randn(8, 5, 12, generator=torch.Generator().manual_seed(0))
    given, pair = (
        logits.gather(-1, labels[..., None])[..., 0]
        for labels in (pairs.given, pairs.counterfactual.true)
    )
    close(Logit(label="given")(logits, pairs, logits), given)
    contrast = Logit(label="given", against="pair")
    close(contrast(logits, pairs, logits), given - pair)
    assert (contrast.name, Logit().name) == ("logit_given_less_pair", "logit_true")
    assert contrast.unit == "nats"
    close(
        Logit(label="true", against="given")(logits, pairs, logits),
        LogitDifference()(logits, pairs, logits),
    )


def test_a_metric_without_slope_at_the_clean_run_is_refused(session):
    with pytest.raises(InputError, match="gradient of kl is zero"):
        Attribution(metric=KL()).table(session)
