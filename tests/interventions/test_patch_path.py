from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from plain_hooks import LLAMA, activations_of, close, logits_of, setting, transformer

from mechmem.interventions.ablate import Ablate
from mechmem.interventions.applied import applied
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.patch_path import PatchPath, Receiver
from mechmem.models import sites
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.sweep import each

BEFORE = Source(checkpoint="before")
EVERY = ("q", "k", "v", "mlp_pre", "logits")
SENDERS = [
    {"site": "z", "layer": 0, "head": 1},
    {"site": "z", "layer": 1, "head": (0, 1), "position": "="},
    {"site": "attn_out", "layer": 0},
    {"site": "neurons", "layer": 0, "neurons": (1, 5, 6)},
    {"site": "mlp_out", "layer": 1, "position": ("a0", "=")},
    {"site": "embed"},
    {"site": "pos_embed"},
    {"site": "z", "layer": (0, 2), "head": 0},
    {"site": "mlp_out", "layer": (0, 1, 2)},
]


@pytest.fixture(scope="module")
def deep(random_models):
    return random_models(3, n_layers=3)


@pytest.fixture
def deep_session(deep, random_models, others):
    return Session(
        models={"after": deep, "before": random_models(4, n_layers=3)},
        example_sets={"clean": others},
    )


def path(sender: dict, *receivers) -> PatchPath:
    return PatchPath(sender=Patch(source=BEFORE, **sender), receivers=receivers)


def logits(session, model, examples, *parts) -> torch.Tensor:
    return session.logits(model, examples, parts)


HEAD: dict[str, Any] = {"site": "z", "layer": 0, "head": 1}


def where_of(receiver: Receiver) -> tuple[Any, ...]:
    """What a receiver is of the activation at its hook."""
    every = slice(None)
    places = {None: every, "=": 9, ("a0", "="): torch.tensor([3, 9])}
    where: tuple[Any, ...] = (every, places[receiver.position])
    return where if receiver.head is None else (*where, receiver.head)


def by_hand(
    model: Any, source: Any, examples, sender: dict[str, Any], receiver: str, where: Any
) -> torch.Tensor:
    """The three runs of path patching (arXiv:2211.00593), with plain hooks.

    Run 1: no intervention. Run 2: the sender patched from the source, all other components frozen.
    Run 3: the receiver set to what it was in run 2.

    Args:
        model: the patched model.
        source: the model that the sender's activation is taken from.
        examples: what both read.
        sender: its site, layer and head.
        receiver: the hook of the receiver.
        where: the part of its activation that is replaced.
    """
    baseline, theirs = activations_of(model, examples), activations_of(source, examples)
    hook = sites.hook_of(model, sender["site"], sender["layer"])
    part = (slice(None), slice(None), sender["head"]) if "head" in sender else slice(None)
    writers = [f"blocks.{i}.hook_{name}_out" for i in range(3) for name in ("attn", "mlp")]
    own = writers[2 * sender["layer"] + (sender["site"] in ("mlp_out", "neurons"))]
    frozen = [setting(name, slice(None), baseline[name]) for name in writers if name != own]
    direct = activations_of(model, examples, setting(hook, part, theirs[hook]), *frozen)
    readers = [receiver]
    if receiver.endswith("mlp.hook_pre") and model.cfg.gated_mlp:
        readers.append(receiver + "_linear")
    return logits_of(model, examples, *(setting(r, where, direct[r]) for r in readers))


@pytest.mark.parametrize("sender", SENDERS, ids=str)
def test_through_every_receiver_it_is_the_senders_own_patch(sender, deep_session, deep, examples):
    receivers = [site for site in EVERY if not (site in "qkv" and sender.get("layer") == 2)]
    found = logits(deep_session, deep, examples, path(sender, *receivers))
    expected = logits(deep_session, deep, examples, Patch(source=BEFORE, **sender))
    close(found, expected)
    assert not torch.allclose(found, logits(deep_session, deep, examples), atol=1e-2)


def test_through_every_receiver_of_a_model_without_mlp_or_norm(random_models, examples):
    model, other = (random_models(i, attn_only=True, norm=None, n_layers=3) for i in (5, 6))
    sender = Patch(site="z", layer=0, head=0, source=other)
    found = logits(
        Session(), model, examples, PatchPath(sender=sender, receivers=("q", "k", "v", "logits"))
    )
    close(found, logits(Session(), model, examples, sender))


def test_any_intervention_can_be_what_the_sender_is_patched_by(deep_session, deep, examples):
    sender = Ablate(site="mlp_out", layer=0, method="resample")
    found = logits(deep_session, deep, examples, PatchPath(sender=sender, receivers=EVERY))
    close(found, logits(deep_session, deep, examples, sender))


@pytest.mark.parametrize(
    ("receiver", "hook"),
    [
        (Receiver(site="q", layer=2, head=1), "blocks.2.attn.hook_q"),
        (Receiver(site="v", layer=1), "blocks.1.attn.hook_v"),
        (Receiver(site="mlp_pre", layer=1, position="="), "blocks.1.mlp.hook_pre"),
        (Receiver(site="logits"), "unembed.hook_out"),
    ],
)
def test_one_receiver_is_the_three_runs_of_path_patching(
    receiver, hook, deep_session, deep, examples
):
    source = deep_session.model("before")
    expected = by_hand(deep, source, examples, HEAD, hook, where_of(receiver))
    part = PatchPath(sender=Patch(source=BEFORE, **HEAD), receivers=(receiver,))
    found = logits(deep_session, deep, examples, part)
    close(found, expected)
    assert not torch.allclose(found, logits_of(deep, examples), atol=1e-3)


OTHERS = {
    "rotary, gated": LLAMA,
    "grouped": {"n_key_value_heads": 2},
    "alibi": {"positional_embedding_type": "alibi"},
    "post-norm": {"use_normalization_before_and_after": True, "normalization_type": "RMS"},
    "olmo2": {"original_architecture": "Olmo2ForCausalLM", "normalization_type": "RMS"},
    "parallel": {"parallel_attn_mlp": True},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "soft caps": {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0},
    "bidirectional": {"attention_dir": "bidirectional"},
    "no norm": {"normalization_type": None},
}


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize(
    "sender",
    [{"site": "attn_out", "layer": 0}, {"site": "mlp_out", "layer": (0, 1)}, {"site": "embed"}],
    ids=str,
)
def test_through_every_receiver_of_a_model_that_is_not_ours_it_is_the_senders_patch(
    sender, fields, examples
):
    model, source = (transformer(seed, n_layers=3, **fields) for seed in (1, 2))
    patch = Patch(source=source, **sender)
    found = logits(Session(), model, examples, PatchPath(sender=patch, receivers=EVERY))
    close(found, logits(Session(), model, examples, patch))
    assert not torch.allclose(found, logits_of(model, examples), atol=1e-2)


def test_an_mlp_in_parallel_does_not_read_the_attention_of_its_layer(examples):
    model, source = (transformer(seed, parallel_attn_mlp=True) for seed in (1, 2))
    sender = Patch(site="attn_out", layer=0, source=source)
    part = PatchPath(sender=sender, receivers=(Receiver(site="mlp_pre", layer=0),))
    with pytest.raises(InputError, match="comes before the sender"):
        logits(Session(), model, examples, part)


def test_positions_outside_of_the_residual_stream_are_no_sender(examples):
    model, source = (transformer(i, positional_embedding_type="shortformer") for i in (1, 2))
    part = PatchPath(sender=Patch(site="pos_embed", source=source), receivers=EVERY)
    with pytest.raises(InputError, match="does not add its positions to the residual stream"):
        logits(Session(), model, examples, part)


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize(
    ("receiver", "hook"),
    [
        (Receiver(site="q", layer=2, head=1), "blocks.2.attn.hook_q"),
        (Receiver(site="k", layer=2, head=1), "blocks.2.attn.hook_k"),
        (Receiver(site="v", layer=1, position=("a0", "=")), "blocks.1.attn.hook_v"),
        (Receiver(site="mlp_pre", layer=1, position="="), "blocks.1.mlp.hook_pre"),
        (Receiver(site="logits"), "unembed.hook_out"),
    ],
    ids=str,
)
@pytest.mark.parametrize("sender", ["z", "attn_out", "mlp_out", "neurons"])
def test_it_is_path_patching_on_models_that_are_not_ours(sender, receiver, hook, fields, examples):
    """Against three runs with plain hooks that freeze everything else."""
    model, source = (transformer(seed, n_layers=3, **fields) for seed in (1, 2))
    chosen: dict[str, Any] = {"site": sender, "layer": 0}
    chosen |= {"head": 1} if sender == "z" else {}
    part = PatchPath(sender=Patch(source=source, **chosen), receivers=(receiver,))
    if sender in ("z", "neurons") and fields in (OTHERS["post-norm"], OTHERS["olmo2"]):
        with pytest.raises(InputError, match="start the path at attn_out or mlp_out"):
            logits(Session(), model, examples, part)
        return
    expected = by_hand(model, source, examples, chosen, hook, where_of(receiver))
    close(logits(Session(), model, examples, part), expected)
    close(logits(Session(backend="hooked"), model, examples, part), expected)
    assert not torch.allclose(expected, logits_of(model, examples), atol=1e-4)


def test_the_direct_path_to_the_logits_by_hand(random_models, examples):
    model, other = (random_models(i, norm=None) for i in (7, 8))
    sender = Patch(site="mlp_out", layer=0, source=other)
    session, hook = Session(), "blocks.0.hook_mlp_out"
    change = session.activation(other, examples, hook) - session.activation(model, examples, hook)
    found = logits(session, model, examples, PatchPath(sender=sender, receivers=("logits",)))
    close(found, logits(session, model, examples) + (change @ model.W_U)[:, -5:])


def test_only_the_receiver_changes(deep_session, deep, examples):
    receiver = Receiver(site="k", layer=1, head=0, position=("a0", "b0"))
    part = path({"site": "z", "layer": 0}, receiver)
    hooks = [
        "blocks.0.attn.hook_z",
        "blocks.0.hook_mlp_out",
        *(f"blocks.1.attn.hook_{x}" for x in "qkv"),
    ]
    edits = deep_session.edits(deep, examples, [part])
    edited = deep_session.edited_activations(deep, examples, edits, hooks)
    plain = deep_session.activations(deep, examples, hooks)
    for hook in [h for h in hooks if not h.endswith("hook_k")]:
        assert torch.equal(edited[hook], plain[hook]), hook
    changed = (edited[hooks[3]] != plain[hooks[3]]).any(dim=-1).any(dim=0)
    assert changed.nonzero().tolist() == [[3, 0], [8, 0]]


@pytest.mark.parametrize("layer", [0, 2])
def test_it_reads_what_the_interventions_before_it_have_made(layer, deep_session, deep, examples):
    """Also those that lie behind the sender, which its first pass never reaches."""
    ablation = Ablate(site="mlp_out", layer=layer, method="zero")
    sender = {"site": "attn_out", "layer": 1}
    found = logits(deep_session, deep, examples, ablation, path(sender, *EVERY))
    close(found, logits(deep_session, deep, examples, ablation, Patch(source=BEFORE, **sender)))
    alone = logits(deep_session, deep, examples, path(sender, *EVERY))
    assert not torch.allclose(found, alone, atol=1e-2)


def test_receivers_of_one_site_add_up(deep_session, deep, examples):
    heads = path({"site": "z", "layer": 0}, *(Receiver(site="v", layer=1, head=i) for i in (0, 1)))
    both = path({"site": "z", "layer": 0}, Receiver(site="v", layer=1))
    close(logits(deep_session, deep, examples, heads), logits(deep_session, deep, examples, both))


def test_from_itself_it_changes_nothing(deep_session, deep, examples):
    part = PatchPath(sender=Patch(site="z", layer=0, source=deep), receivers=EVERY)
    close(logits(deep_session, deep, examples, part), logits(deep_session, deep, examples))


@pytest.mark.parametrize(
    "receivers",
    [
        EVERY,
        ("logits",),
        (Receiver(site="q", layer=(1, 2), head=0), Receiver(site="mlp_pre", layer=0)),
    ],
)
@torch.no_grad()
def test_the_fast_path_is_the_hook_path(receivers, deep_session, deep, examples):
    part = path({"site": "z", "layer": 0, "head": 1}, *receivers)
    deep_session.activation(deep, examples, "blocks.0.hook_resid_pre")
    fast = deep_session.logits(deep, examples, [part])
    with applied(deep, [part], examples, deep_session):
        slow = deep(examples.tokens)[:, -examples.n_answer :]
        again = deep(examples.tokens)[:, -examples.n_answer :]
    close(fast, slow)
    close(again, slow)


@pytest.mark.parametrize(
    ("sender", "receiver", "message"),
    [
        (
            {"site": "resid_pre", "layer": 1},
            "logits",
            "a path must start at one of embed, pos_embed, z,",
        ),
        (
            {"site": "z", "layer": 1},
            Receiver(site="q", layer=1),
            "receiver 'q' at blocks.1.attn.hook_q comes before",
        ),
        (
            {"site": "mlp_out", "layer": 1},
            Receiver(site="mlp_pre", layer=1),
            "comes before the sender",
        ),
        ({"site": "z", "layer": 2}, "q", "no receiver 'q' comes after the sender"),
        ({"site": "z", "layer": 0}, Receiver(site="mlp_pre", head=1), "no head to choose from"),
        (
            {"site": "z", "layer": 0},
            Receiver(site="logits", layer=1),
            "site 'logits' has no layers",
        ),
        ({"site": "z", "layer": 0}, Receiver(site="q", layer=3), "layer 3 is out of range"),
    ],
)
def test_what_is_no_path_is_refused(sender, receiver, message, deep_session, deep, examples):
    with pytest.raises(InputError, match=re.escape(message)):
        path(sender, receiver).edits(deep_session, deep, examples)


def test_it_is_a_block_of_a_spec():
    part = path({"site": "z", "layer": 0}, "logits", Receiver(site="q", layer=(1, 2)))
    assert part.receivers[0] == Receiver(site="logits")
    assert Intervention.model_validate(part.block()) == part
    with pytest.raises(ValueError, match="at least one receiver"):
        path({"site": "z", "layer": 0})


def test_senders_and_receivers_are_swept():
    sender = Patch(site="z", layer=0, head=each(0, 1), source=BEFORE)
    swept = PatchPath(sender=sender, receivers=each(["q"], ["k", "v"]))
    assert Intervention.model_validate(swept.block()) == swept
    members = swept.expand({})
    assert len(members) == 4
    assert members[-1][1] == path({"site": "z", "layer": 0, "head": 1}, "k", "v")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"site": "logits"}, "logits"),
        ({"site": "q", "layer": 0, "position": "a0"}, "q layer 0 position a0"),
    ],
)
def test_a_receiver_is_named_in_tables_by_what_it_says(fields, text):
    assert str(Receiver(**fields)) == text
