"""On every architecture of the zoo: the number of TransformerLens's own hooks, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.config import HookedTransformerConfig
from zoo import CHOICES, FAST, ZOO, build, close, drawn

from mechmem.analyses.circuits.attribution import Attribution
from mechmem.analyses.effects.patch_grid import PatchGrid
from mechmem.analyses.readouts.logit_lens import LogitLens
from mechmem.analyses.readouts.probe import Probe
from mechmem.data.examples import Examples
from mechmem.interventions.ablate import Ablate
from mechmem.interventions.applied import applied
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.steer import Steer
from mechmem.measures.logit import Logit
from mechmem.models import backend, fast, sites
from mechmem.session import Session
from mechmem.spec.errors import InputError

DTYPES = (torch.float64, torch.float32)
Hook = Callable[..., Tensor]


@pytest.fixture(scope="module", params=[(n, d) for n in ZOO for d in DTYPES], ids=str)
def model(request) -> Any:
    name, dtype = request.param
    made = build(ZOO[name], dtype)
    made.zoo_name = name
    return made


@pytest.fixture
def session(model, examples, others) -> Session:
    sets = {"noisy": examples, "clean": others}
    return Session(models={"after": model}, example_sets=sets)


def right(model: Any, examples: Examples, *hooks: tuple[str, Hook]) -> Tensor:
    logits = model.run_with_hooks(examples.tokens, fwd_hooks=list(hooks))
    return logits[:, -examples.n_answer :]


def putting(value: Tensor) -> Hook:
    """A hook that puts this in the place of the activation."""
    return lambda activation, hook: value


def every_site(model: Any) -> list[tuple[str, int | None]]:
    table = sites.table(model)
    named = table.loc[table["editable"], "site"]
    layers = range(model.cfg.n_layers)
    return [
        (name, layer)
        for name in named
        for layer in (layers if sites.SITES[name].has_layer else [None])
    ]


def keep_all(session: Session, model: Any, examples: Examples) -> None:
    """Has every activation kept that is patched in later, so that one forward gives them all."""
    session.activations(model, examples, [sites.hook_of(model, *at) for at in every_site(model)])


def test_the_zoo_is_run_by_the_backend_that_it_should_be(model):
    runner, reason = backend.choose("auto", model)
    assert runner.name == ("fast" if model.zoo_name in FAST else "hooked"), reason


def test_fast_equals_hooked_with_every_activation_of_its_own(model, examples):
    if model.zoo_name not in FAST:
        pytest.skip("refused: the test above says so")
    rows, n = torch.arange(len(examples)), examples.n_answer
    hooks = [sites.hook_of(model, *place) for place in every_site(model)]
    ours, found = backend.FAST.run(model, examples.tokens, rows, n, capture=hooks)
    theirs, there = backend.HOOKED.run(model, examples.tokens, rows, n, capture=hooks)
    close(ours, theirs)
    close(backend.FAST.run(model, examples.tokens, rows, n)[0], theirs)
    for hook in hooks:
        finite = there[hook].isfinite()
        assert (found[hook].isfinite() == finite).all()
        close(found[hook][finite], there[hook][finite])


def test_fast_differentiates_as_hooked_does(model, examples):
    if model.zoo_name not in FAST:
        pytest.skip("refused: the test above says so")
    hooks = [f"blocks.{model.cfg.n_layers - 1}.attn.hook_z", "hook_embed"]
    run = (model, examples.tokens, torch.arange(len(examples)), 5)
    loss = lambda logits, _: logits.log_softmax(-1)[..., 3].sum()  # noqa: E731
    found = [b.gradients(*run, loss, hooks)[2] for b in (backend.FAST, backend.HOOKED)]
    for hook in hooks:
        close(found[0][hook], found[1][hook])


def test_patching_from_itself_changes_nothing_at_any_site(model, session, examples):
    own = session.baseline(model, examples)
    keep_all(session, model, examples)
    patches = [Patch(site=site, layer=layer, source=model) for site, layer in every_site(model)]
    for cell in [*([patch] for patch in patches), patches]:
        close(session.logits(model, examples, cell), own)
    with applied(model, patches, examples, session) as hooked:
        close(hooked(examples.tokens)[:, -examples.n_answer :], own)


def test_a_patch_is_that_of_transformerlens_at_every_site(model, session, examples, others):
    donors = others.select(torch.arange(len(examples))).as_set()
    _, cache = model.run_with_cache(donors.tokens)
    keep_all(session, model, donors)
    for site, layer in every_site(model):
        hook = sites.hook_of(model, site, layer)
        axis = sites.site(site).axes.index("pos")

        def patched(activation: Tensor, hook: Any, at: str = hook, axis: int = axis) -> Tensor:
            chosen = torch.arange(activation.shape[axis]) == 6
            shape = [1] * activation.ndim
            shape[axis] = -1
            return torch.where(chosen.reshape(shape), cache[at], activation)

        name = next(name for name, index in examples.positions.items() if index == 6)
        patch = Patch(site=site, layer=layer, position=name, source=donors)
        found = session.logits(model, examples, [patch])
        close(found, right(model, examples, (hook, patched)))


@pytest.mark.parametrize("site", ["q", "k", "v", "z", "neurons"])
def test_heads_and_neurons_are_ablated_as_by_hand(site, model, session, examples, others):
    if site == "neurons" and model.cfg.attn_only:
        pytest.skip("there are no neurons")
    hook = sites.hook_of(model, site, 0)
    n_units = sites.site(site).n_units(model.cfg)
    units = {"neurons": (1, 3)} if site == "neurons" else {"head": n_units - 1}
    chosen = [1, 3] if site == "neurons" else [n_units - 1]
    _, cache = model.run_with_cache(others.tokens)
    mean = cache[hook].mean(0)

    def ablated(activation: Tensor, hook: Any) -> Tensor:
        new = activation.clone()
        new[:, :, chosen] = mean[:, chosen]
        return new

    part = Ablate(site=site, layer=0, method="mean", reference_set="clean", **units)
    close(session.logits(model, examples, [part]), right(model, examples, (hook, ablated)))


def test_steering_adds_the_difference_of_two_means(model, session, examples, others):
    last = model.cfg.n_layers - 1
    hook = f"blocks.{last}.hook_resid_post"
    carry = others.variables["carry_2"]
    _, cache = model.run_with_cache(others.tokens)
    step = cache[hook][carry == 1].mean(0) - cache[hook][carry == 0].mean(0)
    part = Steer(site="resid_post", layer=last, variable="carry_2", towards=1, away=0, factor=2.0)
    theirs = right(model, examples, (hook, lambda activation, hook: activation + 2 * step))
    close(session.logits(model, examples, [part]), theirs)


def test_a_grid_measures_the_patched_logits(model, session, examples):
    last = model.cfg.n_layers - 1
    grid = PatchGrid(
        site="attn_out", layer=last, source=Source(examples="clean"), measures=(Logit(),)
    )
    table = grid.table(session).set_index(["condition", "prefix", "place"])
    fed = examples.with_prefix("true")
    donors = session.examples("clean").select(examples.index).with_prefix("true")
    _, cache = model.run_with_cache(donors.tokens)
    hook = f"blocks.{last}.hook_attn_out"
    logits = right(model, fed, (hook, lambda activation, hook: cache[hook.name]))
    values = logits.gather(-1, examples.true[..., None])[..., 0]
    found = table.loc[("intervened", "true", "all"), "per_example"]
    close(torch.tensor(np.asarray(found)).float(), values.mean(1).float())


def test_a_probe_reads_the_activations_of_transformerlens(model, session, others):
    hook = sites.hook_of(model, "resid_post", 0)
    _, cache = model.run_with_cache(others.tokens)
    close(session.activation(model, others, hook), cache[hook])
    probe = Probe(variable="carry_2", layer=0, position="=")
    ours = probe.table(session)
    sets = session.example_sets
    theirs = probe.table(Session(models={"after": model}, example_sets=sets, backend="hooked"))
    np.testing.assert_allclose(ours["value"], theirs["value"], atol=1e-6)


def test_a_lens_is_the_models_own_end_on_every_residual(model, session, examples):
    few = replace(examples, positions={"=": 9, "a0": 3})  # the others cost time and add nothing
    session.example_sets["noisy"] = few
    table = LogitLens(prefixes=("given",)).table(session)
    _, cache = model.run_with_cache(examples.tokens)
    n_layers = model.cfg.n_layers
    for layer in range(n_layers + 1):
        name = "hook_resid_pre" if layer < n_layers else "hook_resid_post"
        resid = cache[f"blocks.{min(layer, n_layers - 1)}.{name}"]
        logits = model(resid, start_at_layer=n_layers)
        p = logits.softmax(-1)[:, 9].gather(-1, examples.true[:, :1])[:, 0]
        rows = table[(table["layer"] == layer) & (table["position"] == "=")]
        is_one = (rows["token"] == "true") & (rows["place"] == "s4")
        is_one &= (rows["measure"] == "probability") & (rows["condition"] == "lens")
        found = torch.tensor(rows[is_one]["per_example"].iloc[0])
        close(found.float(), p.float())


def test_attribution_is_change_times_gradient(model, session, examples):
    analysis = Attribution(metric=Logit(label="true"), corrupted=Source(examples="clean"))
    table = analysis.table(session)
    last = model.cfg.n_layers - 1
    hook = f"blocks.{last}.attn.hook_z"
    donors = session.examples("clean").select(examples.index)
    _, cache = model.run_with_cache(donors.tokens)
    kept = {}

    def leaf(activation: Tensor, hook: Any) -> Tensor:
        kept["z"] = activation.detach().requires_grad_()
        return kept["z"]

    logits = right(model, examples, (hook, leaf))
    metric = logits.gather(-1, examples.true[..., None])[..., 0].mean(1)
    (gradient,) = torch.autograd.grad(-metric.sum(), kept["z"])
    scores = ((cache[hook] - kept["z"].detach()) * gradient).sum((1, 3)).mean(0)
    rows = table[(table["component"] == "head") & (table["layer"] == last)]
    close(torch.tensor(rows["value"].to_numpy()).to(scores), scores)


def test_every_field_of_the_config_is_sorted():
    """A field that TransformerLens adds is looked at before `fast` runs a model that has it."""
    known = [*fast.HANDLED, *fast.DEFAULT, *fast.IRRELEVANT]
    assert sorted(known) == sorted({field.name for field in fields(HookedTransformerConfig)})


def test_a_field_that_nobody_has_sorted_is_refused():
    model = build({})
    model.cfg.flux_capacitor = True
    assert "flux_capacitor" in (backend.FAST.refusal(model) or "")


N_FUZZED = 200


def can_run(seed: int, examples: Examples) -> Any:
    """The model of a random config, None for one that TransformerLens itself cannot run."""
    try:
        model = build(drawn(seed), seed=seed)
        model(examples.tokens)
    except Exception:
        return None
    return model


@pytest.mark.parametrize("part", range(4))
def test_random_combinations_of_fields(part, examples, others):
    """A self-patch is nothing, a patch is that of TransformerLens, and `fast` equals `hooked`."""
    n_found, n_fast, seed = 0, 0, 10_000 * part
    donors = others.select(torch.arange(len(examples))).as_set()
    while n_found < N_FUZZED // 4:
        seed += 1
        model = can_run(seed, examples)
        if model is None:
            continue
        n_found += 1
        session = Session(models={"after": model}, example_sets={})
        own = session.baseline(model, examples)
        close(own, right(model, examples))
        n_fast += backend.choose("auto", model)[0].name == "fast"
        _, cache = model.run_with_cache(donors.tokens)
        places = every_site(model)
        for i in torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:4]:
            site, layer = places[int(i)]
            close(
                session.logits(model, examples, [Patch(site=site, layer=layer, source=model)]), own
            )
            hook = sites.hook_of(model, site, layer)
            patch = Patch(site=site, layer=layer, source=donors)
            theirs = right(model, examples, (hook, putting(cache[hook])))
            close(session.logits(model, examples, [patch]), theirs)
    assert n_fast >= 3


def test_the_fuzzed_values_are_of_fields_that_there_are():
    assert set(CHOICES) <= {field.name for field in fields(HookedTransformerConfig)}


def test_a_wrong_site_is_one_line(session, model, examples):
    with pytest.raises(InputError, match="there is no site 'neuron'"):
        session.logits(model, examples, [Patch(site="neuron", layer=0, source=model)])
