from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from mechmem.interventions.inlp import SLACK, _split, inlp, logistic_regression
from mechmem.interventions.subspace import (
    TOLERANCE,
    Eraser,
    class_code,
    leace,
    random_subspace,
    variance_matched,
)

with (
    warnings.catch_warnings()
):  # concept-erasure scripts a function of its own, which torch deprecates
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    from concept_erasure import LeaceFitter


def data(n_classes=3, n=600, d=10, seed=0, strength=2.0, dtype=torch.float64):
    """Correlated rows whose mean depends on a class, and a second class, independent, in another
    direction."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=dtype)
    labels, other = (torch.randint(k, (n,), generator=generator) for k in (n_classes, 2))
    means = torch.randn(n_classes, d, generator=generator, dtype=dtype)
    x = torch.randn(n, d, generator=generator, dtype=dtype) @ mix + strength * means[labels] + 5
    x = x + 3 * other[:, None] * mix[0]
    return x, labels, other


def one_hot(labels):
    return F.one_hot(labels).double()


def accuracy(x, labels) -> float:
    """Of a fresh logistic regression, by cross-checking halves."""
    half = len(x) // 2
    fitted = LogisticRegression(max_iter=2000).fit(x[:half].numpy(), labels[:half].numpy())
    return fitted.score(x[half:].numpy(), labels[half:].numpy())


def share(labels) -> float:
    return labels.bincount().max().item() / len(labels)


def fitted_share(x, labels) -> float:
    return (
        LogisticRegression(max_iter=2000)
        .fit(x.numpy(), labels.numpy())
        .score(x.numpy(), labels.numpy())
    )


def all_erasers(x, labels) -> dict[str, Eraser]:
    return {
        "leace": leace(x, one_hot(labels)),
        "inlp": inlp(x, labels),
        "random": random_subspace(x, 2),
        "variance_matched": variance_matched(x, 2, 0.9),
    }


def test_leace_by_hand():
    # Two uncorrelated dimensions of variance 4/3 and 4/3; the class is the sign of the first.
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64) + 7
    eraser = leace(x, one_hot(torch.tensor([1, 1, 0, 0])))
    expected = torch.tensor([[7.0, 8.0], [7.0, 6.0], [7.0, 8.0], [7.0, 6.0]], dtype=torch.float64)
    assert torch.allclose(eraser(x), expected)
    assert eraser.rank == 1
    assert eraser.variance_left == pytest.approx(0.5)


def test_leace_by_hand_is_oblique_where_dimensions_correlate():
    # x0 = class (-1, 1); x1 = x0 + noise (-1, 1): erasing leaves x1's noise and moves the rest to
    # the mean.
    x = torch.tensor([[1.0, 2.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, -2.0]], dtype=torch.float64)
    eraser = leace(x, one_hot(torch.tensor([1, 1, 0, 0])))
    noise = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    assert torch.allclose(eraser(x), noise, atol=1e-12)
    assert eraser.variance_left == pytest.approx(4 / 12)


def test_random_subspace_by_hand():
    x, _, _ = data(d=4)
    eraser = random_subspace(x, 4)
    assert torch.allclose(eraser(x), x.mean(0).expand_as(x))
    assert eraser.variance_left == pytest.approx(0, abs=1e-12)
    assert torch.equal(random_subspace(x, 0)(x), x)
    assert random_subspace(x, 0).variance_left == 1


@pytest.mark.parametrize("n_classes", [2, 3, 7, 10, 25])
@pytest.mark.parametrize("d", [6, 10, 40])
def test_leace_is_that_of_concept_erasure(n_classes, d):
    x, labels, _ = data(n_classes, d=d, seed=d)
    oracle = LeaceFitter.fit(x, one_hot(labels), shrinkage=False, svd_tol=TOLERANCE).eraser
    found = leace(x, one_hot(labels))
    identity = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(identity - found.write @ found.read, oracle.P, atol=1e-8, rtol=0)
    torch.testing.assert_close(found(x), oracle(x), atol=1e-8, rtol=0)
    assert found.rank == min(n_classes - 1, d)


def test_leace_is_that_of_concept_erasure_on_a_subspace():
    x, labels, _ = data(4, d=8)
    x = torch.cat(
        [x, x @ torch.ones(8, 3, dtype=torch.float64), torch.ones(600, 1, dtype=torch.float64)],
        dim=1,
    )
    oracle = LeaceFitter.fit(x, one_hot(labels), shrinkage=False, svd_tol=TOLERANCE).eraser
    torch.testing.assert_close(leace(x, one_hot(labels))(x), oracle(x), atol=1e-8, rtol=0)


@pytest.mark.parametrize("n_classes", [2, 3, 6])
def test_after_leace_no_classifier_beats_the_majority(n_classes):
    x, labels, _ = data(n_classes, n=2000)
    erased = leace(x, one_hot(labels))(x)
    assert fitted_share(x, labels) > share(labels) + 0.2
    assert fitted_share(erased, labels) == pytest.approx(share(labels), abs=1e-3)
    centred = erased - erased.mean(0)
    assert (centred.T @ (one_hot(labels) - one_hot(labels).mean(0))).abs().max() < 1e-7


def test_one_hot_classes_are_needed():
    x, labels, _ = data(3, n=2000)
    ids = leace(x, labels[:, None].double())
    assert fitted_share(ids(x), labels) > share(labels) + 0.1


@pytest.mark.parametrize("n_classes", [2, 3, 6])
def test_after_inlp_at_most_the_slack_above_the_majority(n_classes):
    x, labels, _ = data(n_classes, n=4000, d=40)
    found = inlp(x, labels)
    assert accuracy(x, labels) > share(labels) + 0.2
    assert accuracy(found(x), labels) <= share(labels[2000:]) + SLACK + 0.01
    assert 0 < found.rank < 40


@pytest.mark.parametrize("n_classes", [2, 3, 6])
def test_after_inlp_a_fresh_classifier_does_no_better_on_the_rows_held_out(n_classes):
    x, labels, _ = data(n_classes, n=4000, d=40)
    found, (fit, held_out) = inlp(x, labels), _split(4000, 0)
    fresh = LogisticRegression(max_iter=2000).fit(found(x[fit]).numpy(), labels[fit].numpy())
    assert (
        fresh.score(found(x[held_out]).numpy(), labels[held_out].numpy())
        <= share(labels[held_out]) + SLACK
    )


FOUND = pytest.mark.xfail(
    strict=True, reason="3 classes: 0.033 above the majority, 6 classes: 0.041"
)


@pytest.mark.parametrize(
    "n_classes", [2, pytest.param(3, marks=FOUND), pytest.param(6, marks=FOUND)]
)
def test_after_inlp_a_fresh_classifier_does_no_better_on_rows_that_nothing_was_fitted_on(n_classes):
    """Not met: what INLP's finitely many rows leave, other rows find. LEACE leaves up to 0.027
    there in the same way."""
    x, labels, _ = data(n_classes, n=12_000, d=40)
    found = inlp(x[:4000], labels[:4000])
    fresh = LogisticRegression(max_iter=2000).fit(
        found(x[4000:8000]).numpy(), labels[4000:8000].numpy()
    )
    assert (
        fresh.score(found(x[8000:]).numpy(), labels[8000:].numpy()) <= share(labels[8000:]) + SLACK
    )


def test_inlp_is_not_centred_and_projects_the_original():
    x, labels, _ = data()
    found = inlp(x, labels)
    assert not found.centre.any()
    assert torch.allclose(found.write.T @ found.write, torch.eye(found.rank, dtype=torch.float64))
    assert torch.allclose(
        found(x), x @ (torch.eye(10, dtype=torch.float64) - found.write @ found.read)
    )


def test_inlp_removes_nothing_where_there_is_nothing():
    x, _, _ = data(n=3000)
    labels = torch.randint(2, (3000,), generator=torch.Generator().manual_seed(5))
    assert inlp(x, labels).rank == 0
    assert torch.equal(inlp(x, labels)(x), x)


def test_inlp_with_more_classes_than_dimensions_removes_everything():
    x, labels, _ = data(n_classes=12, d=6, n=2000, strength=5)
    found = inlp(x, labels)
    assert found.rank == 6
    assert found.variance_left < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_constant_activation_stays_as_it_is(dtype):
    x, labels = torch.full((300, 5), 0.1, dtype=dtype), torch.randint(3, (300,))
    x = x * (
        1 + torch.finfo(dtype).eps * torch.randint(-1, 2, x.shape)
    )  # rounding, which is no variance
    for found in (leace(x, one_hot(labels)), inlp(x, labels), variance_matched(x, 0, 1.0)):
        assert found.rank == 0
        assert found.variance_left == 1
        assert torch.equal(found(x), x)


def test_rounding_is_not_whitened_into_information():
    x, labels, _ = data(3, dtype=torch.float32)
    x = torch.cat([x, 1 + 1e-7 * torch.randn(600, 1)], dim=1)
    found = leace(x, one_hot(labels))
    elsewhere = x.clone()
    elsewhere[:, -1] += 1  # a direction that no example of the fit varied in
    assert torch.allclose(found(elsewhere) - found(x), elsewhere - x, atol=1e-4)


@pytest.mark.parametrize("method", ["leace", "inlp", "random", "variance_matched"])
def test_erasing_twice_is_erasing_once(method):
    x, labels, _ = data()
    found = all_erasers(x, labels)[method]
    assert torch.allclose(found(found(x)), found(x), atol=1e-9)
    assert torch.linalg.matrix_rank(found.write @ found.read) == found.rank > 0


@pytest.mark.parametrize("method", ["leace", "random", "variance_matched"])
def test_around_the_mean_the_mean_stays(method):
    x, labels, _ = data()
    assert torch.allclose(all_erasers(x, labels)[method](x).mean(0), x.mean(0))


@pytest.mark.parametrize("method", ["leace", "inlp", "random", "variance_matched"])
def test_the_stated_variance_is_what_is_left(method):
    x, labels, _ = data()
    found = all_erasers(x, labels)[method]
    left = found(x).var(0).sum() / x.var(0).sum()
    assert found.variance_left == pytest.approx(left.item())
    assert 0 < found.variance_left < 1


@pytest.mark.parametrize("method", ["leace", "inlp"])
def test_an_independent_variable_can_be_read_as_before(method):
    x, labels, other = data(2, n=4000, d=40, strength=1.0)
    found = all_erasers(x, labels)[method]
    assert accuracy(x, other) > 0.8
    assert abs(accuracy(found(x), other) - accuracy(x, other)) < 0.05


@given(rank=st.integers(1, 9), at=st.floats(0.02, 0.98), seed=st.integers(0, 1000))
def test_the_matched_subspace_has_the_rank_and_removes_the_variance(rank, at, seed):
    x, _, _ = data()
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    least, most = values[:rank].sum() / values.sum(), values[-rank:].sum() / values.sum()
    wanted = 1 - (least + at * (most - least)).item()
    found = variance_matched(x, rank, wanted, seed)
    assert found.rank == rank
    assert found.variance_left == pytest.approx(wanted, abs=1e-9)
    assert torch.allclose(found.write.T @ found.write, torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("n_classes", [2, 5, 9])
def test_what_leace_removes_can_always_be_matched(n_classes):
    x, labels, _ = data(n_classes)
    found = leace(x, one_hot(labels))
    for seed in range(5):
        matched = variance_matched(x, found.rank, found.variance_left, seed)
        assert matched.rank == found.rank
        assert matched.variance_left == pytest.approx(found.variance_left, abs=1e-9)


def test_a_seed_gives_the_same_subspace_and_another_seed_another():
    x, _, _ = data()
    for fit in (
        lambda seed: random_subspace(x, 2, seed),
        lambda seed: variance_matched(x, 2, 0.9, seed),
    ):
        assert torch.equal(fit(3).write, fit(3).write)
        assert not torch.allclose(fit(3).write @ fit(3).read, fit(4).write @ fit(4).read, atol=0.1)


def test_a_class_code_by_hand():
    # Class means 0, 4 and 8 along the first dimension, none along the second: one code, the class
    # mean.
    x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [4.0, 1.0], [4.0, -1.0], [8.0, 1.0], [8.0, -1.0]])
    code = class_code(x, torch.tensor([0, 0, 1, 1, 2, 2]), 1)
    spread = torch.tensor([-4.0, -4, 0, 0, 4, 4], dtype=torch.float64)
    assert torch.allclose(code[:, 0] * code[-1, 0].sign(), spread / spread.std())


def test_erasing_a_code_leaves_what_the_code_does_not_hold():
    x, labels, _ = data(30, n=3000, d=12)
    everything, some = leace(x, one_hot(labels)), leace(x, class_code(x, labels, 3))
    assert everything.rank == 12
    assert everything.variance_left < 1e-9
    assert some.rank == 3
    assert 0.05 < some.variance_left < 1
    between = torch.stack([x[labels == i].mean(0) for i in range(30)])
    left = torch.stack([some(x)[labels == i].mean(0) for i in range(30)])
    assert left.var(0).sum() < 0.7 * between.var(0).sum()


def test_a_code_of_full_rank_is_the_variable():
    x, labels, _ = data(4)
    full, classes = leace(x, class_code(x, labels, 3)), leace(x, one_hot(labels))
    assert torch.allclose(full(x), classes(x), atol=1e-8)


def test_logistic_regression_is_that_of_scikit_learn():
    x, labels, _ = data(3)
    scale = x.var(0).mean().sqrt()
    weight, bias = logistic_regression(x, labels, 3)
    centred = (x - x.mean(0)) / scale
    oracle = LogisticRegression(max_iter=5000, tol=1e-10).fit(centred.numpy(), labels.numpy())
    found = (x @ weight.T + bias).softmax(1)
    assert torch.allclose(found, torch.tensor(oracle.predict_proba(centred.numpy())), atol=1e-4)


def test_an_eraser_keeps_the_type_and_shape_of_what_it_is_given():
    x, labels, _ = data()
    found = leace(x, one_hot(labels))
    batch = x.float().reshape(20, 30, 10)
    assert found(batch).dtype == torch.float32
    assert torch.allclose(found(batch), found(x).float().reshape(20, 30, 10), atol=1e-5)
