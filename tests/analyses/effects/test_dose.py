from __future__ import annotations

import pytest
from plain_hooks import activations_of

from mechmem.analyses.effects.dose import Dose


def dose(**fields) -> Dose:
    return Dose(**({"layer": 1, "norm": 0.5, "greedy": False} | fields))


def test_both_sites_are_moved_equally_far(session):
    tables = [dose(site=site).table(session) for site in ("neurons", "attn_out")]
    moved = [t.groupby("condition")["moved"].first()["intervened"] for t in tables]
    assert moved[0] == pytest.approx(moved[1], rel=1e-4)
    assert moved[0] == pytest.approx(0.5, rel=1e-3)


def test_a_large_dose_is_the_smaller_of_the_two_changes(session, model, other_model, examples):
    own, theirs = (activations_of(m, examples) for m in (model, other_model))
    hook = "blocks.1.hook_attn_out"
    attention = (theirs[hook] - own[hook]).norm(dim=-1)[:, -5:]
    hook = "blocks.1.mlp.hook_post"
    neurons = ((theirs[hook] - own[hook]) @ model.blocks[1].mlp.W_out).norm(dim=-1)[:, -5:]
    table = dose(norm=1e6, site="neurons").table(session)
    moved = table[table["condition"] == "intervened"]["moved"].iloc[0]
    assert moved == pytest.approx(attention.minimum(neurons).mean().item(), rel=1e-4)


def test_the_table_has_a_control_and_a_source(session):
    table = dose(control={"kind": "random_direction", "n": 2}).table(session)
    assert set(table["condition"]) == {"baseline", "intervened", "control", "source"}
    assert list(table.columns) == list(Dose.columns)
