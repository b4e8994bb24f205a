"""Errors: what the user wrote cannot be, in one line with what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic_core import InitErrorDetails, PydanticCustomError


class InputError(ValueError):
    """What the user wrote cannot be: says what, where it is known, and what instead."""


def format_error(error: Any) -> str:
    """What one of pydantic's errors says, without pydantic's own words before ours."""
    if error["type"] == "missing":
        return f"{error['loc'][-1]!r} is missing"
    return error["msg"].removeprefix("Value error, ")


def suggest(name: object, names: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest name, else the list of them."""
    known = [str(n) for n in names]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known) or 'none'}"


def error_details(
    kind: str, message: str, loc: tuple[int | str, ...], value: Any
) -> InitErrorDetails:
    return InitErrorDetails(type=custom_error(kind, message), loc=loc, input=value)


def custom_error(kind: Any, message: Any) -> PydanticCustomError:
    """An error whose message is shown as it is: without a context, pydantic treats no text as a
    template."""
    return PydanticCustomError(kind, message)
