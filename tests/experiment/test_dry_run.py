"""A dry run foretells what the real run sends through the models; values are not demanded."""

from __future__ import annotations

from typing import Any

import pytest

from mechmem.experiment.cells import TrainedRun
from mechmem.experiment.dry_run import DryRun, dry_run
from mechmem.experiment.spec import Experiment
from mechmem.progress import ProgressCallback

ANALYSES: dict[str, dict[str, Any]] = {
    "patch_grid": {
        "kind": "patch_grid",
        "site": {"each": ["neurons", "attn_out"]},
        "layer": {"each": "all"},
        "source": {"checkpoint": "before"},
        "greedy": False,
        "control": {"kind": "random_direction", "n": 2},
    },
    "ablation": {"kind": "ablation", "component": "head", "n_random": 2, "greedy": False},
    "probe": {"kind": "probe", "variable": "out_1", "layer": 1, "position": "="},
    "neuron_shift": {"kind": "neuron_shift"},
}


@pytest.mark.parametrize("kind", ANALYSES)
def test_the_cost_of_a_run_is_foretold(kind, spec, trained, recipe, runs):
    block = spec(analyses=[ANALYSES[kind]], figures=[], quantities={}, claims=[], answer="")
    block["examples"] = {
        "noisy": {"noisy": True, "n": 20},
        "clean": {"noisy": False, "n": 60},
    }
    names = {"patch_grid": ["noisy"]}.get(kind, ["noisy", "clean"])
    block["examples"] = {name: block["examples"][name] for name in names}
    if kind in ("ablation", "probe"):
        del block["checkpoints"]["before"]
    experiment = Experiment.model_validate(block)
    foretold = dry_run(experiment)[kind]
    made = TrainedRun(experiment, recipe, 0, runs, ProgressCallback(), {})
    (analysis,) = experiment.analyses
    analysis.run(made.session, experiment.sweep_domain(recipe))
    # Thirds of four examples are no thirds of sixty: the sets that a probe is tested on.
    tolerance = 0.1 if kind == "probe" else 0.02
    assert foretold == pytest.approx(made.session.n_forwarded, rel=tolerance)


def test_values_are_not_demanded_and_few_are_tried(examples):
    session = DryRun({}, models={}, example_sets={})
    session.demand(False, "an untrained model cannot know this")
    assert session.few(512, 8) == 8
    assert session.few(4, 8) == 4


def test_a_set_that_stands_for_a_larger_one_counts_as_that(model, examples):
    few = examples.select(slice(4)).as_set().with_name("noisy")
    session = DryRun({"noisy": 400}, models={"after": model}, example_sets={"noisy": few})
    session.baseline(model, few)
    session.baseline(model, few.with_prefix("true"))
    assert session.n_forwarded == 800
