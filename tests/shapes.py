"""What pytest's `--jaxtyping-packages` checks with: beartype, on the stated tensor shapes and on
nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Other annotations are the type checker's: they may be `Self` or names that are imported for
    types only."""
    hints = function.__annotations__
    stated = {name for name, hint in hints.items() if "jaxtyping." in repr(hint)}
    if not stated:  # functions within functions are made often, and beartype takes its time
        return function
    function.__annotations__ = {
        name: hint if name in stated else Any for name, hint in hints.items()
    }
    return beartype(function)
