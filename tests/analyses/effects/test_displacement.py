from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plain_hooks import activations_of, setting

from mechmem.analyses.effects import displacement as module
from mechmem.analyses.effects.displacement import displacement, fitted
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.random_displacement import RandomDisplacement


def test_distances_by_hand(monkeypatch):
    monkeypatch.setattr(module, "SHRINKAGE", 0.0)
    x = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]]).double()[:, None]
    clean = fitted(x)  # variances 18/3 = 6 and 2/3, no covariance
    assert clean.mean.tolist() == [[0, 0]]
    found = clean.distances(torch.tensor([[[6.0, 0]], [[0, 2]], [[6, 2]]]).double())
    expected = [[math.sqrt(36 / 6 / 2)], [math.sqrt(4 * 1.5 / 2)], [math.sqrt((6 + 6) / 2)]]
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_shrinkage_by_hand():
    x = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]]).double()[:, None]
    equal = (6 + 2 / 3) / 2
    variances = [0.9 * 6 + 0.1 * equal, 0.9 * 2 / 3 + 0.1 * equal]
    found = fitted(x).distances(torch.tensor([[[6.0, 0]], [[0, 2]]]).double())
    expected = [[math.sqrt(36 / variances[0] / 2)], [math.sqrt(4 / variances[1] / 2)]]
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_clean_draws_are_about_1_away_and_a_shift_is_seen():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    x, new = (
        (torch.randn(4000, 1, 5, generator=generator, dtype=torch.float64) @ mixing)
        for _ in range(2)
    )
    clean = fitted(x)
    assert clean.distances(new).pow(2).mean().sqrt() == pytest.approx(1, abs=0.2)
    assert clean.distances(new + 10).mean() > 2


def test_where_nothing_varies_there_is_no_distance():
    assert (
        fitted(torch.ones(6, 1, 3).double()).distances(torch.ones(2, 1, 3).double()).isnan().all()
    )


@torch.no_grad()
def test_the_norm_and_distances_of_a_patch_by_plain_caches(session, model, examples, others):
    """A later layer's activation is looked at after the edits of earlier ones."""
    patches = [
        Patch(site="attn_out", layer=0, position="=", source=Source(examples="clean")),
        Patch(site="resid_post", layer=1, position=("=", "s4"), source=Source(examples="clean")),
    ]
    found = displacement(session, model, examples, patches, others)
    own, theirs = (activations_of(model, e) for e in (examples, others))
    rows = []
    for hook, at in (("blocks.0.hook_attn_out", [9]), ("blocks.1.hook_resid_post", [9, 10])):
        a, b = (x[hook][:, at].double() for x in (own, theirs))
        squares = []
        for value in (b, a):  # the patched value is that of the other set
            for pos in range(len(at)):
                s = np.cov(b[:, pos].T.numpy())
                s = 0.9 * s + 0.1 * np.trace(s) / 16 * np.eye(16)
                d = (value[:, pos] - b[:, pos].mean(0)).numpy()
                squares.append(np.sqrt(np.einsum("nd,de,ne->n", d, np.linalg.inv(s), d) / 16))
        moved, still = np.split(np.stack(squares), 2)
        rows.append([(b - a).norm(dim=-1).mean().item(), moved.mean(), still.mean()])
    np.testing.assert_allclose(found, np.mean(rows, axis=0), rtol=1e-4)


@torch.no_grad()
def test_a_random_displacement_after_an_earlier_edit(session, model, examples, others):
    first = Patch(site="mlp_out", layer=0, source=Source(checkpoint="before"))
    parts = [RandomDisplacement(of=first, seed=1)]
    found = displacement(session, model, examples, parts, others)
    hook = "blocks.0.hook_mlp_out"
    before = activations_of(session.model("before"), examples)[hook]
    own = activations_of(model, examples)[hook]
    assert found.norm == pytest.approx((before - own).norm(dim=-1).mean().item(), rel=1e-4)
    (edit,) = session.edits(model, examples, parts)
    moved = edit(own, torch.arange(len(examples)))
    again = activations_of(model, examples, setting(hook, slice(None), moved))[hook]
    clean = fitted(activations_of(model, others)[hook].double())
    expected = clean.distances(again.double()).mean().item()
    assert found.mahalanobis == pytest.approx(expected, rel=1e-4)


def test_nothing_edited_is_unknown(session, model, examples, others):
    assert all(np.isnan(displacement(session, model, examples, [], others)))


def test_it_is_fitted_once(session, model, examples, others, monkeypatch):
    part = Patch(site="z", layer=1, head=1, source=Source(examples="clean"))
    first = displacement(session, model, examples, [part], others)
    monkeypatch.setattr(module, "fitted", None)
    assert displacement(session, model, examples, [part], others) == first
