from __future__ import annotations

import re

import pytest
import torch

from mechmem.interventions.ablate import Ablate
from mechmem.interventions.applied import applied
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.patch_path import PatchPath, Receiver
from mechmem.models.fast import Edit, forward
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


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def deep(random_models):
    return random_models(3, n_layers=3)


@pytest.fixture
def deep_bench(deep, random_models, others):
    return Session(
        models={"after": deep, "before": random_models(4, n_layers=3)},
        example_sets={"clean": others},
    )


def path(sender: dict, *receivers) -> PatchPath:
    return PatchPath(sender=Patch(source=BEFORE, **sender), receivers=receivers)


@torch.no_grad()
def logits(session, model, examples, *parts, capture=()):
    edits = [edit for part in parts for edit in part.edits(session, model, examples)]
    return forward(model, examples.tokens, examples.n_answer, edits, capture)


@pytest.mark.parametrize("sender", SENDERS, ids=str)
def test_through_every_receiver_it_is_the_senders_own_patch(sender, deep_bench, deep, examples):
    receivers = [site for site in EVERY if not (site in "qkv" and sender.get("layer") == 2)]
    found, _ = logits(deep_bench, deep, examples, path(sender, *receivers))
    expected, _ = logits(deep_bench, deep, examples, Patch(source=BEFORE, **sender))
    close(found, expected)
    assert not torch.allclose(found, logits(deep_bench, deep, examples)[0], atol=1e-2)


def test_through_every_receiver_of_a_model_without_mlp_or_norm(random_models, examples):
    model, other = (random_models(i, attn_only=True, norm=None, n_layers=3) for i in (5, 6))
    sender = Patch(site="z", layer=0, head=0, source=other)
    found, _ = logits(
        Session(), model, examples, PatchPath(sender=sender, receivers=("q", "k", "v", "logits"))
    )
    close(found, logits(Session(), model, examples, sender)[0])


def test_any_intervention_can_be_what_the_sender_is_patched_by(deep_bench, deep, examples):
    sender = Ablate(site="mlp_out", layer=0, method="resample")
    found, _ = logits(deep_bench, deep, examples, PatchPath(sender=sender, receivers=EVERY))
    close(found, logits(deep_bench, deep, examples, sender)[0])


@pytest.mark.parametrize(
    ("receiver", "hook"),
    [
        (Receiver(site="q", layer=2, head=1), "blocks.2.attn.hook_q"),
        (Receiver(site="v", layer=1), "blocks.1.attn.hook_v"),
        (Receiver(site="mlp_pre", layer=1, position="="), "blocks.1.mlp.hook_pre"),
        (Receiver(site="logits"), "unembed.hook_out"),
    ],
)
@torch.no_grad()
def test_one_receiver_is_the_three_runs_of_path_patching(
    receiver, hook, deep_bench, deep, examples
):
    sender = Patch(site="z", layer=0, head=1, source=BEFORE)
    frozen = [f"blocks.{i}.hook_{part}_out" for i in range(3) for part in ("attn", "mlp")][1:]
    kept = deep_bench.activations(deep, examples, frozen)  # run 1: baseline
    freeze = [Edit(name, lambda _, name=name: kept[name]) for name in frozen]
    edits = [
        *sender.edits(deep_bench, deep, examples),
        *freeze,
    ]  # run 2: sender patched, all others frozen
    _, direct = forward(deep, examples.tokens, 5, edits, [hook])
    like = Ablate(
        site=receiver.site, layer=receiver.layer, head=receiver.head, position=receiver.position
    )
    mask = like.mask(deep, examples)
    last = Edit(hook, lambda x: torch.where(mask, direct[hook], x))  # run 3: the receiver patched
    expected, _ = forward(deep, examples.tokens, 5, [last])
    found, _ = logits(deep_bench, deep, examples, PatchPath(sender=sender, receivers=(receiver,)))
    close(found, expected)
    assert not torch.allclose(found, logits(deep_bench, deep, examples)[0], atol=1e-3)


def test_the_direct_path_to_the_logits_by_hand(random_models, examples):
    model, other = (random_models(i, norm=None) for i in (7, 8))
    sender = Patch(site="mlp_out", layer=0, source=other)
    session, hook = Session(), "blocks.0.hook_mlp_out"
    change = session.activation(other, examples, hook) - session.activation(model, examples, hook)
    found, _ = logits(session, model, examples, PatchPath(sender=sender, receivers=("logits",)))
    close(found, logits(session, model, examples)[0] + (change @ model.W_U)[:, -5:])


def test_only_the_receiver_changes(deep_bench, deep, examples):
    part = path(
        {"site": "z", "layer": 0}, Receiver(site="k", layer=1, head=0, position=("a0", "b0"))
    )
    hooks = [
        "blocks.0.attn.hook_z",
        "blocks.0.hook_mlp_out",
        *(f"blocks.1.attn.hook_{x}" for x in "qkv"),
    ]
    _, edited = logits(deep_bench, deep, examples, part, capture=hooks)
    plain = deep_bench.activations(deep, examples, hooks)
    for hook in [h for h in hooks if not h.endswith("hook_k")]:
        assert torch.equal(edited[hook], plain[hook]), hook
    changed = (edited[hooks[3]] != plain[hooks[3]]).any(dim=-1).any(dim=0)
    assert changed.nonzero().tolist() == [[3, 0], [8, 0]]


def test_receivers_of_one_site_add_up(deep_bench, deep, examples):
    heads = path({"site": "z", "layer": 0}, *(Receiver(site="v", layer=1, head=i) for i in (0, 1)))
    both = path({"site": "z", "layer": 0}, Receiver(site="v", layer=1))
    close(logits(deep_bench, deep, examples, heads)[0], logits(deep_bench, deep, examples, both)[0])


def test_from_itself_it_changes_nothing(deep_bench, deep, examples):
    part = PatchPath(sender=Patch(site="z", layer=0, source=deep), receivers=EVERY)
    close(logits(deep_bench, deep, examples, part)[0], logits(deep_bench, deep, examples)[0])


@pytest.mark.parametrize(
    "receivers",
    [
        EVERY,
        ("logits",),
        (Receiver(site="q", layer=(1, 2), head=0), Receiver(site="mlp_pre", layer=0)),
    ],
)
@torch.no_grad()
def test_the_fast_path_is_the_hook_path(receivers, deep_bench, deep, examples):
    part = path({"site": "z", "layer": 0, "head": 1}, *receivers)
    deep_bench.activation(deep, examples, "blocks.0.hook_resid_pre")
    fast = deep_bench.logits(deep, examples, [part])
    with applied(deep, [part], examples, deep_bench):
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
            "a path starts at one of embed, pos_embed, z,",
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
        ({"site": "z", "layer": 2}, "q", "no receiver 'q' comes behind the sender"),
        ({"site": "z", "layer": 0}, Receiver(site="mlp_pre", head=1), "no axis 'head'"),
        (
            {"site": "z", "layer": 0},
            Receiver(site="logits", layer=1),
            "site 'logits' has no layers",
        ),
        ({"site": "z", "layer": 0}, Receiver(site="q", layer=3), "layer 3 is out of range"),
    ],
)
def test_what_is_no_path_is_refused(sender, receiver, message, deep_bench, deep, examples):
    with pytest.raises(InputError, match=re.escape(message)):
        path(sender, receiver).edits(deep_bench, deep, examples)


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
