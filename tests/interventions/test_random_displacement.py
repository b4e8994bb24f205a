from __future__ import annotations

import pytest
import torch

from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.session import Session

BEFORE = Source(checkpoint="before")
PATCHES = [
    Patch(site="resid_pre", layer=1, source=BEFORE),
    Patch(site="neurons", layer=1, neurons=(0, 3, 17, 20), source=BEFORE),
    Patch(site="z", layer=0, head=1, source=BEFORE),
    Patch(site="attn_out", layer=1, position=("=", "s3"), source=BEFORE),
    Patch(site="mlp_out", layer=0, source=Source(mean_over="clean")),
]
by_site = pytest.mark.parametrize("part", PATCHES, ids=[part.site for part in PATCHES])


def displacements(
    part: Patch, session: Session, model, examples, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the patch and its random displacement add to the unedited activation."""
    activation = session.activation(model, examples, part.hooks(model)[0])
    random = RandomDisplacement(of=part, seed=seed)
    (patch,), (moved,) = (p.edits(session, model, examples) for p in (part, random))
    assert patch.hook == moved.hook
    every = torch.arange(len(examples))
    return patch(activation, every) - activation, moved(activation, every) - activation


@by_site
def test_the_displacement_is_as_long_at_every_example_and_position(part, session, model, examples):
    patched, moved = (
        d.flatten(2).norm(dim=-1) for d in displacements(part, session, model, examples)
    )
    torch.testing.assert_close(moved, patched, atol=1e-5, rtol=1e-4)
    assert patched.max() > 0.1


@by_site
def test_it_stays_within_the_units_that_the_patch_changes(part, session, model, examples):
    patched, moved = displacements(part, session, model, examples)
    assert not moved[patched == 0].any()
    assert moved[patched != 0].abs().min() > 0


@by_site
def test_it_points_elsewhere_than_the_patch(part, session, model, examples):
    patched, moved = (d.flatten(1) for d in displacements(part, session, model, examples))
    assert torch.cosine_similarity(patched, moved).abs().max() < 0.9


def test_all_examples_share_the_direction_of_a_position(session, model, examples):
    _, moved = displacements(PATCHES[0], session, model, examples)
    directions = torch.nn.functional.normalize(moved, dim=-1)
    torch.testing.assert_close(
        directions, directions[:1].expand_as(directions), atol=1e-5, rtol=1e-4
    )
    assert torch.cosine_similarity(directions[0, 0], directions[0, 1], dim=0).abs() < 0.9


def test_a_seed_gives_one_direction_and_another_seed_another(session, model, examples):
    first, again, other = (
        displacements(PATCHES[0], session, model, examples, seed)[1] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert torch.cosine_similarity(first[0], other[0], dim=-1).abs().max() < 0.9


@by_site
def test_an_example_is_moved_alike_in_every_batch(part, session, model, examples):
    """Decoding runs the rows that are still open only: they must meet the same intervention."""
    rows = torch.tensor([3, 8])
    _, together = displacements(part, session, model, examples)
    _, apart = displacements(part, session, model, examples.select(rows))
    torch.testing.assert_close(apart, together[rows], atol=1e-5, rtol=1e-4)


def test_a_patch_from_itself_is_moved_into_nothing(session, model, examples):
    part = RandomDisplacement(
        of=Patch(site="resid_post", layer=0, source=Source(checkpoint="after"))
    )
    edited = session.logits(model, examples, [part])
    torch.testing.assert_close(edited, session.logits(model, examples), atol=1e-6, rtol=1e-6)


def test_hooks_of_one_intervention_have_their_own_directions(session, model, examples):
    part = RandomDisplacement(of=Patch(site="mlp_out", layer=(0, 1), source=BEFORE))
    zero, every = torch.zeros(12, 14, 16), torch.arange(12)
    first, second = (edit(zero, every) for edit in part.edits(session, model, examples))
    assert torch.cosine_similarity(first[0], second[0], dim=-1).abs().max() < 0.9


def test_a_displacement_of_a_pattern_keeps_the_other_head_and_hides_the_future(
    session, model, examples
):
    part = Patch(site="pattern", layer=0, head=0, source=BEFORE)
    patched, moved = displacements(part, session, model, examples)
    assert not moved[:, 1].any()
    assert not moved[:, 0].triu(1).any()
    by_position = (displacement.norm(dim=(1, 3)) for displacement in (moved, patched))
    torch.testing.assert_close(*by_position, atol=1e-5, rtol=1e-4)
