from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.experiment.dry_run import DryRun
from mechmem.interventions.applied import applied
from mechmem.interventions.controls.random_direction import RandomDirection
from mechmem.interventions.erase import Erase
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.subspace import leace
from mechmem.models.architecture import Architecture
from mechmem.session import Session
from mechmem.spec.errors import InputError

METHODS = ["leace", "inlp", "random", "variance_matched"]
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def clean():
    return FourDigitAddition(n_train=10, n_held_out=1500).sample("held_out")


@pytest.fixture
def session(model, other_model, examples, clean):
    return Session(
        models={"after": model, "before": other_model},
        example_sets={"noisy": examples, "clean": clean},
    )


def erase(**fields) -> Erase:
    return Erase(
        **({"site": "resid_post", "layer": 1, "variable": "carry_4", "position": "="} | fields)
    )


def accuracy(x, labels) -> float:
    x, labels = x.double().numpy(), labels.numpy()
    return LogisticRegression(max_iter=3000).fit(x, labels).score(x, labels)


def erased(part, session, model, examples):
    before = session.activation(model, examples, part.hooks(model)[0])
    (edit,) = part.edits(session, model, examples)
    return edit(before, torch.arange(len(examples))), before


def test_by_hand_it_is_leace_of_this_position(session, model, examples, clean):
    part = erase(position=("=", "s4"))
    after, before = erased(part, session, model, examples)
    fit = session.activation(model, clean, HOOK)
    for i in (9, 10):
        one_hot = torch.nn.functional.one_hot(clean.variables["carry_4"]).double()
        torch.testing.assert_close(
            after[:, i], leace(fit[:, i].double(), one_hot)(before[:, i]), atol=1e-5, rtol=1e-5
        )
    assert torch.equal(after[:, :9], before[:, :9])
    assert not torch.allclose(after[:, 9:11], before[:, 9:11], atol=1e-3)


def test_afterwards_the_variable_cannot_be_read_and_another_can(session, model, clean):
    after, before = erased(erase(), session, model, clean)
    carry, other = clean.variables["carry_4"], (clean.variables["digit_sum_0"] > 9).long()
    majority = max(carry.double().mean(), 1 - carry.double().mean()).item()
    assert accuracy(before[:, 9], carry) > majority + 0.05
    assert accuracy(after[:, 9], carry) == pytest.approx(majority, abs=0.002)
    assert abs(accuracy(after[:, 9], other) - accuracy(before[:, 9], other)) < 0.05


@pytest.mark.parametrize("control", ["random", "variance_matched"])
def test_the_controls_match_the_erasure_and_leave_the_variable(control, session, model, examples):
    found = erase().erasers(session, model, examples)[HOOK, "="]
    matched = erase(method=control, seed=1).erasers(session, model, examples)[HOOK, "="]
    assert matched.rank == found.rank == 1
    assert (abs(matched.variance_left - found.variance_left) < 1e-9) == (
        control == "variance_matched"
    )
    assert erase(method="random", rank=3).erasers(session, model, examples)[HOOK, "="].rank == 3


@pytest.mark.parametrize("control", ["random", "variance_matched"])
def test_a_control_can_be_matched_to_inlp(control, session, model, examples):
    """However often its subspace is drawn, the rank stays that of the one INLP."""
    found = erase(method="inlp").erasers(session, model, examples)[HOOK, "="]
    assert found.rank > 1  # so that it is not LEACE's
    for seed in range(3):
        control_of = erase(method=control, matched_to="inlp", seed=seed)
        matched = control_of.erasers(session, model, examples)[HOOK, "="]
        assert matched.rank == found.rank
        assert (abs(matched.variance_left - found.variance_left) < 1e-9) == (
            control == "variance_matched"
        )


def test_what_a_control_is_matched_to_is_fitted_once(session, model, examples, monkeypatch):
    fits = []
    monkeypatch.setattr("mechmem.interventions.erase.leace", lambda *a: fits.append(a) or leace(*a))
    for seed in range(3):
        erase(method="variance_matched", seed=seed).edits(session, model, examples)
    assert len(fits) == 1


def test_a_matched_control_leaves_the_variable(session, model, clean):
    after, before = erased(erase(method="variance_matched", seed=2), session, model, clean)
    carry = clean.variables["carry_4"]
    assert abs(accuracy(after[:, 9], carry) - accuracy(before[:, 9], carry)) < 0.05


def test_erasers_are_those_of_every_hook_and_position(session, model, examples):
    part = erase(layer=(0, 1), position="readout", method="random", rank=2)
    found = part.erasers(session, model, examples)
    hooks = [f"blocks.{i}.hook_resid_post" for i in (0, 1)]
    assert list(found) == [(hook, name) for hook in hooks for name in ("=", "s4", "s3", "s2", "s1")]
    assert {e.rank for e in found.values()} == {2}
    assert all(0.05 < e.variance_left < 1 for e in found.values())


def test_an_eraser_is_fitted_once(session, model, examples):
    part = erase()
    first = part.erasers(session, model, examples)[HOOK, "="]
    n = session.n_forwarded
    part.edits(session, model, examples.select(torch.tensor([1, 2])))
    assert part.erasers(session, model, examples.with_prefix("true"))[HOOK, "="] is first
    assert session.n_forwarded == n
    assert erase(seed=1).erasers(session, model, examples)[HOOK, "="] is not first


def test_where_an_activation_is_constant_nothing_is_erased(session, model, examples):
    part = erase(site="embed", layer=None, position="+")
    assert part.erasers(session, model, examples)["hook_embed", "+"].rank == 0
    after, before = erased(part, session, model, examples)
    assert torch.equal(after, before)


@pytest.mark.parametrize("method", ["leace", "inlp"])
def test_more_values_than_dimensions_are_refused(method, session, model, examples):
    message = (
        r"erasing digit_sum_3 by .* at blocks.1.hook_resid_post, position = removes \d+ of 16 "
        r"dimensions and leaves \d.*% of the variance: "
        r"17 classes span up to 16 dimensions;.*n_codes"
    )
    with pytest.raises(InputError, match=message):
        erase(variable="digit_sum_3", method=method).edits(session, model, examples)


def test_a_low_rank_code_of_it_can_be_erased(session, model, examples):
    found = erase(variable="digit_sum_3", n_codes=3).erasers(session, model, examples)[HOOK, "="]
    assert found.rank == 3
    control = erase(variable="digit_sum_3", n_codes=3, method="variance_matched")
    matched = control.erasers(session, model, examples)[HOOK, "="]
    assert (matched.rank, matched.variance_left) == (
        3,
        pytest.approx(found.variance_left, abs=1e-9),
    )


def test_more_codes_than_values_differ_in_are_refused(session, model, examples):
    assert erase(n_codes=1).erasers(session, model, examples)[HOOK, "="].rank == 1
    with pytest.raises(
        InputError,
        match=r"n_codes 2 exceeds the 1 dimension\(s\) spanned by the 2 values of carry_4 in",
    ):
        erase(n_codes=2).edits(session, model, examples)


@pytest.mark.parametrize("method", ["leace", "random", "variance_matched"])
def test_two_hundred_values_in_128_dimensions_are_refused_with_rank_and_variance(method):
    task = FourDigitAddition(n_train=10, n_held_out=2000)
    many = task.sample("held_out")
    many = replace(many, variables={"many": torch.arange(len(many)) % 200})
    wide = Architecture(n_layers=1, d_model=128, n_heads=4, d_mlp=64).build(
        len(task.vocabulary), task.n_context, 0
    )
    session = Session({"after": wide}, {"clean": many})
    message = (
        r"erasing many by leace at blocks.0.hook_resid_post, position = removes 1\d\d of 128 "
        r"dimensions and leaves 0.0% of the variance: "
        r"200 classes span up to 199 dimensions;.*n_codes"
    )
    with pytest.raises(InputError, match=message):
        erase(variable="many", layer=0, method=method).edits(session, wide, many)
    assert erase(variable="many", layer=0, method=method, n_codes=4).erasers(session, wide, many)


def test_hardly_any_variance_left_is_refused(session, model, examples):
    with pytest.raises(
        InputError, match=r"removes 9 of 16 dimensions and leaves 0\.0% of the variance"
    ):
        erase(site="embed", layer=None, variable="out_0", position="a0").edits(
            session, model, examples
        )
    with pytest.raises(InputError, match="removes 16 of 16 dimensions"):
        erase(method="random", rank=16).edits(session, model, examples)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variable": "cary_4"}, "did you mean 'carry_4'?"),
        ({"fit_on": "cleam"}, "did you mean 'clean'?"),
        ({"site": "z"}, "sites of `batch pos d_model` or `batch pos d_mlp`, not at 'z'"),
        ({"site": "logits", "layer": None}, "not at 'logits'"),
        ({"position": "s9"}, "there is no position 's9'"),
        ({"layer": 2}, "layer 2 is out of range"),
    ],
)
def test_what_is_not_there_is_refused(fields, message, session, model, examples):
    with pytest.raises(InputError, match=re.escape(message)):
        erase(**fields).edits(session, model, examples)


def test_a_variable_of_one_value_is_refused(session, model, examples, clean):
    session.example_sets["clean"] = clean.select(clean.variables["carry_4"] == 1).as_set()
    with pytest.raises(InputError, match="carry_4 has only one value; choose a set"):
        erase().edits(session, model, examples)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 3}, "leace finds its own rank"),
        ({"method": "inlp", "n_codes": 3}, "inlp needs classes"),
        ({"method": "random", "matched_to": "inlp", "n_codes": 3}, "inlp needs classes"),
        ({"neurons": (1,)}, "erase has no key 'neurons'"),
        ({"head": 1}, "erase has no key 'head'"),
    ],
)
def test_what_makes_no_sense_is_refused_as_it_is_written(fields, message):
    with pytest.raises(ValueError, match=message):
        erase(**fields)


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_on_four_examples_refuses_nothing(method, model, clean):
    few = clean.select(torch.arange(4)).as_set()
    session = DryRun({"clean": 500}, models={"after": model}, example_sets={"clean": few})
    part = erase(variable="digit_sum_3", method=method, position=None)
    assert session.logits(model, few, [part]).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("site", ["resid_pre", "neurons", "norm_final"])
@torch.no_grad()
def test_the_fast_path_is_the_hook_path(method, site, session, model, examples):
    rank = {"rank": 4} if method == "random" else {}
    layer = None if site == "norm_final" else 1
    part = erase(site=site, layer=layer, method=method, position=("=", "s4"), **rank)
    fast = session.logits(model, examples, [part])
    with applied(model, [part], examples, session):
        slow = model(examples.tokens)[:, -examples.n_answer :]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(fast, session.logits(model, examples), atol=1e-4)


@torch.no_grad()
def test_upstream_sites_are_unchanged(session, model, examples):
    with applied(model, [erase()], examples, session):
        _, cache = model.run_with_cache(examples.tokens)
    for hook in ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"):
        assert torch.allclose(cache[hook], session.activation(model, examples, hook), atol=1e-5)


@torch.no_grad()
def test_a_random_direction_can_be_its_control(session, model, examples):
    for draw in RandomDirection(n=2).draws([erase()], model):
        found = session.logits(model, examples, draw)
        assert not torch.allclose(found, session.logits(model, examples), atol=1e-4)


def test_it_is_a_block_of_a_spec_and_is_swept():
    part = erase(method={"each": METHODS}, seed=3)
    assert Intervention.model_validate(part.block()) == part
    assert [member.method for _, member in part.expand({})] == METHODS
