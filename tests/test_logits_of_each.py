"""Many cells in one go give what a call for each gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from configured import GATED_RMS, GROUPED, configured

from mechmem.interventions.ablate import Ablate
from mechmem.interventions.applied import applied
from mechmem.interventions.patch import Patch, Source
from mechmem.models.backend import FAST
from mechmem.session.session import MOST_STACKED, Session

BEFORE = Source(checkpoint="before")


def every_neuron() -> list[list[Patch]]:
    """Single and several neurons of both layers by turns, everywhere and at some positions."""
    places = (None, "=", ("a0", "s4"), "readout")
    chosen = [(i,) for i in range(24)] + [(3, 1, 20)]
    return [
        [Patch(site="neurons", layer=layer, neurons=some, position=place, source=BEFORE)]
        for place, some, layer in itertools.product(places, chosen, (0, 1))
    ]


def neurons() -> list[list[Patch]]:
    """Some of them."""
    return every_neuron()[::5]


def by_layer() -> list[list[Patch]]:
    """All of them, so that many cells of one layer follow each other."""
    return sorted(every_neuron(), key=lambda cell: cell[0].layer)


def heads() -> list[list[Ablate]]:
    return [
        [Ablate(site=site, layer=layer, head=head, method=method)]
        for site, layer, head, method in itertools.product(
            ("z", "q"), (0, 1), (0, 1), ("mean", "zero")
        )
    ]


def residuals() -> list[list[Patch]]:
    return [
        [Patch(site=site, layer=layer, position=position, source=Source(examples="clean"))]
        for site, layer, position in itertools.product(
            ("resid_pre", "resid_post", "mlp_out"), (0, 1), (None, "b1")
        )
    ]


def several() -> list[list]:
    """Cells of two interventions, of none, and single neurons between them."""
    alone, ablated = neurons()[0], heads()[0]
    last = Patch(site="neurons", layer=1, neurons=(2,), source=BEFORE)
    steered = Ablate(site="neurons", layer=1, neurons=(4, 5), method="resample", seed=3)
    return [alone, alone + ablated, [], [last], [steered], [last, steered], ablated, [steered]]


CELLS = {make.__name__: make for make in (neurons, by_layer, heads, residuals, several)}
MODELS = {
    "ours": {},
    "grouped and gated": GROUPED | GATED_RMS | {"n_heads": 4},
}


@pytest.fixture(params=MODELS)
def session_of(request, examples, others):
    models = {
        name: configured(12, 14, seed, **MODELS[request.param])
        for seed, name in enumerate(("after", "before"))
    }

    def made(**options):
        return Session(models, {"noisy": examples, "clean": others}, **options)

    return made


@pytest.mark.parametrize("n", [1, 5, None], ids=["one", "few", "all"])
@pytest.mark.parametrize("backend", ["fast", "hooked"])
@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS)
def test_each_is_what_one_call_gives(cells, backend, n, session_of, examples):
    session, alone = session_of(backend=backend), session_of(backend=backend)
    model, chosen = session.model("after"), cells()[:n]
    found = list(session.logits_of_each(model, examples, chosen))
    assert len(found) == len(chosen)
    assert session.backends["after"][0] == backend
    baseline, n_changed = alone.baseline(model, examples), 0
    for logits, cell in zip(found, chosen, strict=True):
        expected = alone.logits(model, examples, cell)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        n_changed += not torch.allclose(logits, baseline, atol=1e-4)
    assert n_changed > len(chosen) / 2  # some change what no answer depends on


@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS)
def test_one_call_is_what_plain_hooks_give(cells, session_of, examples):
    session = session_of()
    model, chosen = session.model("after"), cells()[::5]
    for logits, cell in zip(session.logits_of_each(model, examples, chosen), chosen, strict=True):
        with torch.no_grad(), applied(model, cell, examples, session) as edited:
            expected = edited(examples.tokens)[:, -5:]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_neurons_of_one_layer_go_through_the_model_together(session_of, examples, monkeypatch):
    """On `fast`, in stacks of a limited size; the forward starts after their layer."""
    session = session_of()
    model, runs, plain = session.model("after"), [], type(FAST).run

    def recorded(self, model, tokens, *rest, resume=None, **options):
        if resume is not None:
            runs.append((len(tokens) // len(examples), resume[0]))
        return plain(self, model, tokens, *rest, resume=resume, **options)

    monkeypatch.setattr(type(FAST), "run", recorded)
    first, second = ([c for c in by_layer() if c[0].layer == layer] for layer in (0, 1))
    list(session.logits_of_each(model, examples, [*first, *second]))
    most = MOST_STACKED // len(examples)
    assert len(first) == len(second) == 100
    assert runs == [(most, 1), (100 - most, 1), (most, 2), (100 - most, 2)]


def test_little_memory_changes_no_number(session_of, examples):
    wide, tight = session_of(), session_of(memory=200_000)
    model, cells = wide.model("after"), [*neurons()[:6], *heads()[:3], *several()]
    pairs = zip(*(s.logits_of_each(model, examples, cells) for s in (wide, tight)), strict=True)
    for roomy, narrow in pairs:
        torch.testing.assert_close(narrow, roomy, atol=1e-5, rtol=1e-5)
