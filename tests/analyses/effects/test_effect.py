from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from mechmem.analyses.effects.ablation import Ablation
from mechmem.analyses.effects.effect import (
    LEAST_SPAN,
    EffectAnalysis,
    Readings,
    effect_table,
    prefixes,
)
from mechmem.analyses.effects.patch_grid import PatchGrid
from mechmem.data.examples import Examples
from mechmem.data.minimal_pair import MinimalPair
from mechmem.interventions.applied import applied
from mechmem.interventions.controls.random_direction import RandomDirection
from mechmem.interventions.controls.random_neurons import RandomNeurons
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.measures.accuracy import Accuracy
from mechmem.measures.kl import KL
from mechmem.measures.logit import Logit
from mechmem.measures.logit_difference import LogitDifference
from mechmem.measures.measure import Measure
from mechmem.measures.probability import Probability
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.registry import Component
from mechmem.statistics.proportions import clopper_pearson

BEFORE = Source(checkpoint="before")
GRID = PatchGrid(site="attn_out", layer=1, source=BEFORE)
INTERVENTIONS = {
    "none": [],
    "checkpoint": [Patch(site="attn_out", layer=1, source=BEFORE)],
    "examples": [
        Patch(
            site="resid_pre", layer=1, position=("a0", "b0", "="), source=Source(examples="clean")
        )
    ],
    "mean": [Patch(site="neurons", layer=0, neurons=(1, 5, 9), source=Source(mean_over="clean"))],
    "scrambled": [RandomDisplacement(of=Patch(site="neurons", layer=1, source=BEFORE))],
    "several": [
        Patch(site="z", layer=0, head=1, source=BEFORE),
        Patch(site="mlp_out", layer=1, source=BEFORE),
    ],
}


def rows(table: pd.DataFrame, **where) -> pd.DataFrame:
    for column, value in where.items():
        table = table[table[column] == value]
    return table


def the(table: pd.DataFrame, **where) -> pd.Series:
    found = rows(table, **where)
    assert len(found) == 1, found
    return found.iloc[0]


@torch.no_grad()
def naively_decoded(session: Session, model, examples: Examples, parts) -> torch.Tensor:
    """Token by token through the hook path; what is not decoded yet is fed as zeros, which cannot
    be seen."""
    answer = torch.zeros_like(examples.given)
    for place in range(examples.n_answer):
        fed = examples.continued_with(answer)
        with applied(model, parts, fed, session) as edited:
            logits = edited(fed.tokens)[:, -examples.n_answer :]
        answer[:, place] = logits[:, place].argmax(-1)
    return answer


@pytest.mark.parametrize("seed", [11, 12])
@pytest.mark.parametrize("parts", INTERVENTIONS.values(), ids=INTERVENTIONS)
def test_decoding_is_greedy_token_by_token(parts, seed, random_models, session, examples):
    session.models = {"after": random_models(seed), "before": random_models(seed + 100)}
    model = session.model("after")
    for prefix in ("given", "true"):
        fed = examples.with_prefix(prefix)
        assert torch.equal(
            session.greedy(model, fed, parts), naively_decoded(session, model, fed, parts)
        )


def test_decoding_reads_no_label(session, model, examples):
    """Another guess to start from ends at the same answer."""
    other = replace(examples, given=(examples.given + 1) % 10)
    assert torch.equal(session.greedy(model, examples), session.greedy(model, other))


def test_decoding_a_right_guess_costs_one_forward(session, model, examples):
    answer = session.greedy(model, examples)
    again = Session()  # which has no logits of this model yet
    assert torch.equal(again.greedy(model, examples.continued_with(answer)), answer)
    assert again.n_forwarded == len(examples)


def test_noisy_sets_are_fed_both_prefixes_and_clean_ones_the_only_one(examples, others):
    assert prefixes(examples) == ("given", "true")
    assert prefixes(others) == ("given",)
    last_digit_wrong = replace(
        others, given=torch.cat([others.given[:, :-1], (others.given[:, -1:] + 1) % 10], dim=1)
    )
    assert prefixes(last_digit_wrong) == ("given",)


def test_the_table_has_the_documented_columns_and_every_row_once(session):
    table = GRID.model_copy(update={"control": RandomDirection(n=2)}).table(session)
    assert list(table.columns) == list(EffectAnalysis.columns)
    keys = table[["condition", "prefix", "place", "measure"]]
    assert not keys.duplicated().any()
    found = {(c, p) for c, p, *_ in keys.itertuples(index=False)}
    fed = {
        (c, p) for c in ("baseline", "intervened", "control", "source") for p in ("given", "true")
    }
    assert found == fed | {(c, "greedy") for c in ("baseline", "intervened", "control")}
    assert set(table["place"]) == {"all", "s4", "s3", "s2", "s1", "s0"}
    assert set(table["n"]) == {12}


def test_clean_sets_have_no_rows_of_a_second_prefix(session):
    table = GRID.model_copy(update={"examples": "clean"}).table(session)
    assert set(table["prefix"]) == {"given", "greedy"}
    assert set(table["examples"]) == {"clean"}


def test_only_accuracies_are_decoded_and_only_if_asked(session):
    grid = GRID.model_copy(update={"measures": (Accuracy(), KL())})
    assert set(rows(grid.table(session), prefix="greedy")["measure"]) == {"accuracy_true"}
    assert "greedy" not in set(grid.model_copy(update={"greedy": False}).table(session)["prefix"])
    assert "greedy" not in set(
        grid.model_copy(update={"measures": (KL(),)}).table(session)["prefix"]
    )


@pytest.mark.parametrize("prefix", ["given", "true"])
@pytest.mark.parametrize("condition", ["baseline", "intervened", "source"])
def test_values_are_the_measure_of_the_hook_path(
    condition, prefix, session, model, other_model, examples
):
    measure, fed = Probability(label="true"), examples.with_prefix(prefix)
    table = GRID.model_copy(
        update={"measures": (measure,), "source": Source(checkpoint="before", examples="clean")}
    )
    table = rows(table.table(session), condition=condition, prefix=prefix)
    part = Patch(site="attn_out", layer=1, source=Source(checkpoint="before", examples="clean"))
    clean = session.examples("clean").with_prefix(prefix)
    with torch.no_grad(), applied(model, [part], fed, session):
        patched = model(fed.tokens)[:, -5:]
    logits = {
        "baseline": model(fed.tokens)[:, -5:],
        "intervened": patched,
        "source": other_model(clean.tokens)[:, -5:],
    }
    probabilities = (
        logits[condition].detach().softmax(-1).gather(-1, examples.true[..., None])[..., 0]
    )
    by_place = {"all": probabilities.prod(1)} | {f"s{4 - i}": probabilities[:, i] for i in range(5)}
    for place, expected in by_place.items():
        found = the(table, place=place)
        np.testing.assert_allclose(found["per_example"], expected, atol=1e-5)
        assert found["value"] == pytest.approx(expected.mean().item(), abs=1e-5)


def test_decoded_accuracies_are_those_of_the_free_answer(session, model, examples):
    table = rows(GRID.table(session), prefix="greedy", condition="intervened")
    answer = naively_decoded(session, model, examples, INTERVENTIONS["checkpoint"])
    for label in ("given", "true"):
        right = answer == examples.labels(label)
        found = the(table, place="all", measure=f"accuracy_{label}")
        assert found["per_example"].tolist() == right.all(1).float().tolist()
        assert the(table, place="s0", measure=f"accuracy_{label}")["value"] == pytest.approx(
            right[:, 4].float().mean()
        )


def test_kl_is_measured_from_the_baseline(session):
    table = GRID.model_copy(update={"measures": (KL(),)}).table(session)
    assert rows(table, condition="baseline")["value"].abs().max() < 1e-6
    assert rows(table, condition="intervened")["value"].min() > 1e-4


@pytest.mark.parametrize("greedy", [0, 2])
@pytest.mark.parametrize(
    "control", [RandomDirection(n=3), RandomNeurons(n=3, seed=4)], ids=["direction", "neurons"]
)
def test_the_control_is_the_mean_over_its_draws(control, greedy, session, model, examples):
    fields = {
        "site": "neurons",
        "neurons": (0, 4, 8, 9),
        "control": control,
        "n_control_greedy": greedy,
    }
    grid = PatchGrid(
        layer=1, source=BEFORE, measures=("logit_difference", "accuracy_true"), **fields
    )
    table = rows(grid.table(session), condition="control")
    draws = control.draws(grid.interventions(session), model)
    by_hand = []
    for draw in draws:
        with torch.no_grad(), applied(model, draw, examples, session) as edited:
            logits = edited(examples.tokens)[:, -5:]
        by_hand.append(LogitDifference()(logits, examples, logits).mean(1))
    found = the(table, prefix="given", place="all", measure="logit_difference")
    np.testing.assert_allclose(found["per_example"], torch.stack(by_hand).mean(0), atol=1e-5)
    assert len(rows(table, prefix="greedy")) == (6 if greedy else 0)
    if greedy:
        answers = torch.stack(
            [naively_decoded(session, model, examples, draw) for draw in draws[:greedy]]
        )
        right = (answers == examples.true).all(-1).double().mean(0)
        found = the(table, prefix="greedy", place="all")
        np.testing.assert_allclose(found["per_example"], right, atol=1e-6)


def readings(*values: float) -> Readings:
    return Readings({("given", "all", "m"): torch.tensor(values)})


@pytest.mark.parametrize(
    ("baseline", "intervened", "source", "expected"),
    [
        ((0.0, 0.0), (0.5, 0.0), (1.5, 1.5), 0.25 / 1.5),
        ((1.0, 1.02), (1.01, 1.01), (0.0, 0.0), 0.0),
        ((1.0, 1.0), (4.0, 2.5), (2.5, 2.5), 2.25 / 1.5),
        ((1.0, 1.0), (0.5, 0.5), (2.5, 2.5), -0.5 / 1.5),
        ((1.0, 1.0), (4.0, 2.0), (1.0, 1.0), None),
        ((0.0, 0.0), (1.0, 1.0), (LEAST_SPAN / 2, LEAST_SPAN / 2), None),
        ((0.0, 0.0), (1e-5, 1e-5), (1e-5, 1e-5), None),
        ((0.0, 0.0), (0.5, 0.5), (-1.0, 3.0), None),  # the span may be 0: it varies from -1 to 3
    ],
)
def test_recovery_by_hand(baseline, intervened, source, expected):
    conditions = {
        "baseline": readings(*baseline),
        "intervened": readings(*intervened),
        "source": readings(*source),
    }
    table = effect_table("noisy", conditions).set_index("condition")
    found = table["recovery"]
    ends = table.loc["intervened", ["recovery_low", "recovery_high"]]
    assert ends.isna().all() if expected is None else ends.iloc[0] <= expected <= ends.iloc[1]
    assert (
        found["intervened"] is pd.NA
        if expected is None
        else found["intervened"] == pytest.approx(expected)
    )
    assert found[["baseline", "source"]].isna().all()


def test_a_patch_from_itself_has_no_recovery(session):
    table = GRID.model_copy(update={"source": Source(checkpoint="after")}).table(session)
    assert table["recovery"].isna().all()
    assert not np.isinf(table["recovery"].astype(float)).any()


def test_without_a_source_run_there_is_no_recovery():
    table = effect_table("noisy", {"baseline": readings(0.0), "intervened": readings(1.0)})
    assert table["recovery"].isna().all()


def test_intervals_are_those_of_the_examples(session):
    row = the(
        GRID.table(session),
        condition="intervened",
        prefix="given",
        place="s2",
        measure="accuracy_true",
    )
    hits = row["per_example"].astype(float)
    exact = tuple(map(float, clopper_pearson(hits.sum(), len(hits))))
    assert (row["low"], row["high"]) == pytest.approx(exact)
    assert row["low"] <= row["value"] <= row["high"]


def test_the_baseline_is_read_once_for_a_whole_sweep(session, monkeypatch):
    GRID.table(session)
    calls = []
    read = EffectAnalysis._readings
    monkeypatch.setattr(
        EffectAnalysis, "_readings", lambda self, *a: calls.append(a[3]) or read(self, *a)
    )
    GRID.model_copy(update={"layer": 0}).table(session)
    assert [list(parts) for parts in calls] == [[Patch(site="attn_out", layer=0, source=BEFORE)]]


def test_sets_of_the_same_prompts_with_other_pairs_are_kept_apart(task, model, other_model):
    """What is shared between analyses must not be shared between sets that a measure tells
    apart."""
    train, sets = task.sample("train"), {}
    for flip in ("carry_1", "digit_sum_3"):
        sets[flip] = task.pairs(train, MinimalPair(flip=flip))
    shared = [
        i
        for i, row in enumerate(sets["carry_1"].prompt.tolist())
        if row in sets["digit_sum_3"].prompt.tolist()
    ][:6]
    first = sets["carry_1"].select(torch.tensor(shared)).as_set()
    rows_of = [sets["digit_sum_3"].prompt.tolist().index(row) for row in first.prompt.tolist()]
    second = sets["digit_sum_3"].select(torch.tensor(rows_of)).as_set()
    assert torch.equal(first.tokens, second.tokens)
    session = Session({"after": model, "before": other_model}, {"first": first, "second": second})
    for name in ("first", "second"):
        grid = GRID.model_copy(update={"examples": name, "measures": (Probability(label="pair"),)})
        alone = grid.table(Session(session.models, session.example_sets))
        pd.testing.assert_frame_equal(grid.table(session), alone)


def test_a_live_model_can_be_patched_in_from_python(session, other_model):
    found = PatchGrid(site="attn_out", layer=1, source=other_model).table(session)
    pd.testing.assert_frame_equal(found, GRID.table(session))


@pytest.fixture
def own_measures(monkeypatch):
    """Measures that a test defines are forgotten after it."""
    known = Measure.kinds()
    monkeypatch.setitem(Component.registries, "measure", dict(known))


def greedy_rows(session, *measures) -> pd.DataFrame:
    grid = GRID.model_copy(update={"measures": measures})
    return rows(grid.table(session), prefix="greedy", condition="intervened")


@pytest.mark.usefixtures("own_measures")
def test_an_accuracy_of_a_plug_in_judges_the_greedy_answer(session, model, examples):
    class FirstDigit(Accuracy):
        def whole(self, values):
            return values[:, 0]

    answer = naively_decoded(session, model, examples, INTERVENTIONS["checkpoint"])
    found = the(greedy_rows(session, FirstDigit(label="given")), place="all")
    expected = (answer == examples.given)[:, 0].float()
    assert found["measure"] == "first_digit_given"
    assert found["per_example"].tolist() == expected.tolist()


@pytest.mark.usefixtures("own_measures")
def test_what_a_plug_in_makes_of_an_answer_is_what_its_call_makes_of_it(session, model, examples):
    class ErrorRate(Accuracy):
        def __call__(self, logits, examples, baseline):
            return 1 - super().__call__(logits, examples, baseline)

    answer = naively_decoded(session, model, examples, INTERVENTIONS["checkpoint"])
    table = greedy_rows(session, ErrorRate(label="true"), Accuracy(label="true"))
    wrong = (answer != examples.true).float()
    for i, place in enumerate(examples.places):
        found = the(table, place=place, measure="error_rate_true")
        assert found["per_example"].tolist() == wrong[:, i].tolist()
    found = the(table, place="all", measure="error_rate_true")
    assert found["per_example"].tolist() == wrong.amin(dim=1).tolist()


@pytest.mark.usefixtures("own_measures")
def test_a_measure_of_a_plug_in_has_greedy_rows_if_it_judges_answers(session, model, examples):
    class EvenDigits(Measure):
        unit: ClassVar[str] = "fraction"
        judges_answers: ClassVar[bool] = True

        def __call__(self, logits, examples, baseline):
            return (logits.argmax(-1) % 2 == 0).float()

    answer = naively_decoded(session, model, examples, INTERVENTIONS["checkpoint"])
    found = the(greedy_rows(session, EvenDigits()), place="all")
    expected = (answer % 2 == 0).float().mean(dim=1)
    np.testing.assert_allclose(found["per_example"], expected)


@pytest.mark.usefixtures("own_measures")
@pytest.mark.parametrize("others", [(), (Accuracy(),)], ids=["alone", "with an accuracy"])
def test_a_measure_that_cannot_judge_answers_says_so_once(others, session):
    class Entropy(Measure):
        unit: ClassVar[str] = "nats"

        def __call__(self, logits, examples, baseline):
            log_p = logits.log_softmax(-1)
            return -(log_p.exp() * log_p).sum(-1)

    said = []
    session.say = said.append
    found = greedy_rows(session, Entropy(), *others)
    assert "entropy" not in set(found["measure"])
    assert said == ["entropy has no greedy rows: it needs the logits under a prefix"]
    GRID.model_copy(update={"measures": (Entropy(),), "greedy": False}).table(session)
    assert len(said) == 1


@pytest.mark.parametrize("prefix", ["given", "true"])
def test_one_prefix_has_the_rows_that_it_has_of_both(prefix, session):
    both = GRID.table(session)
    one = GRID.model_copy(update={"prefixes": (prefix,)}).table(session)
    assert set(one["prefix"]) == {prefix, "greedy"}
    expected = both[both["prefix"].isin([prefix, "greedy"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, expected)


def test_where_both_labels_agree_the_chosen_prefix_is_named(session):
    chosen = {"examples": "clean", "prefixes": ("true",)}
    table = GRID.model_copy(update=chosen).table(session)
    assert set(table["prefix"]) == {"true", "greedy"}
    given = GRID.model_copy(update=chosen | {"prefixes": ("given",)}).table(session)
    columns = ["condition", "place", "measure", "value"]
    found, expected = (rows(t, prefix=p) for t, p in ((table, "true"), (given, "given")))
    pd.testing.assert_frame_equal(found[columns], expected[columns])


@pytest.mark.parametrize("prefixes", [(), ("true", "true"), ("greedy",)])
def test_prefixes_are_labels_each_named_once(prefixes):
    with pytest.raises(ValidationError, match=r"nothing is chosen|listed twice|'given' or 'true'"):
        PatchGrid(site="attn_out", layer=1, source=BEFORE, prefixes=prefixes)


@torch.no_grad()
def decoded_by_hand(model, source, examples, read, label) -> torch.Tensor:
    """Greedy, with the attention output of layer 1 of `source`, which is fed this label of `read`
    (or, for `own`, the answer so far) at every step."""
    hook, answer = "blocks.1.hook_attn_out", torch.zeros_like(examples.given)
    for place in range(examples.n_answer):
        fed = examples.continued_with(answer)
        if label == "own":
            seen = read.continued_with(answer) if read is examples else read
        else:
            seen = read.with_prefix(label)
        _, cache = source.run_with_cache(seen.tokens)
        edit = (hook, lambda x, hook, cache=cache: cache[hook.name])
        logits = model.run_with_hooks(fed.tokens, fwd_hooks=[edit])
        answer[:, place] = logits[:, place - examples.n_answer].argmax(-1)
    return answer


@pytest.mark.parametrize("seed", [11, 13])
@pytest.mark.parametrize("source_set", [None, "clean"])
def test_the_source_is_fed_what_source_prefix_names(
    source_set, seed, session, random_models, examples, others
):
    model, before = random_models(seed), random_models(seed + 100)
    session.models = {"after": model, "before": before}
    wrong = replace(others, given=(others.given + 1) % 10)  # so that its prefixes differ
    session.example_sets = {"noisy": examples, "clean": wrong}
    source = Source(checkpoint="before", examples=source_set)
    answers = {}
    for label in ("own", "given", "true"):
        grid = GRID.model_copy(update={"source": source, "source_prefix": label})
        table = rows(grid.table(session), prefix="greedy", condition="intervened")
        read = examples if source_set is None else wrong
        answers[label] = decoded_by_hand(model, before, examples, read, label)
        for i, place in enumerate(examples.places):
            found = the(table, place=place, measure="accuracy_given")["per_example"]
            expected = (answers[label][:, i] == examples.given[:, i]).float()
            assert found.tolist() == expected.tolist()
    assert not torch.equal(answers["given"], answers["true"])


@pytest.mark.parametrize("analysis", [PatchGrid, Ablation], ids=lambda kind: kind.kind)
@pytest.mark.parametrize(
    ("examples", "measure", "instead"),
    [
        ("clean", LogitDifference(), "take logit_true, probability_true or accuracy_true"),
        ("clean", Logit(label="true", against="given"), "take logit_true or probability_true"),
        ("alike", Logit(label="given", against="pair"), "take logit_given or probability_given"),
    ],
    ids=["logit_difference", "true_less_given", "given_less_pair"],
)
def test_a_measure_that_is_constant_by_definition_is_refused(
    examples, measure, instead, analysis, session, others
):
    alike = replace(others, counterfactual=others)  # a pair whose answers are the same
    session.example_sets = {**session.example_sets, "alike": alike}
    chosen = {"examples": examples, "measures": (measure,), "greedy": False}
    at = {"site": "attn_out", "layer": 1, "source": BEFORE}
    required = {"component": "layer"} if analysis is Ablation else at
    with pytest.raises(InputError, match=f"{measure.name} is 0; {instead}"):
        analysis(**chosen, **required).table(session)


def test_a_ranking_by_what_is_constant_is_refused(session):
    with pytest.raises(InputError, match=r"logit_difference on 'clean'.*take logit_true"):
        Ablation(component="layer", metric=LogitDifference(), ranked_on="clean").table(session)


def test_on_examples_whose_labels_differ_the_logit_difference_is_measured(session):
    table = GRID.model_copy(update={"measures": (LogitDifference(),)}).table(session)
    assert rows(table, condition="baseline")["value"].abs().max() > 0.01
