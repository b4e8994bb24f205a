"""Costs: what a training or an analysis will take, from one step or forward of its own size."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import torch

from mechmem.models.fast import plain_logits
from mechmem.training.fetch import how_to_get
from mechmem.training.recipe import Recipe
from mechmem.training.store import shipped_name


def seconds_per_example(recipe: Recipe) -> float:
    """Seconds that an example takes to go through the model (the first one of a sweep)."""
    _, cell = recipe.expand({})[0]
    examples, model = cell.task.sample("held_out"), cell.build(0)
    tokens = examples.tokens[:500]
    with torch.no_grad():
        # The first one pays for what later ones find ready.
        plain_logits(model, tokens, examples.n_answer)
        start = time.monotonic()
        plain_logits(model, tokens, examples.n_answer)
    return (time.monotonic() - start) / len(tokens)


def cost_of_training(recipe: Recipe) -> dict[str, Any]:
    """Parameters, instances, steps and minutes of a training, with its hash."""
    examples = recipe.task.training_set()
    size = min(recipe.optimisation.batch_size, len(examples))
    model, start = recipe.build(0), time.monotonic()
    plain_logits(model, examples.tokens[:size], examples.n_answer).sum().backward()
    seconds = time.monotonic() - start
    return {
        "recipe_hash": recipe.recipe_hash,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_instances": len(examples),
        "steps": recipe.optimisation.n_steps,
        "minutes": round(seconds * recipe.optimisation.n_steps / 60, 1),
    }


def training_costs(missing: Mapping[str, tuple[Recipe, int]]) -> list[dict[str, Any]]:
    """The minutes of each training that has to be made.

    Args:
        missing: recipe and seed of each, by its label.
    """
    recipes = {recipe for recipe, _ in missing.values()}
    minutes = {recipe: cost_of_training(recipe)["minutes"] for recipe in recipes}
    return [
        {"training": label, "minutes": minutes[recipe]} for label, (recipe, _) in missing.items()
    ]


def fetch_or_train(missing: Collection[tuple[Recipe, int]]) -> list[str]:
    """A line for each shipped training of which seeds are not installed: how to fetch them, and
    what training them would take.

    Args:
        missing: recipe and seed of each training that is not here.
    """
    lines = []
    for name, command in how_to_get(missing).items():
        of_name = [recipe for recipe, _ in missing if shipped_name(recipe) == name]
        minutes = len(of_name) * cost_of_training(of_name[0])["minutes"]
        lines.append(
            f"{name}: seeds are not installed; fetch them with `{command}`, or they are trained "
            f"(about {minutes:.0f} min)"
        )
    return lines
