from __future__ import annotations

import pytest
import torch
from configured import configured
from plain_hooks import activations_of, close, logits_of

from mechmem.interventions.patch import Source
from mechmem.interventions.patch_contributions import PatchContributions
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.session import Session
from mechmem.spec.errors import InputError


def patch(source, **fields) -> PatchContributions:
    return PatchContributions(**({"layer": 1, "source": Source(live=source)} | fields))


def exchange(model, other, examples, layer: int, neurons: list[int], where=slice(None)):
    """Two plain hooks: the neurons of this run are read, and what they write is exchanged."""
    theirs = activations_of(other, examples)[f"blocks.{layer}.mlp.hook_post"][..., neurons]
    written = theirs @ other.blocks[layer].mlp.W_out[neurons]
    seen = {}

    def look(activation, hook):
        seen["own"] = activation[..., neurons] @ model.blocks[layer].mlp.W_out[neurons]

    def write(activation, hook):
        activation = activation.clone()
        activation[:, where] += (written - seen["own"])[:, where]
        return activation

    return (f"blocks.{layer}.mlp.hook_post", look), (f"blocks.{layer}.hook_mlp_out", write)


@pytest.mark.parametrize("backend", ["fast", "hooked"])
def test_what_neurons_write_is_exchanged(model, other_model, examples, backend):
    session = Session(backend=backend)
    for layer in (0, 1):
        hooks = exchange(model, other_model, examples, layer, [2, 5])
        part = patch(other_model, layer=layer, neurons=(2, 5))
        close(session.logits(model, examples, [part]), logits_of(model, examples, *hooks))


def test_later_layers_lose_what_they_write_in_the_edited_run(model, other_model, examples):
    hooks = [h for at in (0, 1) for h in exchange(model, other_model, examples, at, [2, 5])]
    parts = [patch(other_model, layer=at, neurons=(2, 5)) for at in (0, 1)]
    expected = logits_of(model, examples, *hooks)
    close(Session().logits(model, examples, parts), expected)
    both = patch(other_model, layer=(0, 1), neurons=(2, 5))
    close(Session().logits(model, examples, [both]), expected)


def test_only_at_the_chosen_positions(model, other_model, examples):
    hooks = exchange(model, other_model, examples, 0, [3], 9)
    part = patch(other_model, layer=0, neurons=(3,), position="=")
    close(Session().logits(model, examples, [part]), logits_of(model, examples, *hooks))


def test_all_neurons_bring_the_output_but_for_the_bias(model, other_model, examples):
    hook = "blocks.1.hook_mlp_out"
    bias = model.blocks[1].mlp.b_out - other_model.blocks[1].mlp.b_out
    theirs = activations_of(other_model, examples)[hook] + bias
    expected = logits_of(model, examples, (hook, lambda activation, hook: theirs))
    close(Session().logits(model, examples, [patch(other_model)]), expected)


def test_nothing_changes_from_the_model_itself(model, examples):
    session = Session()
    found = session.logits(model, examples, [patch(model)])
    close(found, session.baseline(model, examples))


def test_in_chunks_as_at_once(model, other_model, examples):
    part = patch(other_model, layer=0, neurons=(1, 2))
    small = Session(memory=2**18)
    assert small.budget.rows_at_once(model, examples) < len(examples)
    close(small.logits(model, examples, [part]), Session().logits(model, examples, [part]))


def test_a_random_displacement_is_as_large(model, other_model, examples):
    part = patch(other_model, neurons=(2, 5))
    session, hook = Session(), "blocks.1.hook_mlp_out"
    runs = [[], [part], [RandomDisplacement(of=part)]]
    plain, moved, displaced = (
        session.edited_activations(model, examples, session.edits(model, examples, r), [hook])[hook]
        for r in runs
    )
    close((moved - plain).norm(dim=-1), (displaced - plain).norm(dim=-1), 1e-4)
    assert not torch.allclose(moved, displaced, atol=1e-3)


def test_other_sites_and_normalised_outputs_are_refused(model, examples):
    with pytest.raises(InputError, match="only neurons have contributions"):
        Session().logits(model, examples, [patch(model, site="z")])
    normal = configured(12, 14, use_normalization_before_and_after=True, normalization_type="RMS")
    with pytest.raises(InputError, match="normalises the outputs of attention"):
        Session().logits(normal, examples, [patch(normal)])
