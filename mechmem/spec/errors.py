"""Errors in what the user wrote: one line that says what is wrong, where, and what to write."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic_core import InitErrorDetails, PydanticCustomError

from mechmem.spec.retired import replaced_value, replacement


class InputError(ValueError):
    """Something in the user's input is wrong; the message says what, where and what to write."""


class BlockError(InputError):
    """A block of the spec (an analysis, a quantity, a figure) asks for something impossible."""

    def __init__(self, loc: tuple[str | int, ...], text: str) -> None:
        super().__init__(text if loc[0] == "analyses" else f"{'.'.join(map(str, loc))}: {text}")
        self.loc, self.text = loc, text


def format_error(error: Any) -> str:
    """The message of one of pydantic's errors, without the prefix that pydantic adds to ours."""
    if error["type"] == "missing":
        return f"{error['loc'][-1]!r} is missing"
    if error["type"] == "too_short":
        # Pydantic counts in the words of its types: "Tuple should have at least 1 item after ..."
        return error["msg"].partition(" after")[0].replace("Tuple should have", "a list needs")
    return error["msg"].removeprefix("Value error, ")


def suggest(name: object, names: Iterable[str]) -> str:
    """The end of an error about an unknown name: its new name if it is a retired one, else the most
    similar known name, else all of them."""
    known = [str(n) for n in names]
    if new := replacement(name, known):
        return f"{str(name)!r} is now {new!r}"
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"choose from {', '.join(known)}" if known else "there are none"


def suggest_value(value: object, values: Iterable[str]) -> str:
    """`suggest` for a value of a table's column; a retired one is named even where no row has the
    new one."""
    if new := replaced_value(value):
        return f"{str(value)!r} is now {new!r}"
    return suggest(value, values)


def error_details(
    kind: str, message: str, loc: tuple[int | str, ...], value: Any
) -> InitErrorDetails:
    """One error of a `ValidationError`.

    Args:
        kind: pydantic's type of the error; any snake_case word.
        message: shown as it is.
        loc: keys and indices from the component down to the wrong value.
        value: the wrong value.
    """
    return InitErrorDetails(type=custom_error(kind, message), loc=loc, input=value)


def custom_error(kind: Any, message: Any) -> PydanticCustomError:
    """An error whose message is shown as it is; with a context, pydantic would fill in braces."""
    return PydanticCustomError(kind, message)
