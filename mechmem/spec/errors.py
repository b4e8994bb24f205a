"""Errors in the user's input: one line on what is wrong, where, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic_core import InitErrorDetails, PydanticCustomError

from mechmem.spec.retired import replaced_value, replacement

MOST_LISTED = 30
"""Known names that an error lists."""


class InputError(ValueError):
    """An error in the user's input; the message explains what is wrong, where, and what to write
    instead."""


class BlockError(InputError):
    """A block of the spec (an analysis, a quantity, a figure) that cannot be computed.

    Args:
        loc: keys and indices from the top of the spec down to the block.
        text: the reason.
    """

    def __init__(self, loc: tuple[str | int, ...], text: str) -> None:
        super().__init__(text if loc[0] == "analyses" else f"{'.'.join(map(str, loc))}: {text}")
        self.loc, self.text = loc, text


def format_error(error: Any) -> str:
    """The message of a pydantic error, without the prefix that pydantic adds to ours."""
    if error["type"] == "missing":
        return f"{error['loc'][-1]!r} is missing"
    if error["type"] == "too_short":
        # Pydantic names its own types: "Tuple should have at least 1 item after ..."
        return error["msg"].partition(" after")[0].replace("Tuple should have", "a list needs")
    return error["msg"].removeprefix("Value error, ")


def suggest(name: object, names: Iterable[str]) -> str:
    """The end of an error about an unknown name: its new name if it is a retired one, otherwise the
    most similar known name, otherwise all known names."""
    known = [str(n) for n in names]
    if new := replacement(name, known):
        return f"{str(name)!r} is now {new!r}"
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    if len(known) > MOST_LISTED:
        return f"choose from {', '.join(known[:MOST_LISTED])}, ... ({len(known)} in all)"
    return f"choose from {', '.join(known)}" if known else "there are none"


def suggest_value(value: object, values: Iterable[str]) -> str:
    """`suggest` for a value of a table's column; the new name of a retired value is given even if
    no row has it."""
    if new := replaced_value(value):
        return f"{str(value)!r} is now {new!r}"
    return suggest(value, values)


def error_details(
    kind: str, message: str, loc: tuple[int | str, ...], value: Any
) -> InitErrorDetails:
    """One error of a `ValidationError`.

    Args:
        kind: type of the error, as in pydantic; any snake_case word.
        message: the message, which is shown unchanged.
        loc: keys and indices from the component down to the wrong value.
        value: the wrong value.
    """
    return InitErrorDetails(type=custom_error(kind, message), loc=loc, input=value)


def custom_error(kind: Any, message: Any) -> PydanticCustomError:
    """An error whose message is shown unchanged: without a context, pydantic does not format
    braces."""
    return PydanticCustomError(kind, message)
