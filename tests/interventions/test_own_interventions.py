"""Interventions as users write them: in place, looking at rows, or at all examples together.

Whatever their style, the numbers are those of the pure style, whatever the memory budget, and
nothing that is shared is written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from plain_hooks import LLAMA, activations_of, close, logits_of, setting, transformer
from plugin import plugin
from torch import Tensor

from mechmem.data.examples import Examples
from mechmem.interventions.applied import applied
from mechmem.interventions.intervention import SiteIntervention, UnitIntervention
from mechmem.interventions.patch import Patch
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.models import sites
from mechmem.models.edits import Edit
from mechmem.models.sites import SITES
from mechmem.session import Session
from mechmem.spec.errors import InputError

EDITABLE = sorted(SITES.keys() - sites.READ_ONLY.keys())
OF_OTHER_MODELS = ("rot_q", "rot_k", "mlp_pre_linear")


def zero_in_place(own: Tensor, rows: Tensor) -> Tensor:
    own[:] = 0
    return own


def zero(own: Tensor, rows: Tensor) -> Tensor:
    return torch.zeros_like(own)


def change_in_place(own: Tensor, rows: Tensor) -> Tensor:
    own *= 2
    own += 0.5
    own[own > 1] = -own[own > 1]
    return own


def change(own: Tensor, rows: Tensor) -> Tensor:
    changed = own * 2 + 0.5
    return torch.where(changed > 1, -changed, changed)


STYLES = {"zero": (zero_in_place, zero), "change": (change_in_place, change)}


@plugin
class Styled(UnitIntervention):
    """Does to the chosen part of an activation what a function does."""

    style: str
    in_place: bool

    def edit(self, at, session, model, examples) -> Edit:
        in_place, pure = STYLES[self.style]
        return Edit(at, in_place if self.in_place else pure)


def choices(site: str) -> list[dict]:
    """Everything, positions, heads or neurons, and both."""
    at = {"position": ("a0", "=", "s4")}
    units = {None: {}, "d_mlp": {"neurons": (0, 5, 23)}}.get(SITES[site].units, {"head": (1,)})
    found = [{}, at, units, at | units] if units else [{}, at]
    layer = {"layer": 1} if SITES[site].has_layer else {}
    return [{"site": site, **layer, **chosen} for chosen in found]


CHOICES = [chosen for site in EDITABLE for chosen in choices(site)]


def name_of(chosen: object) -> str:
    return " ".join(map(str, chosen.values())) if isinstance(chosen, dict) else str(chosen)


@pytest.fixture(scope="module")
def llama():
    return transformer(1, **LLAMA)


@pytest.fixture
def chosen_model(chosen, model, llama):
    """A model that has the chosen site."""
    return llama if chosen["site"] in OF_OTHER_MODELS else model


def frozen(model, session, examples) -> Callable[[], bool]:
    """Whether all weights, and all activations that the session keeps, are still bit by bit what
    they are now."""
    hooks = [
        hook for hook in activations_of(model, examples) if "blocks" in hook or "embed" in hook
    ]
    hooks = [hook for hook in hooks if not hook.endswith(("ln1.hook_normalized", "hook_scale"))]
    kept = session.activations(model, examples, hooks)
    activations = {hook: tensor.clone() for hook, tensor in kept.items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def same() -> bool:
        again = session.activations(model, examples, hooks)
        return all(torch.equal(p, weights[name]) for name, p in model.named_parameters()) and all(
            torch.equal(again[hook], activations[hook]) for hook in hooks
        )

    return same


@pytest.mark.parametrize("chosen", CHOICES, ids=name_of)
@torch.no_grad()
def test_in_place_is_pure_bit_by_bit_at_every_site_and_writes_to_nothing_shared(
    chosen, chosen_model, examples
):
    model, plain = chosen_model, logits_of(chosen_model, examples)
    for backend in ("auto", "hooked"):
        session, fresh = (Session(backend=backend) for _ in range(2))
        is_unchanged = frozen(model, session, examples)
        for style in STYLES:
            in_place, pure = (Styled(style=style, in_place=value, **chosen) for value in (1, 0))
            found = session.logits(model, examples, [in_place])
            assert is_unchanged()
            assert torch.equal(found, session.logits(model, examples, [pure]))
            # Nothing is kept here, so the forward does not resume.
            without = [fresh.logits(model, examples, [part]) for part in (in_place, pure)]
            assert torch.equal(*without)
            by_hooks = []
            for part in (in_place, pure):
                with applied(model, [part], examples, session) as edited:
                    by_hooks.append(edited(examples.tokens)[:, -examples.n_answer :])
            assert torch.equal(*by_hooks)
            assert is_unchanged()
            close(found, without[0])
            close(found, by_hooks[0])
            assert not torch.allclose(found, plain, atol=1e-4)


def test_a_hand_written_zero_is_a_plain_hook(session, model, examples):
    part = Styled(style="zero", in_place=True, site="z", layer=1, head=1, position=("=", "s4"))
    where = (slice(None), torch.tensor([9, 10]), 1)
    plain = logits_of(model, examples, setting("blocks.1.attn.hook_z", where, 0.0))
    close(session.logits(model, examples, [part]), plain)


@pytest.mark.parametrize("site", ["embed", "pos_embed"])
@pytest.mark.parametrize("n", [1, 12])
def test_the_embeddings_are_never_written_to(site, n, model, examples):
    """What a model reads of its embedding matrices are views of them where there is one row."""
    before = model.W_E.detach().clone(), model.W_pos.detach().clone()
    few, part = examples.select(slice(n)), Styled(style="change", in_place=True, site=site)
    for backend in ("fast", "hooked"):
        Session(backend=backend).logits(model, few, [part])
    with applied(model, [part], few), torch.no_grad():
        model(few.tokens)
    assert torch.equal(model.W_E, before[0])
    assert torch.equal(model.W_pos, before[1])


def test_a_grid_after_an_in_place_intervention_has_the_numbers_of_a_new_session(
    session, model, other_model, examples
):
    for site in ("resid_pre", "neurons", "z"):
        session.logits(model, examples, [Styled(style="zero", in_place=True, site=site, layer=1)])
    for site in ("resid_pre", "neurons", "z"):
        part = Patch(site=site, layer=1, position="=", source=other_model)
        found = session.logits(model, examples, [part])
        assert torch.equal(found, Session().logits(model, examples, [part]))


def test_two_in_place_edits_of_one_hook_follow_each_other(session, model, examples):
    twice = [
        Styled(style="change", in_place=True, site="attn_out", layer=1),
        Styled(style="change", in_place=True, site="attn_out", layer=1, position="="),
    ]
    pure = [part.model_copy(update={"in_place": False}) for part in twice]
    found = session.logits(model, examples, twice)
    assert torch.equal(found, session.logits(model, examples, pure))
    assert not torch.allclose(found, session.logits(model, examples, twice[:1]), atol=1e-4)


@plugin
class Keeps(SiteIntervention):
    """Puts one and the same tensor in the place of an activation."""

    kept: ClassVar[Tensor] = torch.zeros(1)

    def edit(self, at, session, model, examples) -> Edit:
        type(self).kept = torch.ones_like(session.activation(model, examples, at.hook))
        return Edit(at, lambda own, rows: self.kept)


def test_a_tensor_that_an_edit_returns_is_not_written_to_by_a_later_one(session, model, examples):
    parts = [
        Keeps(site="attn_out", layer=1),
        Styled(style="zero", in_place=True, site="attn_out", layer=1),
    ]
    session.logits(model, examples, parts)
    assert (Keeps.kept == 1).all()
    halved = ("blocks.1.hook_attn_out", lambda activation, hook: activation.mul_(0.5))
    with applied(model, parts[:1], examples), model.hooks(fwd_hooks=[halved]), torch.no_grad():
        model(examples.tokens)
    assert (Keeps.kept == 1).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda own, rows: own[:1], r"returned \(1, 14, 16\) for \(12, 14, 16\)"),
        (lambda own, rows: own[..., None], r"returned \(12, 14, 16, 1\) for \(12, 14, 16\)"),
        (lambda own, rows: None, r"returned NoneType for \(12, 14, 16\)"),
    ],
)
@pytest.mark.parametrize("backend", ["fast", "hooked"])
def test_a_function_that_returns_something_else_is_refused(
    wrong, message, backend, model, examples, monkeypatch
):
    monkeypatch.setitem(STYLES, "wrong", (wrong, wrong))
    part = Styled(style="wrong", in_place=False, site="attn_out", layer=1)
    with pytest.raises(InputError, match=message):
        Session(backend=backend).logits(model, examples, [part])


# Rows: the same numbers in chunks of any size


@plugin
class Shifted(SiteIntervention):
    """Adds to each example numbers of its own."""

    def edit(self, at, session, model, examples) -> Edit:
        shifts = torch.randn(len(examples.whole), 1, 1, generator=torch.Generator().manual_seed(0))
        return Edit(at, lambda own, rows: own + shifts[examples.index][rows])


@plugin
class Centred(SiteIntervention):
    """Takes the mean over the rows of the batch away."""

    rowwise: bool

    def edit(self, at, session, model, examples) -> Edit:
        return Edit(at, lambda own, rows: own - own.mean(dim=0), rowwise=self.rowwise)


@plugin
class AllTheirMean(SiteIntervention):
    """Puts the mean over the examples that are run in the place of an activation."""

    def edit(self, at, session, model, examples) -> Edit:
        mean = session.activation(model, examples, at).mean(dim=0, keepdim=True)
        return Edit(at, lambda own, rows: mean.expand_as(own))


def session_of(model, examples: Examples, n_rows: int, **options) -> Session:
    """A session that runs so many rows of these examples at once."""
    much = 2**50
    per_row = much / Session(memory=much).budget.rows_at_once(model, examples)
    session = Session(memory=math.ceil(per_row * (n_rows + 0.5)), **options)
    assert session.budget.rows_at_once(model, examples) == n_rows
    return session


PLACES = [
    {"site": "embed"},
    {"site": "resid_pre", "layer": 1},
    {"site": "neurons", "layer": 0, "position": "readout"},
    {"site": "attn_out", "layer": 1, "position": ("=", "s4")},
]


@pytest.mark.parametrize("place", PLACES, ids=name_of)
@pytest.mark.parametrize("backend", ["auto", "hooked"])
def test_a_rowwise_edit_has_the_same_numbers_in_chunks(place, backend, model, examples):
    parts = [Shifted(**place), Styled(style="change", in_place=True, **place)]
    whole = Session(backend=backend)
    expected = whole.logits(model, examples, parts)
    answer = whole.greedy(model, examples, parts)
    assert not torch.allclose(expected, whole.baseline(model, examples), atol=1e-3)
    for n_rows in (1, 3, 5):
        session = session_of(model, examples, n_rows, backend=backend)
        for _ in range(2):  # with and without what the first call has kept
            close(session.logits(model, examples, parts), expected)
        assert torch.equal(session.greedy(model, examples, parts), answer)
        close(session.baseline(model, examples), whole.baseline(model, examples))


def test_greedy_in_chunks_is_decoding_token_by_token(model, examples):
    parts = [Shifted(site="resid_pre", layer=1)]
    expected = token_by_token(Session(), model, examples, parts)
    assert (expected != examples.given).any()
    for n_rows in (1, 3, 12):
        session = session_of(model, examples, n_rows)
        assert torch.equal(session.greedy(model, examples, parts), expected)


def token_by_token(session, model, examples, parts) -> Tensor:
    """Decoding as a textbook has it, always of the whole set."""
    answer = examples.given.clone()
    for step in range(examples.n_answer):
        logits = session.logits(model, examples.continued_with(answer), parts)
        answer[:, step] = logits[:, step].argmax(-1)
    return answer


@pytest.mark.parametrize("of", [False, True], ids=["itself", "displaced"])
def test_an_edit_that_mixes_rows_and_says_so_has_the_whole_numbers_or_none(of, model, examples):
    part = Centred(site="resid_pre", layer=1, rowwise=False)
    part = RandomDisplacement(of=part) if of else part
    activation = activations_of(model, examples)["blocks.1.hook_resid_pre"]
    if not of:
        centred = setting("blocks.1.hook_resid_pre", slice(None), activation - activation.mean(0))
        close(Session().logits(model, examples, [part]), logits_of(model, examples, centred))
    close(
        session_of(model, examples, 12).logits(model, examples, [part]),
        Session().logits(model, examples, [part]),
    )
    for n_rows in (1, 3, 11):
        session = session_of(model, examples, n_rows)
        message = (
            "the edit at blocks.1.hook_resid_pre looks at several rows together, and 12 examples"
        )
        with pytest.raises(InputError, match=message):
            session.logits(model, examples, [part])
        with pytest.raises(InputError, match=message):
            session.greedy(model, examples, [part])


@pytest.mark.parametrize("place", PLACES, ids=name_of)
def test_an_edit_that_mixes_rows_without_saying_so_is_refused_in_chunks(place, model, examples):
    if place["site"] == "embed":
        place = {**place, "position": "a0"}  # elsewhere too
    part = Centred(rowwise=True, **place)
    expected = Session().logits(model, examples, [part])
    close(session_of(model, examples, 12).logits(model, examples, [part]), expected)
    for n_rows in (1, 3):
        session = session_of(model, examples, n_rows)
        with pytest.raises(InputError, match="make it an Edit with `rowwise=False`, or take fewer"):
            session.logits(model, examples, [part])


@plugin
class Contradictory(Centred):
    """Declares that its examples do not depend on each other, and that its rows do."""

    by_example: ClassVar[bool] = True


def test_what_contradicts_itself_is_refused(model, examples):
    part = Contradictory(site="resid_pre", layer=1, rowwise=False)
    for n_rows in (3, 12):
        session = session_of(model, examples, n_rows)
        with pytest.raises(InputError, match="Contradictory declares `by_example`, but"):
            session.logits(model, examples, [part])


@pytest.mark.parametrize("n_rows", [1, 3, 12])
@pytest.mark.parametrize(
    "place",
    [
        {"site": "resid_pre", "layer": 1, "position": "readout"},
        {"site": "attn_out", "layer": 0},
        {"site": "neurons", "layer": 1, "position": ("s4", "s3", "s2")},
    ],
    ids=name_of,
)
def test_greedy_under_what_looks_at_all_examples_is_decoding_the_whole_set(
    place, n_rows, random_models, examples
):
    """No row may be taken for final while the others, on which it depends, still change."""
    part = AllTheirMean(**place)
    n_changed = 0
    for seed in range(6):
        model = random_models(seed)
        expected = token_by_token(Session(), model, examples, [part])
        found = session_of(model, examples, n_rows).greedy(model, examples, [part])
        assert torch.equal(found, expected)
        n_changed += int((expected != Session().greedy(model, examples)).any())
    assert n_changed


def test_greedy_of_all_examples_does_not_trust_guesses_of_other_prefixes(random_models, examples):
    """What is known under a label's prefix was computed with every example fed that label."""
    part = AllTheirMean(site="attn_out", layer=0)
    for seed in range(6):
        model, session = random_models(seed), Session()
        known = {
            label: session.logits(model, examples.with_prefix(label), [part]).argmax(-1)
            for label in ("given", "true")
        }
        # Half of the labels are made what the model says, so that guesses agree with labels.
        rows = torch.arange(len(examples)) % 2 == 0
        given = torch.where(rows[:, None], known["given"], examples.given)
        fed = examples.continued_with(given)
        known = {"given": session.logits(model, fed, [part]).argmax(-1)}
        found = session.greedy(model, fed, [part], known)
        assert torch.equal(found, token_by_token(session, model, fed, [part]))
