"""What pytest's `--jaxtyping-packages` checks with: beartype, on the stated tensor shapes and on
nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import isfunction
from typing import Any

import jaxtyping
from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Other annotations are the type checker's: they may be `Self` or names that are imported for
    types only."""
    stated = function.__annotations__.items()
    function.__annotations__ = {
        name: hint if "jaxtyping." in repr(hint) else Any for name, hint in stated
    }
    return beartype(function)


_plain = jaxtyping.jaxtyped


def _jaxtyped(function: Any = None, **options: Any) -> Any:
    """jaxtyping's decorator, which leaves functions without shapes as they are.

    It would wrap each of them, and functions within functions at every call, which takes longer
    than the tests themselves.
    """
    if function is None:
        return lambda decorated: _jaxtyped(decorated, **options)
    is_skipped = isfunction(function) and not _states_shapes(function)
    return function if is_skipped else _plain(function, **options)


def _states_shapes(function: Any) -> bool:
    """Whether an annotation has a shape, by itself or by the name of a type of its module."""
    words = re.findall(r"\w+", " ".join(map(str, function.__annotations__.values())))
    found = [function.__globals__.get(word) for word in words]
    return any("jaxtyping." in repr(value) for value in found)


jaxtyping.jaxtyped = _jaxtyped  # the decorator that the import hook writes into the package
