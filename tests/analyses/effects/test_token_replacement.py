"""Look-ups built by hand are recognised, and replaced tokens are what plain greedy decoding of the
changed input gives."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from look_up import copying

from mechmem.analyses.effects.token_replacement import TokenReplacement, _hits
from mechmem.experiment.dry_run import DryRun
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.sweep import each

DIGITS = ["a3", "a2", "a1", "a0", "b3", "b2", "b1", "b0"]
N_PROMPT = 10


def greedy(model, prompt):
    """The answer token by token, by plain forwards."""
    for _ in range(5):
        with torch.no_grad():
            prompt = torch.cat([prompt, model(prompt)[:, -1:].argmax(-1)], dim=1)
    return prompt[:, N_PROMPT:]


def session_of(model, examples, others) -> Session:
    """The examples are labelled as the model answers them, and the rule is to answer as the model
    does."""
    given = greedy(model, examples.prompt)
    sets = {"noisy": replace(examples, given=given), "clean": others}
    return Session({"after": model}, sets, rule=lambda prompt: greedy(model, prompt), chance=0.125)


def survival(table: pd.DataFrame, condition: str, by: str, measure: str = "accuracy_given") -> dict:
    rows = table[
        (table["condition"] == condition)
        & (table["place"] == "all")
        & (table["measure"] == measure)
    ]
    return rows.set_index(by)["value"].to_dict()


@pytest.fixture(scope="module")
def pool(task):
    return task.sample("train").select(torch.arange(60)).as_set()


@pytest.mark.parametrize(
    "sources", [[6, 6, 6, 6, 6], [6, 3, 6, 3, 3], [0, 1, 2, 3, 5]], ids=["one", "two", "five"]
)
def test_a_look_up_is_recognised_by_the_tokens_it_is_keyed_on(sources, examples, pool):
    session = session_of(copying(sources), examples, pool)
    table = TokenReplacement(n_draws=1).table(session)
    names = [list(examples.positions)[i] for i in sources]
    assert survival(table, "alone", "position") == {
        name: float(name not in names) for name in DIGITS
    }
    needed = table[table["measure"] == "tokens_needed"]
    assert needed["value"].item() == needed["high"].item() == pytest.approx(len(set(sources)))


def test_several_replaced_leave_what_is_not_keyed_on_them(examples, pool):
    session = session_of(copying([6, 3, 6, 3, 3]), examples, pool)
    orders = [TokenReplacement()._draw(session, examples, DIGITS, seed).order for seed in (7, 8, 9)]
    left = [np.mean([not {"b2", "a0"} & set(order[:m]) for order in orders]) for m in range(9)]
    table = TokenReplacement(n_draws=3, seed=7).table(session)
    assert list(survival(table, "together", "n_replaced").values()) == pytest.approx(left)
    assert any(0 < share < 1 for share in left)


def test_a_pure_look_up_is_the_mean_over_all_sets_of_tokens(examples, pool):
    table = TokenReplacement(n_draws=1, look_up=(3,)).table(
        session_of(copying([6] * 5), examples, pool)
    )
    subsets = {m: [*combinations(range(8), m)] for m in range(9)}
    expected = {
        m: np.mean([not {0, 4, 5} & set(chosen) for chosen in sets]) for m, sets in subsets.items()
    }
    assert survival(table, "look_up_3", "n_replaced") == pytest.approx(expected)


def test_pure_look_ups_by_hand(examples, pool):
    table = TokenReplacement(n_draws=1, look_up=(1, 2, 8)).table(
        session_of(copying([6] * 5), examples, pool)
    )
    assert survival(table, "look_up_1", "n_replaced")[3] == pytest.approx(5 / 8)
    assert survival(table, "look_up_2", "n_replaced")[2] == pytest.approx(15 / 28)
    assert list(survival(table, "look_up_8", "n_replaced").values()) == [1] + [0] * 8
    assert survival(table, "chance", "place") == {"all": 0.125}


def test_a_replaced_token_gives_what_plain_decoding_of_the_changed_input_gives(
    model, examples, pool
):
    table = TokenReplacement(n_draws=1).table(session_of(model, examples, pool))
    for condition, by in (("alone", "position"), ("together", "n_replaced")):
        assert set(survival(table, condition, by, "accuracy_rule").values()) == {1.0}
    by_place = table[(table["measure"] == "accuracy_rule") & (table["place"] != "all")]
    assert len(by_place) == 5 * (8 + 9)
    assert (by_place["value"] == 1).all()
    assert survival(table, "together", "n_replaced")[8] < 1


def test_all_tokens_replaced_is_the_donors_answer_and_none_is_the_models_own(model, examples, pool):
    session = session_of(model, examples, pool)
    analysis = TokenReplacement()
    draw = analysis._draw(session, session.examples("noisy"), DIGITS, 0)
    answer = greedy(model, draw.donors.prompt)
    changed = greedy(model, examples.prompt)
    expected = (answer == changed).all(1).double().numpy()
    assert draw.hits(*DIGITS)["accuracy_given"][:, 0].tolist() == expected.tolist()
    assert draw.hits()["accuracy_given"].all()
    assert (
        draw.hits()["accuracy_true"][:, 1:].tolist() == (changed == examples.true).double().tolist()
    )


def test_the_residual_is_what_plain_hooks_put_there(model, examples, pool):
    session = session_of(model, examples, pool)
    draw = TokenReplacement(layer=1)._draw(session, session.examples("noisy"), DIGITS, 3)
    at = [examples.positions[name] for name in ("a1", "b3")]
    theirs = model.run_with_cache(draw.donors.prompt)[1]["blocks.1.hook_resid_pre"][:, at]

    def put(x, hook):
        x[:, at] = theirs
        return x

    tokens = examples.prompt
    for _ in range(5):
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", put)])
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    expected = tokens[:, N_PROMPT:] == session.examples("noisy").given
    assert draw.hits("a1", "b3")["accuracy_given"][:, 1:].tolist() == expected.double().tolist()
    assert not expected.all()


def test_a_donor_has_another_token_at_every_position(model, examples, pool):
    session = session_of(model, examples, pool)
    draws = [TokenReplacement()._draw(session, examples, DIGITS, seed) for seed in range(20)]
    at = [examples.positions[name] for name in DIGITS]
    for draw in draws:
        assert (draw.donors.prompt[:, at] != examples.prompt[:, at]).all()
        assert sorted(draw.order) == sorted(DIGITS)
    assert len({tuple(draw.order) for draw in draws}) > 15


def test_what_is_answered_by_hand():
    labels = {
        "given": torch.tensor([[1, 2], [1, 2], [1, 2]]),
        "rule": torch.tensor([[3, 2], [3, 4], [5, 6]]),
    }
    found = _hits(torch.tensor([[1, 2], [1, 4], [7, 7]]), labels)
    assert found["accuracy_given"].tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert found["accuracy_rule"].tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert found["off_label_rate"].tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1]]


def test_tokens_needed_is_of_the_answers_that_are_given_at_the_baseline(examples, pool):
    session = session_of(copying([6] * 5), examples, pool)
    half = session.examples("noisy").given.clone()
    half[::2] = 10  # never answered
    session.example_sets = {
        **session.example_sets,
        "noisy": replace(session.examples("noisy"), given=half),
    }
    table = TokenReplacement(n_draws=1).table(session)
    assert survival(table, "together", "n_replaced")[0] == 0.5
    assert table.loc[table["measure"] == "tokens_needed", "value"].item() == pytest.approx(1)


def test_given_positions_may_hold_what_every_prompt_holds(model, examples, pool):
    table = TokenReplacement(n_draws=1, positions=("a0", "+", "="), layer=1).table(
        session_of(model, examples, pool)
    )
    assert list(survival(table, "alone", "position")) == ["a0", "+", "="]
    at_start = TokenReplacement(n_draws=1, positions=("a0", "+", "=")).table(
        session_of(model, examples, pool)
    )
    assert survival(at_start, "alone", "position")["="] == 1


def test_a_sweep_can_be_saved_and_tried_in_a_dry_run(model, examples, pool):
    session = session_of(model, examples, pool)
    swept = TokenReplacement(layer=each(0, 1), n_draws=1)
    table = swept.run(session, {})
    saved = pd.read_parquet(io.BytesIO(table.to_parquet(index=False)))
    assert set(saved.columns) == set(TokenReplacement.columns)
    assert saved[["value", "low", "high", "n", "unit", "measure", "place"]].notna().all(axis=None)
    keys = [c for c in saved if c not in ("value", "low", "high", "n", "per_example")]
    assert not saved.duplicated(keys).any()
    few = {
        name: session.examples(name).select(torch.arange(4)).as_set() for name in ("noisy", "clean")
    }
    sizes = {name: len(session.examples(name)) for name in few}
    dry = DryRun(sizes, models=session.models, example_sets=few, rule=session.rule)
    assert swept.run(dry, {})[keys].equals(table[keys])


def test_the_same_spec_gives_the_same_bytes(model, examples, pool):
    first, again, other = (
        TokenReplacement(n_draws=1, seed=seed)
        .table(session_of(model, examples, pool))
        .to_parquet(index=False)
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_what_cannot_be_is_refused(model, examples, pool):
    session = session_of(model, examples, pool)
    with pytest.raises(InputError, match=r"look_up 3 exceeds the 2 replaced tokens \(a0, b0\)"):
        TokenReplacement(positions=("a0", "b0"), look_up=(3,)).table(session)
    with pytest.raises(InputError, match="'s4' is not in the prompt"):
        TokenReplacement(positions=("a0", "s4")).table(session)
    with pytest.raises(InputError, match="did you mean 'a0'"):
        TokenReplacement(positions=("a00",)).table(session)
    with pytest.raises(InputError, match="layer 2 is out of range"):
        TokenReplacement(layer=2, n_draws=1).table(session)
    few = Session(
        session.models,
        {"noisy": examples, "clean": examples.select(torch.arange(2)).as_set()},
        rule=session.rule,
    )
    with pytest.raises(InputError, match="choose a larger set of donors"):
        TokenReplacement().table(few)
    session.rule = None
    with pytest.raises(InputError, match="needs the task's rule"):
        TokenReplacement().table(session)


def test_before_a_later_layer_there_is_no_look_up_to_compare_with(examples, others, pool, model):
    session = session_of(model, examples, pool)
    later = TokenReplacement(layer=1, n_draws=1).table(session)
    assert not later["condition"].str.startswith("look_up").any()
    assert "tokens_needed" not in set(later["measure"])
    assert {"alone", "together", "chance"} <= set(later["condition"])
