"""What pytest's `--jaxtyping-packages` checks with: beartype, on the stated tensor shapes and on
nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Other annotations are the type checker's: they may be `Self` or names that are imported for
    types only."""
    stated = function.__annotations__.items()
    function.__annotations__ = {
        name: hint if "jaxtyping." in repr(hint) else Any for name, hint in stated
    }
    return beartype(function)
