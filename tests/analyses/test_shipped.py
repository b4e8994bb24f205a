"""Every analysis on every shipped training: no warning, no column that is not documented, no number
missing without a word.

Fields are given by their names, whatever kind they are of, so that a new kind is tried as soon as
it is registered.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
import torch

from mechmem.analyses.analysis import Analysis
from mechmem.analyses.neurons.grid import GridAnalysis
from mechmem.analyses.neurons.localisation import Localisation
from mechmem.api import load
from mechmem.data.example_set import ExampleSet
from mechmem.data.minimal_pair import MinimalPair
from mechmem.session import Session
from mechmem.spec.sweep import each
from mechmem.training.store import SHIPPED, Trained

VARIABLE = {"four_digit_addition": "carry_2", "two_hop_reasoning": "bridge"}
PAIR = {
    "four_digit_addition": MinimalPair(flip="carry_2"),
    "two_hop_reasoning": MinimalPair(flip="bridge", hold=("r2",)),
}
SAME = {
    "four_digit_addition": MinimalPair(flip="digit_sum_1", hold=("carry_2",)),
    "two_hop_reasoning": MinimalPair(flip="e", hold=("bridge", "r2")),
}
"""Pairs with another input and the same intermediate value."""
SMALL: Mapping[str, Any] = {
    "control": {"kind": "random_direction", "n": 2},
    "donors": "many",
    "exact": 3,
    "fit_on": "many",
    "fractions": (0.05, 0.2, 1),
    "head": each(),
    "methods": ("eap", "eap_ig", "exact"),
    "n_draws": 2,
    "n_random": 2,
    "n_steps": 20,
    "other_examples": "clean",
}
"""Values of fields that would cost much or leave something out by default, by the field's name."""
REQUIRED: Mapping[str, Any] = {
    "intervention": {"kind": "ablate", "site": "mlp_out", "layer": {"each": "all"}},
    "k": each(0, 4),
    "layer": each(0, (0, 1)),
    "norm": 1.0,
    "position": "=",
    "same": "same",
    "site": "z",
    "source": {"checkpoint": "before"},
}
"""Values of fields without a default."""
TOO_SLOW = {"neuron", "ablation"}
"""Words that are left out: one forward for each of 1,024 neurons."""
TWINS = {"fda_small": "fda_small_clean", "fda_small_clean": "fda_small"}
TRAININGS = sorted(path.parent.name for path in SHIPPED.glob("*/seed_0"))
N, MANY = 8, 200


def fields_of(kind: type[Analysis], task: str) -> dict[str, Any]:
    """The fields of a small analysis; for the rest, the defaults will do. Of several words, the
    first."""
    of_task = {"variable": VARIABLE[task], "erase": erased(task)}
    chosen: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        if name in SMALL:
            chosen[name] = SMALL[name]
        elif field.is_required():
            words = choices(field.annotation)
            chosen[name] = words[0] if words else (REQUIRED | of_task)[name]
        elif name == "layer" and "site" in kind.model_fields:
            chosen[name] = each(0, 1)
    return chosen


def erased(task: str) -> dict[str, Any]:
    at = {"kind": "erase", "site": "resid_pre", "layer": 1, "position": "="}
    return at | {"variable": VARIABLE[task], "fit_on": "many", "n_codes": 1}


def choices(annotation: Any) -> tuple[str, ...]:
    """The words that a field (or its sweep) chooses one of; none for a field of another type."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    parts = get_args(annotation) if get_origin(annotation) in (Annotated, Union) else ()
    return next((words for part in parts if (words := choices(part))), ())


def small(kind: type[Analysis], task: str) -> Iterator[Analysis]:
    """A small analysis, and others that differ in one swept field that chooses between words."""
    chosen = fields_of(kind, task)
    yield kind.model_validate(chosen)
    for name, field in kind.model_fields.items():
        if "Each" not in str(field.annotation) or name in SMALL:
            continue
        for word in choices(field.annotation):
            if word not in {chosen.get(name, field.default), *TOO_SLOW}:
                yield kind.model_validate(chosen | {name: word})


@functools.cache
def session_of(name: str) -> Session:
    """The last shipped checkpoint, or that at which the labels were memorised, and the one before
    memorisation; or the weights that training began with."""
    trained = load(name)
    after = last(trained)
    before = trained.phases.get("before")
    untrained = trained.recipe.build(trained.seed)
    twin = load(TWINS[name]) if name in TWINS else None
    models = {
        "after": trained.at(after),
        "before": trained.at(before) if before in trained.steps and before < after else untrained,
        "twin": twin.at(last(twin)) if twin else untrained,
    }
    has_noise = bool(trained.task.sample("train").is_noisy.any())
    pair, same = PAIR[trained.task.kind], SAME[trained.task.kind]
    noisy = ExampleSet(noisy=has_noise, n=N, pair=pair, also_pair=same, seed=1)
    sets = {
        "noisy": noisy,  # without noise, other clean ones
        "same": noisy.model_copy(update={"pair": same, "also_pair": pair}),
        "clean": ExampleSet(noisy=False, n=N, pair=pair),
        "many": ExampleSet(noisy=False, n=MANY),
        "held_out": ExampleSet(split="held_out", n=MANY),
    }
    if trained.task.kind == "four_digit_addition":  # some pair changes the digit of each place
        sets["pairs"] = ExampleSet(noisy=False, n=8 * N, pair=MinimalPair(flip="out_2"))
    return Session(
        models,
        {key: chosen.of(trained.task) for key, chosen in sets.items()},
        curves=trained.record["curves"],
        phases=trained.phases,
        chance=trained.task.chance,
        rule=trained.task.answers,
    )


def last(trained: Trained) -> int:
    """The step of `memorised`, if it is shipped, or else the last step that is."""
    memorised = trained.phases.get("memorised")
    return memorised if memorised in trained.steps else max(trained.steps)


def test_there_are_trainings_to_try():
    assert len(TRAININGS) >= 4


def is_about(kind: type[Analysis], training: str) -> bool:
    """Maps of neurons are of sums; neurons can only be located where some were planted."""
    if kind is Localisation:
        return False
    return not issubclass(kind, GridAnalysis) or load(training).task.kind == "four_digit_addition"


@pytest.mark.parametrize(
    ("kind", "training"),
    [pair for pair in product(Analysis.kinds().values(), TRAININGS) if is_about(*pair)],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_every_analysis_of_every_shipped_training(kind, training):
    for analysis in small(kind, load(training).task.kind):
        check_table(analysis, session_of(training))


def check_table(analysis: Analysis, session: Session) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    config = session.model("after").cfg
    sweep_domain = {
        "layer": range(config.n_layers),
        "head": range(config.n_heads),
        "position": tuple(session.examples("clean").positions),
    }
    with session.declaring(analysis.references()):
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
