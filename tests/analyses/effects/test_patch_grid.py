from __future__ import annotations

import pytest
import torch
from transformer_lens import patching

from mechmem.analyses.effects.patch_grid import PatchGrid
from mechmem.interventions.patch import Patch, Source
from mechmem.models.backend import FAST
from mechmem.models.fast import Fast
from mechmem.session import Session
from mechmem.spec.sweep import each

SWEEP_DOMAIN = {"layer": range(3), "head": range(2)}
ORACLES = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "attn_out": patching.get_act_patch_attn_out,
    "mlp_out": patching.get_act_patch_mlp_out,
    "z": patching.get_act_patch_attn_head_out_all_pos,
}


@pytest.fixture(scope="module")
def deep(random_models):
    return random_models(8, n_layers=3)


@pytest.fixture
def deep_session(deep, examples, others) -> Session:
    return Session({"after": deep}, {"noisy": examples, "clean": others})


def grid(site, swept: str) -> PatchGrid:
    chosen = {
        "layer": each(),
        swept: each(),
        "source": Source(examples="clean"),
        "measures": ("logit_difference",),
    }
    return PatchGrid(site=site, **chosen, greedy=False)


@pytest.mark.parametrize("site", ORACLES)
def test_the_grid_is_that_of_transformer_lens(
    site, deep, deep_session, examples, others, monkeypatch
):
    monkeypatch.setattr(patching, "tqdm", list)  # no bars

    def mean_logit_difference(logits):
        at_true, at_given = (
            logits[:, -5:].gather(-1, y[..., None]) for y in (examples.true, examples.given)
        )
        return (at_true - at_given).mean()

    with torch.no_grad():
        _, cache = deep.run_with_cache(others.tokens)
        expected = ORACLES[site](deep, examples.tokens, cache, mean_logit_difference)
    swept = "head" if site == "z" else "position"
    table = grid(site, swept).run(
        deep_session, SWEEP_DOMAIN | {"position": tuple(examples.positions)}
    )
    patched = table.query("condition == 'intervened' and prefix == 'given' and place == 'all'")
    found = patched.pivot_table(values="value", index="layer", columns=swept, sort=False)
    assert found.shape == expected.shape == ((3, 2) if site == "z" else (3, 14))
    torch.testing.assert_close(
        torch.tensor(found.to_numpy()).float(), expected, atol=1e-5, rtol=1e-5
    )
    assert expected.std() > 1e-3


def test_swept_values_come_first_in_the_table(deep_session):
    table = grid(each("z", "q"), "head").run(deep_session, SWEEP_DOMAIN)
    assert list(table.columns[:3]) == ["site", "layer", "head"]
    cells = table[["site", "layer", "head"]].drop_duplicates()
    assert len(cells) == 2 * 3 * 2


@torch.no_grad()
def plainly(model, examples) -> torch.Tensor:
    return FAST.run(model, examples.tokens, torch.arange(len(examples)), 5)[0]


def test_the_source_row_is_the_run_that_is_patched_in(
    session, model, other_model, examples, others
):
    source = Source(checkpoint="before", examples="clean")
    analysis = PatchGrid(site="embed", source=source)
    assert torch.equal(analysis.target(session, examples), plainly(other_model, others))
    same_examples = PatchGrid(site="embed", source=Source(checkpoint="before"))
    assert torch.equal(same_examples.target(session, examples), plainly(other_model, examples))


def test_patching_everything_recovers_everything(session):
    table = PatchGrid(site="logits", source=Source(checkpoint="before"), measures=("kl",)).table(
        session
    )
    recovery = table.query("condition == 'intervened'")["recovery"].dropna()
    assert len(recovery)
    assert recovery.tolist() == pytest.approx([1.0] * len(recovery), abs=1e-4)


def test_a_mean_is_no_run_and_has_no_recovery(session):
    table = PatchGrid(site="attn_out", layer=0, source=Source(mean_over="clean")).table(session)
    assert set(table["condition"]) == {"baseline", "intervened"}
    assert table["recovery"].isna().all()


def test_the_grid_applies_the_patch_that_it_states(session):
    chosen = {
        "site": "neurons",
        "layer": 1,
        "position": "=",
        "neurons": (3, 4),
        "source": Source(checkpoint="before"),
    }
    assert PatchGrid(**chosen).interventions(session) == [Patch(**chosen)]


def test_what_the_grid_patches_resumes_and_costs_less(deep_session, monkeypatch):
    """Every patched forward starts at the patched layer, from the residual that the baseline run
    has left."""
    starts, plain = [], Fast.run

    def recorded(self, *given, resume=None, **options):
        starts.append(0 if resume is None else resume[0])
        return plain(self, *given, resume=resume, **options)

    monkeypatch.setattr(Fast, "run", recorded)
    grid = PatchGrid(site="attn_out", layer=2, source=Source(examples="clean"), greedy=False)
    grid.table(deep_session)
    assert starts.count(2) == 2  # once for each prefix
