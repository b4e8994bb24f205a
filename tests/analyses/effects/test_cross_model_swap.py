"""A component exchanged with a twin, against a model that is put together by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from mechmem.analyses.effects.cross_model_swap import CrossModelSwap
from mechmem.analyses.effects.effect import EffectAnalysis
from mechmem.analyses.effects.patch_grid import PatchGrid
from mechmem.interventions.applied import applied
from mechmem.interventions.controls.random_direction import RandomDirection
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.random_displacement import RandomDisplacement
from mechmem.measures.probability import Probability
from mechmem.session import Session
from mechmem.spec.errors import InputError
from mechmem.spec.sweep import each

EVERYTHING = ("embed", "attn", "mlp", "unembed")
WEIGHTS = {"embed": ("embed.", "pos_embed."), "unembed": ("unembed.", "ln_final.")}
MEASURES = (Probability(label="true"), Probability(label="given"))


@pytest.fixture
def session(model, other_model, examples, others) -> Session:
    return Session({"after": model, "twin": other_model}, {"noisy": examples, "clean": others})


def twin(**fields) -> CrossModelSwap:
    return CrossModelSwap(**({"measures": MEASURES} | fields))


def values(table: pd.DataFrame, condition: str, prefix: str = "given") -> torch.Tensor:
    """measure place n"""
    rows = table[(table["condition"] == condition) & (table["prefix"] == prefix)]
    return torch.tensor(np.stack(rows["per_example"].tolist()))


def probabilities(logits, examples) -> torch.Tensor:
    found = []
    for label in ("true", "given"):
        each_place = (
            logits[:, -5:].softmax(-1).gather(-1, examples.labels(label)[..., None])[..., 0]
        )
        found += [each_place.prod(1), *each_place.unbind(1)]
    return torch.stack(found)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def put_together(random_models, prefixes: tuple[str, ...]):
    """The model with these parameters of its twin."""
    hybrid, other = random_models(0), random_models(1).state_dict()
    hybrid.load_state_dict(
        hybrid.state_dict() | {n: v for n, v in other.items() if n.startswith(prefixes)}
    )
    return hybrid


@pytest.mark.parametrize("into", ["model", "twin"])
@pytest.mark.parametrize("prefix", ["given", "true"])
def test_with_everything_exchanged_it_is_the_other_model(
    into, prefix, session, model, other_model, examples
):
    table = twin(component=EVERYTHING, into=into).table(session)
    host, other = (model, other_model) if into == "model" else (other_model, model)
    fed = examples.with_prefix(prefix)
    close(values(table, "intervened", prefix), probabilities(other(fed.tokens), fed))
    close(values(table, "source", prefix), probabilities(other(fed.tokens), fed))
    close(values(table, "baseline", prefix), probabilities(host(fed.tokens), fed))
    assert not torch.allclose(
        values(table, "baseline", prefix), values(table, "source", prefix), atol=0.01
    )


@pytest.mark.parametrize(
    ("component", "layer", "names"),
    [
        ("embed", None, WEIGHTS["embed"]),
        ("unembed", None, WEIGHTS["unembed"]),
        ("mlp", 0, ("blocks.0.mlp.", "blocks.0.ln2.")),
        ("attn", 1, ("blocks.1.attn.", "blocks.1.ln1.")),
        (("attn", "mlp", "unembed"), (1,), ("blocks.1.", *WEIGHTS["unembed"])),
    ],
)
@torch.no_grad()
def test_weights_make_the_model_that_state_dicts_put_together(
    component, layer, names, session, random_models, examples
):
    table = twin(component=component, layer=layer).table(session)
    logits = put_together(random_models, names)(examples.tokens)
    close(values(table, "intervened"), probabilities(logits, examples))
    assert not torch.allclose(values(table, "intervened"), values(table, "baseline"), atol=0.01)


@pytest.mark.parametrize(
    ("component", "layer", "hooks"),
    [
        ("embed", None, ["hook_embed", "hook_pos_embed"]),
        ("attn", 0, ["blocks.0.hook_attn_out"]),
        ("mlp", None, ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]),
        (("mlp", "attn"), 1, ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]),
    ],
)
@torch.no_grad()
def test_activations_are_those_of_the_twin(
    component, layer, hooks, session, model, other_model, examples
):
    table = twin(component=component, layer=layer, method="activations").table(session)
    _, cache = other_model.run_with_cache(examples.tokens)
    logits = model.run_with_hooks(
        examples.tokens, fwd_hooks=[(h, lambda x, hook: cache[hook.name]) for h in hooks]
    )
    close(values(table, "intervened"), probabilities(logits, examples))
    by_weights = values(twin(component=component, layer=layer).table(session), "intervened")
    assert torch.allclose(by_weights, values(table, "intervened"), atol=1e-5) == (
        component == "embed"
    )


def test_the_activation_of_the_unembedding_is_the_twins_answer(session):
    table = twin(component="unembed", method="activations").table(session)
    close(values(table, "intervened"), values(table, "source"))


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_exchanged_with_itself_it_stays_as_it_is(method, session):
    table = twin(
        component=EVERYTHING, method=method, twin="after", control=RandomDirection(n=1)
    ).table(session)
    close(values(table, "intervened"), values(table, "baseline"))
    close(values(table, "control"), values(table, "baseline"))
    assert table["recovery"].isna().all()


def test_into_the_twin_is_the_exchange_seen_from_the_twin(session):
    there = twin(component="mlp", layer=1, into="twin", control=RandomDirection(n=2)).table(session)
    swapped = twin(
        component="mlp", layer=1, model="twin", twin="after", control=RandomDirection(n=2)
    ).table(session)
    pd.testing.assert_frame_equal(there, swapped)


def test_the_whole_twin_has_an_answer_of_its_own_too(session):
    table = CrossModelSwap(component="mlp", layer=0).table(session)
    assert list(table) == list(EffectAnalysis.columns) == list(CrossModelSwap.columns)
    found = set(zip(table["condition"], table["prefix"], strict=True))
    assert found == {
        (c, p) for c in ("baseline", "intervened", "source") for p in ("given", "true", "greedy")
    }
    whole = PatchGrid(
        model="twin", site="attn_out", layer=0, source=Source(checkpoint="after")
    ).table(session)
    answers = whole[(whole["condition"] == "baseline") & (whole["prefix"] == "greedy")]
    close(
        values(table, "source", "greedy"), torch.tensor(np.stack(answers["per_example"].tolist()))
    )


@torch.no_grad()
def test_controls_move_each_part_as_far_and_no_two_alike(session, model, other_model, examples):
    analysis = twin(component="embed", method="activations", control=RandomDirection(n=3))
    draws = analysis.controls(session, analysis.interventions(session))["control"]
    assert [len(draw) for draw in draws] == [2, 2, 2]
    moved = {}
    for hook in ("hook_embed", "hook_pos_embed"):
        own, theirs = (session.activation(m, examples, hook) for m in (model, other_model))
        with applied(model, draws[0], examples, session):
            moved[hook] = model.run_with_cache(examples.tokens)[1][hook] - own
        change = theirs - own
        close(moved[hook].norm(dim=-1), change.norm(dim=-1))
    cosine = torch.cosine_similarity(moved["hook_embed"], moved["hook_pos_embed"], dim=-1)
    assert cosine.abs().max() < 0.95


def test_the_first_parts_control_is_as_it_was(session):
    grid = PatchGrid(
        site="attn_out",
        layer=0,
        source=Source(checkpoint="twin"),
        control=RandomDirection(n=1, seed=5),
    )
    (part,) = grid.interventions(session)
    drawn = [[RandomDisplacement(of=part, seed=5)]]
    assert grid.controls(session, [part]) == {"control": drawn}
    assert isinstance(part, Patch)


def test_what_has_no_layers_takes_none(session):
    with pytest.raises(ValidationError, match="embed and unembed have no layers"):
        CrossModelSwap(component=("embed", "unembed"), layer=1)
    with pytest.raises(InputError, match="embed have no layers"):
        CrossModelSwap(component=each("mlp", "embed"), layer=1).run(session, {})
    with pytest.raises(InputError, match="layer 2 is out of range"):
        CrossModelSwap(component="mlp", layer=2, method="activations").table(session)


def test_a_sweep_names_what_was_exchanged(session):
    sweep = CrossModelSwap(
        component=each("attn", "mlp"),
        layer=each(),
        method=each("weights", "activations"),
        greedy=False,
    )
    table = sweep.run(session, {"layer": range(2)})
    assert list(table.columns[:3]) == ["method", "component", "layer"]
    assert len(table[["method", "component", "layer"]].drop_duplicates()) == 8
