"""Selections: types of fields that hold one value or several distinct ones, and are never empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Strict

T = TypeVar("T")


def distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    """The values, unchanged. Raises ValueError if there are none, or one is listed twice."""
    if not values:
        raise ValueError("nothing is chosen; name at least one, or leave the field out")
    if twice := repeated(values):
        raise ValueError(f"{twice[0]!r} is listed twice")
    return values


def repeated(values: Sequence[T]) -> list[T]:
    """The values that also occur earlier in the sequence."""
    return [value for i, value in enumerate(values) if value in values[:i]]


Index = Annotated[int, Strict()]
"""An integer; strings and booleans are refused."""
Indices = Index | Annotated[tuple[Index, ...], AfterValidator(distinct)]
"""One index or several."""
Units = Annotated[tuple[Index, ...], AfterValidator(distinct)]
"""Several indices of heads or neurons."""
Names = str | Annotated[tuple[str, ...], AfterValidator(distinct)]
"""One name or several."""
