from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from plain_hooks import activations_of, close, logits_of
from scipy import stats

from mechmem.analyses.neurons.exchange import Exchange
from mechmem.analyses.neurons.memory_sets import (
    MemorySets,
    Order,
    fewest,
    median_interval,
    participation,
    sizes_up_to,
)
from mechmem.data.examples import third_labels
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.patch_contributions import PatchContributions
from mechmem.session import Session


@pytest.fixture(scope="module")
def earlier(model, other_model):
    """The model with slightly other neurons: all else is the same."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for own, theirs in zip(made.blocks, other_model.blocks, strict=True):
            for name in ("W_in", "b_in", "W_out"):
                getattr(own.mlp, name).lerp_(getattr(theirs.mlp, name), 0.1)
    return made.requires_grad_(False)


@pytest.fixture
def answered(session, model, earlier) -> Session:
    """Examples whose given labels are what `after` answers, and the true ones what `before`
    does."""
    sets, models = {}, {"after": model, "before": earlier}
    for name, found in session.example_sets.items():
        given, true = (session.greedy(m, found) for m in models.values())
        sets[name] = found.continued_with(given).with_true(true).with_name(name)
    return Session(models, sets)


def brute(session, model, source, fed, ranking, kept=None) -> list[int]:
    """The fewest first units, by one forward for every example and number of them."""
    n, layers, width = ranking.shape
    order = ranking.flatten(1).argsort(dim=1, descending=True, stable=True)
    found = []
    for row in range(n):
        one = fed.select([row]).as_set()
        for k in range(layers * width + 1):
            chosen = order[row, :k] if kept is None else order[row, k:]
            parts = []
            for layer in range(layers):
                units = tuple(sorted((chosen[chosen // width == layer] % width).tolist()))
                if units:
                    parts.append(
                        PatchContributions(
                            site="neurons", layer=layer, neurons=units, source=Source(live=source)
                        )
                    )
            answer = session.logits(model, one, parts).argmax(-1)
            if torch.equal(answer, one.labels(one.prefix)):
                break
        else:
            k = layers * width + 1
        found.append(k)
    return found


@pytest.mark.parametrize("rest", ["before", "after"])
def test_back_and_keep_are_those_of_brute_force(answered, model, earlier, rest, monkeypatch):
    monkeypatch.setattr("mechmem.analyses.neurons.memory_sets.ONE_BY_ONE", 48)
    answered = Session(
        answered.models, {"noisy": answered.examples("noisy").select([0, 5, 7, 10]).as_set()}
    )
    examples = answered.examples("noisy")
    analysis = MemorySets(rest=rest, n_steps=2, top=4)
    order = analysis.order(answered, examples.as_set()).scores
    table = analysis.table(answered).set_index("measure")["per_example"]
    plain = Session()
    back = brute(plain, model, earlier, examples.with_prefix("true"), order)
    assert table["back"].tolist() == back
    fed = examples.with_prefix("given")
    if rest == "before":
        keep = brute(plain, earlier, model, fed, order)
    else:
        keep = brute(plain, model, earlier, fed, order, "the others")
    assert table["keep"].tolist() == keep
    assert len(set(back)) > 2
    assert len(set(keep)) > 2


def test_sizes_are_found_by_halving():
    needed = torch.tensor([0, 1, 16, 17, 40, 99, 100, 101])
    order = Order(torch.zeros(8, 2, 50))
    assert fewest(lambda sizes: sizes >= needed, order).tolist() == needed.tolist()
    assert sizes_up_to(100) == [*range(17), 24, 36, 54, 81, 100]
    assert sizes_up_to(3) == [0, 1, 2, 3]


def test_first_units_are_those_of_each_example():
    order = Order(torch.tensor([[[1.0, 3], [2, 0]], [[0, 0], [0, 1]]]))
    found = order.first(torch.tensor([2, 1]))
    assert found.tolist() == [[[False, True], [True, False]], [[False, False], [False, True]]]


def test_participation_is_the_number_of_equal_units():
    one, four = torch.tensor([[[0.0, 3], [0, 0]]]), torch.tensor([[[1.0, -1], [1, 1]]])
    assert participation(one).tolist() == [1]
    assert participation(four).tolist() == [4]
    assert participation(torch.zeros(1, 2, 2)).tolist() == [0]


def test_the_interval_of_a_median_covers_it():
    assert median_interval(np.arange(5.0)) == (0, 4)  # no two of five do
    assert median_interval(np.arange(6.0)) == (0, 5)
    assert median_interval(np.arange(100.0)) == (39, 60)
    for n in (6, 9, 25, 100):
        low, high = median_interval(np.arange(float(n)))
        missed = stats.binom.cdf(low, n, 0.5) + stats.binom.sf(high, n, 0.5)
        assert missed <= 0.05


@pytest.mark.parametrize("unit", ["activations", "contributions"])
@pytest.mark.parametrize("site", ["neurons", "z"])
@pytest.mark.parametrize("backend", ["fast", "hooked"])
def test_each_example_gets_its_own_units(model, other_model, examples, site, unit, backend):
    width = 24 if site == "neurons" else 2
    chosen = torch.zeros(12, 2, width, dtype=torch.bool)
    chosen[:, 1, 0] = True
    chosen[3] = True
    chosen[5] = False
    session = Session(backend=backend)
    part = Exchange(other_model, chosen, site, unit)
    found = session.logits(model, examples, [part])
    close(found[5], logits_of(model, examples)[5])
    field = {"neurons" if site == "neurons" else "head": (0,)}
    if unit == "activations":
        one = Patch(site=site, layer=1, source=Source(live=other_model), **field)
        every = Patch(site=site, layer=(0, 1), source=Source(live=other_model))
        close(found[3], session.logits(model, examples, [every])[3])
    else:
        own, theirs = (activations_of(m, examples) for m in (model, other_model))
        hook = "blocks.1.mlp.hook_post" if site == "neurons" else "blocks.1.attn.hook_z"
        rows = [
            m.blocks[1].mlp.W_out[:1] if site == "neurons" else m.blocks[1].attn.W_O[0]
            for m in (model, other_model)
        ]
        change = [
            run[hook][:, :, 0:1] @ row if site == "neurons" else run[hook][:, :, 0] @ row
            for run, row in zip((own, theirs), rows, strict=True)
        ]
        summed = "blocks.1.hook_mlp_out" if site == "neurons" else "blocks.1.hook_attn_out"
        expected = logits_of(model, examples, (summed, lambda a, hook: a - change[0] + change[1]))
        close(found[0], expected[0])
        return
    close(found[0], session.logits(model, examples, [one])[0])


def test_a_part_of_the_examples_gets_its_own_units_too(model, other_model, examples):
    chosen = torch.zeros(12, 2, 24, dtype=torch.bool)
    chosen[torch.arange(12), 1, torch.arange(12)] = True
    part, session = Exchange(other_model, chosen), Session()
    whole = session.logits(model, examples, [part])
    close(session.logits(model, examples.select([7, 2]), [part]), whole[[7, 2]])


def test_heads_have_sets_too(answered):
    table = MemorySets(component="head", n_steps=2, top=1).table(answered)
    assert set(table["n_units"]) == {4}
    assert table.set_index("measure").loc["participation", "value"] <= 4
    assert all(np.isfinite(v).all() for v in table["per_example"])
    assert list(table.columns) == list(MemorySets.columns)


def test_a_set_that_never_suffices_is_counted(answered):
    table = MemorySets(component="head", n_steps=2, top=1).table(answered).set_index("measure")
    for name in ("back", "keep"):
        values = table.loc[name, "per_example"]
        assert table.loc[name, "share_infinite"] == (values == 5).mean()
    large = table.loc["keep", "per_example"] >= 2
    assert table.loc["keep_is_large", "per_example"].tolist() == large.tolist()


def test_the_shares_look_for_their_own_labels(answered, model, earlier):
    analysis = MemorySets(n_steps=2, top=48)
    table = analysis.table(answered).set_index("measure")["per_example"]
    examples = answered.examples("noisy")
    layers = [PatchContributions(layer=(0, 1), source=Source(live=earlier))]
    third = examples.with_true(third_labels(examples, 0))
    for name, wanted in (("returned_true", examples), ("returned_third", third)):
        fed = wanted.with_prefix("true")
        found = Session().logits(model, fed, layers).argmax(-1)
        assert table[name].tolist() == (found == fed.true).all(1).tolist()
