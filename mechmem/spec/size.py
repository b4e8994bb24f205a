"""Sizes in bytes, written as `2 GiB`, `512 MiB` or a number of bytes."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

UNITS = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def n_bytes(size: Any) -> Any:
    """The number of bytes of a size such as `2 GiB`; anything but a string is returned
    unchanged."""
    if not isinstance(size, str):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?\s*", size, re.IGNORECASE)
    if found is None:
        raise ValueError(f"{size!r} is not a size; write 2 GiB, 512 MiB or a number of bytes")
    number, unit = found.groups("")
    return int(float(number) * UNITS[unit.upper()])


Size = Annotated[int, Field(gt=0), BeforeValidator(n_bytes, json_schema_input_type=int | str)]
"""A number of bytes, larger than zero; `2 GiB` or `512 MiB` in a spec."""
