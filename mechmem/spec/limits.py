"""Upper limits of numbers in a spec: far above every sensible study, and far below what never ends.

A field gets its limit by its type, such as `n_draws: Draws = 5`. Text and values of specs are
bounded in `bounded_yaml`.
"""

from __future__ import annotations

import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

from mechmem.spec.errors import InputError

T = TypeVar("T")

MOST_SEEDS = 1_000
MOST_CELLS = 10_000
"""Members of a sweep."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""The seed of a random generator: 0 to 2^63 - 1."""
Steps = Annotated[int, Field(ge=1, le=10_000_000)]
"""Steps of a training."""
Draws = Annotated[int, Field(ge=1, le=100_000)]
"""How often something random is drawn, or an integral is evaluated."""
Instances = Annotated[int, Field(ge=1, le=10_000_000)]
"""Examples, or instances of a task."""
Layers = Annotated[int, Field(ge=1, le=1_000)]
Heads = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=1_000_000)]
"""Neurons of a layer, or dimensions of an activation."""
Index = Annotated[int, Field(ge=0, le=1_000_000)]
"""A place in an activation, or a count of such places that may be 0."""


NAME = r"^[A-Za-z0-9_.-]+$"
Name = Annotated[str, Field(pattern=NAME, max_length=100)]
"""A name that is part of a file's name."""


def check_name(name: str, what: str) -> None:
    """Raises InputError unless this can be the name of a file. Patterns, paths and the empty name
    are no names.

    Args:
        name: as the user gave it.
        what: has the name, such as `training`.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name) or set(name) == {"."}:
        raise InputError(
            f"{name[:100]!r} is not the name of a {what}: names have letters, digits, '_', '-' and "
            "'.', and are no paths"
        )


def few_seeds(seeds: tuple[T, ...]) -> tuple[T, ...]:
    """The seeds, unchanged. Raises ValueError if there are more than MOST_SEEDS."""
    if len(seeds) > MOST_SEEDS:
        raise ValueError(f"{len(seeds):,} seeds are listed; at most {MOST_SEEDS:,}")
    return seeds


Seeds = Annotated[tuple[Seed, ...], AfterValidator(few_seeds)]
"""Seeds of the replications."""


def check_seed(seed: int) -> None:
    """Raises InputError for a seed outside of 0 to 2^63 - 1."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed {seed} must be at least 0 and less than 2^63")
