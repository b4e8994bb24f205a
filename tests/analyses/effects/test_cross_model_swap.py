"""A component exchanged with a twin, against a model that is put together by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from mechmem.analyses.effects.cross_model_swap import Twin
from mechmem.analyses.effects.effect import EffectAnalysis
from mechmem.analyses.effects.patch_grid import PatchGrid
from mechmem.interventions.applied import applied
from mechmem.interventions.controls.control import RandomDirection
from mechmem.interventions.patch import Patch, Source
from mechmem.interventions.random_displacement import Scramble
from mechmem.measures.probability import Probability
from mechmem.session import Bench
from mechmem.spec.registry import InputError, each

EVERYTHING = ("embed", "attn", "mlp", "unembed")
WEIGHTS = {"embed": ("embed.", "pos_embed."), "unembed": ("unembed.", "ln_final.")}
MEASURES = (Probability(label="true"), Probability(label="given"))


@pytest.fixture
def bench(model, other_model, examples, others) -> Bench:
    return Bench({"after": model, "twin": other_model}, {"noisy": examples, "clean": others})


def twin(**fields) -> Twin:
    return Twin(**({"measures": MEASURES} | fields))


def values(table: pd.DataFrame, condition: str, prefix: str = "given") -> torch.Tensor:
    """measure place n"""
    rows = table[(table["condition"] == condition) & (table["prefix"] == prefix)]
    return torch.tensor(np.stack(rows["per_example"].tolist()))


def probabilities(logits, examples) -> torch.Tensor:
    found = []
    for label in ("true", "given"):
        each_place = logits[:, -5:].softmax(-1).gather(-1, examples.labels(label)[..., None])[..., 0]
        found += [each_place.prod(1), *each_place.unbind(1)]
    return torch.stack(found)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def put_together(random_models, prefixes: tuple[str, ...]):
    """The model with these parameters of its twin."""
    hybrid, other = random_models(0), random_models(1).state_dict()
    hybrid.load_state_dict(hybrid.state_dict() | {n: v for n, v in other.items() if n.startswith(prefixes)})
    return hybrid


@pytest.mark.parametrize("into", ["model", "twin"])
@pytest.mark.parametrize("prefix", ["given", "true"])
def test_with_everything_exchanged_it_is_the_other_model(into, prefix, bench, model, other_model, examples):
    table = twin(component=EVERYTHING, into=into).table(bench)
    host, other = (model, other_model) if into == "model" else (other_model, model)
    fed = examples.with_prefix(prefix)
    close(values(table, "patched", prefix), probabilities(other(fed.tokens), fed))
    close(values(table, "source", prefix), probabilities(other(fed.tokens), fed))
    close(values(table, "unpatched", prefix), probabilities(host(fed.tokens), fed))
    assert not torch.allclose(values(table, "unpatched", prefix), values(table, "source", prefix), atol=0.01)
    defined = table.loc[table["condition"] == "patched", "recovery"].dropna()
    assert len(defined) > 8
    assert defined.tolist() == pytest.approx([1.0] * len(defined), abs=1e-3)


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
def test_weights_make_the_model_that_state_dicts_put_together(component, layer, names, bench, random_models, examples):
    table = twin(component=component, layer=layer).table(bench)
    logits = put_together(random_models, names)(examples.tokens)
    close(values(table, "patched"), probabilities(logits, examples))
    assert not torch.allclose(values(table, "patched"), values(table, "unpatched"), atol=0.01)


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
def test_activations_are_those_of_the_twin(component, layer, hooks, bench, model, other_model, examples):
    table = twin(component=component, layer=layer, how="activations").table(bench)
    _, cache = other_model.run_with_cache(examples.tokens)
    logits = model.run_with_hooks(examples.tokens, fwd_hooks=[(h, lambda x, hook: cache[hook.name]) for h in hooks])
    close(values(table, "patched"), probabilities(logits, examples))
    by_weights = values(twin(component=component, layer=layer).table(bench), "patched")
    assert torch.allclose(by_weights, values(table, "patched"), atol=1e-5) == (component == "embed")


def test_the_activation_of_the_unembedding_is_the_twins_answer(bench):
    table = twin(component="unembed", how="activations").table(bench)
    close(values(table, "patched"), values(table, "source"))


@pytest.mark.parametrize("how", ["weights", "activations"])
def test_exchanged_with_itself_it_stays_as_it_is(how, bench):
    table = twin(component=EVERYTHING, how=how, twin="after", control=RandomDirection(n=1)).table(bench)
    close(values(table, "patched"), values(table, "unpatched"))
    close(values(table, "control"), values(table, "unpatched"))
    assert table["recovery"].isna().all()


def test_into_the_twin_is_the_exchange_seen_from_the_twin(bench):
    there = twin(component="mlp", layer=1, into="twin", control=RandomDirection(n=2)).table(bench)
    swapped = twin(component="mlp", layer=1, model="twin", twin="after", control=RandomDirection(n=2)).table(bench)
    pd.testing.assert_frame_equal(there, swapped)


def test_the_whole_twin_has_an_answer_of_its_own_too(bench):
    table = Twin(component="mlp", layer=0).table(bench)
    assert list(table) == list(EffectAnalysis.columns) == list(Twin.columns)
    found = set(zip(table["condition"], table["prefix"], strict=True))
    assert found == {(c, p) for c in ("unpatched", "patched", "source") for p in ("given", "true", "decode")}
    whole = PatchGrid(model="twin", site="attn_out", layer=0, source=Source(checkpoint="after")).table(bench)
    answers = whole[(whole["condition"] == "unpatched") & (whole["prefix"] == "decode")]
    close(values(table, "source", "decode"), torch.tensor(np.stack(answers["per_example"].tolist())))


@torch.no_grad()
def test_controls_move_each_part_as_far_and_no_two_alike(bench, model, examples):
    analysis = twin(component="embed", how="activations", control=RandomDirection(n=3))
    draws = analysis.control_draws(bench, analysis.parts(bench))
    assert [len(draw) for draw in draws] == [2, 2, 2]
    moved = {}
    for hook in ("hook_embed", "hook_pos_embed"):
        with applied(model, draws[0], examples, bench):
            moved[hook] = model.run_with_cache(examples.tokens)[1][hook] - bench.activation(model, examples, hook)
        change = bench.activation(bench.model("twin"), examples, hook) - bench.activation(model, examples, hook)
        close(moved[hook].norm(dim=-1), change.norm(dim=-1))
    cosine = torch.cosine_similarity(moved["hook_embed"], moved["hook_pos_embed"], dim=-1)
    assert cosine.abs().max() < 0.95


def test_the_first_parts_control_is_as_it_was(bench):
    grid = PatchGrid(site="attn_out", layer=0, source=Source(checkpoint="twin"), control=RandomDirection(n=1, seed=5))
    (part,) = grid.parts(bench)
    assert grid.control_draws(bench, [part]) == [[Scramble(of=part, seed=5)]]
    assert isinstance(part, Patch)


def test_what_has_no_layers_takes_none(bench):
    with pytest.raises(ValidationError, match="embed and unembed have no layers"):
        Twin(component=("embed", "unembed"), layer=1)
    with pytest.raises(InputError, match="embed have no layers"):
        Twin(component=each("mlp", "embed"), layer=1).run(bench, {})
    with pytest.raises(InputError, match="layer 2 is out of range"):
        Twin(component="mlp", layer=2, how="activations").table(bench)


def test_a_sweep_names_what_was_exchanged(bench):
    sweep = Twin(component=each("attn", "mlp"), layer=each(), how=each("weights", "activations"), decode=False)
    table = sweep.run(bench, {"layer": range(2)})
    assert list(table.columns[:3]) == ["how", "component", "layer"]
    assert len(table[["how", "component", "layer"]].drop_duplicates()) == 8
