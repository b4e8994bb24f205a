from __future__ import annotations

import pandas as pd
import pytest

from mechmem.analyses.effects.intervene import Intervene
from mechmem.analyses.effects.patch_grid import PatchGrid
from mechmem.interventions.controls.random_neurons import RandomNeurons
from mechmem.interventions.intervention import Intervention
from mechmem.interventions.patch import Patch, Source
from mechmem.spec.sweep import each

BEFORE = Source(checkpoint="before")


def test_it_reports_the_effect_of_the_intervention_it_states(session):
    patch = {"site": "attn_out", "layer": 1, "source": BEFORE}
    found = Intervene(intervention=Patch(**patch)).table(session)
    of_grid = (
        PatchGrid(**patch).table(session).query("condition != 'source'").reset_index(drop=True)
    )
    pd.testing.assert_frame_equal(found.drop(columns="recovery"), of_grid.drop(columns="recovery"))


def test_fields_of_the_intervention_can_be_swept(session):
    swept = Intervene(intervention=Patch(site=each("z", "k"), layer=each(), source=BEFORE))
    table = swept.run(session, {"layer": range(2)})
    assert len(table[["site", "layer"]].drop_duplicates()) == 4


def test_its_control_is_drawn_for_the_intervention(session):
    part = Patch(site="neurons", layer=0, neurons=(1, 2), source=BEFORE)
    analysis = Intervene(intervention=part, control=RandomNeurons(n=2))
    draws = analysis.controls(session, analysis.interventions(session))
    assert draws == {"control": RandomNeurons(n=2).draws([part], session.model("after"))}


@pytest.mark.parametrize(
    "block", [{"kind": "patch", "site": "embed", "source": {"checkpoint": "before"}}]
)
def test_a_block_names_any_intervention_of_the_registry(block):
    analysis = Intervene.model_validate({"kind": "intervene", "intervention": block})
    assert isinstance(analysis.intervention, Intervention)
    assert Intervene.model_validate(analysis.block()) == analysis
