"""Every analysis on every shipped training: no warning, no column that is not documented, no number
missing unsaid.

A new kind of analysis needs a line in `SMALL`.
"""

from __future__ import annotations

import functools
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from mechmem.analyses.analysis import Analysis
from mechmem.api import load
from mechmem.data.example_set import ExampleSet
from mechmem.data.minimal_pair import MinimalPair
from mechmem.session import Session
from mechmem.training.store import SHIPPED

VARIABLE = {"four_digit_addition": "carry_2", "two_hop_reasoning": "bridge"}
"""As the value of a field: the task's own variable."""
PAIR = {
    "four_digit_addition": MinimalPair(flip="carry_2"),
    "two_hop_reasoning": MinimalPair(flip="bridge", hold=("r2",)),
}
BEFORE = {"checkpoint": "before"}
EVERY_DIGIT = ("out_0", "out_1", "out_2", "out_3")
"""Sets of pairs, each of which changes one digit of a sum."""
ERASED = {
    "kind": "erase",
    "site": "resid_pre",
    "layer": 1,
    "position": "=",
    "variable": VARIABLE,
    "fit_on": "many",
}
ERASED |= {"n_codes": 1}
SMALL: dict[str, dict[str, Any]] = {
    "ablation": {
        "component": {"each": ["head", "layer"]},
        "ranked_on": "many",
        "n_random": 2,
        "k": [1],
    },
    "activation_map": {"pairs": EVERY_DIGIT, "k": 2},
    "attribution": {"exact": 3},
    "circuit": {
        "method": {"each": ["eap", "eap_ig", "exact"]},
        "fractions": [0.05, 0.2, 1],
        "n_random": 2,
    },
    "circuit_overlap": {"other_examples": "clean", "fractions": [0.05, 0.2, 1], "n_random": 2},
    "concentration": {},
    "token_replacement": {"layer": {"each": [0, 1]}, "donors": "many", "n_draws": 2},
    "dynamics": {},
    "edge_scores": {"methods": ["eap", "eap_ig", "exact"]},
    "erasure": {"erase": ERASED, "n_draws": 2},
    "heuristic_types": {"layer": {"each": [0, [0, 1]]}, "k": 16},
    "heuristics": {"examples": "many", "pairs": EVERY_DIGIT},
    "intervene": {"intervention": {"kind": "ablate", "site": "mlp_out", "layer": {"each": "all"}}},
    "logit_lens": {},
    "map_similarity": {"examples": "many"},
    "neuron_shift": {},
    "neuron_top_k": {"layer": {"each": [0, [0, 1]]}, "k": {"each": [0, 4]}, "n_random": 2},
    "patch_grid": {
        "site": "z",
        "layer": 1,
        "head": {"each": "all"},
        "source": BEFORE,
        "control": "random_direction",
    },
    "probe": {"variable": VARIABLE, "layer": {"each": [0, 2]}, "position": "=", "fit_on": "many"},
    "tuned_lens": {"fit_on": "many", "n_steps": 20},
    "cross_model_swap": {
        "component": {"each": ["attn", "mlp"]},
        "method": {"each": ["weights", "activations"]},
    },
}
"""The fields of a small analysis of each kind, beside their defaults; `noisy`, `clean`
and `many` (clean ones too), `before`, `after` and `twin`
are there by name, and swept fields may be `{each: ...}`."""
ADDITION_ONLY = frozenset({"activation_map", "heuristic_types", "heuristics", "map_similarity"})
"""Kinds that ask about addition."""
TWINS = {"fda_small": "fda_small_clean", "fda_small_clean": "fda_small"}
TRAININGS = sorted(path.name for path in SHIPPED.iterdir())
N, MANY = 8, 200


@functools.cache
def bench_of(name: str) -> Session:
    """The last of the phases that are shipped and, before it, the first; or the weights that
    training began with."""
    trained = load(name)
    at = {phase: step for phase, step in trained.phases.items() if step in trained.steps}
    untrained = trained.recipe.build(trained.seed)
    models = {
        "after": trained.at("memorised" if "memorised" in at else "final"),
        "before": trained.at("generalised") if "generalised" in at else untrained,
        "twin": load(TWINS[name]).at("final") if name in TWINS else untrained,
    }
    has_noise = bool(trained.task.sample("train").is_noisy.any())
    pair = PAIR[trained.task.kind]
    sets = {
        "noisy": ExampleSet(
            noisy=has_noise, n=N, pair=pair, seed=1
        ),  # without noise, other clean ones
        "clean": ExampleSet(noisy=False, n=N, pair=pair),
        "many": ExampleSet(noisy=False, n=MANY),
    }
    if trained.task.kind == "four_digit_addition":
        sets |= {
            digit: ExampleSet(noisy=False, n=N, pair=MinimalPair(flip=digit))
            for digit in EVERY_DIGIT
        }
    return Session(
        models,
        {key: chosen.of(trained.task) for key, chosen in sets.items()},
        curves=trained.record["curves"],
        phases=trained.phases,
        chance=trained.task.chance,
        rule=trained.task.answers,
    )


def filled(value: Any, task: str) -> Any:
    if value is VARIABLE:
        return VARIABLE[task]
    return (
        {name: filled(part, task) for name, part in value.items()}
        if isinstance(value, dict)
        else value
    )


def small(kind: str, task: str) -> Analysis:
    fields = {name: filled(value, task) for name, value in SMALL[kind].items()}
    return Analysis.model_validate({"kind": kind} | fields)


def test_every_kind_is_tried():
    assert sorted(SMALL) == sorted(Analysis.kinds())
    assert len(TRAININGS) >= 4


def is_about(kind: str, training: str) -> bool:
    return kind not in ADDITION_ONLY or load(training).task.kind == "four_digit_addition"


@pytest.mark.parametrize(
    ("kind", "training"), [pair for pair in product(sorted(SMALL), TRAININGS) if is_about(*pair)]
)
def test_every_analysis_of_every_shipped_training(kind, training):
    task = load(training).task.kind
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    analysis, session = small(kind, task), bench_of(training)
    sweep_domain = {
        "layer": range(3),
        "head": range(4),
        "position": tuple(session.examples("clean").positions),
    }
    table = analysis.run(session, sweep_domain)
    swept = {name for labels, _ in analysis.expand(sweep_domain) for name in labels}
    if "value" in table and may_be_missing(analysis.columns["value"]):
        table = table[table["value"].notna()]  # without a value, there is no interval
    assert len(table)
    assert set(table) - swept <= set(analysis.columns) <= set(table)
    assert [
        c
        for c in analysis.columns
        if table[c].isna().any() and not may_be_missing(analysis.columns[c])
    ] == []
    if "per_example" in table:
        assert all(np.isfinite(values).all() for values in table["per_example"])
    assert torch.equal(before, torch.random.get_rng_state())


def may_be_missing(description: str) -> bool:
    return "undefined" in description or "empty" in description
