from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mechmem.data.label_noise import Digit
from mechmem.data.tasks.four_digit_addition import FourDigitAddition
from mechmem.models.architecture import Architecture
from mechmem.training.recipe import PHASES, Optimisation, Phase, Recipe

BASE = Recipe(task=FourDigitAddition(n_train=50))
LEFT_OUT = {"name", "optimisation.generalised", "optimisation.memorised", "optimisation.device"}
OTHER: dict[str, Any] = {
    "name": "another",
    "task": {"kind": "two_hop_reasoning"},
    "task.n_train": 51,
    "task.seed": 1,
    "task.answer_order": "least_significant_first",
    "task.noise": Digit(),
    "task.noise.rate": 0.06,
    "task.noise.seed": 1,
    "architecture.n_layers": 3,
    "architecture.d_model": 64,
    "architecture.n_heads": 8,
    "architecture.d_head": 16,
    "architecture.d_mlp": 100,
    "architecture.attn_only": True,
    "architecture.activation": "gelu",
    "architecture.norm": None,
    "architecture.init_std": 0.1,
    "optimisation.n_steps": 4001,
    "optimisation.batch_size": 501,
    "optimisation.learning_rate": 2e-3,
    "optimisation.betas": (0.9, 0.99),
    "optimisation.weight_decay": 0.1,
    "optimisation.n_warmup_steps": 0,
    "optimisation.schedule": "cosine",
    "optimisation.final_factor": 0.2,
    "optimisation.max_grad_norm": 2.0,
    "optimisation.evaluate_every": 50,
    "optimisation.n_evaluated": 1000,
    "optimisation.generalised": {"held_out": 0.5},
    "optimisation.memorised": {"memorised": 0.5},
    "optimisation.stop_at": {"memorised": 0.9},
    "optimisation.patience": 2,
    "optimisation.device": "cpu",
    "optimisation.noisy_share": 0.5,
    "true_labels": True,
    "start": {"training": {"task": {"kind": "four_digit_addition"}}},
    "trainable": {"last_layers": 1},
    "vary": ["weights"],
}
"""Another value for every field that a recipe has."""


def with_other(path: str) -> Recipe:
    block = BASE.block()
    *parents, last = path.split(".")
    node = block
    for part in parents:
        node = node[part]
    node[last] = OTHER[path]
    return Recipe.model_validate(block)


def test_every_field_is_asked_about():
    fields = {f"architecture.{name}" for name in Architecture.model_fields}
    fields |= set(Recipe.model_fields) - {"task", "architecture", "optimisation", "plant"}
    fields |= {f"optimisation.{name}" for name in Optimisation.model_fields}
    assert fields <= OTHER.keys()


@pytest.mark.parametrize("path", OTHER)
def test_the_recipe_hash_changes_with_what_decides_the_weights_and_with_nothing_else(path):
    other = with_other(path)
    assert other != BASE
    assert (other.recipe_hash == BASE.recipe_hash) == (path in LEFT_OUT)


def test_the_recipe_hash_is_the_same_however_the_recipe_was_written():
    again = Recipe.model_validate(
        {
            "task": {"n_train": 50, "kind": "four_digit_addition"},
            "optimisation": {"betas": [0.9, 0.98]},
        }
    )
    assert again.recipe_hash == BASE.recipe_hash


@pytest.mark.parametrize(
    ("fields", "factors"),
    [
        ({"n_warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 99: 1}),
        ({"n_warmup_steps": 0}, {0: 1, 99: 1}),
        (
            {"schedule": "linear", "n_warmup_steps": 0, "final_factor": 0.1},
            {0: 1, 50: 0.55, 75: 0.325, 100: 0.1},
        ),
        (
            {"schedule": "cosine", "n_warmup_steps": 0, "final_factor": 0.2},
            {0: 1, 25: 0.8828427, 50: 0.6, 100: 0.2},
        ),
        (
            {"schedule": "linear", "n_warmup_steps": 50, "final_factor": 0.0},
            {0: 0.02, 24: 0.38, 49: 0.51, 80: 0.2},
        ),
        ({"schedule": "constant", "n_warmup_steps": 0, "final_factor": 0.5}, {0: 1, 99: 1}),
    ],
)
def test_schedule_by_hand(fields, factors):
    optimisation = Optimisation(n_steps=100, **fields)
    assert {step: optimisation.schedule_factor(step) for step in factors} == pytest.approx(factors)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    n_warmup=st.integers(0, 30),
    final=st.floats(0, 1),
    step=st.integers(0, 98),
)
def test_the_learning_rate_rises_in_the_warm_up_and_never_after_it(schedule, n_warmup, final, step):
    optimisation = Optimisation(
        n_steps=100, schedule=schedule, n_warmup_steps=n_warmup, final_factor=final
    )
    now, then = optimisation.schedule_factor(step), optimisation.schedule_factor(step + 1)
    assert 0 < now <= 1
    assert (schedule != "constant" or now <= then) if step + 1 < n_warmup else then <= now + 1e-12


def curve(*rows: tuple[float, float, float], every: int = 100) -> list[dict[str, Any]]:
    """Curves from (held_out, corrected, memorised)."""
    names = ("held_out", "corrected", "memorised")
    return [{"step": every * i} | dict(zip(names, row, strict=True)) for i, row in enumerate(rows)]


PHASED = Optimisation(
    generalised=Phase(held_out=0.9, corrected=0.8), memorised=Phase(memorised=0.95)
)


@pytest.mark.parametrize(
    ("rows", "before", "generalised", "memorised"),
    [
        # the rule first, the memory later
        ([(0, 0, 0), (0.9, 0.8, 0.1), (0.95, 0.2, 0.7), (0.94, 0.0, 0.95)], 100, 100, 300),
        # never generalised: each of the two conditions alone is not enough
        ([(0, 0, 0), (0.95, 0.7, 0.1), (0.5, 0.9, 0.3), (0.2, 0.0, 1.0)], 200, None, 300),
        # never memorised
        ([(0, 0, 0), (1, 1, 0), (1, 1, 0.94)], 100, 100, None),
        # the memory first
        ([(0, 0, 0), (0.1, 0, 0.96), (0.9, 0.8, 0.9)], 200, 200, 100),
        # a phase that is lost again was there
        ([(0, 0, 0), (0.9, 0.9, 0), (0, 0, 0.99), (0, 0, 0)], 100, 100, 200),
        # nothing at all
        ([(0, 0, 0)], None, None, None),
        # at once
        ([(0.9, 0.8, 0.95), (0, 0, 0)], 0, 0, 0),
    ],
)
def test_phases_are_read_off_the_curves(rows, before, generalised, memorised):
    found = PHASED.phases(curve(*rows))
    assert found == {
        "initial": 0,
        "before": before,
        "generalised": generalised,
        "memorised": memorised,
        "final": 100 * (len(rows) - 1),
    }
    assert tuple(found) == PHASES


def test_a_phase_can_ask_that_nothing_is_memorised_yet():
    optimisation = Optimisation(generalised=Phase(held_out=0.9, memorised_at_most=0.05))
    assert (
        optimisation.phases(curve((0.95, 1, 0.06), (0.9, 1, 0.05), (1, 1, 0)))["generalised"] == 100
    )


@pytest.mark.parametrize("name", ["held_out", "corrected", "memorised", "memorised_at_most"])
def test_every_threshold_of_a_phase_counts(name):
    row = {"held_out": 0.5, "corrected": 0.5, "memorised": 0.5}
    worse = {"memorised_at_most": 0.49}.get(name, 0.51)
    assert Phase(**{name: 0.5}).is_met(row)
    assert not Phase(**{name: worse}).is_met(row)


@pytest.mark.parametrize(
    ("step", "is_kept"),
    [(0, True), (100, True), (150, False), (200, True), (250, True), (300, False), (249, False)],
)
def test_checkpoints_are_kept_at_evaluations_and_at_the_end(step, is_kept):
    assert Optimisation(n_steps=250, evaluate_every=100).keeps(step) is is_kept


@pytest.mark.parametrize("name", ["", "a/b", "a b", "../a"])
def test_a_name_is_a_file_name(name):
    with pytest.raises(ValidationError):
        Recipe(name=name, task=BASE.task)
