"""Example: one instance of a task, as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, repr=False)
class Example:
    """One row of a set of examples; its `repr` is a readable line."""

    index: int
    """Row in the set from which the example was selected."""
    prompt: str
    given: str
    true: str
    is_noisy: bool
    variables: Mapping[str, int]

    @property
    def text(self) -> str:
        """The prompt and the given label, as in `3 4 7 1 + 2 9 0 8 = 0 6 3 7 9`, followed by the
        true label if the given one is wrong."""
        return line(self.prompt, self.given, self.true)

    def __repr__(self) -> str:
        return self.text


def line(prompt: str, given: str, true: str) -> str:
    """One example in one line.

    Args:
        prompt: the words of the prompt.
        given: the words of the given label.
        true: the words of the true label; shown only if it differs from the given one.
    """
    return f"{prompt} {given}" + ("" if given == true else f"   (true: {true})")
