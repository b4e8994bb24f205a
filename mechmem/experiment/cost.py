"""Costs: what a training or an analysis will take, from one step or forward of its own size."""

from __future__ import annotations

import time
from typing import Any

import torch

from mechmem.models.fast import plain_logits
from mechmem.training.recipe import Recipe


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
