"""Knock-out curves by hand, and against zero and mean ablation in plain TransformerLens hooks."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from mechmem.analyses.effects import ablation as home
from mechmem.analyses.effects.ablation import Ablation, area
from mechmem.analyses.effects.intervene import Intervene
from mechmem.interventions.ablate import Ablate
from mechmem.measures.accuracy import Accuracy
from mechmem.measures.logit import Logit
from mechmem.measures.probability import Probability
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.sweep import each

FIRST_READOUT = 9
N_PARTS = {"head": 4, "neuron": 48, "layer": 4}
GIVEN = Probability(label="given")


def ablation(component: str, **fields) -> Ablation:
    return Ablation(
        component=component, **({"n_random": 3, "greedy": False, "measures": (GIVEN,)} | fields)
    )


def by_hooks(model, examples, parts, over, method="mean"):
    """Logits with these parts replaced by zero or by their mean over a set, in TransformerLens's
    own way."""
    _, cache = model.run_with_cache(over.tokens)

    def knock_out(x, hook):
        value = torch.zeros_like(x) if method == "zero" else cache[hook.name].mean(0).expand_as(x)
        here = [p for p in parts if p.layer == hook.layer()]
        if x.ndim == 4:
            for part in here:
                x[:, :, part.index] = value[:, :, part.index]
        elif hook.name.endswith("hook_post"):
            for part in here:
                x[..., part.index] = value[..., part.index]
        else:
            x[:] = value
        return x

    names = {
        "z": "attn.hook_z",
        "neurons": "mlp.hook_post",
        "attn_out": "hook_attn_out",
        "mlp_out": "hook_mlp_out",
    }
    hooks = {f"blocks.{p.layer}.{names[p.site]}" for p in parts}
    with torch.no_grad():
        logits = model.run_with_hooks(
            examples.tokens, fwd_hooks=[(hook, knock_out) for hook in hooks]
        )
    return logits[:, FIRST_READOUT:]


def probability(logits, labels) -> float:
    return logits.softmax(-1).gather(-1, labels[..., None])[..., 0].prod(1).mean().item()


def curve(
    table: pd.DataFrame, condition: str, prefix: str = "given", measure: str = "probability_given"
) -> list[float]:
    rows = table[
        (table["place"] == "all") & (table["condition"] == condition) & (table["prefix"] == prefix)
    ]
    return rows[rows["measure"] == measure].sort_values("k")["value"].tolist()


def test_the_area_by_hand():
    shares = [0, 0.5, 1]
    ranked = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    random = np.array([[1.0, 1.0], [1.0, 0.5], [0.0, 0.0]])
    # triangles of height 1 and 0.5 on a base of 1
    assert area(shares, ranked, random).tolist() == [0.5, 0.25]
    assert area(shares, random, ranked).tolist() == [-0.5, -0.25]
    # at sizes 0, 1, 4 of 4 the second triangle has the same base
    assert area([0, 0.25, 1], ranked, random).tolist() == [0.5, 0.25]


def test_the_area_is_in_units_of_what_is_there_at_the_baseline():
    ranked = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    random = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert area([0, 0.5, 1], ranked, random).mean() == pytest.approx(0.25 / 0.5)
    assert np.isnan(area([0, 0.5, 1], 0 * ranked, random)).all()


def test_the_most_there_can_be_is_one():
    ks = np.linspace(0, 1, 1001)
    ranked, random = (
        np.repeat((ks <= end)[:, None], 3, axis=1).astype(float) for end in (0, 0.999)
    )
    assert area(ks.tolist(), ranked, random).mean() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("method", ["zero", "mean"])
@pytest.mark.parametrize("component", N_PARTS)
def test_the_ranked_curve_is_that_of_plain_hooks(
    component, method, session, model, examples, others
):
    analysis = ablation(component, method=method, reference_set="clean", k=(1, 3))
    ranked, table = analysis.ranking(session), analysis.table(session)
    expected = [
        probability(by_hooks(model, examples, ranked[:k], others, method), examples.given)
        for k in (0, 1, 3, N_PARTS[component])
    ]
    assert curve(table, "ranked") == pytest.approx(expected, rel=1e-4)
    assert len(set(np.round(expected, 9))) == 4


def test_without_a_set_the_mean_is_of_the_examples_that_are_patched(session, model, examples):
    analysis = ablation("head", k=(2,))
    logits = by_hooks(model, examples, analysis.ranking(session)[:2], examples)
    assert curve(analysis.table(session), "ranked")[1] == pytest.approx(
        probability(logits, examples.given), rel=1e-4
    )


@pytest.mark.parametrize("component", N_PARTS)
def test_parts_are_ranked_by_what_is_lost_without_them(component, session, model, others):
    analysis = ablation(component, reference_set="clean", ranked_on="clean")
    ranked = analysis.ranking(session)
    left = [probability(by_hooks(model, others, [part], others), others.true) for part in ranked]
    assert len(ranked) == len(set(ranked)) == N_PARTS[component]
    assert np.all(np.diff(left) >= -1e-9)
    assert left[-1] > left[0]


def test_another_set_has_another_ranking(session):
    orders = [ablation("neuron", ranked_on=name).ranking(session) for name in ("noisy", "clean")]
    assert orders[0] != orders[1]
    assert set(orders[0]) == set(orders[1])


def test_attribution_ranks_a_linear_model_as_the_effects_do(random_models, others):
    model = random_models(0, n_layers=1, n_heads=8, attn_only=True, norm=None)
    session = Session(models={"after": model}, example_sets={"clean": others})
    fields = {"metric": Logit(label="true"), "reference_set": "clean", "examples": "clean"}
    by_effect, by_attribution = (
        ablation("head", ranked_by=by, **fields) for by in ("effect", "attribution")
    )
    assert by_attribution.ranking(session) == by_effect.ranking(session)
    assert len(by_effect.ranking(session)) == 8


@pytest.mark.parametrize("component", N_PARTS)
def test_attribution_is_the_gradient_times_the_step_to_the_mean(component, session, model, others):
    analysis = ablation(component, ranked_by="attribution", metric=Logit(label="true"))
    names = {
        "z": "attn.hook_z",
        "neurons": "mlp.hook_post",
        "attn_out": "hook_attn_out",
        "mlp_out": "hook_mlp_out",
    }
    parts, kept = analysis.every(model), {}
    hooks = {f"blocks.{p.layer}.{names[p.site]}" for p in parts}

    def keep(x, hook):
        x.retain_grad()
        kept[hook.name] = x
        return x

    logits = model.run_with_hooks(others.tokens, fwd_hooks=[(hook, keep) for hook in hooks])[
        :, FIRST_READOUT:
    ]
    logits.gather(-1, others.true[..., None]).mean((1, 2)).sum().backward()
    model.zero_grad()
    scores = {}
    for part in parts:
        x = kept[f"blocks.{part.layer}.{names[part.site]}"]
        product = (x - x.mean(0)) * x.grad
        if part.index is not None:
            product = product[:, :, part.index] if x.ndim == 4 else product[..., part.index]
        scores[part] = product.sum().item()
    ranked = [scores[part] for part in analysis.ranking(session)]
    assert len(ranked) == N_PARTS[component]
    assert np.all(np.diff(ranked) <= 1e-4)
    assert np.ptp(ranked) > 0.01


def test_a_head_that_does_everything_goes_first(random_models, examples, others):
    model = random_models(0)
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            for head in range(2):
                if (layer, head) != (1, 0):
                    block.attn.W_O[head] = 0
    session = Session(models={"after": model}, example_sets={"noisy": examples, "clean": others})
    analysis = ablation(
        "head", k=(1, 2, 3), metric=GIVEN, ranked_on="noisy", measures=(Logit(label="given"),)
    )
    assert analysis.ranking(session)[0].name == "a1.h0"
    values = curve(analysis.table(session), "ranked", measure="logit_given")
    assert values[1:] == pytest.approx([values[1]] * 4, rel=1e-5)
    assert abs(values[0] - values[1]) > 1e-3


@pytest.mark.parametrize("component", N_PARTS)
def test_all_curves_meet_at_the_ends(component, session, model, examples):
    table = ablation(component, k=(2,)).table(session)
    ranked, random = (curve(table, condition) for condition in ("ranked", "random"))
    baseline = probability(by_hooks(model, examples, [], examples), examples.given)
    assert ranked[0] == random[0] == pytest.approx(baseline, rel=1e-5)
    assert ranked[-1] == random[-1] != ranked[0]


def test_a_random_curve_is_the_mean_over_its_orders(session, model, examples):
    analysis = ablation("head", n_random=3, k=(1,), reference_set="noisy", seed=5)
    orders = analysis.orders(analysis.ranking(session))
    left = [
        probability(by_hooks(model, examples, order[:1], examples), examples.given)
        for order in orders
    ]
    rows = analysis.table(session).query(
        "condition == 'random' and place == 'all' and prefix == 'given' and k == 1"
    )
    assert rows["value"].tolist() == pytest.approx([np.mean(left)], rel=1e-4)
    assert rows["low"].item() >= min(left) * (1 - 1e-4)
    assert rows["high"].item() <= max(left) * (1 + 1e-4)
    assert rows["n"].item() == 3


def test_orders_hold_every_part_once_and_follow_the_seed(session):
    analysis = ablation("neuron", n_random=4)
    orders = analysis.orders(analysis.ranking(session))
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert (
        analysis.model_copy(update={"seed": 1}).orders(analysis.ranking(session))[0] not in orders
    )


def test_every_part_comes_first_equally_often(session):
    analysis = ablation("head")
    ranked = analysis.ranking(session)
    for n_random in (len(ranked), 2 * len(ranked)):
        orders = analysis.model_copy(update={"n_random": n_random}).orders(ranked)
        firsts = [order[0] for order in orders]
        assert {part: firsts.count(part) for part in ranked} == dict.fromkeys(
            ranked, n_random // len(ranked)
        )


def test_the_interval_of_an_area_holds_the_spread_of_the_orders(session):
    """Examples that agree leave no spread of their own; orders that differ do."""
    row = home._between(np.array([[0.1] * 8, [0.3] * 8, [0.5] * 8]))
    assert row["value"] == pytest.approx(0.3)
    assert row["low"] == pytest.approx(0.1, abs=0.07)
    assert row["high"] == pytest.approx(0.5, abs=0.07)
    assert home._between(np.full((3, 8), 0.2))["low"] == pytest.approx(0.2)


def test_the_area_is_that_of_the_curves_in_the_table(session):
    table = ablation("head", k=(1, 2, 3), measures=(Logit(label="given"),)).table(session)
    ranked, random = (
        curve(table, condition, measure="logit_given") for condition in ("ranked", "random")
    )
    between = np.trapezoid(np.subtract(random, ranked), np.linspace(0, 1, 5))
    row = table.query("measure == 'area_logit_given' and place == 'all' and prefix == 'given'")
    assert row["value"].item() == pytest.approx(between / ranked[0], rel=1e-5)
    assert row["low"].item() < row["value"].item() < row["high"].item()
    assert row["per_example"].item().mean() == pytest.approx(row["value"].item(), rel=1e-5)


def test_a_part_alone_is_what_intervene_makes_of_it(session):
    table = ablation(
        "head", method="resample", measures=(GIVEN, Accuracy(label="true")), seed=4, greedy=True
    ).table(session)
    part = Ablate(site="z", layer=1, head=0, method="resample", seed=4)
    alone = Intervene(intervention=part, measures=(GIVEN, Accuracy(label="true"))).table(session)
    keys = ["prefix", "place", "measure"]
    found = table[(table["condition"] == "alone") & (table["part"] == "a1.h0")].set_index(keys)
    expected = alone[alone["condition"] == "intervened"].set_index(keys)
    assert found["value"].to_dict() == expected["value"].to_dict()
    assert set(table.loc[table["condition"] == "alone", "rank"]) == {1, 2, 3, 4}


def test_how_many_examples_were_ranked_on_too(session, examples):
    session.example_sets = {
        **session.example_sets,
        "half": examples.select(torch.arange(3)).as_set(),
    }
    for ranked_on, expected in (("noisy", 1), ("clean", 0), ("half", 0.25)):
        table = ablation("layer", ranked_on=ranked_on).table(session)
        assert table.loc[table["measure"] == "ranked_on_too", "value"].tolist() == [expected]


def test_every_prefix_has_its_rows_and_few_random_orders_are_decoded(session):
    fields = {"greedy": True, "measures": (Accuracy(label="given"),), "n_control_greedy": 2}
    table = ablation("layer", **fields).table(session)
    rows = table[(table["condition"] == "random") & (table["place"] == "all")]
    assert rows.groupby("prefix")["n"].unique().map(list).to_dict() == {
        "given": [3],
        "true": [3],
        "greedy": [2],
    }
    table = ablation("layer", **fields | {"n_control_greedy": 0}).table(session)
    assert set(table.loc[table["prefix"] == "greedy", "condition"]) == {"ranked", "alone"}


@pytest.mark.parametrize(
    ("n", "k", "sizes"), [(12, None, [0, 1, 2, 4, 8, 12]), (4, None, [0, 1, 2, 4])]
)
def test_sizes_double_unless_given(n, k, sizes):
    assert ablation("head", k=k).sizes(n) == sizes
    assert ablation("head", k=(3, 0)).sizes(n) == [0, 3, n]


def test_the_same_spec_gives_the_same_bytes(model, other_model, examples, others):
    def made(seed: int) -> bytes:
        session = Session(
            models={"after": model}, example_sets={"noisy": examples, "clean": others}
        )
        return (
            ablation("neuron", k=(5,), method="gaussian", seed=seed)
            .table(session)
            .to_parquet(index=False)
        )

    assert made(0) == made(0)
    assert made(0) != made(1)


def test_the_table_can_be_saved_with_a_sweep(session):
    fields = {
        "method": each("zero", "mean"),
        "examples": each("noisy", "clean"),
        "measures": (Logit(label="given"),),
    }
    swept = ablation(each("head", "layer"), **fields)
    saved = pd.read_parquet(io.BytesIO(swept.run(session, {}).to_parquet(index=False)))
    assert set(saved.columns) == {*Ablation.columns, "method"}
    assert saved[["value", "low", "high", "n", "unit"]].notna().all(axis=None)
    keys = [c for c in saved if c not in ("value", "low", "high", "n", "per_example")]
    assert not saved.duplicated(keys).any()


def test_a_ranking_is_made_once_for_a_whole_sweep(session):
    def cost(analysis: Ablation) -> int:
        before = session.n_forwarded
        analysis.ranking(session)
        return session.n_forwarded - before

    assert cost(ablation("neuron")) >= 48 * 12
    assert cost(ablation("neuron", examples="clean")) == 0


def test_what_cannot_be_is_refused(session, random_models):
    with pytest.raises(
        InputError, match=r"k 5 is more than the 4 components \(heads\) of the model"
    ):
        ablation("head", k=(5,)).table(session)
    with pytest.raises(ValidationError, match="3 is listed twice"):
        ablation("head", k=(3, 0, 3))
    # Random orders are its control, and it has no other.
    with pytest.raises(ValidationError, match="ablation has no key 'control'"):
        ablation("head", control="random_direction")
    attention_only = Session(
        models={"after": random_models(0, attn_only=True)}, example_sets=session.example_sets
    )
    with pytest.raises(InputError, match="no MLP, so no neurons; knock out heads or layers"):
        ablation("neuron").table(attention_only)
    with pytest.raises(InputError, match="did you mean 'clean'"):
        ablation("head", ranked_on="claen").table(session)
