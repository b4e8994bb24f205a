"""Lenses against TransformerLens's own path, the model's own output, and a translator that is known
to be right."""

from __future__ import annotations

import copy
import io

import numpy as np
import pandas as pd
import pytest
import torch
from configured import CAPPED, GATED_RMS, GROUPED, ROTARY, configured

import mechmem as mm
from mechmem.analyses.readouts.lens import residuals
from mechmem.analyses.readouts.logit_lens import LogitLens
from mechmem.analyses.readouts.tuned_lens import TunedLens
from mechmem.data.example_set import ExampleSet
from mechmem.data.tasks.two_hop_reasoning import TwoHopReasoning
from mechmem.experiment.dry_run import DryRun
from mechmem.session import Session
from mechmem.spec.errors import InputError

LENSES = pytest.mark.parametrize(
    "lens", [LogitLens(), TunedLens(n_steps=4)], ids=lambda lens: lens.kind
)


def rows(table: pd.DataFrame, **where) -> pd.DataFrame:
    for column, value in where.items():
        table = table[table[column] == value]
    return table


def values(table: pd.DataFrame, **where) -> np.ndarray:
    """The values of the examples in the one row of these labels."""
    (found,) = rows(table, **where)["per_example"]
    return found


def by_transformer_lens(model, examples) -> torch.Tensor:
    """Logits of every residual, `layer n pos d_vocab`, from `cache`, `ln_final` and `unembed`."""
    with torch.no_grad():
        _, cache = model.run_with_cache(examples.tokens)
        resid = cache.accumulated_resid(layer=-1, incl_mid=False)
        norm = model.ln_final if model.cfg.normalization_type else torch.nn.Identity()
        return model.unembed(norm(resid.flatten(0, 1))).unflatten(0, resid.shape[:2])


@pytest.fixture(scope="module")
def shipped() -> Session:
    trained = mm.load("fda_small")
    sets = {
        "noisy": ExampleSet(noisy=True, n=30),
        "clean": ExampleSet(noisy=False, n=500),
        "held_out": ExampleSet(split="held_out", n=100),
    }
    return Session(
        {"after": trained.at("memorised")}, {name: s.of(trained.task) for name, s in sets.items()}
    )


@pytest.mark.parametrize("prefix", ["given", "true"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", None])
def test_the_logit_lens_is_that_of_transformer_lens(norm, prefix, random_models, examples):
    model = random_models(0, norm=norm)
    table = LogitLens(variables=("out_2",)).table(Session({"after": model}, {"noisy": examples}))
    logits = by_transformer_lens(model, examples.with_prefix(prefix)).numpy()
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    n, names = np.arange(len(examples)), list(examples.positions)
    for layer, position, (token, place, wanted) in (
        (0, "a3", ("given", "s4", examples.given[:, 0])),
        (1, "=", ("true", "s2", examples.true[:, 2])),
        (2, "s1", ("given", "s0", examples.given[:, 4])),
        (1, "s3", ("out_2", "any", examples.variables["out_2"])),
    ):
        at = {"layer": layer, "position": position, "token": token, "place": place}
        at |= {"prefix": prefix, "condition": "lens"}
        here = logits[layer, :, names.index(position)]
        chance = odds[layer, :, names.index(position)]
        np.testing.assert_allclose(
            values(table, **at, measure="probability"),
            chance[n, wanted] / chance.sum(-1),
            rtol=1e-4,
            atol=1e-6,
        )
        expected = (here > here[n, wanted][:, None]).sum(-1)
        np.testing.assert_array_equal(values(table, **at, measure="rank"), expected)


@LENSES
def test_the_last_layer_where_answers_are_read_is_the_model_s_own_output(
    lens, session, model, examples
):
    table = lens.table(session)
    for prefix in ("given", "true"):
        fed = examples.with_prefix(prefix)
        with torch.no_grad():
            output = model(fed.tokens)[:, -5:].softmax(-1)
        for label in ("given", "true"):
            own = output.gather(-1, examples.labels(label)[..., None])[..., 0]
            at = {
                "prefix": prefix,
                "layer": 2,
                "token": label,
                "measure": "probability",
                "condition": "lens",
            }
            np.testing.assert_allclose(
                values(table, **at, position="readout"), own.mean(1), rtol=1e-4
            )
            for i, (position, place) in enumerate(
                zip(["=", "s4", "s3", "s2", "s1"], examples.places, strict=True)
            ):
                np.testing.assert_allclose(
                    values(table, **at, position=position, place=place), own[:, i], rtol=1e-4
                )
    last = rows(table, layer=2, measure="kl")
    assert last["value"].abs().max() < 1e-6


@pytest.mark.parametrize(
    "fields", [CAPPED, CAPPED | ROTARY, GROUPED | GATED_RMS], ids=["capped", "rotary", "grouped"]
)
@LENSES
@torch.no_grad()
def test_in_other_configurations_the_last_layer_is_the_model_s_own_output_too(
    lens, fields, examples, others
):
    model = configured(12, 14, **fields)
    with_sets = {"noisy": examples, "clean": others}
    session = Session({"after": model}, with_sets)
    logits = model(examples.tokens)[:, -5:]
    last = session.activation(model, examples, "blocks.1.hook_resid_post")
    read = lens.lenses(session, model)["lens"](2, last)[:, -5:]
    torch.testing.assert_close(read, logits, atol=1e-5, rtol=1e-5)
    table = rows(lens.table(session), layer=2, prefix="given", position="readout")
    own = logits.softmax(-1).gather(-1, examples.given[..., None])[..., 0].mean(1)
    at = {"token": "given", "measure": "probability", "condition": "lens"}
    np.testing.assert_allclose(values(table, **at), own, rtol=1e-4)
    if "output_logits_soft_cap" in fields:  # and not what the unembedding gives alone
        uncapped = model.unembed(model.ln_final(last))[:, -5:]
        assert uncapped.abs().max() > 3 > read.abs().max()


def test_the_kl_is_that_of_the_model_s_output_from_the_lens(session, model, examples):
    logits = by_transformer_lens(model, examples)[:, :, -5:].log_softmax(-1)
    expected = (logits[2].exp() * (logits[2] - logits[1])).sum(-1)
    table = rows(LogitLens().table(session), prefix="given", layer=1, measure="kl")
    np.testing.assert_allclose(
        values(table, position="s4", place="s3"), expected[:, 1], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        values(table, position="readout", place="all"), expected.mean(1), rtol=1e-4, atol=1e-6
    )


@LENSES
def test_the_shuffled_control_is_the_token_of_another_example(lens, session):
    at = {
        "prefix": "true",
        "layer": 1,
        "position": "b0",
        "place": "s1",
        "token": "true",
        "measure": "rank",
    }
    own = values(lens.table(session), **at, condition="lens")
    examples = session.examples("noisy")
    logits = torch.stack(residuals(session, session.model("after"), examples.with_prefix("true")))
    read = lens.lenses(session, session.model("after"))["lens"](1, logits[1])[
        :, list(examples.positions).index("b0")
    ]
    rank = (read[:, None] > read[..., None]).sum(-1).numpy()  # of every token
    tokens = examples.true[:, 3].numpy()
    np.testing.assert_array_equal(own, rank[np.arange(12), tokens])
    drawn = [
        values(lens.model_copy(update={"seed": s}).table(session), **at, condition="shuffled")
        for s in range(3)
    ]
    for shuffled in drawn:
        possible = [set(rank[i, np.delete(tokens, i)]) for i in range(12)]
        assert all(found in others for found, others in zip(shuffled, possible, strict=True))
    assert not np.array_equal(drawn[0], drawn[1])


@LENSES
def test_every_position_layer_and_token_has_its_rows(lens, session):
    lens = lens.model_copy(update={"variables": ("out_0", "out_4")})
    table = lens.table(session)
    assert list(table.columns) == list(lens.columns)
    assert not table.isna().any(axis=None)
    key = ["examples", "prefix", "layer", "position", "place", "token", "condition", "measure"]
    assert not table.duplicated(key).any()
    tokens = rows(table, measure="rank", condition="shuffled")
    assert len(tokens) == 2 * 3 * (
        14 * (2 * 5 + 2) + 2
    )  # prefixes, residuals, positions x (labels x places + variables)
    assert rows(table, measure="kl", condition="lens").shape[0] == 2 * 3 * 6
    saved = pd.read_parquet(io.BytesIO(table.to_parquet(index=False)))
    assert saved["layer"].dtype == np.int64
    assert (table["low"] <= table["value"] + 1e-9).all()
    assert (table["value"] <= table["high"] + 1e-9).all()


@LENSES
def test_the_same_lens_has_the_same_bytes(lens, model, examples, others):
    first, second = (
        lens.table(Session({"after": model}, {"noisy": examples, "clean": others})).to_parquet()
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("name", ["out_9", "digit_sum_0"])
def test_what_is_no_token_is_refused(session, name):
    with pytest.raises(
        InputError,
        match=f"variables whose values are tokens, unlike '{name}'; choose from out_0, out_1",
    ):
        LogitLens(variables=(name,)).table(session)


def test_a_relation_is_no_token_though_its_number_could_be_one():
    facts = TwoHopReasoning(n_entities=12, n_relations=5).sample("held_out")
    assert set(facts.token_variables) == {"e", "bridge", "answer"}
    assert all((facts.prompt[:, 0] == facts.variables["e"]).tolist())


def test_a_single_example_has_no_control(session):
    session.example_sets = {"noisy": session.examples("noisy").select(torch.tensor([0])).as_set()}
    with pytest.raises(InputError, match="'noisy' has one example"):
        LogitLens().table(session)


def test_the_untrained_translator_is_the_logit_lens(session):
    plain, tuned = LogitLens().table(session), TunedLens(n_steps=0).table(session)
    for condition in ("lens", "shuffled"):
        a, b = (rows(t, condition=condition).reset_index(drop=True) for t in (plain, tuned))
        pd.testing.assert_frame_equal(a, b)
    untrained = rows(tuned, condition="untrained").assign(condition="lens").reset_index(drop=True)
    pd.testing.assert_frame_equal(untrained, rows(plain, measure="kl").reset_index(drop=True))


def test_a_right_translator_is_found(session, model):
    """Layers that only add a constant: the right translator is a shift, and the KL is then 0."""
    still = copy.deepcopy(model)
    with torch.no_grad():
        for block in still.blocks:
            block.attn.W_O.zero_()
            block.mlp.W_out.zero_()
    session.models = {"after": still}
    table = TunedLens(n_steps=400, learning_rate=0.03).table(session)
    kl = rows(table, measure="kl", place="all", prefix="given").set_index(["condition", "layer"])[
        "value"
    ]
    assert kl["untrained", 0] > 0.1
    assert kl["lens", 0] < 2e-3
    assert kl["lens", 1] < 2e-3


def test_training_lowers_the_held_out_kl_of_a_shipped_model_and_leaves_the_last_layer_alone(
    shipped,
):
    table = TunedLens(examples="held_out").table(shipped)
    kl = rows(table, measure="kl", place="all").set_index(["condition", "layer"])["value"]
    for layer in (0, 1):
        assert kl["lens", layer] < 0.6 * kl["untrained", layer]
    assert kl["lens", 2] == pytest.approx(0, abs=1e-6)


def test_translators_are_kept_on_the_session_and_leave_the_model_alone(shipped):
    model = shipped.model("after")
    before = {name: p.clone() for name, p in model.named_parameters()}
    lens = TunedLens(n_steps=5, examples="noisy")
    found = lens.translators(shipped, model)
    assert lens.translators(shipped, model) is found
    assert lens.model_copy(update={"examples": "held_out"}).translators(shipped, model) is found
    assert lens.model_copy(update={"learning_rate": 0.1}).translators(shipped, model) is not found
    assert not any(part.requires_grad for part in found)
    assert lens == TunedLens(n_steps=5, examples="noisy")
    assert all(
        torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters()
    )


def test_a_translated_residual_is_unembedded(shipped):
    model, examples = shipped.model("after"), shipped.examples("noisy")
    lens = TunedLens(n_steps=5, examples="noisy")
    change, shift = lens.translators(shipped, model)
    resid = residuals(shipped, model, examples)[1]
    with torch.no_grad():
        moved = torch.einsum("npd,de->npe", resid, torch.eye(128) + change[1]) + shift[1]
        expected = model.unembed(model.ln_final(moved))
        torch.testing.assert_close(
            lens.lenses(shipped, model)["lens"](1, resid), expected, atol=1e-4, rtol=1e-4
        )
        assert not torch.allclose(expected, shipped.unembedded(model, resid), atol=1e-2)


def test_a_dry_run_has_the_same_labels_and_is_cheap(session):
    real = TunedLens(n_steps=3).table(session)
    sizes = {name: len(examples) for name, examples in session.example_sets.items()}
    dry = DryRun(sizes, models=session.models, example_sets=session.example_sets)
    few = TunedLens(n_steps=10**6).table(dry)
    labels = ["prefix", "layer", "position", "place", "token", "condition", "measure", "unit"]
    pd.testing.assert_frame_equal(real[labels], few[labels])
