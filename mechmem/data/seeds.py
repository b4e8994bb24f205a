"""Seeds: what differs between the replications of a training."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

import numpy as np

from mechmem.data.label_noise import LabelNoise
from mechmem.data.tasks.task import Task

Part = Literal["task", "noise", "weights", "batches"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Everything random in a training: the instances and their split (or the world), the wrong labels,
the initial weights, and the order of the batches."""


def derived(seed: int, part: Part, own: int = 0) -> int:
    """The seed of one part of a replication.

    All parts of a replication come from one `SeedSequence`, so that they are independent of each
    other and of every other replication. Seed 0 is the draw as it is written in the recipe.

    Args:
        seed: of the replication.
        part: what is drawn.
        own: seed of this part as written in the recipe.
    """
    if seed == 0:
        return own
    sequence = np.random.SeedSequence([seed, own], spawn_key=(PARTS.index(part),))
    return int(sequence.generate_state(1)[0])


def seeded(task: Task, seed: int, vary: Collection[Part] = PARTS) -> Task:
    """The task as one replication draws it.

    Args:
        task: as written in the recipe. A task without the fields `seed` or `noise` keeps its own.
        seed: of the replication.
        vary: the parts that differ between replications.
    """
    changes = {}
    noise = getattr(task, "noise", None)
    if "task" in vary and "seed" in type(task).model_fields:
        changes["seed"] = derived(seed, "task", task.seed)  # ty: ignore[missing-attribute]
    if "noise" in vary and isinstance(noise, LabelNoise):
        changes["noise"] = noise.model_copy(update={"seed": derived(seed, "noise", noise.seed)})
    return task.model_copy(update=changes)
