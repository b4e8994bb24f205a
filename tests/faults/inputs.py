"""Cases of input: specs, overrides, names, paths and arguments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from campaign import Case


def cases(seed: int) -> Iterator[Case]:
    """All cases of this module."""

    def fine(folder: Path) -> list[str]:
        return ["list"]

    yield Case("command: list", "command line", fine, must="pass")
