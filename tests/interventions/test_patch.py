from __future__ import annotations

import re

import pytest
import torch
from plain_hooks import activations_of, close, logits_of
from pydantic import ValidationError

from mechmem.data.examples import Examples
from mechmem.data.minimal_pair import MinimalPair
from mechmem.interventions.patch import Patch, Source
from mechmem.session import Session
from mechmem.spec.errors import InputError

HOOK = "blocks.1.hook_attn_out"


def patched(
    session: Session, model, examples: Examples, source: Source | object, hook: str = HOOK
) -> torch.Tensor:
    """The activation at the hook under a patch of attn_out at layer 1."""
    edits = session.edits(model, examples, [Patch(site="attn_out", layer=1, source=source)])
    return session.edited_activations(model, examples, edits, [hook])[hook]


def plain(model, examples: Examples) -> torch.Tensor:
    return activations_of(model, examples)[HOOK]


def logits(session, model, examples, **fields) -> torch.Tensor:
    return session.logits(model, examples, [Patch(**fields)])


@pytest.mark.parametrize(("site", "layer"), [("resid_pre", 0), ("resid_post", 1), ("logits", None)])
def test_patching_everything_from_other_examples_gives_their_logits(
    site, layer, session, model, examples, others
):
    found = logits(
        session, model, examples, site=site, layer=layer, source=Source(examples="clean")
    )
    close(found, logits_of(model, others))
    assert not torch.allclose(found, session.logits(model, examples), atol=0.1)


def test_patching_everything_from_a_checkpoint_gives_its_logits(
    session, model, other_model, examples
):
    found = logits(session, model, examples, site="logits", source=Source(checkpoint="before"))
    close(found, logits_of(other_model, examples))


@pytest.mark.parametrize(
    "source", [Source(checkpoint="after"), Source(examples="noisy")], ids=["checkpoint", "examples"]
)
@pytest.mark.parametrize("site", ["resid_pre", "z", "neurons", "attn_out", "mlp_out", "k"])
def test_patching_from_itself_changes_nothing(site, source, session, model, examples):
    found = logits(session, model, examples, site=site, layer=1, source=source)
    close(found, session.logits(model, examples))


def test_a_checkpoint_gives_its_activation_on_the_same_examples(
    session, model, other_model, examples
):
    close(
        patched(session, model, examples, Source(checkpoint="before")), plain(other_model, examples)
    )


def test_other_examples_give_theirs_row_by_row(session, model, examples, others):
    close(patched(session, model, examples, Source(examples="clean")), plain(model, others))


def test_rows_stay_aligned_after_a_selection(session, model, examples, others):
    rows = torch.tensor([7, 2, 2, 11])
    found = patched(session, model, examples.select(rows), Source(examples="clean"))
    close(found, plain(model, others)[rows])
    twice = patched(
        session, model, examples.select(rows).select(torch.tensor([3, 0])), Source(examples="clean")
    )
    close(twice, plain(model, others)[[11, 7]])


def test_the_source_is_fed_the_same_prefix(session, model, examples):
    """The set was made with given labels; the patched run is fed true ones, so the source must be
    too."""
    fed, source = examples.with_prefix("true"), Source(examples="noisy")
    close(patched(session, model, fed, source), plain(model, fed))
    assert not torch.equal(plain(model, fed), plain(model, examples))


def test_a_checkpoint_goes_with_other_examples(session, model, other_model, examples, others):
    found = patched(session, model, examples, Source(checkpoint="before", examples="clean"))
    close(found, plain(other_model, others))


def test_the_mean_is_over_the_set_at_each_position(session, model, other_model, examples, others):
    expected = sum(
        plain(model, others.select(torch.tensor([i]))) for i in range(len(others))
    ) / len(others)
    found = patched(session, model, examples, Source(mean_over="clean"))
    close(found, expected.expand(len(examples), -1, -1))
    assert found[0].std(dim=0).min() > 1e-3  # positions have their own means
    of_other = patched(session, model, examples, Source(mean_over="clean", checkpoint="before"))
    close(of_other[0], plain(other_model, others).mean(dim=0))


def test_the_mean_is_over_the_prefix_that_is_fed(session, model, examples):
    fed = examples.with_prefix("true")
    found = patched(session, model, fed, Source(mean_over="noisy"))
    close(found[0], plain(model, fed).mean(dim=0))


def test_a_mean_can_be_over_a_set_of_another_size(session, model, examples, others):
    session.example_sets = {"few": others.select(torch.arange(3))}
    found = patched(session, model, examples, Source(mean_over="few"))
    close(found[5], plain(model, others)[:3].mean(dim=0))


def test_a_pair_gives_the_activation_of_the_minimal_pair(task, session, model, examples):
    pairs = task.pairs(task.sample("train"), MinimalPair(flip="carry_1")).select(torch.arange(9))
    assert pairs.counterfactual is not None
    found = patched(session, model, pairs, Source(pair=True))
    close(found, plain(model, pairs.counterfactual))
    few = pairs.select(torch.tensor([4, 1]))
    expected = plain(model, pairs.counterfactual)[[4, 1]]
    close(patched(session, model, few, Source(pair=True)), expected)


def test_a_live_model_or_example_set_may_be_given_as_it_is(model, other_model, examples, others):
    close(patched(Session(), model, examples, other_model), plain(other_model, examples))
    close(patched(Session(), model, examples, others), plain(model, others))


def test_live_examples_go_with_a_checkpoint(session, model, other_model, examples, others):
    found = patched(session, model, examples, Source(live=others, checkpoint="before"))
    close(found, plain(other_model, others))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "a source needs `checkpoint`, `examples`, `pair: true` or `mean_over`"),
        ({"examples": "clean", "mean_over": "clean"}, "one of `examples`, `pair` and `mean_over`"),
        ({"pair": True, "mean_over": "clean"}, "one of `examples`, `pair` and `mean_over`"),
        ({"checkpoints": "before"}, "did you mean 'checkpoint'"),
    ],
)
def test_a_source_is_one_thing(fields, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        Source(**fields)


def test_a_live_source_excludes_a_named_one_of_its_kind(model, others):
    with pytest.raises(ValidationError, match="one of"):
        Source(live=others, examples="clean")
    with pytest.raises(ValidationError, match="either a live model or `checkpoint`"):
        Source(live=model, checkpoint="before")


def test_a_live_source_must_be_a_model_or_examples():
    with pytest.raises(ValidationError, match="a live source must be a model or Examples"):
        Source(live="before")


def test_a_live_source_cannot_be_written_into_a_spec(other_model):
    part = Patch(site="embed", source=other_model)
    with pytest.raises(Exception, match="can't be written into a spec; name it in the experiment"):
        part.block()


def test_a_source_is_written_without_what_it_does_not_use():
    part = Patch(site="embed", source={"checkpoint": "before"})
    assert part.block()["source"] == {"checkpoint": "before"}
    assert Patch.model_validate(part.block()) == part


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"checkpoint": "befor"}, "no checkpoint 'befor'; did you mean 'before'"),
        ({"examples": "clea"}, "no example set 'clea'; did you mean 'clean'"),
        ({"mean_over": "clea"}, "no example set 'clea'; did you mean 'clean'"),
        ({"pair": True}, "`pair: true` needs an example set that was made with `pair:`"),
    ],
)
def test_what_the_session_does_not_hold_is_refused(source, message, session, model, examples):
    with pytest.raises(InputError, match=re.escape(message)):
        Patch(site="attn_out", layer=0, source=source).edits(session, model, examples)


def test_a_source_with_too_few_examples_is_refused(session, model, examples, others):
    session.example_sets = {"few": others.select(torch.arange(3))}
    with pytest.raises(
        InputError, match="the source has 3 examples, fewer than the 12 that are patched"
    ):
        patched(session, model, examples, Source(examples="few"))


@pytest.mark.parametrize("site", ["neurons", "z"])
def test_a_source_of_another_architecture_is_refused(site, random_models, model, examples):
    source = random_models(1, d_mlp=20, n_heads=4, d_head=4)
    with pytest.raises(InputError, match="they must be of one architecture"):
        logits(Session(), model, examples, site=site, layer=0, source=source)


@pytest.mark.parametrize("fields", [{"n_layers": 1}, {"attn_only": True}], ids=str)
def test_a_source_that_lacks_the_site_is_refused(fields, random_models, model, examples):
    with pytest.raises(InputError, match=r"no .*'blocks\.1\.hook_mlp_out'"):
        Patch(site="mlp_out", layer=1, source=random_models(1, **fields)).edits(
            Session(), model, examples
        )
