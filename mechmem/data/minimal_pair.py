"""Minimal pairs: the variable that they change and those that they keep."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from mechmem.data.checks import repeated
from mechmem.spec.limits import Seed
from mechmem.spec.registry import Component


class MinimalPair(Component):
    """The variable that an example's minimal pair changes, and the variables that it keeps."""

    flip: str = Field(min_length=1)
    """The variable that must differ."""
    hold: tuple[str, ...] = ()
    """Variables that must stay the same."""
    seed: Seed = 0
    """Seed of the choice among several possible pairs."""

    @model_validator(mode="after")
    def _names_each_variable_once(self) -> Self:
        if self.flip in self.hold:
            raise ValueError(f"{self.flip!r} cannot both flip and hold; remove it from `hold`")
        twice = repeated(self.hold)
        if twice:
            raise ValueError(f"hold names {twice[0]!r} twice; name each variable once")
        return self
